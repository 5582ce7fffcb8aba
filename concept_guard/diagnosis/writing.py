"""Diagnosis: write what was found as data and as one HTML page.

Nothing here knows how it was found, or what else lies in the folder.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from concept_guard.diagnosis.analysis import Analysis
from concept_guard.diagnosis.contents import contents, influence_rows
from concept_guard.diagnosis.history import History
from concept_guard.diagnosis.misclassified import Error
from concept_guard.diagnosis.subject import Subject
from concept_guard.diagnosis.words import headline, said
from concept_guard.flags import Flag
from concept_guard.report import write_html

PAGE, DATA = "report.html", "report.json"


def write_report(
    folder: Path,
    subject: Subject,
    analysis: Analysis,
    *,
    title: str,
    command: str,
    history: History | None = None,
) -> None:
    """Write `report.json` and `report.html`, each whole or not at all.

    Args:
        folder: Where they are to be.
        subject: What was examined.
        analysis: What was found.
        title: Heading of the page.
        command: That repeats it.
        history: What happened while the model was trained, if it was trained with the guard.
    """
    history = history or History()
    text = json.dumps(_plain(subject, analysis, history), indent=1, ensure_ascii=False)
    page = contents(subject, analysis, history, title, command)
    write_html(page, folder / PAGE)
    part = folder / f"{DATA}.part"
    part.write_bytes(text.encode("utf8", errors="backslashreplace"))
    os.replace(part, folder / DATA)


def error_rows(subject: Subject, analysis: Analysis) -> list[dict[str, Any]]:
    """Return the errors as plain data.

    Args:
        subject: What was examined.
        analysis: What was found.

    Returns:
        One row per error: file, classes, driving concept, and what would change the prediction.
    """
    return [_row(error, subject) for error in analysis.errors]


def _row(error: Error, subject: Subject) -> dict[str, Any]:
    classes, told = subject.classes, error.explanation
    return {
        "file": subject.file(error.index),
        "label": classes[error.label],
        "predicted": classes[error.predicted],
        "confidence": round(error.confidence, 4),
        "concept": error.concept,
        "confirmed": error.confirmed,
        "flip": said(told.flip, classes),
        "repair": said(told.repair, classes),
    }


def _plain(subject: Subject, analysis: Analysis, history: History) -> dict[str, Any]:
    """Return all that was found, and the history if there is one, as plain data."""
    report, classes = analysis.report, subject.classes
    plain = {
        "model": subject.name,
        "weights": subject.weights,
        "data": subject.source,
        "classes": list(classes),
        "images": report.images_seen,
        "errors": report.errors_seen,
        "accuracy": report.accuracy,
        "worst_group_accuracy": report.worst_group_accuracy,
        "worst_class_recall": report.worst_class_recall,
        "error_share_explained": report.error_share_explained,
        "seen_from": report.seen_from,
        "likely_seen_from": report.likely_seen_from,
        "verdict": headline(analysis, classes, history.flags),
        "notes": list(report.notes),
        "flags": _flags(report.flags, subject),
        "suspects": list(analysis.suspects),
        "misclassified": error_rows(subject, analysis),
        "groups": [{**asdict(g), "class": classes[g.class_index]} for g in analysis.groups],
        "influence": [asdict(row) for row in influence_rows(analysis, classes)],
        "unreadable": [subject.file(index) for index in analysis.unreadable],
        "seconds": analysis.seconds,
    }
    if history.flags or history.comparisons:
        plain["trained"] = {
            "flags": _flags(history.flags, subject),
            "comparisons": [asdict(comparison) for comparison in history.comparisons],
        }
    return plain


def _flags(flags: Sequence[Flag], subject: Subject) -> list[dict[str, Any]]:
    return [
        {
            **asdict(flag),
            "class": subject.classes[flag.class_index],
            "examples": [subject.file(index) for index in flag.examples],
        }
        for flag in flags
    ]
