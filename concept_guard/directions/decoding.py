"""Stage 2, find: filters and biases that cut unlabelled rows into few, clear memberships.

Nothing here knows about models or signal vectors. All work happens in a reduced basis: rows are
standardised per channel and rotated onto their leading principal axes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_guard.directions import losses

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Weights and schedule of the decoding objective.

    Source: arXiv 2509.23926, appendix table 7, steps (a) and (b).
    Departure: hundreds of large-batch updates instead of 800 + 2,000 epochs; the terms that the
    source adds in its later steps are not part of this objective.

    Attributes:
        sparsity: Weights of the sparsity term in the constrained and the free step.
        max_activation: Weight of the maximum activation term.
        inactive: Weights of the inactive classifier term in both steps.
        margin: Weight of the margin term.
        alignment: Weight of the uncertainty region alignment term (needs a head).
        tau: Share of all rows that is spread over the concepts as least support.
        updates: Numbers of updates of both steps.
        warm_updates: Number of updates of a warm start.
        rates: Adam's learning rates of both steps.
        batch: Rows per update.
    """

    sparsity: tuple[float, float] = (2.6, 0.85)
    max_activation: float = 2.8
    inactive: tuple[float, float] = (5.0, 15.0)
    margin: float = 0.6
    alignment: float = 0.25
    tau: float = 0.9
    updates: tuple[int, int] = (300, 300)
    warm_updates: int = 200
    rates: tuple[float, float] = (0.02, 0.01)
    batch: int = 4096


@dataclass(frozen=True, eq=False)
class Basis:
    """An affine map between activations and the reduced basis.

    Attributes:
        mean: `(C,)` mean activation.
        inward: `(C, R)` maps centred activations to reduced coordinates.
        outward: `(R, C)` maps reduced coordinates back to centred activations.
    """

    mean: Tensor
    inward: Tensor
    outward: Tensor

    @classmethod
    def of(cls, rows: Tensor, *, rank: int, floor: float = 1e-6) -> "Basis":
        """Fit the basis: standardise the live channels, keep the leading principal axes.

        Args:
            rows: `(P, C)` activations.
            rank: Largest number of axes kept.
            floor: Channels whose deviation is below this share of the largest one are dead and
                left out. Dimensionless.

        Returns:
            The basis, in float32.
        """
        x = rows.to(torch.float64)
        mean = x.mean(dim=0)
        deviation = x.std(dim=0)
        live = deviation > floor * deviation.max()
        inverse = torch.where(live, 1.0 / deviation.clamp_min(1e-300), 0.0)
        standard = (x - mean) * inverse
        values, axes = torch.linalg.eigh(standard.T @ standard / len(x))
        keep = values > 1e-6 * values.max()
        axes = axes[:, keep].flip(1)[:, :rank]  # leading axes first
        inward = inverse[:, None] * axes
        outward = axes.T * torch.where(live, deviation, 0.0)
        return cls(mean.float(), inward.float(), outward.float())


