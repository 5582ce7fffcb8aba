"""Losses per sample out of a criterion that averages, so that rebalancing can weigh them."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

Criterion = Callable[[Tensor, Tensor], Tensor]
SAME = 1e-4  # relative difference that rounding may leave between a mean and the criterion


def per_sample(criterion: Criterion, num_classes: int) -> Criterion | None:
    """Return a function like a criterion that does not average, if it is an average over samples.

    The criterion's own `reduction="none"` is tried first, then the criterion on every sample, at
    once or one by one. What is chosen gives the criterion's value on random logits of each class.

    Args:
        criterion: Of `(B, M)` logits and `(B,)` classes, to a scalar.
        num_classes: Number of logits, M.

    Returns:
        Maps `(B, M)` logits and `(B,)` classes to `(B,)` losses. None if the criterion is no mean
        over samples, such as one with weights of classes, or takes no classes.
    """
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(num_classes).repeat(2)
    logits = torch.randn(len(labels), num_classes, generator=draw)
    if isinstance(criterion, nn.Module):
        tensors = [*criterion.parameters(), *criterion.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        logits, labels = logits.to(device), labels.to(device)
    for losses in (_unreduced(criterion), _at_once(criterion), _one_by_one(criterion)):
        if losses is not None and _agrees(losses, criterion, logits, labels):
            return losses
    return None


def _unreduced(criterion: Criterion) -> Criterion | None:
    if getattr(criterion, "reduction", None) != "mean":
        return None
    new = copy.deepcopy(criterion)
    new.reduction = "none"  # type: ignore[attr-defined]

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        found = new(logits, labels)
        return found if found.ndim == 1 else found.flatten(1).mean(dim=1)

    return losses


def _at_once(criterion: Criterion) -> Criterion:
    def one(logits: Tensor, label: Tensor) -> Tensor:
        return criterion(logits[None], label[None])

    return torch.vmap(one)


def _one_by_one(criterion: Criterion) -> Criterion:
    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack(
            [criterion(x[None], y[None]) for x, y in zip(logits, labels, strict=True)]
        )

    return losses


def _agrees(losses: Criterion, criterion: Criterion, logits: Tensor, labels: Tensor) -> bool:
    """Return whether losses are one per sample, and the criterion their mean."""
    try:
        found, wanted = losses(logits, labels), criterion(logits, labels)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return False  # not a criterion of classes, or not for this way of calling it
    if found.shape != labels.shape or wanted.ndim:
        return False
    return bool((found.mean() - wanted).abs() <= SAME * wanted.abs().clamp_min(1e-6))
