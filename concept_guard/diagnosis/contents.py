"""Diagnosis: from findings to what the page shows.

Nothing here knows how the page is drawn, or how anything was found.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from concept_guard.cards import Card, card_image, marked_picture, picture
from concept_guard.diagnosis.analysis import Analysis
from concept_guard.diagnosis.history import History
from concept_guard.diagnosis.misclassified import Error, Shown
from concept_guard.diagnosis.subject import Subject
from concept_guard.diagnosis.words import headline, said
from concept_guard.flags import Flag
from concept_guard.report import (
    ConceptEntry,
    Contribution,
    ErrorRow,
    GroupRow,
    ImageEntry,
    InfluenceRow,
    Picture,
    Report,
    SuspectEntry,
)
from concept_guard.report.pictures import jpeg
from concept_guard.reporting import HELD

MOST_INFLUENCE = 40  # rows of the table of influence
NO_FLAG = "over all images it does not go with errors towards a class beyond what chance allows"
NAMED = 10  # unreadable images that are named


def contents(
    subject: Subject, analysis: Analysis, history: History, title: str, command: str
) -> Report:
    """Return what the page shows.

    Args:
        subject: What was examined.
        analysis: What was found.
        history: What happened while the model was trained, if it was trained with the guard.
        title: Heading of the page.
        command: That repeats it.

    Returns:
        The contents.
    """
    report, classes = analysis.report, subject.classes
    errors = _under(analysis)
    of = {i: tuple(_error_row(e, subject) for e in some) for i, some in errors.items()}
    listed = {error.index for some in errors.values() for error in some}
    return Report(
        title=title,
        subtitle=f"{report.errors_seen} of {report.images_seen} images are misclassified",
        verdict=headline(analysis, classes, history.flags),
        facts=_facts(subject, analysis),
        concepts=tuple(
            _flag_entry(f, classes, report.images_seen, of.get(f.concept, ()), analysis.cards)
            for f in report.flags
        ),
        groups=_groups(analysis, classes),
        influence=influence_rows(analysis, classes)[:MOST_INFLUENCE],
        images=tuple(_image(shown, subject) for shown in analysis.shown),
        other_errors=tuple(
            _error_row(e, subject) for e in analysis.errors if e.index not in listed
        ),
        suspects=tuple(
            SuspectEntry(i, NO_FLAG, of[i], _drawn(analysis.cards, i)) for i in analysis.suspects
        ),
        trained=tuple(_trained(f, subject, analysis, history) for f in history.flags),
        history=history.rounds,
        comparisons=history.comparisons,
        notes=_notes(subject, analysis),
        command=command,
    )


def _facts(subject: Subject, analysis: Analysis) -> tuple[tuple[str, str], ...]:
    report = analysis.report
    return (
        ("Model", subject.name),
        ("Weights", subject.weights),
        ("Images", f"{report.images_seen} of {len(subject.classes)} classes: {subject.source}"),
        ("Accuracy", f"{report.accuracy:.3f}"),
        ("Misclassified", str(report.errors_seen)),
        ("Share of errors under a flag", f"{report.error_share_explained:.0%}"),
        ("Read at", analysis.tap),
    )


def _notes(subject: Subject, analysis: Analysis) -> tuple[str, ...]:
    missing = [subject.file(index) for index in analysis.unreadable]
    notes = list(analysis.report.notes)
    if missing:
        verb = "image" if len(missing) == 1 else "images"
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        notes.append(
            f"{len(missing)} unreadable {verb} left out: {', '.join(missing[:NAMED])}{more}"
        )
    return tuple(notes)


def _under(analysis: Analysis) -> dict[int, list[Error]]:
    """Return the errors that are listed under a concept: a held one has confirmed errors alone."""
    held = {flag.concept for flag in analysis.report.flags if flag.status in HELD}
    of: dict[int, list[Error]] = {f.concept: [] for f in analysis.report.flags}
    of |= {i: [] for i in analysis.suspects}
    for error in analysis.errors:
        if error.concept in of and error.confirmed == (error.concept in held):
            of[error.concept].append(error)
    return of


def _groups(analysis: Analysis, classes: Sequence[str]) -> tuple[GroupRow, ...]:
    """Return the groups of each held concept, the classes that it misleads also as one group."""
    rows = []
    for flag in analysis.report.flags:
        of = [g for g in analysis.groups if g.concept == flag.concept]
        for carried in (False, True) if of else ():
            rest = [g for g in of if g.carried == carried and g.class_index != flag.class_index]
            count = sum(g.images for g in rest)
            right = sum(g.images * g.accuracy for g in rest if g.accuracy is not None)
            name = f"all classes but {classes[flag.class_index]}"
            rate = right / count if count else None
            rows.append(GroupRow(name, flag.concept, carried, count, rate))
        rows += [
            GroupRow(classes[g.class_index], g.concept, g.carried, g.images, g.accuracy) for g in of
        ]
    return tuple(rows)


def _error_row(error: Error, subject: Subject) -> ErrorRow:
    classes = subject.classes
    return ErrorRow(subject.file(error.index), classes[error.label], classes[error.predicted])


def _flag_entry(
    flag: Flag,
    classes: Sequence[str],
    images: int,
    errors: tuple[ErrorRow, ...],
    cards: Mapping[int, Card],
) -> ConceptEntry:
    return ConceptEntry(
        id=flag.concept,
        class_name=classes[flag.class_index],
        status=flag.status,
        reason=flag.reason,
        risk_difference=flag.risk_difference,
        interval=flag.interval,
        q_value=flag.q_value,
        fixed=flag.fixed,
        broken=flag.broken,
        present=flag.present,
        images=images,
        errors=errors,
        card=_drawn(cards, flag.concept),
    )


def _trained(flag: Flag, subject: Subject, analysis: Analysis, history: History) -> ConceptEntry:
    """Return a flag of the guard with what became of the errors it was raised for."""
    reading, classes = analysis.reading, subject.classes
    at = {index: n for n, index in enumerate(reading.indices.tolist())}
    labels, now = reading.labels.tolist(), reading.logits.argmax(dim=1).tolist()
    rows = tuple(
        ErrorRow(
            subject.file(index),
            classes[labels[at[index]]],
            classes[flag.class_index],
            after=classes[now[at[index]]],
        )
        for index in flag.examples
        if index in at
    )
    entry = _flag_entry(flag, classes, len(labels), rows, history.cards)
    leak, readable = history.leak.get(flag.concept), history.readable.get(flag.concept)
    return replace(entry, leak=leak, readable=readable)


def _drawn(cards: Mapping[int, Card], concept: int) -> Picture | None:
    return jpeg(card_image(cards[concept])) if concept in cards else None


def influence_rows(analysis: Analysis, classes: Sequence[str]) -> tuple[InfluenceRow, ...]:
    """Return the influence of the tested concepts on the classes.

    Args:
        analysis: What was found.
        classes: Names in the order of the logits.

    Returns:
        One row per concept and class, the strongest first.
    """
    tested = {flag.concept for flag in analysis.report.flags}
    found, ids = analysis.influence, analysis.findings.ids
    cells = [
        (abs(float(found.change[n, k])), n, k)
        for n, concept in enumerate(ids)
        if concept in tested
        for k in range(len(classes))
    ]
    return tuple(
        InfluenceRow(ids[n], classes[k], float(found.score[n, k]), float(found.p_value[n, k]))
        for _, n, k in sorted(cells, key=lambda cell: -cell[0])
    )


def _flip(error: Error, classes: Sequence[str]) -> str:
    told = error.explanation
    if told.flip is None:
        return "No change of a single concept changes the prediction."
    return "" if told.flip == told.repair else said(told.flip, classes)


def _repair(error: Error, classes: Sequence[str]) -> str:
    told = error.explanation
    if told.repair is not None:
        return f"{said(told.repair, classes)} That is right."
    return "" if told.flip is None else "No change of a single concept makes it right."


def _image(shown: Shown, subject: Subject) -> ImageEntry:
    """Return an error with picture and contributions: what sets it apart from a usual image."""
    error, classes = shown.error, subject.classes
    told = error.explanation
    to_label = told.to_label if told.to_label is not None else told.to_predicted
    apart = (told.to_predicted - told.usual[0], to_label - told.usual[-1])
    return ImageEntry(
        file=subject.file(error.index),
        label=classes[error.label],
        predicted=classes[error.predicted],
        picture=jpeg(picture(shown.image)),
        contributions=tuple(
            Contribution(concept, float(apart[0][n]), float(apart[1][n]))
            for n, concept in enumerate(told.concepts)
        ),
        flip=_flip(error, classes),
        repair=_repair(error, classes),
        concept=error.concept,
        marked=None if shown.place is None else jpeg(marked_picture(shown.image, shown.place)),
    )
