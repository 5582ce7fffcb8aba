"""Stage 5: where in an image a concept is, for its card.

Nothing here knows how cards are drawn or which concepts deserve one.
"""

import torch
from torch import Tensor
from torch.nn import functional

from concept_guard.taps import Tap

CELLS = 8  # the side of the grid of grey patches that cover an image one at a time
FINE = 7  # least side of a feature map that is used in place of covering the image
ROUNDING = 1e-5  # changes of a factor below this share of it say nothing


def location_maps(tap: Tap, images: Tensor, direction: Tensor) -> Tensor:
    """Return how strongly each place of each image speaks for a concept.

    At a tap with positions this is the factor itself. Where the row is the plain mean of a fine
    feature map, each of its positions has its share in the factor. At other pooled taps each cell
    of a grid is covered in turn with the image's mean colour, and the place counts by how much the
    factor falls; that needs no assumption about what lies between image and tap, and 64 passes.

    Source: Zhou et al. (2016), CVPR, section 2 (the map behind a mean); Zeiler and Fergus (2014),
    ECCV, section 4.2 (occlusion).

    Args:
        tap: Where the concept is read.
        images: `(n, channels, H, W)` network input.
        direction: `(C,)` filter of the concept, or `(n, C)` one for each image.

    Returns:
        `(n, h, w)` between 0 and 1, on the CPU; a map that is 0 throughout has no place.
    """
    factor = _factors(tap, images, direction)
    shared = (0, 1, 2) if direction.ndim == 1 else (1, 2)
    least = ROUNDING * factor.abs().amax(dim=shared, keepdim=True)
    if factor[0].numel() > 1:
        return _scaled(factor, least)
    pooled = tap.pooled_from(images) if min(images.shape[-2:]) >= FINE else None
    if pooled is not None and min(pooled.shape[1:3]) >= FINE:
        return _scaled(_along(pooled.flatten(1, 2), direction).view(pooled.shape[:3]).cpu(), least)
    rows, columns = (min(CELLS, side) for side in images.shape[-2:])
    drops = torch.zeros(len(images), rows, columns)
    of_each = direction if direction.ndim == 1 else direction.repeat(columns, 1)
    for row in range(rows):  # in one pass
        covered = torch.cat([_covered(images, row, k, rows, columns) for k in range(columns)])
        left = _factors(tap, covered, of_each)[:, 0, 0].view(columns, len(images))
        drops[:, row] = factor[:, 0, 0, None] - left.T
    return _scaled(_smoothed(drops), least)


def _factors(tap: Tap, images: Tensor, direction: Tensor) -> Tensor:
    """Return `(n, h, w)` values of `x . w` on the CPU, at the positions of these images."""
    labels = torch.zeros(len(images), dtype=torch.long)
    reading = tap.read(iter([(images, labels)]), max_rows=2**62, seed=0)
    return _along(reading.rows, direction).view(-1, *reading.grid).cpu()


def _along(rows: Tensor, direction: Tensor) -> Tensor:
    """Return `(n, Q)` values of `x . w` for `(n, Q, C)` rows and one filter, or one per image."""
    return (rows * direction.to(rows)[..., None, :]).sum(dim=-1)


def _covered(images: Tensor, row: int, column: int, rows: int, columns: int) -> Tensor:
    """Return the images with one cell of the grid in their mean colour."""
    covered = images.clone()
    height, width = images.shape[-2:]
    top, bottom = row * height // rows, (row + 1) * height // rows
    left, right = column * width // columns, (column + 1) * width // columns
    covered[..., top:bottom, left:right] = images.mean(dim=(-2, -1), keepdim=True)
    return covered


def _smoothed(maps: Tensor) -> Tensor:
    """Return maps in which every cell is averaged with the neighbours it has; no peak moves."""
    side = torch.tensor([0.25, 0.5, 0.25])
    weight = torch.outer(side, side)[None, None]
    cells = functional.conv2d(torch.ones_like(maps[:1, None]), weight, padding=1)
    return (functional.conv2d(maps[:, None], weight, padding=1) / cells)[:, 0]


def _scaled(maps: Tensor, least: Tensor) -> Tensor:
    """Return the maps with a peak of 1 and 0 for what lies below their mean or `least` above it."""
    raised = maps - maps.mean(dim=(1, 2), keepdim=True)
    raised = torch.where(raised > least, raised, 0.0)
    return raised / raised.amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
