"""Stage 5: images as PNG and JPEG files in memory.

Nothing here knows what the images show, or where they will stand.
"""

from io import BytesIO

import torch
from PIL import Image
from torch import Tensor


def png(image: Tensor) -> bytes:
    """Encode an image without loss, for drawings such as concept cards.

    Args:
        image: `(3, H, W)` floats in `[0, 1]`; what lies outside is clamped, NaN is black.

    Returns:
        The bytes of a PNG file; the same for the same image.
    """
    file = BytesIO()
    _picture(image).save(file, format="PNG", optimize=True)
    return file.getvalue()


def jpeg(image: Tensor, quality: int = 80) -> bytes:
    """Encode an image with loss but in fewer bytes, for photographs.

    Args:
        image: `(3, H, W)` floats in `[0, 1]`; what lies outside is clamped, NaN is black.
        quality: Between 1 and 95; more looks better and takes more bytes.

    Returns:
        The bytes of a JPEG file; the same for the same image.
    """
    file = BytesIO()
    _picture(image).save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()


def _picture(image: Tensor) -> Image.Image:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape or not image.is_floating_point():
        raise ValueError(
            f"picture of shape {tuple(image.shape)} and {image.dtype}: expected (3, H, W) floats "
            "in [0, 1] with H, W >= 1"
        )
    pixels = image.detach().to("cpu", torch.float32).nan_to_num(nan=0.0).clamp(0.0, 1.0)
    return Image.fromarray((255 * pixels).round().to(torch.uint8).permute(1, 2, 0).numpy())