class Search:
    """Descends the objective on fixed rows, from a random start or from earlier filters.

    Args:
        reduced: `(P, R)` rows in the reduced basis.
        basis: The map that made them; leads back to activations for the head.
        head: Maps `(B, C)` activations to `(B, M)` logits, or None.
        objective: Weights and schedule.
        generator: Draws the batches.
    """

    def __init__(
        self,
        reduced: Tensor,
        basis: Basis,
        head: Head | None,
        objective: Objective,
        generator: torch.Generator,
    ) -> None:
        self.reduced, self.basis, self.head = reduced, basis, head
        self.objective, self.generator = objective, generator

    def from_start(self, start: Tensor) -> tuple[Tensor, Tensor, float]:
        """Run the orthonormal step with one shared margin, then the free step.

        Args:
            start: `(K, R)` first filters; orthonormalised here when K <= R.

        Returns:
            `(K, R)` filters and `(K,)` biases, and the final loss on all rows.
        """
        o = self.objective
        filters = orthonormal(start).requires_grad_()
        raw = self.reduced @ filters.detach().T
        share = o.tau / len(start)
        biases = torch.quantile(raw[: 2**16], 1 - share, dim=0).requires_grad_()
        log_slope = torch.zeros((), device=start.device).requires_grad_()
        optimizer = torch.optim.Adam([filters, biases, log_slope], lr=o.rates[0], betas=(0.9, 0.99))
        for update in range(o.updates[0]):
            batch = self._batch()
            slope = log_slope.exp()
            factors = (batch @ filters.T - biases) * slope
            loss = self._terms(batch, factors, filters, biases, slope, stage=0)
            self._descend(optimizer, loss, update / o.updates[0], o.rates[0])
            with torch.no_grad():
                filters.copy_(orthonormal(filters))
        slope = log_slope.exp().detach()
        return self._free(filters.detach() * slope, biases.detach() * slope, o.updates[1])

    def refine(self, filters: Tensor, biases: Tensor) -> tuple[Tensor, Tensor, float]:
        """Continue the free step from the filters and biases of an earlier fit.

        Args:
            filters: `(K, R)` earlier filters in this basis.
            biases: `(K,)` earlier biases in this basis.

        Returns:
            `(K, R)` filters and `(K,)` biases, and the final loss on all rows.
        """
        return self._free(filters, biases, self.objective.warm_updates)

    def _free(self, filters: Tensor, biases: Tensor, updates: int) -> tuple[Tensor, Tensor, float]:
        """Return the result of the free step: own direction, margin and bias for every filter."""
        o = self.objective
        filters = filters.clone().requires_grad_()
        biases = biases.clone().requires_grad_()
        optimizer = torch.optim.Adam([filters, biases], lr=o.rates[1], betas=(0.9, 0.99))
        for update in range(updates):
            batch = self._batch()
            factors = batch @ filters.T - biases
            one = torch.ones((), device=filters.device)
            loss = self._terms(batch, factors, filters, biases, one, stage=1)
            self._descend(optimizer, loss, update / updates, o.rates[1])
        filters, biases = filters.detach(), biases.detach()
        with torch.no_grad():
            whole = self.reduced @ filters.T - biases
            final = self._interpretability(whole, filters, stage=1)
        return filters, biases, float(final)

    def _batch(self) -> Tensor:
        """Return all rows, or a random batch when there are more than fit one."""
        count, size = len(self.reduced), self.objective.batch
        if count <= size:
            return self.reduced
        device = self.generator.device
        pick = torch.randint(count, (size,), generator=self.generator, device=device)
        return self.reduced[pick.to(self.reduced.device)]

    def _terms(
        self,
        batch: Tensor,
        factors: Tensor,
        filters: Tensor,
        biases: Tensor,
        slope: Tensor,
        *,
        stage: int,
    ) -> Tensor:
        loss = self._interpretability(factors, filters * slope, stage=stage)
        if self.head is not None and len(filters) <= filters.shape[1]:
            loss = loss + self.objective.alignment * self._alignment(
                batch, filters, biases, self.head
            )
        return loss

    def _interpretability(self, factors: Tensor, filters: Tensor, *, stage: int) -> Tensor:
        """Return the weighted sparsity, maximum activation, inactive and margin terms."""
        o = self.objective
        sparse = losses.sparsity(factors).mean()
        active = losses.max_activation(factors).mean()
        idle = losses.inactive(factors, o.tau / factors.shape[1])
        wide = losses.margin(filters)
        return (
            o.sparsity[stage] * sparse
            + o.max_activation * active
            + o.inactive[stage] * idle
            + o.margin * wide
        )

    def _alignment(self, batch: Tensor, filters: Tensor, biases: Tensor, head: Head) -> Tensor:
        """Return how sure the head is of rows moved to where all detectors are undecided."""
        some = batch[: min(len(batch), 1024)]
        residual = some @ filters.T - biases
        gram = filters @ filters.T
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        steps: Tensor = torch.linalg.solve(gram + ridge, residual.T)
        share = 0.5 + 0.4 * torch.rand(
            (len(some), 1), generator=self.generator, device=self.generator.device
        ).to(batch.device)
        moved = some - share * (steps.T @ filters)
        return losses.confidence(head(self.basis.mean + moved @ self.basis.outward))

    def _descend(
        self, optimizer: torch.optim.Optimizer, loss: Tensor, progress: float, rate: float
    ) -> None:
        """Take one Adam step; the rate falls to a tenth over the last half."""
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, 1.9 - 1.8 * progress)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def orthonormal(filters: Tensor) -> Tensor:
    """Return the nearest orthonormal rows (polar factor) when K <= R, else unit rows.

    Args:
        filters: `(K, R)` vectors.

    Returns:
        `(K, R)` orthonormal rows, or unit rows when there are more rows than coordinates.
    """
    if len(filters) > filters.shape[1]:
        return torch.nn.functional.normalize(filters, dim=1)
    values, vectors = torch.linalg.eigh((filters @ filters.T).to(torch.float64))
    root = vectors @ torch.diag(values.clamp_min(1e-12).rsqrt()) @ vectors.T
    nearest: Tensor = root.to(filters.dtype) @ filters
    return nearest
