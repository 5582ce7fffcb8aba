"""Stage 5: from what a round found to its record, its cards, and where the run stands.

Nothing here knows how these are shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from concept_guard import measures
from concept_guard.association import sensitivity
from concept_guard.cards import TILES, Card, displayable
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.decisions import FlagLine, Stage, Standing, now
from concept_guard.flags import Flag
from concept_guard.leaks import Leaks
from concept_guard.localisation import location_maps
from concept_guard.probe import Batches, images_at
from concept_guard.reading import Reading
from concept_guard.records import RoundReport
from concept_guard.rounds import Findings
from concept_guard.taps import Tap

HELD = ("found", "erased", "waiting")


def report(
    reading: Reading,
    found: Findings,
    corrector: Corrector,
    if_erased: Tensor | None,
    left: Leaks,
    *,
    withdrawn: Sequence[str] = (),
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
        left: What is left of the concepts under correction.
        withdrawn: Sentences on the corrections that are withdrawn, because they do not help.
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
        leak=left.difference,
        readable=left.readable,
        cosine_to_last=found.cosine_to_last,
        penalty=corrector.penalty.share,
        errors_seen=errors,
        images_seen=len(labels),
        seconds=seconds,
        overhead=overhead,
        verdict=measures.verdict(flags, errors, len(labels), alpha, seen),
        drift=found.drift,
        new=found.new,
        vanished=found.vanished,
        notes=(*found.pairs.notes, *left.returned, *withdrawn),
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
        wanted: Ids of concepts; those that are neither tracked nor tested get none.

    Returns:
        Concept id to card.
    """
    tested = {t.concept for t in found.tracked}
    tested |= {i for i, c in found.candidates.items() if c.pair is not None}
    return cards_of(tap, probe, reading, filters_of(found), [i for i in wanted if i in tested])


def filters_of(found: Findings) -> dict[int, Tensor]:
    """Return the filter that reads each concept best: within classes where there is one.

    Args:
        found: What a round found.

    Returns:
        Concept id to `(C,)` filter.
    """
    filters = dict(zip(found.ids, found.pairs.filters, strict=True))
    filters |= {t.concept: t.pair.filter for t in found.tracked}
    filters |= {i: c.pair.filter for i, c in found.candidates.items() if c.pair is not None}
    return {i: f.to(found.pairs.filters) for i, f in filters.items()}


def cards_of(
    tap: Tap,
    probe: Batches,
    reading: Reading,
    filters: Mapping[int, Tensor],
    wanted: Iterable[int],
    *,
    tiles: int = TILES,
    foremost: Mapping[int, Tensor] | None = None,
) -> dict[int, Card]:
    """Make the cards of some concepts.

    Args:
        tap: Where the concepts are read.
        probe: Where the images come from.
        reading: Of that probe.
        filters: Concept id to `(C,)` filter.
        wanted: Ids of concepts.
        tiles: Images on a card.
        foremost: Concept id to positions in the reading of the images that come first.

    Returns:
        Concept id to card: the images that carry most of it, with its place marked. No card
        if the model takes something else than images.
    """
    result = {}
    wrong = reading.logits.argmax(dim=1) != reading.labels
    for concept in wanted:
        direction = filters[concept].to(reading.rows)
        level = (reading.rows @ direction).amax(dim=1)
        best = level.argsort(descending=True)
        if foremost is not None and concept in foremost:
            first = foremost[concept].to(best)
            best = torch.cat([first, best[~torch.isin(best, first)]])
        top = best[:tiles]
        images, _ = images_at(probe, reading.indices[top])
        if images.ndim == 4:
            maps = location_maps(tap, images, direction).cpu()
            result[concept] = Card(displayable(images), maps, tuple(bool(w) for w in wrong[top]))
    return result


def standing(
    report: RoundReport,
    ids: Sequence[int],
    corrector: Corrector,
    config: GuardConfig,
    class_names: Sequence[str] | None,
    *,
    stage: Stage,
    due: int,
    decisions_read: int,
) -> Standing:
    """Return where the run stands now, which people may have changed since the round.

    Args:
        report: Of the last round.
        ids: Concepts of the last round.
        corrector: What is under correction.
        config: Settings of the guard.
        class_names: Shown instead of class indices.
        stage: Of the run.
        due: Optimizer updates after which the next round is due.
        decisions_read: How many decisions the run has taken up.

    Returns:
        What the command line is to know.
    """
    erased = tuple(t.concept for t in corrector.tracked)
    return Standing(
        stage=stage,
        step=report.step,
        due=due,
        written=now(),
        verdict=report.verdict,
        corrects=bool(config.action),
        concepts=tuple(sorted({*ids, *erased})),
        erased=erased,
        flags=tuple(_line(flag, corrector, class_names) for flag in report.flags),
        decisions_read=decisions_read,
    )


def _line(flag: Flag, corrector: Corrector, class_names: Sequence[str] | None) -> FlagLine:
    k = flag.class_index
    tested = flag if flag.status == "unconfirmed" else replace(flag, status="found")
    return FlagLine(
        concept=flag.concept,
        class_name=class_names[k] if class_names and k < len(class_names) else str(k),
        status=corrector.status(tested),
        risk_difference=flag.risk_difference,
        q_value=flag.q_value,
        reason=flag.reason,
    )
