"""Stage 4b: act on tracked concepts: project them out, rebalance the loss, bake.

Nothing here knows why a concept was flagged or how its pair is kept true.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from concept_guard.errors import BakeError
from concept_guard.influence import steps
from concept_guard.tracking import Tracked

WORST_CONDITION = 1e3  # of S W'; beyond it, concepts overlap too much to be told apart
LARGEST_WEIGHT = 5.0  # larger ones destroyed training (0.04 instead of 0.76 on unmarked digits)
MEMORY = 0.998  # decay per update of the group counts: about 500 updates


class Projection:
    """The oblique projection of several concepts, as one function of rows.

    It can be pickled and copied with the model it acts on, and is exactly affine, so that it can
    be folded into a linear map behind it.
    """

    def __init__(self, filters: Tensor, moves: Tensor, reference: Tensor) -> None:
        self.filters, self.moves, self.reference = filters, moves, reference

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows with the concepts' factors at their reference.

        Args:
            rows: `(..., C)` activations of any floating type.

        Returns:
            `(..., C)` corrected activations of the same type.
        """
        x = rows.to(self.filters.dtype)
        with torch.autocast(x.device.type, enabled=False):  # `x W' - r` cancels
            excess = x @ self.filters.T - self.reference
            return (x - excess @ self.moves).to(rows.dtype)


def projection(tracked: Sequence[Tracked], strength: float) -> Projection | None:
    """Build the projection of all tracked concepts at once.

    Concepts are taken in order; one that would make `S W'` ill-conditioned is left out with a
    warning, because dividing by it would blow activations up.

    Args:
        tracked: Concepts to project out.
        strength: Share of the excess factor that is removed, in (0, 1].

    Returns:
        The projection, or None if there is nothing to project out.
    """
    chosen: list[Tracked] = []
    for concept in tracked:
        filters, signals = _stacked([*chosen, concept])
        condition = float(torch.linalg.cond(signals.double() @ filters.double().T))
        if condition <= WORST_CONDITION:
            chosen.append(concept)
        else:
            warnings.warn(
                f"concept {concept.concept} is not projected out: it overlaps with concepts "
                f"{[c.concept for c in chosen]} (condition {condition:.0f}, expected at most "
                f"{WORST_CONDITION:.0f}). Restore one of them.",
                stacklevel=2,
            )
    if not chosen:
        return None
    filters, signals = _stacked(chosen)
    reference = torch.tensor([c.pair.absent for c in chosen]).to(filters)
    moves = strength * steps(filters, signals)
    return Projection(filters, moves.to(filters.dtype), reference)


def _stacked(tracked: Sequence[Tracked]) -> tuple[Tensor, Tensor]:
    filters = torch.stack([c.pair.filter for c in tracked])
    return filters, torch.stack([c.pair.signal for c in tracked])


class GroupCounts:
    """How many training samples of each class carry each tracked concept, with a fading memory.

    Attributes:
        counts: Concept id to `(M, 2)` float64 counts, absent and present, on the CPU.
    """

    def __init__(self) -> None:
        self.counts: dict[int, Tensor] = {}

    def start(self, concept: int, labels: Tensor, carried: Tensor, num_classes: int) -> None:
        """Begin to count a concept with its shares on the probe.

        Args:
            concept: Id of the concept.
            labels: `(N,)` classes of the probe.
            carried: `(N,)` bool, which probe images carry it.
            num_classes: M.
        """
        self.counts[concept] = _grouped(labels, carried, num_classes)

    def weights(self, tracked: Sequence[Tracked], rows: Tensor, labels: Tensor) -> Tensor:
        """Count a training batch and return the weight of each of its samples.

        Within a class, the group that is rarer (concept present or absent) weighs more, by the
        ratio of the shares, at most five times as much; the mean weight over the counted samples
        is 1, so that the learning rate keeps its meaning. Several concepts multiply.

        Args:
            tracked: Concepts to rebalance.
            rows: `(B, Q, C)` activations of the batch, before any correction.
            labels: `(B,)` classes.

        Returns:
            `(B,)` positive weights in float32, on the device of the rows.
        """
        weight = torch.ones(len(labels), dtype=torch.float64, device=rows.device)
        for concept in tracked:
            with torch.autocast(rows.device.type, enabled=False):
                factor = rows @ concept.pair.filter.to(rows)
            carried = (factor > concept.pair.threshold).any(dim=1)
            known = self.counts[concept.concept]
            known.mul_(MEMORY).add_(_grouped(labels, carried, len(known)))
            table = _table(known).to(rows.device)
            weight *= table[labels, carried.long()]
        return weight.clamp(1 / LARGEST_WEIGHT, LARGEST_WEIGHT).float()


