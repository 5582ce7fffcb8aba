"""Audit: write what was found as a table, as data, as direction pairs and as one HTML page.

Nothing here knows how it was found.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from concept_guard.audit.analysis import Analysis, Error
from concept_guard.audit.opening import Opened
from concept_guard.audit.settings import AuditSettings
from concept_guard.cards import card_image, displayable
from concept_guard.changes import Change
from concept_guard.probe import images_at, probe_batches
from concept_guard.report import (
    ConceptEntry,
    Contribution,
    ErrorRow,
    GroupRow,
    ImageEntry,
    InfluenceRow,
    Report,
    jpeg,
    write_html,
)

_COLUMNS = (
    "file",
    "label",
    "predicted",
    "confidence",
    "concept",
    "confirmed",
    "flip",
    "repair",
)
MOST_INFLUENCE = 40  # rows of the table of influence in the page


def write_audit(
    folder: Path, settings: AuditSettings, opened: Opened, analysis: Analysis, command: str
) -> None:
    """Write `errors.csv`, `concepts.safetensors`, `report.json`, `report.html` and `args.yaml`.

    All of them or none: they appear together when everything is written.

    Args:
        folder: Where they are to be; it does not exist yet.
        settings: What was asked for.
        opened: Model and images.
        analysis: What was found.
        command: That repeats the audit.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        rows = [_row(error, opened) for error in analysis.errors]
        _write_errors(part / "errors.csv", rows)
        about = {"ids": json.dumps(list(analysis.findings.ids)), "tap": settings.guard.tap}
        analysis.findings.pairs.save(part / "concepts.safetensors", about)
        plain = _plain(opened, analysis, rows)
        text = json.dumps(plain, indent=1, ensure_ascii=False)
        (part / "report.json").write_text(text, encoding="utf8")
        args = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (part / "args.yaml").write_text(args, encoding="utf8")
        write_html(_page(settings, opened, analysis, command), part / "report.html")
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _file(opened: Opened, index: int) -> str:
    """Return the path of an image below the folder of the images."""
    path = Path(opened.images.name(index))
    return str(path.relative_to(opened.folder)) if path.is_relative_to(opened.folder) else str(path)


def _said(change: Change | None, classes: Sequence[str]) -> str:
    if change is None:
        return ""
    verb = "erased" if change.kind == "erase" else "inserted"
    return (
        f"With concept {change.concept} {verb} by {change.size:.0%} it is predicted as "
        f"{classes[change.predicted]}."
    )


def _row(error: Error, opened: Opened) -> dict[str, Any]:
    classes, told = opened.classes, error.explanation
    return {
        "file": _file(opened, error.index),
        "label": classes[error.label],
        "predicted": classes[error.predicted],
        "confidence": round(error.confidence, 4),
        "concept": error.concept,
        "confirmed": error.confirmed,
        "flip": _said(told.flip, classes),
        "repair": _said(told.repair, classes),
    }


