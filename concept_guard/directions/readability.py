"""Stage 2, find: how well a concept whose presence is known can be read from rows.

Nothing here knows what was done to the rows, or what follows from the answer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from concept_guard.directions.threads import few_threads
from concept_guard.directions.within_class import cross_fitted, folds

LEAST_CARRIERS = 8  # images, and as many without, in the classes that have both: two per fold


@dataclass(frozen=True)
class Readability:
    """How well a fresh linear probe tells the rows of a class with a concept from those without.

    Attributes:
        auc: Chance that of two such rows the right one is read higher; .5 if nothing is read.
        error: Standard error of that chance where nothing can be read.
    """

    auc: float
    error: float


def readability(rows: Tensor, labels: Tensor, present: Tensor, *, seed: int) -> Readability | None:
    """Fit a linear discriminant on most images, read the others, and compare within classes.

    Every image is read by a discriminant that has not seen it. Rows are compared within a class
    and a fold, so that neither the class nor the scale of a fold helps; these comparisons are
    weighed by `n1 n0 / (n1 + n0 + 1)`.

    Source: van Elteren (1960), Bulletin of the International Statistical Institute 37:351-361
    (rank tests in strata, and their weights).

    Args:
        rows: `(N, Q, C)` activations.
        labels: `(N,)` classes.
        present: `(N, Q)` bool, which rows carry the concept.
        seed: Chooses the folds.

    Returns:
        The result, or None where too few images are in classes that have both kinds.
    """
    carried = present.any(dim=1)
    group = labels * 2 + carried.long()
    count = torch.bincount(group, minlength=2 * (int(labels.max()) + 1)).view(-1, 2)
    if int(count[(count > 0).all(dim=1)].sum(dim=0).amin()) < LEAST_CARRIERS:
        return None
    positions = rows.shape[1]
    flat, mask = rows.flatten(0, 1), present.flatten()
    of_rows = labels.repeat_interleave(positions)
    fold = folds(group, seed).repeat_interleave(positions)
    with few_threads(flat.numel()):
        read = cross_fitted(flat - flat.mean(dim=0), of_rows, mask, None, fold)
    return None if read is None else _compared(read[0], of_rows, mask, fold)


def _compared(factor: Tensor, labels: Tensor, present: Tensor, fold: Tensor) -> Readability | None:
    """Return the mean chance over all classes and folds that have rows of both kinds."""
    strata = (labels * (int(fold.max()) + 1) + fold).cpu().numpy()
    factors, carried = factor.cpu().numpy(), present.cpu().numpy()
    higher = weights = 0.0
    for stratum in np.intersect1d(strata[carried], strata[~carried]):
        at = strata == stratum
        on = carried[at]
        n1, n0 = int(on.sum()), int((~on).sum())
        ranks = rankdata(factors[at])[on].sum()
        weight = n1 * n0 / (n1 + n0 + 1)
        higher += weight * (ranks - n1 * (n1 + 1) / 2) / (n1 * n0)
        weights += weight
    return Readability(float(higher / weights), (12 * weights) ** -0.5) if weights else None
