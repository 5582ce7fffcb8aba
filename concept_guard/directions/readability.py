"""Stage 2, find: how well a concept whose presence is known can be read from rows.

Nothing here knows what was done to the rows, or what follows from the answer.
"""

import numpy as np
import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor

from concept_guard.directions.scatter import FOLDS, folds
from concept_guard.directions.threads import few_threads
from concept_guard.directions.within_class import root_of, shrinkage_of

LEAST_CARRIERS = 8  # images, and as many without, in the classes that have both: two per fold


def readability(
    rows: Tensor, labels: Tensor, present: Tensor, *, seed: int
) -> tuple[float | None, ...]:
    """Return how well fresh linear probes tell the rows of a class with a concept from the others.

    Every image is read by discriminants that were fitted without its fold. Rows are compared
    within a class and a fold, so that neither the class nor the scale of a fold helps; the shares
    of right comparisons are weighed by `n1 n0 / (n1 + n0 + 1)`.

    Source: van Elteren (1960), Bulletin of the International Statistical Institute 37:351-361
    (rank tests in strata, and their weights).

    Args:
        rows: `(N, Q, C)` activations.
        labels: `(N,)` classes.
        present: `(N, Q, K)` bool, which rows carry which concept.
        seed: Chooses the folds.

    Returns:
        For each concept the AUC, .5 if nothing is read; None where too few images are in classes
        that have both kinds.
    """
    carried = present.any(dim=1)
    positions = rows.shape[1]
    fold = folds(labels * 2 + carried.any(dim=1).long(), seed).repeat_interleave(positions)
    of_rows = labels.repeat_interleave(positions)
    flat, marks = rows.flatten(0, 1), present.flatten(0, 1)
    with few_threads(flat.numel()):
        factors = _cross_fitted(flat, of_rows, marks, fold).cpu().numpy()
    strata = (of_rows * FOLDS + fold).cpu().numpy()
    return tuple(
        _compared(factors[:, k], marks[:, k].cpu().numpy(), strata)
        if _enough(labels, carried[:, k])
        else None
        for k in range(present.shape[2])
    )


def _enough(labels: Tensor, carried: Tensor) -> bool:
    group = labels * 2 + carried.long()
    count = torch.bincount(group, minlength=2 * (int(labels.max()) + 1)).view(-1, 2)
    return int(count[(count > 0).all(dim=1)].sum(dim=0).amin()) >= LEAST_CARRIERS


def _cross_fitted(rows: Tensor, labels: Tensor, present: Tensor, fold: Tensor) -> Tensor:
    """Return `(P, K)` factors, each read by a discriminant that did not see the fold of its row.

    One covariance within classes serves all concepts: that presence adds to it along the signal
    changes the length of a discriminant, not its direction.
    """
    factors = torch.zeros(present.shape, dtype=rows.dtype, device=rows.device)
    for left_out in range(FOLDS):
        at = (fold != left_out).nonzero().flatten()
        residual = rows[at] - _class_means(rows[at], labels[at])
        signals = present[at].to(rows.dtype).T @ residual  # (K, C): residuals add up to 0 per class
        covariance = (residual.T @ residual).to(torch.float64) / len(at)
        shrunk, level = shrinkage_of(residual, covariance), covariance.diagonal().mean()
        if float(level) == 0.0:
            continue
        covariance *= 1 - shrunk
        covariance.diagonal().add_(max(shrunk, 1e-6) * level)
        root = root_of(covariance)
        filters = torch.cholesky_solve(signals.T.to(torch.float64), root).to(rows.dtype)
        factors[fold == left_out] = rows[fold == left_out] @ filters
    return factors


def _class_means(rows: Tensor, labels: Tensor) -> Tensor:
    """Return for every row the mean of its class."""
    count = torch.bincount(labels).clamp_min(1)
    total = torch.zeros((len(count), rows.shape[1]), dtype=rows.dtype, device=rows.device)
    total.index_add_(0, labels, rows)
    return (total / count[:, None])[labels]


def _compared(factors: np.ndarray, carried: np.ndarray, strata: np.ndarray) -> float | None:
    """Return the share of right comparisons over all strata that have rows of both kinds."""
    right = weights = 0.0
    for stratum in np.intersect1d(strata[carried], strata[~carried]):
        at = strata == stratum
        on = carried[at]
        n1, n0 = int(on.sum()), int((~on).sum())
        ranks = scipy.stats.rankdata(factors[at])[on].sum()
        right += float(ranks - n1 * (n1 + 1) / 2) / (n1 + n0 + 1)
        weights += n1 * n0 / (n1 + n0 + 1)
    return right / weights if weights else None