def _write_errors(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, fieldnames=_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _plain(opened: Opened, analysis: Analysis, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the audit as plain data."""
    report, classes = analysis.report, opened.classes
    return {
        "model": opened.name,
        "weights": opened.weights,
        "data": str(opened.folder),
        "classes": list(classes),
        "images": report.images_seen,
        "errors": report.errors_seen,
        "accuracy": report.accuracy,
        "worst_group_accuracy": report.worst_group_accuracy,
        "error_share_explained": report.error_share_explained,
        "seen_from": report.seen_from,
        "likely_seen_from": report.likely_seen_from,
        "verdict": report.verdict,
        "notes": list(report.notes),
        "flags": [
            {
                **asdict(flag),
                "class": classes[flag.class_index],
                "examples": [_file(opened, index) for index in flag.examples],
            }
            for flag in report.flags
        ],
        "misclassified": list(rows),
        "groups": [{**asdict(g), "class": classes[g.class_index]} for g in analysis.groups],
        "influence": [asdict(row) for row in _influence(analysis, classes)],
        "unreadable": [_file(opened, index) for index in analysis.unreadable],
        "seconds": analysis.seconds,
    }


def _influence(analysis: Analysis, classes: Sequence[str]) -> list[InfluenceRow]:
    """Return the influence of the tested concepts, strongest first."""
    tested = {flag.concept for flag in analysis.report.flags}
    at = [n for n, i in enumerate(analysis.findings.ids) if i in tested]
    found, ids = analysis.influence, analysis.findings.ids
    rows = [
        (
            abs(float(found.change[n, k])),
            InfluenceRow(ids[n], name, float(found.score[n, k]), float(found.p_value[n, k])),
        )
        for n in at
        for k, name in enumerate(classes)
    ]
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])]


def _page(settings: AuditSettings, opened: Opened, analysis: Analysis, command: str) -> Report:
    report, classes = analysis.report, opened.classes
    driven = {
        f.concept: [e for e in analysis.errors if e.confirmed and e.concept == f.concept]
        for f in report.flags
    }
    entries = tuple(
        ConceptEntry(
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
            images=report.images_seen,
            errors=tuple(_error_row(e, opened) for e in driven[flag.concept]),
            card=jpeg(card_image(analysis.cards[flag.concept]))
            if flag.concept in analysis.cards
            else None,
        )
        for flag in report.flags
    )
    facts = (
        ("Model", opened.name),
        ("Weights", opened.weights),
        ("Images", f"{report.images_seen} of {len(classes)} classes in {opened.folder}"),
        ("Accuracy", f"{report.accuracy:.3f}"),
        ("Misclassified", str(report.errors_seen)),
        ("Share of errors under a flag", f"{report.error_share_explained:.0%}"),
        ("Tap", settings.guard.tap),
    )
    unreadable = [_file(opened, index) for index in analysis.unreadable]
    notes = list(report.notes)
    if unreadable:
        notes.append(f"{len(unreadable)} unreadable images left out: {', '.join(unreadable[:10])}")
    return Report(
        title=f"Audit of {opened.name}",
        subtitle=f"{report.errors_seen} of {report.images_seen} images are misclassified",
        verdict=report.verdict,
        facts=facts,
        concepts=entries,
        groups=tuple(
            GroupRow(classes[g.class_index], g.concept, g.carried, g.images, g.accuracy)
            for g in analysis.groups
        ),
        influence=tuple(_influence(analysis, classes)[:MOST_INFLUENCE]),
        images=_images(settings, opened, analysis),
        other_errors=tuple(_error_row(e, opened) for e in analysis.errors if not e.confirmed),
        notes=tuple(notes),
        command=command,
    )


def _error_row(error: Error, opened: Opened) -> ErrorRow:
    classes = opened.classes
    return ErrorRow(_file(opened, error.index), classes[error.label], classes[error.predicted])


def _images(settings: AuditSettings, opened: Opened, analysis: Analysis) -> tuple[ImageEntry, ...]:
    """Return the errors that are shown with picture and contributions."""
    import torch

    shown = analysis.errors[: settings.explained]
    if not shown:
        return ()
    at = torch.tensor([error.index for error in shown])
    pictures, _ = images_at(probe_batches(opened.loader, settings.guard.seed), at)
    entries = []
    for error, picture in zip(shown, displayable(pictures), strict=True):
        told, classes = error.explanation, opened.classes
        to_label = told.to_label if told.to_label is not None else told.to_predicted
        apart = (told.to_predicted - told.usual[0], to_label - told.usual[-1])
        contributions = tuple(
            Contribution(concept, float(apart[0][n]), float(apart[1][n]))
            for n, concept in enumerate(told.concepts)
        )
        entries.append(
            ImageEntry(
                file=_file(opened, error.index),
                label=classes[error.label],
                predicted=classes[error.predicted],
                picture=jpeg(picture),
                contributions=contributions,
                flip=_said(told.flip, classes)
                or "No change of a single concept changes the prediction.",
                repair=_said(told.repair, classes) or "No change of a single concept repairs it.",
            )
        )
    return tuple(entries)
