"""Stage 3d: the smallest change of one concept that changes a prediction.

Nothing here knows how concepts were found or why an image was predicted as it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from concept_guard.directions import DirectionPairs

LEAST_SINGULAR = 1e-6  # of S W', as a share of the largest
STRIDES, HALVINGS = 8, 6  # of the search: in eighths of the way, then to 1/512

Kind = Literal["erase", "insert"]
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Change:
    """A change of one concept that changes the prediction.

    Attributes:
        concept: Id of the concept.
        kind: Whether it is erased or inserted.
        size: Share of the way to the level that rows without it have, or those with it; in (0, 1].
        predicted: The class that is predicted then.
    """

    concept: int
    kind: Kind
    size: float
    predicted: int


@dataclass(frozen=True, eq=False)
class Levels:
    """Usual latent factors of rows with and without each concept.

    Attributes:
        absent: `(K,)` means over the rows without it.
        present: `(K,)` means over the rows with it; where one of the two has no rows, it is as far
            from the threshold as the other.
        amounts: `(K,)` mean multiples of the signal vectors, see `amounts_of`.
    """

    absent: Tensor
    present: Tensor
    amounts: Tensor

    @classmethod
    def of(cls, factors: Tensor, pairs: DirectionPairs) -> "Levels":
        """Measure the levels on some rows.

        Args:
            factors: `(..., K)` latent factors.
            pairs: That they were read with.

        Returns:
            The levels.
        """
        flat = factors.flatten(0, -2)
        gate = (flat > 0).to(flat)
        on, off = gate.sum(dim=0), (1 - gate).sum(dim=0)
        absent = (flat * (1 - gate)).sum(dim=0) / off.clamp_min(1)
        present = (flat * gate).sum(dim=0) / on.clamp_min(1)
        return cls(
            torch.where(off > 0, absent, -present),
            torch.where(on > 0, present, -absent),
            amounts_of(flat.mean(dim=0), pairs).to(factors.dtype),
        )


def amounts_of(factors: Tensor, pairs: DirectionPairs) -> Tensor:
    """Return the multiples v of the signal vectors that lead to a row from the undecided point.

    That point `u = x - v S` lies on all thresholds: `v = (x W' - b) (S W')^-1`.

    Source: arXiv 2509.23926, constrained uncertainty region alignment.

    Args:
        factors: `(..., K)` latent factors.
        pairs: That they were read with.

    Returns:
        `(..., K)` float64; those of least squares where more concepts than channels have no point
        on all thresholds.
    """
    crossed = (pairs.signals.double() @ pairs.filters.double().T).cpu()
    inverse = torch.linalg.pinv(crossed, rtol=LEAST_SINGULAR)
    amounts: Tensor = factors.double() @ inverse.to(factors.device)
    return amounts


def smallest_changes(
    rows: Tensor,
    wanted: Tensor,
    pairs: DirectionPairs,
    ids: Sequence[int],
    levels: Levels,
    logits_of: Logits,
    tried: Sequence[int],
    *,
    linear: bool = False,
) -> list[Change | None]:
    """Return for every image the smallest change of one concept that leads to a prediction.

    A concept is erased where it is present and inserted everywhere, along its signal vector: part
    of the way to its usual level in absence or presence.

    Args:
        rows: `(N, Q, C)` activations of the images.
        wanted: `(N,)` classes to be predicted; -1 for any but the present one.
        pairs: Direction pairs.
        ids: Ids of the pairs, in order.
        levels: Of these pairs.
        logits_of: Maps `(N, Q, C)` rows to `(N, M)` logits.
        tried: Positions of the concepts to try.
        linear: Whether `logits_of` is affine in single rows, so that it need not be asked for every
            step of every search.

    Returns:
        The changes; None where no single one leads there, or the prediction is the wanted one.
    """
    with torch.no_grad():
        logits = logits_of(rows)
        factors = pairs.factors(rows)
        best: list[Change | None] = [None] * len(rows)
        for concept in tried:
            for kind in ("erase", "insert"):
                move = _move(factors[..., concept], levels, concept, kind)
                along = _along(rows, logits, move, pairs.signals[concept], logits_of, linear)
                sizes, classes = _Way(wanted, logits.argmax(dim=1), along).first()
                for n in sizes.isfinite().nonzero().flatten().tolist():
                    known = best[n]
                    if known is None or float(sizes[n]) < known.size:
                        best[n] = Change(ids[concept], kind, float(sizes[n]), int(classes[n]))
    return best


def _move(factor: Tensor, levels: Levels, concept: int, kind: Kind) -> Tensor:
    """Return `(N, Q)` by how much a factor changes if the whole way is gone."""
    if kind == "erase":
        return torch.where(factor > 0, levels.absent[concept] - factor, 0.0)
    return (levels.present[concept] - factor).clamp_min(0.0)


def _along(
    rows: Tensor, logits: Tensor, move: Tensor, signal: Tensor, logits_of: Logits, linear: bool
) -> Logits:
    """Return the function from `(N,)` shares of the way to `(N, M)` logits."""
    if not linear:
        way = move[..., None] * signal
        return lambda share: logits_of(rows + share[:, None, None] * way)
    slope = logits_of(rows[:1] + signal) - logits_of(rows[:1])  # (1, M) per unit along the signal
    return lambda share: torch.addmm(logits, (share * move[:, 0])[:, None], slope)


@dataclass(frozen=True, eq=False)
class _Way:
    """The straight way of every image along one move."""

    wanted: Tensor
    predicted: Tensor
    logits_along: Logits

    def at(self, share: Tensor) -> Tensor:
        """Return `(N,)` predictions after these shares of the way."""
        return self.logits_along(share).argmax(dim=1)

    def reached(self, now: Tensor) -> Tensor:
        """Return which predictions are the wanted ones."""
        arrived = torch.where(self.wanted < 0, now != self.predicted, now == self.wanted)
        return arrived & (self.wanted != self.predicted)

    def first(self) -> tuple[Tensor, Tensor]:
        """Return `(N,)` smallest shares, infinite where there is none, and the classes there."""
        high = torch.full(self.wanted.shape, torch.inf, device=self.wanted.device)
        for stride in range(1, STRIDES + 1):
            here = torch.full_like(high, stride / STRIDES)
            high = torch.where(self.reached(self.at(here)), high.minimum(here), high)
        found = high.isfinite()
        high = torch.where(found, high, 0.0)
        low = high - 1 / STRIDES
        for _ in range(HALVINGS if bool(found.any()) else 0):
            middle = (low + high) / 2
            arrived = self.reached(self.at(middle))
            low, high = torch.where(arrived, low, middle), torch.where(arrived, middle, high)
        return torch.where(found, high, torch.inf), self.at(high)
