"""Stage 2, find: coordinates in which rows are centred, scaled per channel and uncorrelated.

Nothing here knows what is looked for in the rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**12  # rows that are worked on at a time; with 2**14 the moments take a third longer
DEAD = 1e-6  # share of the largest deviation below which a channel is constant
FLAT = 1e-6  # share of the largest variance below which an axis is empty


@dataclass(frozen=True, eq=False)
class Basis:
    """An affine map between activations and white coordinates.

    Attributes:
        mean: `(C,)` mean activation.
        inward: `(C, R)` maps centred activations to coordinates with unit covariance.
        outward: `(R, C)` maps these back to centred activations.
        beyond: `(C, Q)` maps centred activations to the other axes, with unit covariance as well.
    """

    mean: Tensor
    inward: Tensor
    outward: Tensor
    beyond: Tensor

    @classmethod
    def of(cls, rows: Tensor, *, rank: int) -> "Basis":
        """Fit the basis: standardise the live channels, keep the leading principal axes.

        Where rows lie in a subspace, so do the columns of the inward map: what no row has is not
        read.

        Source: arXiv 2509.23926, step (a), standardised features; principal axes as in FastICA
        (Hyvarinen and Oja 2000, Neural Networks 13:411-430, section 5).

        Args:
            rows: `(P, C)` activations.
            rank: Largest number of axes kept, R.

        Returns:
            The basis, in float32.
        """
        mean, covariance = moments(rows)
        deviation = covariance.diagonal().clamp_min(0.0).sqrt()
        live = deviation > DEAD * deviation.max()
        inverse = torch.where(live, 1.0 / deviation.clamp_min(1e-300), 0.0)
        values, axes = torch.linalg.eigh(inverse[:, None] * covariance * inverse)
        keep = values > FLAT * values.max()
        span = torch.linalg.qr(torch.where(live, deviation, 0.0)[:, None] * axes[:, keep]).Q
        values, axes = values[keep].flip(0), axes[:, keep].flip(1)
        inward = inverse[:, None] * axes / values.sqrt()
        inward = torch.where(live[:, None], span @ (span.T @ inward), 0.0).float()
        outward = (axes * values.sqrt()).T[:rank] * torch.where(live, deviation, 0.0)
        return cls(mean.float(), inward[:, :rank], outward.float(), inward[:, rank:])

    def white(self, rows: Tensor) -> Tensor:
        """Return rows in white coordinates.

        Args:
            rows: `(P, C)` activations.

        Returns:
            `(P, R)` float32.
        """
        return self._seen(rows, self.inward)

    def others(self, rows: Tensor) -> Tensor:
        """Return rows in the axes beyond the white coordinates.

        Args:
            rows: `(P, C)` activations.

        Returns:
            `(P, Q)` float32.
        """
        return self._seen(rows, self.beyond)

    def _seen(self, rows: Tensor, inward: Tensor) -> Tensor:
        return torch.cat([(part.float() - self.mean) @ inward for part in rows.split(CHUNK)])


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of rows, chunk by chunk.

    Products are taken in float32 around the mean of the first chunk and summed in float64.

    Args:
        rows: `(P, C)` activations.

    Returns:
        `(C,)` and `(C, C)` float64.
    """
    near = rows[:CHUNK].float().mean(dim=0)
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    scatter = torch.zeros((rows.shape[1],) * 2, dtype=torch.float64, device=rows.device)
    for part in rows.split(CHUNK):
        centred = part.float() - near
        total += centred.sum(dim=0)
        scatter += (centred.T @ centred).to(torch.float64)
    shift = total / len(rows)
    return near + shift, scatter / len(rows) - torch.outer(shift, shift)
