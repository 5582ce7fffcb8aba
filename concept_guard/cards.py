"""Stage 5: draw a concept as a sheet of probe images with its location marked, or one image.

Nothing here knows about TensorBoard, the model, or how the images were chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TILES = 8  # images on a card
TILE_PIXELS = 96  # long side of one image on the card
PICTURE_PIXELS = 224  # long side of an image that is shown alone
_FRAME, _GAP = 3, 4  # pixels
_PAPER = 1.0
_RIGHT, _WRONG, _OUTLINE = (0.8, 0.8, 0.8), (0.9, 0.1, 0.1), (1.0, 0.85, 0.0)
_INSIDE = 0.5  # from this map value on a pixel counts as the concept's location
_DIMMED = 0.35  # brightness that is left where the concept is absent


@dataclass(frozen=True, eq=False)
class Card:
    """What a concept card shows.

    Attributes:
        images: `(n, 3, H, W)` the probe images that show the concept best, in `[0, 1]`, best
            first; a card draws the first eight.
        maps: `(n, h, w)` how strongly the concept is present at each place, in `[0, 1]`; the
            place is drawn where the map reaches one half. A `1 x 1` map has no place to draw.
        wrong: Whether each image is misclassified, for the colour of its frame; empty if unknown.

    Raises:
        ValueError: If the shapes do not belong together, or there is no image.
    """

    images: Tensor
    maps: Tensor
    wrong: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        images, maps, wrong = tuple(self.images.shape), tuple(self.maps.shape), len(self.wrong)
        if (
            len(images) != 4
            or images[1] != 3
            or 0 in images + maps
            or len(maps) != 3
            or maps[0] != images[0]
            or wrong not in {0, images[0]}
        ):
            raise ValueError(
                f"card with images {images}, maps {maps} and {wrong} marks of wrong images: "
                "expected images (n, 3, H, W) with n >= 1, maps (n, h, w), and n marks or none. "
                "Leave out the concept if it has no image."
            )


def displayable(images: Tensor) -> Tensor:
    """Bring normalised network input into the range and the channels that a card needs.

    The whole batch shares one shift and one scale, so that images stay comparable; which
    normalisation the loader used need not be known.

    Args:
        images: `(n, C, H, W)` images with 1 or 3 channels (of more, the first is shown).

    Returns:
        `(n, 3, H, W)` float32 on the CPU, in `[0, 1]`.
    """
    pixels = images.detach().to("cpu", torch.float32).nan_to_num(posinf=0.0, neginf=0.0)
    if pixels.shape[1] != 3:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    low, high = pixels.aminmax()
    return (pixels - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)


def card_image(card: Card) -> Tensor:
    """Draw the card: a row of images and, below each, the same image with the concept marked.

    In the lower row everything outside the concept's location is dark and grey, and a yellow
    line runs around it. Misclassified images have a red frame.

    Args:
        card: What to draw.

    Returns:
        `(3, height, width)` float32 in `[0, 1]`, at most 852 pixels wide.
    """
    images = _sized(card.images[:TILES].detach().to("cpu", torch.float32), TILE_PIXELS)
    maps = card.maps[:TILES].detach().to("cpu", torch.float32)
    rows = [images]
    if maps[0].numel() > 1:
        rows.append(_marked(images, maps))
    wrong = card.wrong[:TILES] or (False,) * len(images)
    strips = [_strip(_framed(row, wrong)) for row in rows]
    sheet = torch.cat(strips, dim=1)
    return functional.pad(sheet, (_GAP, 0, _GAP, 0), value=_PAPER)


def picture(image: Tensor) -> Tensor:
    """Return one image in the size in which it is shown alone.

    Args:
        image: `(3, H, W)` in `[0, 1]`.

    Returns:
        `(3, h, w)` float32 in `[0, 1]`, at most 224 pixels wide and high.
    """
    return _sized(image[None].detach().to("cpu", torch.float32), PICTURE_PIXELS)[0]


def marked_picture(image: Tensor, place: Tensor) -> Tensor:
    """Return one image with a place in it marked as on a card.

    Args:
        image: `(3, H, W)` in `[0, 1]`.
        place: `(h, w)` in `[0, 1]`; the place is where it reaches one half.

    Returns:
        As `picture`: dark and grey outside the place, with a yellow line around it.
    """
    return _marked(picture(image)[None], place[None].detach().to("cpu", torch.float32))[0]


def _sized(images: Tensor, pixels: int) -> Tensor:
    """Return images with this long side: in whole pixels if tiny, smoothly scaled otherwise."""
    images = images.nan_to_num().clamp(0.0, 1.0)
    height, width = images.shape[-2:]
    longest = max(height, width)
    if longest <= pixels:
        return functional.interpolate(images, scale_factor=pixels // longest, mode="nearest")
    size = [max(1, round(side * pixels / longest)) for side in (height, width)]
    return functional.interpolate(images, size=size, mode="bilinear", antialias=True)


def _marked(images: Tensor, maps: Tensor) -> Tensor:
    """Return `(n, 3, H, W)` images, dark where the `(n, h, w)` maps are low, the rest outlined."""
    size = images.shape[-2:]
    maps = maps.nan_to_num().clamp(0.0, 1.0)[:, None]
    maps = functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    shown = (maps / _INSIDE).clamp(max=1.0)
    grey = _DIMMED * images.mean(dim=1, keepdim=True)
    inside = (maps >= _INSIDE).to(images.dtype)
    outline = functional.max_pool2d(inside, 5, stride=1, padding=2) > inside
    colour = torch.tensor(_OUTLINE).view(1, 3, 1, 1)
    return torch.where(outline, colour, grey + shown * (images - grey))


def _framed(images: Tensor, wrong: tuple[bool, ...]) -> Tensor:
    """Return the images with a frame around each, red where it is misclassified."""
    count, _, height, width = images.shape
    colours = torch.tensor([_WRONG if is_wrong else _RIGHT for is_wrong in wrong])
    framed = colours[:, :, None, None].repeat(1, 1, height + 2 * _FRAME, width + 2 * _FRAME)
    framed[:, :, _FRAME : _FRAME + height, _FRAME : _FRAME + width] = images[:count]
    return framed


def _strip(tiles: Tensor) -> Tensor:
    """Return `(n, 3, h, w)` tiles side by side, with a gap to the right and below of each."""
    tiles = functional.pad(tiles, (0, _GAP, 0, _GAP), value=_PAPER)
    return torch.cat(tuple(tiles), dim=2)
