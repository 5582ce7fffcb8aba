"""Stage 4b: act on tracked concepts: project them out, rebalance the loss, bake.

Nothing here knows why a concept was flagged or how its pair is kept true.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from concept_guard.directions import Subspace
from concept_guard.errors import BakeError
from concept_guard.ranks import ALONE, Ranks
from concept_guard.tracking import Tracked, images_with

LARGEST_WEIGHT = 5.0  # larger ones destroyed training (0.04 instead of 0.76 on unmarked digits)
STEP = 0.1  # width of the step of a gate, as a share of the way from absence to presence
MEMORY = 0.998  # decay per update of the group counts: about 500 updates


class Gate:
    """How surely a row carries any of some concepts, as their detectors read it.

    Source: arXiv 2509.23926, appendix I, and Bareeva et al. (2024), arXiv 2404.09601: a
    concept is taken out of the images in which it is detected. A soft step half-way between
    absence and presence, a tenth of the way wide. On a CIFAR-10 patch with known images it makes
    no difference (.586 of the clean and .566 of the patched images right, .587 and .565 without;
    one network, not trained on), hence it is off unless asked for.

    Args:
        concepts: Whose pairs read the rows; at least one.
    """

    def __init__(self, concepts: Sequence[Tracked]) -> None:
        pairs = [t.pair for t in concepts]
        self.filters = torch.stack([p.filter for p in pairs])
        self.thresholds = self.filters.new_tensor([p.threshold for p in pairs])
        self.widths = self.filters.new_tensor([max(STEP * abs(p.gain), 1e-6) for p in pairs])

    def __call__(self, rows: Tensor) -> Tensor:
        """Return `(..., 1)` shares between 0 (no concept) and 1, for `(..., C)` rows."""
        read = (rows @ self.filters.T - self.thresholds) / self.widths
        return read.sigmoid().amax(dim=-1, keepdim=True)


class Projection:
    """The oblique projection of several concepts, as one function of rows.

    It can be pickled and copied with the model it acts on, and without a gate is exactly affine,
    so that it can be folded into a linear map behind it.
    """

    def __init__(
        self, filters: Tensor, moves: Tensor, reference: Tensor, gate: Gate | None = None
    ) -> None:
        self.filters, self.moves, self.reference = filters, moves, reference
        self.gate = gate

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows with the concepts' factors at their reference.

        Args:
            rows: `(..., C)` activations of any floating type.

        Returns:
            `(..., C)` corrected activations of the same type.
        """
        x = rows.to(self.filters.dtype)
        with torch.autocast(x.device.type, enabled=False):  # `x W' - r` cancels
            move = (x @ self.filters.T - self.reference) @ self.moves
            return (x - (move if self.gate is None else self.gate(x) * move)).to(rows.dtype)


def projection(subspace: Subspace, strength: float, gate: Gate | None = None) -> Projection:
    """Return the projection that takes a subspace out of rows.

    Args:
        subspace: Of all concepts that are to be projected out.
        strength: Share of the excess factors that is removed, in (0, 1].
        gate: Says of which rows; None for all.

    Returns:
        The projection.
    """
    return Projection(subspace.filters, strength * subspace.signals, subspace.absent, gate)


