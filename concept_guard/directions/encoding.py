"""Stage 2, find: signal vectors, the estimated encoding directions, from filters and rows.

Nothing here knows how the filters were found.
"""

import torch
from torch import Tensor


def signal_vectors(
    rows: Tensor, filters: Tensor, biases: Tensor, *, floor: float = 1e-8, least: int = 8
) -> tuple[Tensor, Tensor]:
    """Estimate the encoding direction that belongs to each decoding direction.

    With factor `z = x . w`, the signal vector is `cov(x, z) / var(z)` over the rows where the
    concept is present (`z > b`): the regression of the activation on the factor. It satisfies
    `w . s = 1`, which is what makes erasure along `s` idempotent.

    Source: arXiv 2509.23926, eq. 1 (positives only).
    Departure: where the positives do not vary along the filter, or fewer than `least` rows are
    positive, the moments of all rows are used (Haufe et al. 2014, NeuroImage 87:96-110), so
    that a rare concept still has a direction; the second result says which.

    Args:
        rows: `(P, C)` activations.
        filters: `(K, C)` decoding directions; any non-zero scale.
        biases: `(K,)` thresholds, in units of `x . w`.
        floor: Least factor variance that counts as variation, as a share of the mean channel
            variance times the squared filter norm. Dimensionless.
        least: Least number of positive rows for the positives-only form.

    Returns:
        `(K, C)` encoding directions in the dtype of `filters`, units of activation per unit of
        factor; and `(K,)` bool, true where the positives-only form was used.
    """
    x = rows.to(torch.float64)
    x = x - x.mean(dim=0)
    w = filters.to(torch.float64)
    raw = rows.to(torch.float64) @ w.T  # (P, K)
    gate = (raw > biases.to(torch.float64)).to(torch.float64)
    by_positives, variance = _regression(x, raw, gate)
    scale = x.square().mean() * w.square().sum(dim=1)
    usable = (gate.sum(dim=0) >= least) & (variance > floor * scale)
    if not bool(usable.all()):
        by_all, variance_all = _regression(x, raw, torch.ones_like(gate))
        by_positives = torch.where(usable[:, None], by_positives, by_all)
        dead = variance_all <= floor * scale
        by_positives[dead & ~usable] = 0.0
    return by_positives.to(filters.dtype), usable


def _regression(x: Tensor, raw: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(K, C)` slopes of the rows on each gated factor, and its `(K,)` variance."""
    count = gate.sum(dim=0).clamp_min(1.0)
    mean = (gate * raw).sum(dim=0) / count
    centred = gate * (raw - mean)
    variance = (centred * raw).sum(dim=0) / count
    slope = centred.T @ x / count[:, None]
    return slope / variance.clamp_min(torch.finfo(x.dtype).tiny)[:, None], variance
