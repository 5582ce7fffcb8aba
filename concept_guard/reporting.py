"""Stage 5: from what a round found to its record and its cards.

Nothing here knows how records and cards are shown.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from concept_guard import measures
from concept_guard.association import sensitivity
from concept_guard.cards import Card, displayable
from concept_guard.corrector import Corrector
from concept_guard.flags import Flag
from concept_guard.localisation import location_maps
from concept_guard.probe import Batches, Reading, images_at
from concept_guard.records import RoundReport
from concept_guard.rounds import Findings
from concept_guard.taps import Tap

HELD = ("found", "erased", "waiting")


def report(
    reading: Reading,
    found: Findings,
    corrector: Corrector,
    if_erased: Tensor | None,
    *,
    step: int,
    alpha: float,
    seconds: float,
    overhead: float,
) -> RoundReport:
    """Put the numbers of a round together.

    Args:
        reading: What the round was based on.
        found: What it found.
        corrector: After it acted.
        if_erased: `(N, M)` logits with everything new erased, or None.
        step: Optimizer updates so far.
        alpha: False-discovery level.
        seconds: Duration of the round.
        overhead: Share of the wall time the guard has used.

    Returns:
        The record.
    """
    logits, labels = reading.logits, reading.labels
    flags = _flags(found, corrector)
    carried = {t.concept: t.carriers.any(dim=1) for t in found.tracked}
    carried |= {i: c.present.any(dim=1) for i, c in found.candidates.items()}
    held = [flag for flag in flags if flag.status in HELD and flag.concept in carried]
    groups = [carried[flag.concept] for flag in held]
    errors = int((logits.argmax(dim=1) != labels).sum())
    after = if_erased
    seen = sensitivity(
        logits.argmax(dim=1),
        labels,
        logits.shape[1],
        concepts=len(found.concepts),
        alpha=alpha,
    )
    return RoundReport(
        step=step,
        concepts=found.concepts,
        flags=flags,
        erased=tuple(t.concept for t in corrector.tracked),
        accuracy=measures.accuracy(logits, labels),
        worst_group_accuracy=measures.worst_group_accuracy(logits, labels, groups),
        worst_class_recall=measures.worst_class_recall(logits, labels),
        error_share_explained=measures.error_share_explained(logits, labels, held, carried),
        accuracy_if_erased=None if after is None else measures.accuracy(after, labels),
        worst_group_accuracy_if_erased=None
        if after is None
        else measures.worst_group_accuracy(after, labels, groups),
        leak=found.leak,
        cosine_to_last=found.cosine_to_last,
        penalty=0.0,
        errors_seen=errors,
        images_seen=len(labels),
        seconds=seconds,
        overhead=overhead,
        verdict=measures.verdict(flags, errors, len(labels), alpha, seen),
        drift=found.drift,
        new=found.new,
        vanished=found.vanished,
        notes=found.pairs.notes,
        seen_from=seen.least,
        likely_seen_from=seen.likely,
    )


def _flags(found: Findings, corrector: Corrector) -> tuple[Flag, ...]:
    """Return the flags of concepts under correction, as first raised, then those of this round."""
    erased = [
        replace(corrector.flags[t.concept], status="erased")
        for t in corrector.tracked
        if t.concept in corrector.flags
    ]
    known = {flag.concept for flag in erased}
    fresh = [
        replace(c.flag, status=corrector.status(c.flag))
        for i, c in found.candidates.items()
        if i not in known
    ]
    return (*erased, *fresh)


def cards(
    tap: Tap, probe: Batches, reading: Reading, found: Findings, wanted: Sequence[int]
) -> dict[int, Card]:
    """Make the cards of the concepts that have a slot.

    Args:
        tap: Where the concepts are read.
        probe: Where the images come from.
        reading: The round's reading.
        found: What the round found.
        wanted: Ids of concepts.

    Returns:
        Concept id to card: the images that carry most of it, with its place marked.
    """
    directions = {t.concept: t.pair.filter for t in found.tracked}
    directions |= {i: c.pair.filter for i, c in found.candidates.items() if c.pair is not None}
    result = {}
    wrong = reading.logits.argmax(dim=1) != reading.labels
    for concept in wanted:
        if concept not in directions:
            continue
        direction = directions[concept].to(reading.rows)
        level = (reading.rows @ direction).amax(dim=1)
        top = level.argsort(descending=True)[:8]
        images, _ = images_at(probe, reading.indices[top])
        if images.ndim == 4:
            maps = location_maps(tap, images, direction)
            shown = displayable(images)
            result[concept] = Card(shown, maps, tuple(bool(w) for w in wrong[top]))
    return result
