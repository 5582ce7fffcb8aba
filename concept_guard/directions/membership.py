"""Stage 2, find: which rows carry a concept, told more sharply than by its first guess.

Nothing here knows where the guess is from or what presence is used for.
"""

from dataclasses import dataclass

import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor

from concept_guard.directions.scatter import Scatter, group_sums
from concept_guard.directions.threads import few_threads
from concept_guard.directions.within_class import (
    discriminant,
    grouping,
    shrinkage_of,
    signal_of,
)

ROUNDS = 2
REACH = 0.15  # of the way from absence to presence: half the width of valley and peak


@dataclass(frozen=True, eq=False)
class Membership:
    """Which rows carry a concept, and how clearly they stand apart from those that do not.

    Attributes:
        present: `(P,)` bool.
        valley: Rows of the other classes half-way between absence and presence, .35 to .65 of
            the way.
        peak: Rows of them around presence, .85 to 1.15 of the way. A mark that is there or not
            has fewer rows in the valley than at the peak; a mere tail of a continuous quantity
            has more.
        own_absence: Rows of the class itself within .15 of absence, on the scale of the class:
            its presence is the median of those rows that are beyond half-way.
        own_valley: Rows of it .25 to .55 of that way: nearer to absence, because the many rows
            around presence reach further down than the few around absence reach up.
        own_peak: Rows of it .85 to 1.15 of that way. A mark beside the class's own evidence
            leaves the class in two groups with nothing between them.
    """

    present: Tensor
    valley: int
    peak: int
    own_absence: int = 0
    own_valley: int = 0
    own_peak: int = 0

    @property
    def separation(self) -> float:
        """Between -1 (a continuous tail) and 1 (two groups with nothing between them)."""
        return (self.peak - self.valley) / max(1, self.peak + self.valley)

    @property
    def chance(self) -> float:
        """Probability of so few rows in the valley if they were as likely there as at the peak."""
        return float(scipy.stats.binom.cdf(self.valley, self.valley + self.peak, 0.5))

    @property
    def own_separation(self) -> float:
        """The same as `separation` in the class itself, for its rows without the concept."""
        return (self.own_absence - self.own_valley) / max(1, self.own_absence + self.own_valley)

    @property
    def own_chance(self) -> float:
        """The same as `chance` in the class itself, for its rows without the concept."""
        return float(
            scipy.stats.binom.cdf(self.own_valley, self.own_valley + self.own_absence, 0.5)
        )


def refine_membership(scatter: Scatter, present: Tensor, class_index: int) -> Membership | None:
    """Sharpen a first guess of presence by what the pair of that guess reads, cross-fitted.

    A pair is estimated within classes on some folds and reads the others; rows beyond half-way
    between the medians of the absent and the present rows of other classes are the next guess.

    Args:
        scatter: Of `(P, C)` activations, with its folds.
        present: `(P,)` bool, the first guess.
        class_index: The class the concept pulls towards; the rows of all others set the scale.

    Returns:
        The membership, or None when fewer than 3 rows of other classes carry the concept.
    """
    rows, others = scatter.rows, scatter.labels != class_index
    shrinkage: float | None = None
    scaled = torch.zeros(len(rows), device=rows.device)
    for turn in range(ROUNDS + 1):
        if turn:
            before, present = present, scaled > 0.5
            if torch.equal(present, before):
                break
        if int((others & present).sum()) < 3 or int((others & ~present).sum()) < 3:
            return None
        with few_threads(rows.numel()):
            read = _cross_fitted(scatter, present, shrinkage)
        if read is None:
            return None
        factor, shrinkage = read
        low = factor[others & ~present].median()
        scaled = (factor - low) / (factor[others & present].median() - low)
    of_others, own = scaled[others], scaled[~others]
    own = own / own[own > 0.5].median() if bool((own > 0.5).any()) else own
    return Membership(
        scaled > 0.5,
        valley=_near(of_others, 0.5),
        peak=_near(of_others, 1.0),
        own_absence=_near(own, 0.0),
        own_valley=_near(own, 0.4),
        own_peak=_near(own, 1.0),
    )


def _near(scaled: Tensor, level: float) -> int:
    return int(((scaled - level).abs() < REACH).sum())


def _cross_fitted(
    scatter: Scatter, present: Tensor, shrinkage: float | None
) -> tuple[Tensor, float] | None:
    """Return `(P,)` factors, each read by a pair that did not see its row; and the shrinkage."""
    pieces, group = scatter.pieces, grouping(scatter.labels, present)
    groups = 2 * (int(scatter.labels.max()) + 1)
    sums = [group_sums(piece.centred, group[piece.at], groups) for piece in pieces]
    count, total = (torch.stack(values).sum(dim=0) for values in zip(*sums, strict=True))
    product = torch.stack([piece.product for piece in pieces]).sum(dim=0)
    factor = torch.zeros_like(scatter.rows[:, 0])
    for piece, (own_count, own_total) in zip(pieces, sums, strict=True):
        kept, kept_total = count - own_count, total - own_total
        means = kept_total / kept.clamp_min(1)[:, None]
        signal = signal_of(kept, means)
        covariance = (product - piece.product - kept_total.T @ means) / float(kept.sum())
        if signal is None or float(covariance.diagonal().sum()) <= 0.0:
            return None
        if shrinkage is None:
            others = torch.ones_like(present).index_fill(0, piece.at, value=False)
            residual = scatter.centred[others] - means[group[others]].to(factor.dtype)
            shrinkage = shrinkage_of(residual, covariance)
        direction = discriminant(covariance, signal, shrinkage)
        factor[piece.at] = piece.rows @ direction.to(factor.dtype)
    return factor, shrinkage or 0.0
