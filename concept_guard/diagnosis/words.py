"""Diagnosis: findings in words, with the names of classes and files.

Nothing here knows how they are laid out.
"""

from collections.abc import Sequence

from concept_guard.changes import Change
from concept_guard.diagnosis.analysis import Analysis
from concept_guard.flags import Flag
from concept_guard.reporting import HELD


def headline(analysis: Analysis, classes: Sequence[str], trained: Sequence[Flag] = ()) -> str:
    """Say what drives errors, or why nothing is held to.

    Args:
        analysis: What was found.
        classes: Names in the order of the logits.
        trained: Flags of the guard while the model was trained.

    Returns:
        A few sentences.
    """
    report = analysis.report
    held = [flag for flag in report.flags if flag.status in HELD]
    if held:
        driven = sum(error.confirmed for error in analysis.errors)
        under = "it" if len({flag.concept for flag in held}) == 1 else "these concepts"
        text = _pulling(held, "drives", classes)
        text += f". {driven} of the {report.errors_seen} errors fall under {under}"
    else:
        text = report.verdict
    if not trained:
        return f"{_capital(text)}."
    before = "; ".join(f"{_pulling([f], 'drove', classes)} ({f.status})" for f in trained)
    return f"While training: {before}. After training: {text}."


def _pulling(flags: Sequence[Flag], verb: str, classes: Sequence[str]) -> str:
    return "; ".join(
        f"concept {f.concept} {verb} errors towards {classes[f.class_index]}" for f in flags
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def said(change: Change | None, classes: Sequence[str]) -> str:
    """Say what a change of one concept would do to a prediction.

    Args:
        change: The smallest that does it, or None.
        classes: Names in the order of the logits.

    Returns:
        One sentence; empty without a change.
    """
    if change is None:
        return ""
    verb = "erased" if change.kind == "erase" else "inserted"
    share = f"{change.size:.0%}" if change.size >= 0.01 else "less than 1%"
    return (
        f"With concept {change.concept} {verb} by {share} it is predicted as "
        f"{classes[change.predicted]}."
    )
