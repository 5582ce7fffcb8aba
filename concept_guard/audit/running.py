"""Audit: from settings to the folder with the report.

Nothing here knows how the command line is written.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter

from concept_guard.audit.analysis import Analysis, analyse
from concept_guard.audit.opening import Opened, open_audit
from concept_guard.audit.settings import AuditSettings
from concept_guard.audit.writing import write_audit
from concept_guard.errors import ConfigError, StateError
from concept_guard.probe import probe_batches
from concept_guard.records import table

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
    _logger.info("audit: %s on %d images in %s", opened.name, len(opened.images), opened.folder)
    probe = probe_batches(opened.loader, settings.guard.seed)
    analysis = analyse(opened.model, probe, settings.guard, broken=opened.images.broken)
    opened.images.check()
    write_audit(folder, settings, opened, analysis, command)
    return AuditResult(folder, analysis, _text(opened, analysis), perf_counter() - began)


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


def _text(opened: Opened, analysis: Analysis) -> str:
    """Return the flags, the verdict, and the misclassified files with what drives them."""
    names = {index: Path(opened.images.name(index)).name for index in range(len(opened.images))}
    report, classes = analysis.report, opened.classes
    files = [names[index] for index in range(len(names))]
    lines = [
        f"{opened.name}, {opened.weights}: {report.errors_seen} of {report.images_seen} images "
        f"misclassified, accuracy {report.accuracy:.3f}",
        "",
        table(report, classes, files),
    ]
    if analysis.errors:
        lines += ["", "misclassified files, by the concept that drives them (* confirmed):"]
    for error in analysis.errors[:LISTED]:
        mark = "*" if error.confirmed else " "
        wrong = f"{classes[error.label]} -> {classes[error.predicted]} ({error.confidence:.2f})"
        lines.append(f"  concept {error.concept}{mark} {wrong}  {opened.images.name(error.index)}")
    if len(analysis.errors) > LISTED:
        lines.append(f"  and {len(analysis.errors) - LISTED} more in errors.csv")
    return "\n".join(lines)
