"""Stage 5: one HTML page on which concepts drive errors, with all its pictures inside.

Nothing here knows how concepts were found or confirmed, or which program asks for the page.
"""

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from concept_guard.report.contents import (
    HELD,
    NOT_HELD,
    ConceptEntry,
    Contribution,
    ErrorRow,
    GroupRow,
    Report,
)
from concept_guard.report.drawing import data_uri, environment, style
from concept_guard.report.runs import embedded
from concept_guard.report.words import number, signed

SMALL_GROUP = 5  # images; the accuracy of fewer says nothing
WORST_GROUPS = 3  # that stand out in the table
STRONGEST = 8  # contributions in the bars of an image
MOST_CLASSES = 12  # counted above a list of errors


def render(report: Report) -> str:
    """Return the page as one HTML document that needs no other file and no network.

    Args:
        report: What to show. Texts are plain text: whatever looks like HTML in them is escaped.
            A picture that is neither PNG nor JPEG is refused with a ValueError.

    Returns:
        The document. The same report gives the same document.
    """
    templates = environment(
        {
            "bar": _bar,
            "counts": _counts,
            "classes": _true_classes,
            "data_uri": data_uri,
            "number": number,
            "repaired": _repaired,
            "sentence": _sentence,
            "signed": signed,
            "small": _small,
            "strength": _strength,
            "strongest": _strongest,
        }
    )
    ordered = sorted(report.concepts, key=_evidence)
    held = [entry for entry in ordered if entry.status in HELD]
    not_held = [entry for entry in ordered if entry.status in NOT_HELD]
    trained = sorted(report.trained, key=_evidence)
    told = "" if report.history is None else embedded([report.history], level=3)
    return templates.get_template("template.html.j2").render(
        report=report,
        style=Markup(style()),  # noqa: S704, a file of this package
        history=Markup(told),  # noqa: S704, escaped by its own template
        held=held,
        not_held=not_held,
        trained=trained,
        anchors=_anchors(report, held, not_held, trained),
        pairs=_group_pairs(report.groups),
        worst=_worst(report.groups),
        influence=sorted(report.influence, key=lambda row: -abs(row.score)),
        small_group=SMALL_GROUP,
        held_states=HELD,
    )


def write_html(report: Report, path: Path) -> None:
    """Write the page so that a failure leaves the file as it was, or absent.

    Args:
        report: What to show.
        path: The file to write, in a folder that exists. Where it cannot be written the OSError
            is passed on.
    """
    # A file name that is no valid text stays readable as its escape sequence.
    page = render(report).encode("utf8", errors="backslashreplace")
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(page)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _evidence(entry: ConceptEntry) -> tuple[float, float]:
    return entry.q_value, -entry.risk_difference


def _anchors(report: Report, *lists: Sequence[ConceptEntry]) -> dict[int, str]:
    """Return concept id to the part of the page that shows the concept, its best flag first."""
    named = zip(("flag", "other", "trained"), lists, strict=True)
    anchors = {f.id: f"suspect-{n}" for n, f in enumerate(report.suspects, start=1)}
    for name, entries in reversed(list(named)):
        anchors |= {e.id: f"{name}-{n}" for n, e in reversed(list(enumerate(entries, start=1)))}
    return anchors


@dataclass(frozen=True)
class _GroupPair:
    """The images of a class with a concept beside those without it."""

    class_name: str
    concept: int
    carrying: GroupRow | None = None
    without: GroupRow | None = None


def _group_pairs(groups: Sequence[GroupRow]) -> list[_GroupPair]:
    """Return the groups side by side, the least accurate group that is not small first.

    Two classes may have the same name: their groups pair up in the order given.
    """
    sides: dict[tuple[str, int], tuple[list[GroupRow], list[GroupRow]]] = {}
    for row in groups:
        sides.setdefault((row.class_name, row.concept), ([], []))[row.carried].append(row)
    pairs = [
        _GroupPair(
            *name,
            carrying=carrying[n] if n < len(carrying) else None,
            without=without[n] if n < len(without) else None,
        )
        for name, (without, carrying) in sides.items()
        for n in range(max(len(without), len(carrying)))
    ]
    return sorted(pairs, key=_least_accuracy)


def _least_accuracy(pair: _GroupPair) -> float:
    return min(
        (
            row.accuracy
            for row in (pair.carrying, pair.without)
            if row is not None and row.accuracy is not None and not _small(row)
        ),
        default=math.inf,
    )


def _small(row: GroupRow) -> bool:
    return row.images < SMALL_GROUP


def _worst(groups: Sequence[GroupRow]) -> list[GroupRow]:
    """Return the few groups that stand out; none that is small or has no errors."""
    wrong = sorted(
        (row.accuracy, n)
        for n, row in enumerate(groups)
        if row.accuracy is not None and row.accuracy < 1 and not _small(row)
    )
    return [groups[n] for _, n in wrong[:WORST_GROUPS]]


def _strongest(contributions: Sequence[Contribution]) -> list[Contribution]:
    return sorted(contributions, key=lambda given: -_strength(given))[:STRONGEST]


def _strength(given: Contribution) -> float:
    """Return the size of the larger of the two contributions, 0 if neither is a number."""
    sizes = (abs(given.to_predicted), abs(given.to_label or 0.0))
    return max((size for size in sizes if math.isfinite(size)), default=0.0)


def _bar(value: float, largest: float) -> str:
    """Return the style of a bar that grows from the middle, to the right if positive."""
    share = value / largest if largest > 0 and math.isfinite(value) else 0.0
    width = 50 * min(abs(share), 1.0)
    return f"left:{50 - width if share < 0 else 50:.1f}%;width:{width:.1f}%"


def _sentence(entry: ConceptEntry) -> str:
    """Return how many of the images that carry the concept it misleads."""
    driven = len(entry.errors)
    verb = "is" if driven == 1 else "are"
    if entry.status in HELD and 0 < driven <= entry.present:
        return (
            f"{driven} of the {entry.present} images of other classes that carry it {verb} "
            f"predicted as {entry.class_name}, among {entry.images} images examined."
        )
    carried = f"Of {entry.images} images examined, {entry.present} of other classes carry it"
    if entry.status not in HELD:
        return f"{carried}. It speaks most for {driven or 'none'} of the errors."
    return f"{carried}; {driven or 'none'} {verb} listed as driven towards {entry.class_name}."


def _repaired(errors: Sequence[ErrorRow]) -> str:
    """Return what became of errors that were listed before the training went on."""
    right = sum(row.after == row.label for row in errors)
    return f"{right} of these {len(errors)} {'is' if right == 1 else 'are'} right after training."


def _true_classes(errors: Sequence[ErrorRow]) -> str:
    """Return the most frequent true classes of the errors with their counts, in that order."""
    return _counts([row.label for row in errors])


def _counts(names: Sequence[str], most: int = MOST_CLASSES) -> str:
    """Return the most frequent names with their counts, in that order."""
    counted = Counter(names).most_common()
    parts = [f"{name} ({count})" for name, count in counted[:most]]
    left = len(counted) - len(parts)
    return ", ".join(parts) + (f" and {left} more" if left else "")
