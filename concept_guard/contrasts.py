"""Stage 4a: what is different in images with a concept, the class held fixed: level and spread.

Nothing here knows what is done with it.
"""

import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor

from concept_guard.counterfactual import COVERED, Counterfactual, mapped

CHANGED = 5.0  # standard errors from which a change is certain; more where images are few
CHANNEL = 3.5  # the same for the level of a whole channel: there are few of them to be wrong about
PRIOR = 8.0  # images that the variance of all counts as, beside that of those with or without
FLOOR = 1e-3  # of the mean variance: values that hardly vary are not divided by nothing


class Sums:
    """Sums over images in two halves, from which follows what a concept does to them.

    Args:
        classes: Number of classes, K.
        shape: Of an image, channels first.
    """

    def __init__(self, classes: int, shape: torch.Size) -> None:
        self._channels, self._values = shape[0], shape.numel()
        size = 2 * self._values + self._channels
        self._counts = torch.zeros(2, classes, 2, dtype=torch.float64)  # by half, class, presence
        self._sums = torch.zeros(2, classes, 2, size, dtype=torch.float64)
        self._squares = torch.zeros_like(self._sums)

    def add(self, images: Tensor, halves: Tensor, classes: Tensor, carried: Tensor) -> None:
        """Add images.

        Args:
            images: `(B, ...)` floating.
            halves: `(B,)` 0 or 1.
            classes: `(B,)` 0 to K - 1.
            carried: `(B,)` bool, which have the concept.
        """
        pixels = images.double().reshape(len(images), self._channels, -1)
        means = pixels.mean(dim=2)
        rest = pixels - means[..., None]
        values = torch.cat([pixels.flatten(1), rest.flatten(1), means], dim=1)
        present = carried.long()
        at = halves, classes, present
        self._counts.index_put_(at, torch.ones(len(values)).double(), accumulate=True)
        self._sums.index_put_(at, values, accumulate=True)
        self._squares.index_put_(at, values.square(), accumulate=True)

    def map(self, *halves: int) -> Counterfactual | None:
        """Return what the concept does to images, with a threshold of 0.

        First it is asked what happens to a whole channel, then what more happens in one place:
        what is not certain does not become noise in the images. Certain is a level within classes
        that differs by more than five standard errors, of a whole channel by more than 3.5, and the
        logarithm of a spread by more than five for a channel and ten in one place. In one half,
        where standard errors are that much larger, it is those over the root of two.

        Args:
            *halves: Which are looked at: 0, 1 or both.

        Returns:
            None if there are too few images, or nothing is certain.
        """
        of, scale = list(halves), (len(halves) / 2) ** 0.5
        counts, sums, squares = (t[of].sum(0) for t in (self._counts, self._sums, self._squares))
        told = counts.min(dim=1).values > 0
        counts, sums, squares = counts[told], sums[told], squares[told]
        if not float((counts - 1).sum()) > 0:
            return None
        means = sums / counts[..., None]
        spreads = (squares - counts[..., None] * means.square()).clamp_min(0)
        variances, uncertain = _variances(spreads, counts)
        typical = variances[0, : self._values].mean()
        if not float(typical) > 0:
            return None
        variances = variances.clamp_min(FLOOR * typical)
        weights = counts.prod(dim=1) / counts.sum(dim=1)
        shares = (weights / weights.sum())[:, None]
        centre, there = ((shares * of_kind).sum(0) for of_kind in means.unbind(1))
        common = (spreads.sum(dim=(0, 1)) / (counts - 1).sum()).clamp_min(FLOOR * typical)
        level, ratio = there - centre, (variances[1] / variances[0]).sqrt()
        error = _errors(common, variances, uncertain, (shares.square() / counts).sum(0), weights)
        chance = scipy.stats.norm.sf([scale * CHANGED, scale * CHANNEL])
        certain = torch.from_numpy(scipy.stats.t.isf(chance, float((counts - 1).sum())))
        error[: 2 * self._values] *= certain[0]
        error[2 * self._values :] *= certain[1]
        moved = self._shifted(level, error)
        stretched = float((uncertain.sum() / 2).sqrt())
        factor = self._stretched(ratio, variances, scale * CHANGED * stretched)
        # What covers a value hardly varies: its level is known, however near the centre it is.
        moved = torch.where(factor < COVERED, level[: self._values], moved)
        variance = torch.where(factor == 1, common[: self._values], variances[0, : self._values])
        return mapped(centre[: self._values], moved, factor, variance)

    def _shifted(self, level: Tensor, least: Tensor) -> Tensor:
        """Return `(n,)` the certain changes of level.

        A channel does what most of its values do: what certainly does something else is left out.

        Args:
            level: `(2n + C,)` of values, of what they have over their channel's mean, and of that.
            least: `(2n + C,)` from where on a change is certain.
        """
        n, channels = self._values, self._channels
        plain = level[:n].view(channels, -1)
        alone, beside, whole = (t.view(channels, -1) for t in least.split([n, n, channels]))
        alike = (plain - plain.median(dim=1, keepdim=True).values).abs() <= beside
        shift = (plain * alike).sum(dim=1, keepdim=True) / alike.sum(dim=1, keepdim=True)
        own = torch.where(plain.abs() > alone, plain, 0.0)
        with_it = (shift.abs() > whole) & ((plain - shift).abs() <= beside)
        return torch.where(with_it, shift, own).flatten()

    def _stretched(self, ratio: Tensor, variances: Tensor, least: float) -> Tensor:
        """Return `(n,)` the certain factors of spread; a channel has that of most of its values.

        Args:
            ratio: `(2n + C,)` of spreads, as levels are laid out.
            variances: `(2, 2n + C)` without the concept and with it.
            least: From where on the logarithm of a channel's is certain; twice that for a value's.
        """
        n, channels = self._values, self._channels
        spread, local = (t.view(channels, -1) for t in ratio[: 2 * n].split(n))
        usual = local.median(dim=1, keepdim=True).values
        alike = (local / usual).log().abs() <= 2 * least
        over = (variances[:, n : 2 * n].view(2, channels, -1) * alike).sum(dim=2)
        whole = (over[1] / over[0]).sqrt()[:, None]
        whole = torch.where(whole.log().abs() > least, whole, 1.0)
        own = torch.where(whole != 1, local, spread)
        return torch.where((own / whole).log().abs() > 2 * least, own, whole).flatten()


