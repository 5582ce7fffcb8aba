"""Stage 2, find: what the descents move: detectors with their margins, in scaled coordinates.

Nothing here knows what is descended.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

DEAD = 1e-6  # share of the largest deviation below which a channel is constant


@dataclass(frozen=True, eq=False)
class Space:
    """Centred and scaled coordinates of rows."""

    mean: Tensor
    size: Tensor

    @classmethod
    def of(cls, images: Tensor, *, each: bool = False) -> "Space":
        """Return the coordinates with unit channels, or with unit channels on average."""
        rows = images.flatten(0, 1)
        size = rows.std(dim=0)
        if each:
            size = torch.where(size > DEAD * size.max(), size, torch.inf)  # dead ones read 0
        else:
            size = size.square().mean().sqrt().expand_as(size)
        return cls(rows.mean(dim=0), size)

    def inward(self, images: Tensor) -> Tensor:
        """Return `(..., C)` images in these coordinates."""
        return (images - self.mean) / self.size

    def outward(self, scaled: Tensor) -> Tensor:
        """Return `(..., C)` scaled rows as they came; a dead channel has its mean."""
        return self.mean + scaled * torch.where(self.size.isinf(), 0.0, self.size)

    def raw(self, filters: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """Return filters and biases for rows as they came."""
        filters = filters / self.size
        return filters, biases + filters @ self.mean

    def own(self, filters: Tensor, biases: Tensor) -> tuple[Tensor, Tensor]:
        """Return filters and biases of rows as they came for these coordinates."""
        return filters * self.size, biases - filters @ self.mean


class Tied:
    """Orthonormal filters that share one margin and one threshold."""

    def __init__(self, filters: Tensor, threshold: Tensor) -> None:
        self.parameters = [filters.clone(), threshold.clone(), torch.zeros_like(threshold)]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return `(K, C)` filters and `(K,)` biases."""
        filters, threshold, log_slope = self.parameters
        slope = log_slope.exp()
        return filters * slope, (threshold * slope).expand(len(filters))

    def settle(self) -> None:
        """Make the filters orthonormal again."""
        self.parameters[0].copy_(orthonormal(self.parameters[0]))


class Free:
    """Filters of any direction, each with its own margin and threshold."""

    def __init__(self, filters: Tensor, biases: Tensor) -> None:
        lengths = filters.norm(dim=1)
        self.parameters = [normalize(filters, dim=1), biases / lengths, lengths.log()]

    def read(self) -> tuple[Tensor, Tensor]:
        """Return `(K, C)` filters and `(K,)` biases."""
        directions, thresholds, log_slopes = self.parameters
        slopes = log_slopes.exp()
        return normalize(directions, dim=1) * slopes[:, None], thresholds * slopes

    def settle(self) -> None:
        """Do nothing: directions are normalised where they are read."""


def held(detectors: Tied | Free) -> tuple[Tensor, Tensor]:
    """Return copies of filters and biases that no gradient reaches.

    Args:
        detectors: Either kind.

    Returns:
        `(K, C)` filters and `(K,)` biases.
    """
    with torch.no_grad():
        filters, biases = detectors.read()
    return filters.clone(), biases.clone()


def orthonormal(filters: Tensor) -> Tensor:
    """Return the nearest orthonormal rows (polar factor) when K <= C, else unit rows.

    Args:
        filters: `(K, C)` vectors.

    Returns:
        `(K, C)` orthonormal rows, or unit rows when there are more rows than coordinates.
    """
    if len(filters) > filters.shape[1]:
        return normalize(filters, dim=1)
    values, vectors = torch.linalg.eigh((filters @ filters.mT).to(torch.float64))
    root = vectors @ torch.diag(values.clamp_min(1e-12).rsqrt()) @ vectors.mT
    nearest: Tensor = root.to(filters.dtype) @ filters
    return nearest
