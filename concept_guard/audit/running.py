"""Audit: from settings to the folder with the report.

Nothing here knows how the command line is written.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from time import perf_counter

from concept_guard.audit.opening import open_audit
from concept_guard.audit.settings import AuditSettings
from concept_guard.audit.writing import write_audit
from concept_guard.diagnosis import Analysis, Subject, analyse, headline
from concept_guard.errors import ConfigError, StateError
from concept_guard.records import table
from concept_guard.training.images import check_all

_logger = logging.getLogger(__name__)
LISTED = 20  # misclassified files in the printed text


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What an audit found, and where it is written.

    Attributes:
        folder: Holds `report.html`, `report.json`, `errors.csv`, `concepts.safetensors` and
            `args.yaml`.
        analysis: The result.
        table: Flags, verdict and the first misclassified files as text.
        seconds: Duration.
    """

    folder: Path
    analysis: Analysis
    table: str
    seconds: float


def audit(settings: AuditSettings, *, command: str = "") -> AuditResult:
    """Audit a trained model on a folder of images; nothing is trained.

    Args:
        settings: Model, images and output.
        command: That repeats the audit, for the report.

    Returns:
        The result; it is written when this returns.
    """
    began = perf_counter()
    folder = _claimed(settings)
    opened = open_audit(settings)
    subject = opened.subject
    _logger.info("audit: %s on %d images: %s", subject.name, opened.size, subject.source)
    analysis = analyse(subject, settings.guard, explained=settings.explained)
    check_all([opened.samples])
    write_audit(folder, settings, subject, analysis, command)
    return AuditResult(folder, analysis, _text(subject, analysis), perf_counter() - began)


def _claimed(settings: AuditSettings) -> Path:
    """Return the folder of the result, which does not exist yet and can be made.

    Raises:
        StateError: If it holds something.
        ConfigError: If it cannot be written.
    """
    stem = Path(settings.source).stem.replace(".", "_")
    name = settings.experiment or f"{datetime.now():%Y%m%d-%H%M%S}-{stem}"
    folder = Path(settings.output, name)
    if folder.exists():
        raise StateError(f"{folder} exists and is kept; choose another folder: experiment=NAME")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(folder.name + ".part")
        part.mkdir(exist_ok=True)
        part.rmdir()
    except OSError as error:
        raise ConfigError(
            f"output={settings.output}: cannot be written ({error.strerror}); expected a folder "
            "that can be: output=FOLDER"
        ) from error
    return folder


def _text(subject: Subject, analysis: Analysis) -> str:
    """Return the flags, the verdict, and the misclassified files with what drives them."""
    report, classes = analysis.report, subject.classes
    seen = analysis.reading.seen
    files = [Path(subject.file(index)).name for index in range(seen)]
    lines = [
        f"{subject.name}, {subject.weights}: {report.errors_seen} of {report.images_seen} images "
        f"misclassified, accuracy {report.accuracy:.3f}",
        "",
        table(replace(report, verdict=headline(analysis, classes)), classes, files),
    ]
    if analysis.errors:
        lines += ["", "misclassified files, by the concept that drives them (* confirmed):"]
    for error in analysis.errors[:LISTED]:
        mark = "*" if error.confirmed else " "
        wrong = f"{classes[error.label]} -> {classes[error.predicted]} ({error.confidence:.2f})"
        lines.append(f"  concept {error.concept}{mark} {wrong}  {subject.file(error.index)}")
    if len(analysis.errors) > LISTED:
        lines.append(f"  and {len(analysis.errors) - LISTED} more in errors.csv")
    return "\n".join(lines)