def _errors(
    common: Tensor, variances: Tensor, uncertain: Tensor, counted: Tensor, weights: Tensor
) -> Tensor:
    """Return `(n,)` standard errors of changes of level.

    Variances of few images are shrunk towards that of all; errors are never below those that it
    gives.

    Source: Smyth (2004), doi 10.2202/1544-6115.1027 (moderated t; here with a fixed prior).

    Args:
        common: `(n,)` variance of all images.
        variances: `(2, n)` without the concept and with it.
        uncertain: `(2,)` one over their degrees of freedom.
        counted: `(2,)` what of a variance is left in the mean over the images of all classes.
        weights: `(K,)` of classes.
    """
    free = (1 / uncertain)[:, None]
    steady = (free * variances + PRIOR * common) / (free + PRIOR)
    own = (counted[:, None] * steady).sum(0)
    return torch.maximum(own, common / weights.sum()).sqrt()


def _variances(spreads: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return variances within classes without a concept and with it, of the same mix of classes.

    Args:
        spreads: `(K, 2, n)` sums of squares around the means.
        counts: `(K, 2)` images, at least 1.

    Returns:
        `(2, n)` variances, the same for both where no class has two images of either kind; and
        `(2,)` one over their degrees of freedom, of which both have a half then.
    """
    free = counts - 1
    both = counts.prod(dim=1) / counts.sum(dim=1) * (free.min(dim=1).values > 0)
    if not float(both.sum()) > 0:
        pooled = spreads.sum(dim=(0, 1)) / free.sum()
        return pooled.expand(2, -1), (2 / free.sum()).expand(2)
    shares = (both / both.sum())[:, None]
    variances = (shares[..., None] * spreads / free.clamp_min(1)[..., None]).sum(0)
    return variances, (shares.square() / free.clamp_min(1)).sum(0)