def calibrated(
    subspace: Subspace, rows: Tensor, labels: Tensor, carried: Tensor, classifier: nn.Linear
) -> Subspace:
    """Choose the level to leave behind such that the predictions fit the classes of the probe.

    Every row is left at the same level, so that it only adds a constant to each logit. The mean
    of the rows without a concept is a wrong one where the concepts are many and few rows have
    none: these are rows of something else, and everything would be taken for that. The level of
    the highest likelihood is as convex to find as a logistic regression; it is held near the
    first one by a prior of one standard deviation of the rows within a class. In every class the
    rows with and without a concept weigh the same in all: the class that leaned on the mark is to
    be recognised again, but not at the price of those that are taken for it.

    Departure: of ten colours of digits nine were found and erased. At the level of rows without
    them, those of the tenth colour, .41 of test images were right (.51 with no erasure at all), at
    this level .71; on another seed, with eight found, .68 and .77 (1 % conflicting colours).

    Args:
        subspace: With a level to start from.
        rows: `(P, C)` activations.
        labels: `(P,)` classes.
        carried: `(P,)` bool, which rows carry any of the concepts.
        classifier: The linear map behind the rows.

    Returns:
        The subspace with another level.
    """
    counts = grouped(labels, carried, classifier.out_features)
    weights = weight_table(counts, math.inf).to(rows.device)[labels, carried.long()]
    with torch.no_grad():
        weight, f = classifier.weight.to(torch.float64), subspace.filters.to(torch.float64)
        pull = subspace.signals.to(torch.float64) @ weight.T  # (R, M): logits per unit of level
        bias = 0.0 if classifier.bias is None else classifier.bias.to(torch.float64)
        x = rows.to(torch.float64)
        start = subspace.absent.to(torch.float64)
        logits = x @ weight.T - (x @ f.T - start) @ pull + bias
    shift = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS([shift], max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        losses = functional.cross_entropy(logits + shift @ pull, labels, reduction="none")
        value = (weights * losses).sum() + 0.5 * shift.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return replace(subspace, absent=(start + shift.detach()).to(subspace.absent.dtype))


def losses_without(
    rows: Tensor, labels: Tensor, classifier: nn.Linear, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the cross entropy of training samples with concepts projected out.

    Rows are what was captured, so that the gradient reaches the classifier alone.

    Departure: the network itself is not trained under the projection, as it was before. What it
    learns then is to show the concept in other ways; a classifier that never saw projected rows
    makes less of them. On a CIFAR-10 network with a planted patch, true membership and weights up
    to 5, .578 of the patched and .622 of the clean images were right when all was trained under
    the projection, .587 and .605 when nothing was, .593 and .618 when the classifier was; on
    digits with 1 % conflicting colours .48, .77 and .80 (one seed each).

    Args:
        rows: `(B, Q, C)` activations of the batch, before any correction.
        labels: `(B,)` classes.
        classifier: The linear map behind them.
        edit: Takes the concepts out of rows.

    Returns:
        `(B,)` losses.
    """
    with torch.autocast(rows.device.type, enabled=False):
        projected = edit(rows)[:, 0].to(classifier.weight.dtype)
        logits = functional.linear(projected, classifier.weight, classifier.bias)
        return functional.cross_entropy(logits, labels, reduction="none")


class GroupCounts:
    """How many training samples of each class carry each tracked concept, with a fading memory.

    Args:
        ranks: The processes that train.

    Attributes:
        counts: Concept id to `(M, 2)` float64 counts, absent and present, on the CPU.
    """

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.counts: dict[int, Tensor] = {}
        self._ranks = ranks

    def start(self, concept: int, labels: Tensor, carried: Tensor, num_classes: int) -> None:
        """Begin to count a concept with its shares on the probe.

        Args:
            concept: Id of the concept.
            labels: `(N,)` classes of the probe.
            carried: `(N,)` bool, which probe images carry it.
            num_classes: M.
        """
        self.counts[concept] = grouped(labels, carried, num_classes)

    def weights(
        self, tracked: Sequence[Tracked], rows: Tensor, labels: Tensor, strength: float = 1.0
    ) -> Tensor:
        """Count a training batch and return the weight of each of its samples.

        All processes count together: their batches weigh as one.
        Within a class, the group that is rarer (concept present or absent) weighs more, by the
        ratio of the shares to the power of the strength, at most five times as much; the mean
        weight over the counted samples is 1, so that the learning rate keeps its meaning. Several
        concepts multiply.

        Args:
            tracked: Concepts to rebalance.
            rows: `(B, Q, C)` activations of the batch, before any correction.
            labels: `(B,)` classes.
            strength: Share of the log ratio to make up for, in [0, 1].

        Returns:
            `(B,)` positive weights in float32, on the device of the rows.
        """
        if not tracked:
            return torch.ones(len(labels), device=rows.device)
        carried, ids = images_with(tracked, rows), [concept.concept for concept in tracked]
        known = torch.stack([self.counts[i] for i in ids])
        seen = self._ranks.summed(grouped(labels, carried, known.shape[1]))
        known = known.mul_(MEMORY).add_(seen)
        self.counts |= dict(zip(ids, known, strict=True))
        table = weight_table(known, LARGEST_WEIGHT, strength).to(rows.device)
        each = torch.arange(len(ids), device=rows.device)[:, None]
        weight = table[each, labels.to(rows.device), carried.long()].prod(dim=0)
        return weight.clamp(1 / LARGEST_WEIGHT, LARGEST_WEIGHT).float()


def obstacle(targets: Tensor | None, rows: Tensor | None, num_classes: int) -> str:
    """Return why the samples of a batch cannot be worked with, or nothing.

    Args:
        targets: `(B,)` classes, if they were given.
        rows: `(B, Q, C)` activations of the batch, if the tap has them.
        num_classes: M.

    Returns:
        The reason with the way out.
    """
    if targets is None:
        return "guard.loss got no targets; call guard.loss(loss, labels)"
    if targets.ndim != 1 or targets.is_floating_point():
        return "targets are soft; pass class indices, as before Mixup or CutMix"
    if targets.dtype == torch.bool or targets.is_complex():
        return f"targets are {targets.dtype}; pass class indices of an integer type"
    if rows is None or len(rows) != len(targets):
        seen = "none" if rows is None else str(len(rows))
        return f"the last forward pass gave {seen} of {len(targets)} samples to the tap"
    if not bool(torch.isfinite(rows).all()):
        return "activations of the batch hold NaN or infinite values; lower the learning rate"
    wrong = sorted({t for t in targets.tolist() if not 0 <= t < num_classes})
    return f"targets {wrong} are outside [0, {num_classes})" if wrong else ""


def grouped(labels: Tensor, carried: Tensor, num_classes: int) -> Tensor:
    """Count samples by class and presence of a concept.

    Args:
        labels: `(N,)` classes.
        carried: `(N,)` bool, or `(K, N)` of several concepts.
        num_classes: M.

    Returns:
        `(M, 2)` or `(K, M, 2)` float64 counts, absent and present, on the CPU.
    """
    groups, alike = 2 * num_classes, torch.atleast_2d(carried.cpu())
    first = groups * torch.arange(len(alike))[:, None]
    group = first + labels.cpu() * 2 + alike.long()
    counts = torch.bincount(group.flatten(), minlength=groups * len(alike)).double()
    return counts.view(*carried.shape[:-1], num_classes, 2)


def weight_table(counts: Tensor, most: float, strength: float = 1.0) -> Tensor:
    """Return the weights of groups: rarer ones up to so many times the commoner one, mean 1.

    Args:
        counts: `(..., M, 2)` samples by class and presence.
        most: The largest ratio.
        strength: Power of the ratio, between 0 (all weigh the same) and 1.

    Returns:
        `(..., M, 2)` weights.
    """
    ratio = counts.amax(dim=-1, keepdim=True) / counts.clamp_min(1e-9)
    raw = (ratio**strength).clamp(1.0, most)
    samples = counts.sum(dim=(-2, -1), keepdim=True)
    return raw * samples / (raw * counts).sum(dim=(-2, -1), keepdim=True).clamp_min(1e-9)


def check_bakeable(classifier: nn.Linear | None, tap: str, *, gated: bool) -> nn.Linear:
    """Return the classifier, if a projection in front of it can be folded into it exactly.

    Args:
        classifier: The map behind the tap.
        tap: Where the projection acts, for the message.
        gated: Whether it acts on some rows only.

    Returns:
        The classifier.

    Raises:
        BakeError: If no plain linear map with a bias follows the tap, or the projection is gated.
    """
    if gated:
        raise BakeError(
            "gate = true: a projection that acts on some rows only is no linear map and cannot be "
            "folded into the classifier. Set gate: false, or keep the guard attached when "
            "predicting."
        )
    if classifier is None or classifier.bias is None:
        found = "a classifier without bias" if classifier is not None else "no plain linear map"
        raise BakeError(
            f"tap {tap!r} is followed by {found}, expected a Linear with bias; the correction "
            "cannot be folded in exactly. Use tap: pre_logits on a model with a plain linear "
            "head, or keep the guard attached when predicting."
        )
    return classifier


def bake_into(classifier: nn.Linear, edit: Projection) -> None:
    """Fold a projection into the linear map behind it, exactly.

    With `x' = x - (x W' - r) M`, the map `A x' + a` becomes `(A - A M' W) x + a + A M' r`.

    Args:
        classifier: A map with a bias, changed in place; its parameters stay the same objects.
        edit: The projection in front of it.
    """
    with torch.no_grad():
        a = classifier.weight.to(torch.float64)
        pull = a @ edit.moves.to(a).T  # (M, K): how the logits move per unit of each factor
        classifier.weight.copy_(a - pull @ edit.filters.to(a))
        classifier.bias.add_((pull @ edit.reference.to(a)).to(classifier.bias.dtype))
