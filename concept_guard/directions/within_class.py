"""Stage 2, find: the pair of a concept whose presence is known, estimated within classes.

Nothing here knows how presence was found or what the pair is used for.
"""

from dataclasses import dataclass

import torch
from scipy.stats import binom
from torch import Tensor

from concept_guard.directions.threads import few_threads

FOLDS, ROUNDS = 4, 2
REACH = 0.15  # of the way from absence to presence: half the width of valley and peak


@dataclass(frozen=True, eq=False)
class WithinClassPair:
    """The pair of one concept, free of what the concept shares with the classes.

    Attributes:
        filter: `(C,)` decoding direction, scaled so that `filter . signal = 1`.
        signal: `(C,)` encoding direction: what the presence of the concept adds to a row.
        absent: Mean of `x . filter` over the rows without the concept.
        gain: How far `x . filter` rises from the rows without to those with the concept
            (medians); about 1.
        shrinkage: Ledoit-Wolf shrinkage of the covariance, between 0 and 1.
    """

    filter: Tensor
    signal: Tensor
    absent: float
    gain: float
    shrinkage: float

    @property
    def threshold(self) -> float:
        """Value of `x . filter` half-way between absence and presence."""
        return self.absent + 0.5 * self.gain


def within_class_pair(
    rows: Tensor, labels: Tensor, present: Tensor, *, shrinkage: float | None = None
) -> WithinClassPair | None:
    """Estimate encoding and decoding direction of a concept from its presence.

    The signal vector is the regression of the row on presence with the class held fixed: the
    difference of means (present minus absent) per class, weighted by `n1 n0 / (n1 + n0)`. The
    filter is the discriminant `C^-1 s` with the covariance `C` within (class, presence) groups,
    shrunk towards a multiple of the identity. Estimated on biased data without holding the class
    fixed, both directions would contain the class.

    Source: Haufe et al. (2014), NeuroImage 87:96-110 (patterns); Ledoit and Wolf (2004), J.
    Multivariate Analysis 88:365-411 (shrinkage).

    Args:
        rows: `(P, C)` activations.
        labels: `(P,)` classes.
        present: `(P,)` bool.
        shrinkage: Shrinkage to use; None estimates it.

    Returns:
        The pair in float32, or None when no class has rows both with and without the concept.
    """
    with few_threads(rows.numel()):
        return _estimate(rows, labels, present, shrinkage)


