"""Stage 2, find: signal vectors, the estimated encoding directions, from filters and rows.

Nothing here knows how the filters were found.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from concept_guard.directions.basis import CHUNK
from concept_guard.directions.reservoir import sampled

Estimator = Literal["joint", "positives", "pattern"]
RIDGE = 1e-4  # of unit moments, so that two concepts with the same rows share their signal
FLOOR = 1e-8  # share of the mean channel variance below which a factor does not vary
LEAST = 8  # positive rows for the positives-only form
LEFT = 2**14  # rows on which it is measured what concepts leave


def signal_vectors(
    rows: Tensor, filters: Tensor, biases: Tensor, estimator: Estimator = "joint"
) -> Tensor:
    """Estimate the encoding direction that belongs to each decoding direction.

    With factor `z = x . w`, present where `z > b`:

    - `joint`: the regression of the row on the gated factors of all concepts at once (a factor's
      excess over its mean in absence where the concept is present, and 0 where it is not), so
      that rows with several concepts are shared out among them; then shrunk along every axis of
      what the concepts leave of the rows, by the share of the slopes that is noise there;
    - `positives`: `cov(x, z) / var(z)` over the rows where the one concept is present;
    - `pattern`: the mean row with the concept minus the mean row without it.

    All are scaled to `w . s = 1`, which is what makes erasure along `s` idempotent.

    Source: arXiv 2509.23926, eq. 1 (positives); Haufe et al. 2014, NeuroImage 87:96-110 (joint,
    over factors that are not gated); Pahde et al. 2025, pattern-CAV (pattern). Shrinkage: James
    and Stein (1961), positive part, with the concepts as the repeated measurement.
    Departure: joint is the default. Mean cosine to the true encoders on mixtures in 64 channels,
    joint / positives: 96 concepts .998 / .954, with large distractors .935 / .890; 16 correlated
    concepts with large distractors .996 / .925. A filter that leaks little of a distractor larger
    than the concepts bends the one-concept estimate. Shrinkage matters where concepts are many and
    distractors large: in 256 channels, 64, 256 and 384 concepts, .978, .953 and .949, without it
    .967, .877 and .838. Without distractors it changes nothing.

    Args:
        rows: `(P, C)` activations.
        filters: `(K, C)` decoding directions; any non-zero scale.
        biases: `(K,)` thresholds, in units of `x . w`.
        estimator: See above.

    Returns:
        `(K, C)` encoding directions in the dtype of `filters`, units of activation per unit of
        factor. Where an estimator says nothing about a concept (no positive rows that vary, or
        nothing that its filter reads), its joint regression on the ungated factor; zeros where
        the filter reads nothing at all.
    """
    if len(filters) == 0:
        return filters.clone()
    sums = _Sums(rows, filters.float(), biases.float())
    found = {"joint": sums.joint, "positives": sums.positives, "pattern": sums.pattern}[estimator]()
    w = filters.to(torch.float64)
    found = _scaled(found, w)
    if not bool(found.isfinite().all()):
        alone = _scaled(sums.ungated(), w)
        found = torch.where(found.isfinite(), found, alone.nan_to_num())
    return found.to(filters.dtype)


class _Sums:
    """First and second moments of rows and factors, gathered chunk by chunk."""

    def __init__(self, rows: Tensor, filters: Tensor, biases: Tensor) -> None:
        self.rows, self.filters, self.biases = rows, filters, biases
        self.mean = rows[:CHUNK].float().mean(dim=0)  # near the mean; moments are taken around it
        count = absent = raw = x = torch.zeros((), dtype=torch.float64, device=rows.device)
        for part, factor, gate in self._parts():
            count = count + gate.sum(dim=0, dtype=torch.float64)
            raw = raw + factor.sum(dim=0, dtype=torch.float64)
            absent = absent + (factor * ~gate).sum(dim=0, dtype=torch.float64)
            x = x + part.sum(dim=0)
        self.count, self.total, self.shift = count, len(rows), x / len(rows)
        self.middle = raw / self.total
        self.base = absent / (self.total - count).clamp_min(1)
        self.above = (raw - absent) / count.clamp_min(1)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield from map(self._read, self.rows.split(CHUNK))

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return rows around the mean, their factors around it, and where these are present."""
        centred = rows.float() - self.mean
        factor = centred @ self.filters.T
        return centred, factor, factor + self.filters @ self.mean > self.biases

    def _against_rows(self, read: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return `(K, K)` and `(K, C)` second moments of a regressor with itself and the rows."""
        square = torch.zeros((len(self.filters),) * 2, dtype=torch.float64, device=self.rows.device)
        cross = torch.zeros(self.filters.shape, dtype=torch.float64, device=self.rows.device)
        total = torch.zeros(len(self.filters), dtype=torch.float64, device=self.rows.device)
        for part, factor, gate in self._parts():
            regressor = read(factor, gate)
            total += regressor.sum(dim=0, dtype=torch.float64)
            square += (regressor.T @ regressor).to(torch.float64)
            cross += (regressor.T @ part).to(torch.float64)
        mean = total / self.total
        square = square / self.total - torch.outer(mean, mean)
        return square, cross / self.total - torch.outer(mean, self.shift)

    def joint(self) -> Tensor:
        base = self.base.float()
        square, cross = self._against_rows(lambda factor, gate: (factor - base) * gate)
        slopes, variance = _regressed(square, cross)
        return _shrunk(slopes, variance / self.total, self._left(slopes, base))

    def _left(self, slopes: Tensor, base: Tensor) -> Tensor:
        """Return the `(C, C)` covariance of what slopes on gated factors leave of some rows."""
        some = sampled(self.rows, LEFT, torch.Generator().manual_seed(0))
        centred, factor, gate = self._read(some)
        left = centred - ((factor - base) * gate) @ slopes.float()
        left = left - left.mean(dim=0)
        return (left.T @ left / len(left)).to(torch.float64)

    def pattern(self) -> Tensor:
        square, cross = self._against_rows(lambda _, gate: gate.float())
        return cross / square.diagonal()[:, None]

    def positives(self) -> Tensor:
        above = self.above.float()
        square, cross = self._against_rows(lambda factor, gate: (factor - above) * gate)
        variance = square.diagonal() * self.total / self.count.clamp_min(1)
        reach = self.filters.double().square().sum(dim=1) * self._variance()
        usable = (self.count >= LEAST) & (variance > FLOOR * reach)
        return torch.where(usable[:, None], cross / square.diagonal()[:, None], torch.nan)

    def ungated(self) -> Tensor:
        middle = self.middle.float()
        square, cross = self._against_rows(lambda factor, _: factor - middle)
        return _regressed(square, cross)[0]

    def _variance(self) -> float:
        squares = sum(float((p - self.shift.float()).square().sum()) for p, _, _ in self._parts())
        return squares / self.rows.numel()


def _regressed(square: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Return the joint regression on regressors with these moments, each scaled to unit size.

    The second result is the `(K,)` variance of slopes from one row of unit variance.
    """
    size = square.diagonal().clamp_min(0).sqrt()
    scale = torch.where(size > 0, 1 / size.clamp_min(1e-300), 0.0)
    unit = scale[:, None] * square * scale
    unit.diagonal().add_(RIDGE)
    inverse = torch.linalg.inv(unit)
    return scale[:, None] * (inverse @ (scale[:, None] * cross)), scale**2 * inverse.diagonal()


def _shrunk(slopes: Tensor, variance: Tensor, left: Tensor) -> Tensor:
    """Return slopes without the share that their noise explains, along every axis of what is left.

    The axes are those of its correlations, so that the scale of channels does not matter. In units
    of their standard errors slopes along one axis have the mean square 1 if there is nothing but
    noise. Needs three concepts; fewer stay as they are.
    """
    deviation = left.diagonal().sqrt()
    noisy = deviation > 0
    inverse = torch.where(noisy, 1 / deviation.clamp_min(1e-300), 0.0)
    noise, axes = torch.linalg.eigh(inverse[:, None] * left * inverse)
    along = (slopes * inverse) @ axes
    errors = variance[:, None] * noise.clamp_min(0)
    square = (along.square() / errors.clamp_min(1e-300)).sum(dim=0)
    concepts = int((variance > 0).sum())
    kept = (1 - max(concepts - 2, 0) / square.clamp_min(1e-300)).clamp_min(0)
    return torch.where(noisy, (along * kept) @ axes.T * deviation, slopes)


def _scaled(signals: Tensor, filters: Tensor) -> Tensor:
    """Return signals scaled to `w . s = 1`; NaN where a filter reads nothing of its signal."""
    read = (signals * filters).sum(dim=1)
    enough = read > 1e-6 * signals.norm(dim=1) * filters.norm(dim=1)
    return torch.where(enough[:, None], signals / read[:, None], torch.nan)
