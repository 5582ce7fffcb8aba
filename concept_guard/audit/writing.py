"""Audit: the folder of the result, which appears when everything in it is written.

Nothing here knows how anything was found, or what the report shows.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from concept_guard.audit.settings import AuditSettings
from concept_guard.diagnosis import Analysis, Subject, error_rows, write_report

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


def write_audit(
    folder: Path, settings: AuditSettings, subject: Subject, analysis: Analysis, command: str
) -> None:
    """Write `errors.csv`, `concepts.safetensors`, `report.json`, `report.html` and `args.yaml`.

    All of them or none: they appear together when everything is written.

    Args:
        folder: Where they are to be; it does not exist yet.
        settings: What was asked for.
        subject: What was examined.
        analysis: What was found.
        command: That repeats the audit.
    """
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_errors(part / "errors.csv", error_rows(subject, analysis))
        about = {"ids": json.dumps(list(analysis.findings.ids)), "tap": settings.guard.tap}
        analysis.findings.pairs.save(part / "concepts.safetensors", about)
        args = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (part / "args.yaml").write_text(args, encoding="utf8")
        title = f"Audit of {subject.name}"
        write_report(part, subject, analysis, title=title, command=command)
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _write_errors(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, fieldnames=_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
