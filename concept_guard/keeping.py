"""Stage 5: from the record of a round, and from acts, to what the history of the run keeps.

Nothing here knows how entries are written or drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from concept_guard import tags
from concept_guard.decisions import now
from concept_guard.entries import (
    ActEntry,
    ActName,
    ConceptEntry,
    FlagEntry,
    GroupEntry,
    RoundEntry,
    StartEntry,
)
from concept_guard.flags import Flag
from concept_guard.records import Group, RoundReport, evidence, named

MOST_CLASSES = 20  # whose groups are kept one by one, for each concept


@dataclass(frozen=True)
class Act:
    """Something that the guard or a person did.

    Attributes:
        name: What was done.
        concepts: Ids of the concepts it was done to.
        text: The same in words.
        by: Who did it.
    """

    name: ActName
    concepts: tuple[int, ...] = ()
    text: str = ""
    by: Literal["guard", "person"] = "guard"


@dataclass(frozen=True)
class Names:
    """What people call classes and probe images.

    Attributes:
        classes: Shown instead of class indices, if they are known.
        files: Shown instead of probe indices, if they are known.
    """

    classes: Sequence[str] | None = None
    files: Sequence[str] | None = None

    def of_class(self, index: int) -> str:
        """Return the name of a class, or its index."""
        return named(self.classes, index)

    def of_image(self, index: int) -> str:
        """Return the name of a probe image, or its index in words."""
        return named(self.files, index) if self.files else f"probe image {index}"


def start_entry(
    step: int, version: str, model: str, settings: Mapping[str, object], names: Names
) -> StartEntry:
    """Return that a guard began to write.

    Args:
        step: Optimizer updates so far.
        version: Of concept_guard.
        model: Class of the network.
        settings: Of the guard.
        names: Of the classes.

    Returns:
        The entry.
    """
    return StartEntry(
        step=step,
        time=now(),
        version=version,
        model=model,
        settings={name: str(value) for name, value in settings.items()},
        classes=tuple(map(str, names.classes or ())),
    )


def act_entry(step: int, act: Act) -> ActEntry:
    """Return what the history keeps of an act.

    Args:
        step: Optimizer updates so far.
        act: What was done.

    Returns:
        The entry.
    """
    return ActEntry(
        step=step, time=now(), act=act.name, concepts=act.concepts, text=act.text, by=act.by
    )


def round_entry(report: RoundReport, slots: Mapping[int, int], names: Names) -> RoundEntry:
    """Return what the history keeps of a round: all its numbers, and the concepts that mattered.

    Args:
        report: The round.
        slots: Concept id to slot of the TensorBoard page.
        names: Of classes and probe images.

    Returns:
        The entry.
    """
    values = tags.round_values(report)
    return RoundEntry(
        step=report.step,
        time=now(),
        verdict=report.verdict,
        notes=tuple(note for note in (report.identity, *report.notes) if note),
        numbers={tag.removeprefix(tags.PREFIX): value for tag, value in values.items()},
        images=report.images_seen,
        errors=report.errors_seen,
        concepts=_concepts(report, slots, names),
        groups=_groups(report, names),
        new=report.new,
        vanished=report.vanished,
        found=len(report.concepts),
    )


def _groups(report: RoundReport, names: Names) -> tuple[GroupEntry, ...]:
    """Return the groups; of many classes those with most carriers, the others taken together."""
    own = {(flag.concept, flag.class_index) for flag in report.flags}
    carriers = {(g.concept, g.class_index): g.images for g in report.groups if g.carried}
    kept: list[GroupEntry] = []
    for concept in dict.fromkeys(group.concept for group in report.groups):
        mine = [group for group in report.groups if group.concept == concept]
        classes = dict.fromkeys(group.class_index for group in mine)
        ranked = sorted(
            classes, key=lambda k: ((concept, k) not in own, -carriers.get((concept, k), 0))
        )
        shown = {*ranked[:MOST_CLASSES]} if len(ranked) > MOST_CLASSES + 1 else {*ranked}
        kept += [
            _group([group], names.of_class(group.class_index))
            for group in mine
            if group.class_index in shown
        ]
        for carried in (False, True):
            rest = [g for g in mine if g.class_index not in shown and g.carried == carried]
            if rest:
                kept.append(_group(rest, f"{len(rest)} other classes"))
    return tuple(kept)


def _group(groups: Sequence[Group], name: str) -> GroupEntry:
    """Return groups taken together."""
    images = sum(group.images for group in groups)

    def share(values: Sequence[float | None]) -> float | None:
        known = [(v, g.images) for v, g in zip(values, groups, strict=True) if v is not None]
        total = sum(count for _, count in known)
        return round(sum(v * count for v, count in known) / total, 4) if total else None

    return GroupEntry(
        concept=groups[0].concept,
        class_name=name,
        carried=groups[0].carried,
        images=images,
        accuracy=share([group.accuracy for group in groups]),
        accuracy_uncorrected=share([group.accuracy_uncorrected for group in groups]),
    )


def _concepts(
    report: RoundReport, slots: Mapping[int, int], names: Names
) -> tuple[ConceptEntry, ...]:
    rates = {concept.id: concept.presence_rate for concept in report.concepts}
    flags: dict[int, list[FlagEntry]] = {}
    for flag in sorted(report.flags, key=evidence):
        flags.setdefault(flag.concept, []).append(_flag(flag, names))
    return tuple(
        ConceptEntry(
            id=i,
            slot=slots.get(i),
            presence_rate=rates.get(i),
            flags=tuple(flags.get(i, ())),
            erased=i in report.erased,
            leak=report.leak.get(i),
            readable=report.readable.get(i),
            drift=report.drift.get(i),
        )
        for i in dict.fromkeys((*flags, *slots, *report.erased))
    )


def _flag(flag: Flag, names: Names) -> FlagEntry:
    return FlagEntry(
        class_name=names.of_class(flag.class_index),
        risk_difference=flag.risk_difference,
        interval=flag.interval,
        q_value=flag.q_value,
        fixed=flag.fixed,
        broken=flag.broken,
        present=flag.present,
        status=flag.status,
        reason=flag.reason,
        examples=tuple(map(names.of_image, flag.examples)),
    )
