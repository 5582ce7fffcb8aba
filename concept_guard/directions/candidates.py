"""Stage 2, find: directions with the presence that they read; which ones are concepts.

Nothing here knows how directions were found.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.clarity import clarity, excess, split, two_means

CLEAR = 2.5  # clarity from which a split says more than skewness; parts of classes have up to 2.4
CHANCE = 1.8  # normal rows have at most 1.6, or 2.2 in groups of few rows
ALIKE = 0.6  # correlation of factor or presence from which two candidates are one concept
EQUAL = 0.95
POLISHES = 12
GAIN = 1e-4  # of clarity, below which a polished direction is not worth a change


@dataclass(frozen=True, eq=False)
class Candidates:
    """Directions in white rows with the presence that they read.

    Attributes:
        directions: `(n, R)` unit vectors.
        factors: `(P, n)` rows times directions.
        thresholds: `(n,)` in the unit of the factors.
    """

    directions: Tensor
    factors: Tensor
    thresholds: Tensor

    @classmethod
    def of(
        cls, white: Tensor, directions: Tensor, thresholds: Tensor | None = None
    ) -> "Candidates":
        """Read rows along directions.

        Args:
            white: `(P, R)` rows with unit covariance.
            directions: `(n, R)` unit vectors.
            thresholds: `(n,)`; None takes the clearest split of each factor.

        Returns:
            The candidates, in the same order.
        """
        factors = white @ directions.T
        if thresholds is None:
            thresholds = split(factors)
        return cls(directions, factors, thresholds)

    @property
    def present(self) -> Tensor:
        """`(P, n)` bool, where the factor is beyond its threshold."""
        return self.factors > self.thresholds

    def clarities(self, lengths: Tensor | None = None) -> Tensor:
        """Return how clearly the thresholds split the factors.

        Args:
            lengths: `(P,)` squared lengths of the white rows, see `clarity`.

        Returns:
            `(n,)` clarities.
        """
        return clarity(self.factors, self.present, lengths)

    def __len__(self) -> int:
        return len(self.directions)

    def __add__(self, other: "Candidates") -> "Candidates":
        return Candidates(
            torch.cat([self.directions, other.directions]),
            torch.cat([self.factors, other.factors], dim=1),
            torch.cat([self.thresholds, other.thresholds]),
        )

    def replaced(self, at: Tensor, other: "Candidates") -> "Candidates":
        """Return the candidates with others at these positions."""
        directions, factors = self.directions.clone(), self.factors.clone()
        thresholds = self.thresholds.clone()
        directions[at], factors[:, at] = other.directions, other.factors
        thresholds[at] = other.thresholds
        return Candidates(directions, factors, thresholds)

    def select(self, at: Tensor) -> "Candidates":
        """Return the candidates at these positions, in this order."""
        return Candidates(self.directions[at], self.factors[:, at], self.thresholds[at])


def chosen(candidates: Candidates, worth: Tensor, count: int) -> Tensor:
    """Return the candidates of largest worth, one per concept as long as there are enough.

    Args:
        candidates: Any number, in the order in which they fill up the number.
        worth: `(n,)`; those of negative infinity are never chosen.
        count: How many to return at most.

    Returns:
        Positions: the different ones, best first, then what fills up the number: alike but not
        equal. Fewer than `count` if there are not enough.
    """
    of_factors, of_presence = map(_correlation, (candidates.factors, candidates.present.float()))
    likeness = torch.maximum(of_factors, of_presence).cpu().numpy()
    usable = worth > -torch.inf
    by_worth = [at for at in worth.argsort(descending=True).tolist() if usable[at]]
    kept: list[int] = []
    for order, bound in ((by_worth, ALIKE), (sorted(by_worth), EQUAL)):
        for at in order:
            if len(kept) < count and at not in kept and not (likeness[at, kept] > bound).any():
                kept.append(at)
    return torch.tensor(kept, dtype=torch.long, device=candidates.thresholds.device)


def polished(white: Tensor, candidates: Candidates) -> Candidates:
    """Turn every direction to the regression of its own gated factor, while that is clearer.

    The gated factor is the factor's excess over its mean in absence, and 0 in absence. Where
    absence is a constant the true filter is a fixed point, whatever the concepts' dependence.

    Args:
        white: `(P, R)` rows with unit covariance.
        candidates: Directions to improve.

    Returns:
        Candidates none of which is less clear than before.
    """
    now, clear = candidates, candidates.clarities()
    for _ in range(POLISHES):
        gated = excess(now.factors, now.present)
        turned = normalize((gated - gated.mean(dim=0)).T @ white, dim=1)
        factors = white @ turned.T
        thresholds = two_means(factors, now.thresholds, rounds=3)
        clearer = clarity(factors, factors > thresholds)
        better = clearer > clear + GAIN
        if not bool(better.any()):
            break
        clear = torch.where(better, clearer, clear)
        now = Candidates(
            torch.where(better[:, None], turned, now.directions),
            torch.where(better, factors, now.factors),
            torch.where(better, thresholds, now.thresholds),
        )
    return now


def _correlation(values: Tensor) -> Tensor:
    """Return `(n, n)` correlations of columns; 0 for a column that does not vary."""
    unit = normalize(values - values.mean(dim=0), dim=0)
    return unit.T @ unit
