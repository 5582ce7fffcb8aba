"""Stage 5: draw a concept as a sheet of probe images with its location marked, or one image.

Nothing here knows about TensorBoard, the model, or how the images were chosen.
"""

from dataclasses import dataclass
from io import BytesIO

import torch
from PIL import Image, ImageDraw, ImageFont
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
_TEXT, _LINE, _MOST_LETTERS = 13, 20, 110  # pixels; a caption fits the width of eight images
_QUALITIES = (80, 50, 25, 10)  # of a JPEG; the first that is small enough is taken


@dataclass(frozen=True, eq=False)
class Card:
    """What a concept card shows.

    Attributes:
        images: `(n, 3, H, W)` the probe images that show the concept best, in `[0, 1]`, best
            first; a card draws the first eight.
        maps: `(n, h, w)` how strongly the concept is present at each place, in `[0, 1]`; the
            place is drawn where the map reaches one half. A `1 x 1` map has no place to draw.
        wrong: Whether each image is misclassified, for the colour of its frame; empty if unknown.
        errors: `(m, 3, h, w)` misclassified probe images that the concept drives, in `[0, 1]`; a
            card draws the first eight. None where there are none to show.
        of: Probe indices of the images; empty if unknown.
        of_errors: Probe indices of the errors.

    Raises:
        ValueError: If the shapes do not belong together, or there is no image.
    """

    images: Tensor
    maps: Tensor
    wrong: tuple[bool, ...] = ()
    errors: Tensor | None = None
    of: tuple[int, ...] = ()
    of_errors: tuple[int, ...] = ()

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
        if self.errors is not None and (self.errors.ndim != 4 or 0 in self.errors.shape):
            raise ValueError(
                f"card with errors {tuple(self.errors.shape)}: expected images (m, 3, H, W) with "
                "m >= 1. Leave them out if there are none."
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


def card_image(card: Card, caption: str = "") -> Tensor:
    """Draw the card: a row of images and, below each, the same image with the concept marked.

    In the second row everything outside the concept's location is dark and grey, and a yellow
    line runs around it. Misclassified images have a red frame. Below stand errors that the
    concept drives.

    Args:
        card: What to draw.
        caption: One line above; empty for none.

    Returns:
        `(3, height, width)` float32 in `[0, 1]`, at most 852 pixels wide.
    """
    images = _sized(card.images[:TILES].detach().to("cpu", torch.float32), TILE_PIXELS)
    maps = card.maps[:TILES].detach().to("cpu", torch.float32)
    rows = [images]
    if maps[0].numel() > 1:
        rows.append(_marked(images, maps))
    wrong = card.wrong[:TILES] or (False,) * len(images)
    parts = [_strip(_framed(row, wrong)) for row in rows]
    if card.errors is not None:
        errors = _sized(card.errors[:TILES].detach().to("cpu", torch.float32), TILE_PIXELS)
        parts += [_line("errors that it drives:"), _strip(_framed(errors, (True,) * len(errors)))]
    if caption:
        parts.insert(0, _line(caption))
    width = max(part.shape[2] for part in parts)
    sheet = torch.cat([_widened(part, width) for part in parts], dim=1)
    return functional.pad(sheet, (_GAP, 0, _GAP, 0), value=_PAPER)


def encoded(sheet: Tensor, most_bytes: int) -> bytes:
    """Return a drawing as a JPEG file that is small enough.

    Args:
        sheet: `(3, H, W)` in `[0, 1]`.
        most_bytes: Size that the file must not have beyond; first the quality is lowered for it,
            then the drawing is made smaller.

    Returns:
        The file.
    """
    pixels = (255 * sheet.clamp(0.0, 1.0)).round().to(torch.uint8).permute(1, 2, 0)
    image = Image.fromarray(pixels.contiguous().numpy())
    while True:
        for quality in _QUALITIES:
            file = _jpeg(image, quality)
            if len(file) <= most_bytes or max(image.size) <= TILES:
                return file
        image = image.reduce(2)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = BytesIO()
    image.save(file, format="JPEG", quality=quality)
    return file.getvalue()


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


def _line(words: str) -> Tensor:
    """Return a line of text; letters that the font does not have are boxes."""
    shown = "".join(letter if letter.isprintable() else " " for letter in words)
    if len(shown) > _MOST_LETTERS:
        shown = f"{shown[: _MOST_LETTERS - 1]}\u2026"
    font = ImageFont.load_default(_TEXT)
    width = max(1, round(font.getlength(shown)))
    image = Image.new("L", (min(width, TILES * (TILE_PIXELS + 2 * _FRAME + _GAP)), _LINE), 255)
    ImageDraw.Draw(image).text((0, 1), shown, font=font, fill=0)
    grey = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return grey.view(1, _LINE, -1).expand(3, -1, -1).float() / 255


def _widened(part: Tensor, width: int) -> Tensor:
    return functional.pad(part, (0, width - part.shape[2]), value=_PAPER)
