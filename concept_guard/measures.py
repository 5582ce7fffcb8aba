"""Stage 5: what a round's numbers are: accuracy by group, explained errors, the verdict.

Nothing here knows how the numbers are shown.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from concept_guard.association import MOST_CARRIERS, Sensitivity
from concept_guard.benefit import SMALLEST_GROUP
from concept_guard.flags import Flag
from concept_guard.reading import Reading
from concept_guard.records import Group, named


def not_finite(reading: Reading, loss: Tensor | None, tap: str) -> list[str]:
    """Return what makes a round impossible: parts that hold NaN or infinite values.

    Args:
        reading: Rows and logits of the probe.
        loss: The last training loss, if there was one.
        tap: Where the rows were read, for the message.

    Returns:
        Names of the parts, empty if all is finite.
    """
    parts = (
        (f"activations at tap {tap!r}", reading.rows),
        ("logits", reading.logits),
        ("the training loss", loss),
    )
    return [n for n, t in parts if t is not None and not bool(torch.isfinite(t).all())]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of right predictions.

    Args:
        logits: `(N, M)` class logits.
        labels: `(N,)` classes.

    Returns:
        Between 0 and 1.
    """
    return float((logits.argmax(dim=1) == labels).double().mean())


def worst_class_recall(logits: Tensor, labels: Tensor) -> float:
    """Return the recall of the class that is recognised least.

    Args:
        logits: `(N, M)` class logits.
        labels: `(N,)` classes.

    Returns:
        Between 0 and 1, over the classes that have images.
    """
    right = logits.argmax(dim=1) == labels
    return min(float(right[labels == k].double().mean()) for k in labels.unique().tolist())


def pseudo_groups(
    logits: Tensor,
    labels: Tensor,
    carried: Mapping[int, Tensor],
    uncorrected: Tensor | None = None,
) -> tuple[Group, ...]:
    """Return size and accuracy of every (class, concept present or not) group.

    Args:
        logits: `(N, M)` class logits.
        labels: `(N,)` classes.
        carried: Concept id to `(N,)` bool presence.
        uncorrected: `(N, M)` logits without what is projected out, if they are known.

    Returns:
        The groups, concept by concept and class by class, without before with.
    """
    right = logits.argmax(dim=1) == labels
    bare = None if uncorrected is None else uncorrected.argmax(dim=1) == labels
    groups = []
    for concept, presence in carried.items():
        group = labels * 2 + presence.to(labels)
        sizes, shares = _shares(group, right)
        bare_shares = None if bare is None else _shares(group, bare)[1]
        for k in labels.unique().tolist():
            for value in (False, True):
                at = 2 * k + value
                empty = at >= len(sizes) or not sizes[at]
                share = None if empty else shares[at]
                bare_share = None if empty or bare_shares is None else bare_shares[at]
                size = 0 if empty else sizes[at]
                groups.append(Group(k, concept, value, size, share, bare_share))
    return tuple(groups)


def _shares(group: Tensor, right: Tensor) -> tuple[list[int], list[float]]:
    """Return size and share of right predictions by group."""
    sizes = torch.bincount(group)
    hits = torch.bincount(group, weights=right.double())
    return sizes.tolist(), (hits / sizes.clamp_min(1)).tolist()


def worst_group_accuracy(logits: Tensor, labels: Tensor, carried: Sequence[Tensor]) -> float:
    """Return the accuracy of the worst (class, concept present) group.

    Args:
        logits: `(N, M)` class logits.
        labels: `(N,)` classes.
        carried: One `(N,)` bool per concept that counts, in any order.

    Returns:
        Between 0 and 1, over groups of at least 5 images; the worst class recall without concepts.
    """
    groups = pseudo_groups(logits, labels, dict(enumerate(carried)))
    rates = [g.accuracy for g in groups if g.accuracy is not None and g.images >= SMALLEST_GROUP]
    return min(rates) if rates else worst_class_recall(logits, labels)


def error_share_explained(
    logits: Tensor, labels: Tensor, flags: Sequence[Flag], carried: Mapping[int, Tensor]
) -> float:
    """Return the share of errors that are predictions of a flag's class where it is present.

    Args:
        logits: `(N, M)` class logits.
        labels: `(N,)` classes.
        flags: Flags that hold.
        carried: Concept id to `(N,)` bool presence.

    Returns:
        Between 0 and 1; 0 without errors.
    """
    predicted = logits.argmax(dim=1)
    wrong = predicted != labels
    explained = torch.zeros_like(wrong)
    for flag in flags:
        explained |= wrong & carried[flag.concept] & (predicted == flag.class_index)
    return float(explained.sum() / wrong.sum().clamp_min(1))


def _at_least(images: int) -> str:
    return f"at least {images}" if images < MOST_CARRIERS else f"more than {images}"


def verdict(
    flags: Sequence[Flag],
    errors: int,
    images: int,
    alpha: float,
    seen: Sensitivity,
    class_names: Sequence[str] | None = None,
) -> str:
    """Say in one sentence what was flagged, or why nothing could be.

    Args:
        flags: All flags of the round.
        errors: Probe images predicted wrongly.
        images: Probe images read.
        alpha: False-discovery level.
        seen: How small a shortcut these images can show.
        class_names: Said instead of class indices.

    Returns:
        One sentence.
    """
    held = [flag for flag in flags if flag.status in ("found", "erased", "waiting")]
    if held:
        parts = [
            f"concept {f.concept} drives errors towards class {named(class_names, f.class_index)}"
            for f in held
        ]
        return f"flagged: {'; '.join(parts)}"
    basis = f"{errors} errors seen on {images} probe images"
    limits = (
        f"a shortcut on fewer than {seen.least} images of other classes cannot be seen with these; "
        f"one that misleads on half of its images needs {_at_least(seen.likely)} of them"
    )
    if not flags:
        return f"no evidence: {basis}, no concept goes with them (q <= {alpha:g}); {limits}"
    return (
        f"no evidence: {basis}, {len(flags)} concepts go with some of them but are not confirmed "
        f"as their cause; {limits}"
    )
