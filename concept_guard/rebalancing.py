"""Stage 4c: turn the criterion's result into the loss to descend.

Nothing here knows how the weights of samples come about, or how samples are drawn.
"""

import torch
from torch import Tensor

from concept_guard.correction import obstacle
from concept_guard.corrector import Corrector
from concept_guard.errors import TapError
from concept_guard.health import Health
from concept_guard.sampling import Samples
from concept_guard.sharding import is_sharded
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


def descended(
    loss: Tensor,
    targets: Tensor | None,
    indices: Tensor | None,
    *,
    tap: Tap,
    corrector: Corrector,
    samples: Samples,
    health: Health,
) -> Tensor:
    """Return the loss that unlearns: weighed samples, and a classifier that does without.

    What is added to the loss of the samples adds its gradient, not its value: the value stays that
    of the criterion, with and without a correction.

    Args:
        loss: A scalar, or `(B,)` losses per sample.
        targets: `(B,)` classes, or None.
        indices: `(B,)` positions in the training set, or None.
        tap: Holds the activations of the batch.
        corrector: Weighs samples, and knows what is projected out and held down.
        samples: Learns what the samples carry; while it has a sampler, losses are not weighed.
        health: Warns, once, where something cannot act.

    Returns:
        A scalar; bit for bit the scalar given or the plain mean while nothing is corrected.
    """
    plain = loss if loss.ndim == 0 else loss.mean()
    at = samples.checked(indices, targets)
    if not corrector.tracked:
        return plain
    health.warn_once(corrector.augmentation.problem)
    try:
        classifier = tap.classifier
    except TapError as error:
        health.warn_once(f"nothing is corrected: {error}.")
        return plain
    if classifier is not None and is_sharded(classifier.weight):
        health.warn_once(
            "nothing is corrected: the classifier is divided among the processes while the loss is "
            "computed; divide it together with the whole model, fully_shard(model, "
            "reshard_after_forward=False)."
        )
        return plain
    weighed = plain
    if corrector.rebalancing or corrector.erasure.adapting:
        weighed = _of_samples(
            loss, targets, at, tap=tap, corrector=corrector, samples=samples, health=health
        )
    if corrector.penalty.active:
        term, problem = corrector.penalty.term(corrector.strength)
        if problem:
            health.warn_once(f"penalizing cannot act: {problem}.")
        if term is not None:
            weighed = weighed + (term - term.detach()).to(weighed.dtype)
    return weighed


def _of_samples(
    loss: Tensor,
    targets: Tensor | None,
    at: Tensor | None,
    *,
    tap: Tap,
    corrector: Corrector,
    samples: Samples,
    health: Health,
) -> Tensor:
    """Return the mean of the weighed losses, and the gradient of those with concepts taken out."""
    plain, rows = loss if loss.ndim == 0 else loss.mean(), tap.captured
    problem = obstacle(targets, rows, tap.num_classes)
    if problem or rows is None or targets is None:
        stopped = "rebalancing" if corrector.rebalancing else "adapting the classifier"
        health.warn_once(f"{stopped} cannot act: {problem}.")
        if corrector.ranks.size > 1:
            _show_nothing(loss, tap, corrector, samples)
        return plain
    weights, weighed = torch.ones_like(targets, dtype=plain.dtype), plain
    if corrector.rebalancing and samples.size is not None:
        _show(samples, at, targets, rows, health)
    elif corrector.rebalancing and loss.ndim == 0:
        health.warn_once(
            "rebalancing cannot act: guard.loss got a scalar; use a criterion with "
            "reduction='none'."
        )
    elif corrector.rebalancing:
        with torch.no_grad():
            weights = corrector.weights(rows, targets).to(loss.dtype)
        weighed = (loss * weights).mean()
    if not corrector.erasure.adapting:
        return weighed
    without = (corrector.erasure.losses_without(rows, targets) * weights).mean()
    return weighed + (without - without.detach())


def _show_nothing(loss: Tensor, tap: Tap, corrector: Corrector, samples: Samples) -> None:
    """Tell other processes, which wait for it, that the batch of this one cannot be counted."""
    rows, none = torch.empty(0, 1, tap.channels), torch.empty(0, dtype=torch.long)
    if corrector.rebalancing and samples.size is not None:
        samples.see(none, none, rows)
    elif corrector.rebalancing and loss.ndim:
        corrector.weights(rows, none)


def _show(
    samples: Samples,
    indices: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    health: Health,
) -> None:
    if indices is None:
        health.warn_once(
            "rebalancing cannot act: the sampler cannot learn what samples carry; call "
            "guard.loss(loss, labels, indices=...) with their positions in the training set."
        )
    else:
        samples.see(indices, labels, rows)