def obstacle(loss: Tensor, targets: Tensor | None, rows: Tensor | None, num_classes: int) -> str:
    """Return why the samples of a batch cannot be weighed, or nothing.

    Args:
        loss: A scalar or `(B,)` losses.
        targets: `(B,)` classes, if they were given.
        rows: `(B, Q, C)` activations of the batch, if the tap has them.
        num_classes: M.

    Returns:
        The reason with the way out.
    """
    if loss.ndim == 0:
        return "guard.loss got a scalar; use a criterion with reduction='none'"
    if targets is None:
        return "guard.loss got no targets; call guard.loss(loss, labels)"
    if targets.ndim != 1 or targets.is_floating_point():
        return "targets are soft; pass class indices, as before Mixup or CutMix"
    if targets.dtype == torch.bool or targets.is_complex():
        return f"targets are {targets.dtype}; pass class indices of an integer type"
    if rows is None or len(rows) != len(loss):
        seen = "none" if rows is None else str(len(rows))
        return f"the last forward pass gave {seen} of {len(loss)} samples to the tap"
    if not bool(torch.isfinite(rows).all()):
        return "activations of the batch hold NaN or infinite values; lower the learning rate"
    wrong = sorted({t for t in targets.tolist() if not 0 <= t < num_classes})
    return f"targets {wrong} are outside [0, {num_classes})" if wrong else ""


def _grouped(labels: Tensor, carried: Tensor, num_classes: int) -> Tensor:
    group = labels.cpu() * 2 + carried.long().cpu()
    return torch.bincount(group, minlength=2 * num_classes).view(-1, 2).double()


def _table(counts: Tensor) -> Tensor:
    """Return `(M, 2)` weights: rarer groups up to five times the commoner one, mean 1."""
    ratio = counts.max(dim=1, keepdim=True).values / counts.clamp_min(1e-9)
    raw = ratio.clamp(1.0, LARGEST_WEIGHT)
    return raw * counts.sum() / (raw * counts).sum().clamp_min(1e-9)


def bake_into(classifier: nn.Linear | None, edit: Projection, tap: str) -> None:
    """Fold a projection into the linear map behind it, exactly.

    With `x' = x - (x W' - r) M`, the map `A x' + a` becomes `(A - A M' W) x + a + A M' r`.

    Args:
        classifier: The map behind the tap, changed in place; its parameters stay the same objects.
        edit: The projection in front of it.
        tap: Where the projection acts, for the message.

    Raises:
        BakeError: If no plain linear map with a bias follows the tap.
    """
    if classifier is None or classifier.bias is None:
        found = "a classifier without bias" if classifier is not None else "no plain linear map"
        raise BakeError(
            f"tap {tap!r} is followed by {found}, expected a Linear with bias; the correction "
            "cannot be folded in exactly. Use tap: pre_logits on a model with a plain linear "
            "head, or keep the guard attached when predicting."
        )
    with torch.no_grad():
        a = classifier.weight.to(torch.float64)
        pull = a @ edit.moves.to(a).T  # (M, K): how the logits move per unit of each factor
        classifier.weight.copy_(a - pull @ edit.filters.to(a))
        classifier.bias.add_((pull @ edit.reference.to(a)).to(classifier.bias.dtype))
