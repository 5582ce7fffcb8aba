"""Stage 1: how the rows lie in an activation, and which grid their positions form.

Nothing here knows about hooks or edits: it judges shapes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from concept_guard.errors import TapError

SUFFIXES = {"NCHW": 4, "NHWC": 4, "NLC": 3}  # layout -> axes of such an activation


@dataclass(frozen=True)
class Layout:
    """How an activation holds its rows.

    Attributes:
        name: "NC", "NCHW", "NHWC" or "NLC".
        prefix: Tokens of NLC in front of the spatial ones, kept apart.
    """

    name: str
    prefix: int = 0

    def rows(self, x: Tensor) -> Tensor:
        """Return the `(N, Q, C)` rows of an activation, a view of it where possible."""
        if self.name == "NCHW":
            return x.flatten(2).transpose(1, 2)
        if self.name == "NHWC":
            return x.flatten(1, 2)
        return x[:, self.prefix :] if self.name == "NLC" else x.flatten(1).unsqueeze(1)

    def written(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return a new activation with these `(N, Q, C)` rows and all else as in `x`."""
        if self.name == "NCHW":
            new = rows.transpose(1, 2).reshape(x.shape)
        elif self.name == "NLC":
            new = torch.cat([x[:, : self.prefix], rows], dim=1)
        else:
            new = rows.reshape(x.shape)
        alike = new.dtype == x.dtype and new.stride() == x.stride()
        return new if alike else torch.empty_like(x).copy_(new)


def layout_of(
    model: nn.Module,
    images: Tensor,
    where: str,
    shape: tuple[int, ...],
    suffix: str,
    module: nn.Module,
    channels: int | None,
) -> Layout:
    """Return the layout of an activation: what the user says, or the first clue that settles it.

    Args:
        model: That made the activation.
        images: `(N, ...)` images it was made from.
        where: The tap as the user wrote it.
        shape: Of the activation.
        suffix: The layout that the user asks for, or "".
        module: That returned the activation.
        channels: Length of a row, where the model declares it.

    Raises:
        TapError: If the shape does not fit, or could be read in two ways.
    """
    if suffix and SUFFIXES[suffix] != len(shape):
        raise TapError(f"tap {where!r}: {suffix} does not fit the output, its shape is {shape}")
    if len(shape) == 2:
        return Layout("NC")
    if len(shape) == 3:
        return Layout("NLC", _prefix(model, images, where, shape, suffix, channels))
    if suffix:
        return Layout(suffix)
    fits = {"NCHW": (shape[1], shape[2:]), "NHWC": (shape[3], shape[1:3])}
    declared = getattr(model, "output_fmt", None)
    clues = (
        {name for name, (width, _) in fits.items() if width == channels},
        {"NCHW"} if isinstance(module, nn.Conv2d | nn.BatchNorm2d) else set(),
        {"NHWC"} if type(module) in (nn.Linear, nn.LayerNorm) else set(),
        {name for name, (_, grid) in fits.items() if _is_aspect(grid, images)},
        {str(getattr(declared, "value", declared))} & {*fits},
    )
    found = next((clue for clue in clues if len(clue) == 1), None)
    if found is None:
        raise TapError(
            f"tap {where!r}: shape {shape} can be NCHW or NHWC; write '{where}@NCHW' or "
            f"'{where}@NHWC'"
        )
    return Layout(next(iter(found)))


# How many tokens come before the grid. They are counted, since the declared number may be off.
def _prefix(
    model: nn.Module,
    images: Tensor,
    where: str,
    shape: tuple[int, ...],
    suffix: str,
    channels: int | None,
) -> int:
    tokens = shape[1]
    declared = int(getattr(model, "num_prefix_tokens", 0) or 0)
    options = [prefix for prefix in sorted({0, declared or 1}) if prefix < tokens]
    rows, columns = _patch_grid(model, images) or (0, 0)
    fitting = [prefix for prefix in options if tokens - prefix == rows * columns]
    fitting += [prefix for prefix in options if _aspect_grids(images, tokens - prefix)]
    fitting += [declared] if suffix and declared < tokens else []
    if channels is not None and channels == shape[1] != shape[2]:
        raise TapError(
            f"tap {where!r}: shape {shape} has its {channels} channels before the tokens, expected "
            "them last; tap a module in front of the transposition"
        )
    if not fitting:
        raise TapError(
            f"tap {where!r}: cannot tell which of {tokens} tokens form the grid, shape {shape}; "
            f"write '{where}@NLC' to skip the {declared} prefix tokens that the model declares"
        )
    return fitting[0]


def positions(
    model: nn.Module, images: Tensor, layout: Layout, shape: tuple[int, ...]
) -> tuple[int, int]:
    """Return the rows and columns that the Q positions of an activation form."""
    if layout.name == "NCHW":
        return shape[2], shape[3]
    if layout.name == "NHWC":
        return shape[1], shape[2]
    tokens = shape[1] - layout.prefix if layout.name == "NLC" else 1
    grid = _patch_grid(model, images)
    if grid and grid[0] * grid[1] == tokens:
        return grid
    return [*_aspect_grids(images, tokens), (1, tokens)][0]


def _patch_grid(model: nn.Module, images: Tensor) -> tuple[int, int] | None:
    """Return the grid that timm's patch embedding makes of these images."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    height, width = (patch, patch) if isinstance(patch, int) else patch or (0, 0)
    return (images.shape[-2] // height, images.shape[-1] // width) if height else None


def _aspect_grids(images: Tensor, tokens: int) -> list[tuple[int, int]]:
    """Return the grids of so many tokens whose sides are in the proportion of the images."""
    grids = ((rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0)
    return [grid for grid in grids if _is_aspect(grid, images)]


def _is_aspect(grid: tuple[int, ...], images: Tensor) -> bool:
    height, width = images.shape[-2:]
    return abs(grid[0] * width - grid[1] * height) < max(height, width)
