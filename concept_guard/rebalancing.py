"""Stage 4c: turn the criterion's result into the loss to descend.

Nothing here knows how the weights of samples come about.
"""

import torch
from torch import Tensor

from concept_guard.correction import obstacle
from concept_guard.corrector import Corrector
from concept_guard.health import Health
from concept_guard.taps import Tap


def checked(loss: Tensor, targets: Tensor | None) -> Tensor:
    """Return the loss as it is, if it and the targets belong together.

    Args:
        loss: A scalar, or `(B,)` losses per sample.
        targets: `(B,)` classes, or None.

    Returns:
        The loss.

    Raises:
        ValueError: If their shapes do not fit.
    """
    fits = targets is None or not loss.ndim or targets.shape[:1] == loss.shape
    if loss.ndim > 1 or not fits:
        got = "no targets" if targets is None else f"targets {tuple(targets.shape)}"
        raise ValueError(
            f"loss has shape {tuple(loss.shape)} with {got}; expected a scalar, or one loss "
            "per sample and as many targets (criterion with reduction='none')"
        )
    return loss


def rebalanced(
    loss: Tensor, targets: Tensor | None, tap: Tap, corrector: Corrector, health: Health
) -> Tensor:
    """Return the mean of the losses, weighed where something is rebalanced.

    Args:
        loss: A scalar, returned as it is, or `(B,)` losses per sample.
        targets: `(B,)` classes, or None.
        tap: Holds the activations of the batch.
        corrector: Weighs samples.
        health: Warns, once, where weights cannot be had.

    Returns:
        A scalar; bit for bit the plain mean while nothing is rebalanced.
    """
    plain = loss if loss.ndim == 0 else loss.mean()
    if not corrector.rebalancing:
        return plain
    rows = tap.captured
    problem = obstacle(loss, targets, rows, tap.num_classes)
    if problem or rows is None or targets is None:
        health.warn_once(f"rebalancing cannot act: {problem}.")
        return plain
    with torch.no_grad():
        weights = corrector.weights(rows, targets)
    return (loss * weights.to(loss.dtype)).mean()