def _estimate(
    rows: Tensor, labels: Tensor, present: Tensor, shrinkage: float | None
) -> WithinClassPair | None:
    group = labels * 2 + present.long()
    count, total = _group_sums(rows, group, 2 * (int(group.max()) // 2 + 1))
    means = total / count.clamp_min(1)[:, None]
    signal = _signal(count, means)
    residual = rows - means[group].to(rows.dtype)
    covariance = (residual.T @ residual).to(torch.float64) / len(rows)
    if signal is None or float(covariance.diagonal().sum()) == 0.0:
        return None
    if shrinkage is None:
        shrinkage = shrinkage_of(residual, covariance)
    direction = _discriminant(covariance, signal, shrinkage).to(rows.dtype)
    factor = rows @ direction
    off, on = factor[~present], factor[present]
    gain = float(on.median() - off.median())
    return WithinClassPair(direction, signal.to(rows.dtype), float(off.mean()), gain, shrinkage)


def _group_sums(rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return `(G,)` counts and `(G, C)` float64 sums of the rows of each group."""
    count = torch.bincount(group, minlength=groups).to(torch.float64)
    total = torch.zeros((groups, rows.shape[1]), dtype=torch.float64, device=rows.device)
    total.index_add_(0, group, rows.to(torch.float64))
    return count, total


def _signal(count: Tensor, means: Tensor) -> Tensor | None:
    """Return the weighted difference of means, None if there is none: even groups lack presence."""
    n0, n1 = count[0::2], count[1::2]
    weight = torch.where((n0 > 0) & (n1 > 0), n0 * n1 / (n0 + n1).clamp_min(1), 0.0)
    if float(weight.sum()) == 0.0:
        return None
    signal = (weight[:, None] * (means[1::2] - means[0::2])).sum(dim=0) / weight.sum()
    return signal if float(signal.square().sum()) > 0.0 else None


def _discriminant(covariance: Tensor, signal: Tensor, shrinkage: float) -> Tensor:
    """Return the filter of a signal vector under a covariance, which it shrinks in place."""
    level = covariance.diagonal().mean()
    covariance *= 1 - shrinkage
    covariance.diagonal().add_(max(shrinkage, 1e-6) * level)
    direction = torch.cholesky_solve(signal[:, None], torch.linalg.cholesky(covariance))[:, 0]
    return direction / (direction @ signal)


def shrinkage_of(residual: Tensor, covariance: Tensor) -> float:
    """Return Ledoit and Wolf's shrinkage of a covariance towards a multiple of the identity.

    What scikit-learn computes in two more products of matrices follows from the norms of the rows,
    because the squares of all products of two entries of a row add up to its norm to the fourth.

    Args:
        residual: `(P, C)` centred rows.
        covariance: `(C, C)` of these rows, float64.

    Returns:
        A share between 0 and 1.
    """
    rows, channels = residual.shape
    square = float(covariance.square().sum())
    fourth = float(residual.to(torch.float64).square().sum(dim=1).square().sum()) / rows
    spread = square - float(covariance.diagonal().sum()) ** 2 / channels
    return min(fourth - square, rows * spread) / (rows * spread) if spread > 0 else 0.0


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
        return float(binom.cdf(self.valley, self.valley + self.peak, 0.5))

    @property
    def own_separation(self) -> float:
        """The same as `separation` in the class itself, for its rows without the concept."""
        return (self.own_absence - self.own_valley) / max(1, self.own_absence + self.own_valley)

    @property
    def own_chance(self) -> float:
        """The same as `chance` in the class itself, for its rows without the concept."""
        return float(binom.cdf(self.own_valley, self.own_valley + self.own_absence, 0.5))


def refine_membership(
    rows: Tensor, labels: Tensor, present: Tensor, class_index: int, *, seed: int
) -> Membership | None:
    """Sharpen a first guess of presence by what the pair of that guess reads, cross-fitted.

    A pair is estimated within classes on some folds and reads the others; rows beyond half-way
    between the medians of the absent and the present rows of other classes are the next guess.

    Args:
        rows: `(P, C)` activations.
        labels: `(P,)` classes.
        present: `(P,)` bool, the first guess.
        class_index: The class the concept pulls towards; the rows of all others set the scale.
        seed: Chooses the folds.

    Returns:
        The membership, or None when fewer than 3 rows of other classes carry the concept.
    """
    rows = rows - rows.mean(dim=0)
    others = labels != class_index
    shrinkage: float | None = None
    scaled = torch.zeros(len(rows), device=rows.device)
    for turn in range(ROUNDS + 1):
        if turn:
            present = scaled > 0.5
        if int((others & present).sum()) < 3 or int((others & ~present).sum()) < 3:
            return None
        with few_threads(rows.numel()):
            read = _cross_fitted(rows, labels, present, shrinkage, seed + turn)
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
    rows: Tensor, labels: Tensor, present: Tensor, shrinkage: float | None, seed: int
) -> tuple[Tensor, float] | None:
    """Return `(P,)` factors, each read by a pair that did not see its row; and the shrinkage.

    The products of the rows of each fold are taken once: those of all other folds are the sum of
    all less this one. The rows are centred, so that little is lost by the difference.
    """
    group = labels * 2 + present.long()
    fold = folds(group, seed)
    groups = 2 * (int(labels.max()) + 1)
    parts = [(fold == left_out).nonzero().flatten() for left_out in range(FOLDS)]
    products = [(rows[at].T @ rows[at]).to(torch.float64) for at in parts]
    sums = [_group_sums(rows[at], group[at], groups) for at in parts]
    count, total = (torch.stack(values).sum(dim=0) for values in zip(*sums, strict=True))
    product = torch.stack(products).sum(dim=0)
    factor = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)
    for at, own, (own_count, own_total) in zip(parts, products, sums, strict=True):
        kept, kept_total = count - own_count, total - own_total
        means = kept_total / kept.clamp_min(1)[:, None]
        signal = _signal(kept, means)
        covariance = (product - own - kept_total.T @ means) / float(kept.sum())
        if signal is None or float(covariance.diagonal().sum()) <= 0.0:
            return None
        if shrinkage is None:
            others = torch.cat([part for part in parts if part is not at])
            shrinkage = shrinkage_of(rows[others] - means[group[others]].to(rows.dtype), covariance)
        direction = _discriminant(covariance, signal, shrinkage)
        factor[at] = rows[at] @ direction.to(rows.dtype)
    return factor, shrinkage or 0.0


def folds(group: Tensor, seed: int) -> Tensor:
    """Spread every group over all folds.

    Args:
        group: `(P,)` group of each row or image.
        seed: Chooses among the members of a group.

    Returns:
        `(P,)` the fold of each.
    """
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    order = order[group.cpu()[order].argsort(stable=True)]
    fold = torch.empty(len(group), dtype=torch.long)
    fold[order] = torch.arange(len(group)) % FOLDS
    return fold.to(group.device)
