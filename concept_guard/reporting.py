"""Stage 5: from what a round found to its record, its cards, and where the run stands.

Nothing here knows how these are shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from concept_guard import measures
from concept_guard.association import sensitivity
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.decisions import FlagLine, Stage, Standing, now
from concept_guard.flags import Flag
from concept_guard.keeping import Act
from concept_guard.leaks import Leaks
from concept_guard.reading import Reading
from concept_guard.records import RoundReport, named
from concept_guard.rounds import Findings

HELD = ("found", "erased", "waiting")


def report(
    reading: Reading,
    found: Findings,
    corrector: Corrector,
    if_erased: Tensor | None,
    left: Leaks,
    *,
    uncorrected: Tensor | None = None,
    withdrawn: Mapping[int, str] | None = None,
    class_names: Sequence[str] | None = None,
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
        uncorrected: `(N, M)` logits without what was projected out when the round began, or None.
        withdrawn: Concept id to the reason why its correction is withdrawn; None for none.
        class_names: Said instead of class indices.
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
    after, without, withdrawn = if_erased, uncorrected, withdrawn or {}
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
        verdict=measures.verdict(flags, errors, len(labels), alpha, seen, class_names),
        drift=found.drift,
        new=found.new,
        vanished=found.vanished,
        notes=(
            *found.pairs.notes,
            *left.returned,
            *withdrawn.values(),
            *corrector.augmentation.notes,
        ),
        seen_from=seen.least,
        likely_seen_from=seen.likely,
        accuracy_uncorrected=None if without is None else measures.accuracy(without, labels),
        worst_group_uncorrected=None
        if without is None
        else measures.worst_group_accuracy(without, labels, groups),
        groups=measures.pseudo_groups(
            logits, labels, {flag.concept: carried[flag.concept] for flag in held}, without
        ),
        withdrawn=tuple(withdrawn),
    )


def acts(
    report: RoundReport,
    before: RoundReport | None,
    under_way: Sequence[int],
    class_names: Sequence[str] | None = None,
) -> list[Act]:
    """Return what the guard did in a round.

    Args:
        report: The round.
        before: The round before, if there was one.
        under_way: Ids of the concepts that were under correction when it began.
        class_names: Said instead of class indices.

    Returns:
        Flags that were not there before, corrections that began, and such as were withdrawn.
    """
    known = () if before is None else before.flagged
    towards = {f.concept: named(class_names, f.class_index) for f in reversed(report.flags)}
    flagged = [i for i in report.flagged if i not in known and i not in under_way]
    begun = [i for i in (*report.erased, *report.withdrawn) if i not in under_way]
    return [
        *(
            Act("flag", (i,), f"concept {i} is flagged: drives errors towards class {towards[i]}")
            for i in flagged
        ),
        *(Act("erase", (i,), f"the correction of concept {i} begins") for i in begun),
        *(Act("withdraw", (i,), f"concept {i}: no better off for it") for i in report.withdrawn),
    ]


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
