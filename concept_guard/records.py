"""Stage 5: the record of a round, and the same record as plain text and as Markdown.

Nothing here knows how a concept was found, tested or corrected, or where the text is shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from concept_guard.directions import Concept
from concept_guard.flags import Flag

_NOT_FLAGGED = ("vetoed", "unconfirmed")
_HEADER = (
    "concept",
    "class",
    "risk difference",
    "q",
    "fixed/broken",
    "present",
    "leak",
    "readable",
    "status",
)


@dataclass(frozen=True)
class Group:
    """The images of one class that carry a concept, or of those that do not.

    Attributes:
        class_index: Their true class.
        concept: Id of the concept.
        carried: Whether they carry it.
        images: How many there are.
        accuracy: Share of right predictions; None without images.
        accuracy_uncorrected: The same without what is projected out; None if not measured.
    """

    class_index: int
    concept: int
    carried: bool
    images: int
    accuracy: float | None
    accuracy_uncorrected: float | None = None


@dataclass(frozen=True)
class RoundReport:
    """What one round found, and what it did to the network.

    Attributes:
        step: Optimizer updates when the round ran.
        concepts: Every concept of the round.
        flags: The tested (concept, class) pairs worth showing, in the order of the guard.
        erased: Ids of the concepts that are erased now.
        accuracy: Share of right probe predictions.
        worst_group_accuracy: Accuracy of the worst (class, concept present) group.
        worst_class_recall: Recall of the worst class.
        error_share_explained: Share of the errors that fall under a flag.
        accuracy_if_erased: `accuracy` with every flagged concept erased; None if not measured.
        worst_group_accuracy_if_erased: Likewise.
        leak: Concept under correction to the absolute risk difference that is left of it once this
            round has corrected it, on images from which the projection was not estimated.
        cosine_to_last: Mean of `drift`; 1 in the first round, 0 if no concept was found again.
        penalty: Share of the variance of the logits that the penalized concepts carry, over the
            last training batches; 0 while there are none.
        errors_seen: Probe images predicted wrongly.
        images_seen: Probe images read.
        seconds: Duration of the round.
        overhead: Share of the wall time that the guard has used so far.
        verdict: One sentence: what was flagged, or why nothing could be.
        drift: Concept id to the cosine of its filter with the last round's, for concepts found
            again.
        new: Ids of the concepts that the last round did not have; empty in the first round.
        vanished: Ids of the last round that are gone.
        notes: What the search for concepts has to say, such as why there are so few, and which
            concepts under correction came back since the last round.
        seen_from: Images of other classes that must carry a shortcut for it to be seen at all.
        likely_seen_from: From how many on one that misleads on half of them is seen with
            probability .8.
        readable: Concept under correction to how well a fresh linear probe still reads it from the
            rows of such images, the class held fixed: the AUC, .5 if not at all. Concepts with too
            few images are missing.
        accuracy_uncorrected: `accuracy` without what is projected out; None if nothing was when
            the round began, or no linear map follows the tap.
        worst_group_uncorrected: Likewise.
        groups: Size and accuracy of the (class, concept present) groups of what is flagged.
        withdrawn: Ids of the concepts whose correction ended because it does not help.
    """

    step: int
    concepts: tuple[Concept, ...]
    flags: tuple[Flag, ...]
    erased: tuple[int, ...]
    accuracy: float
    worst_group_accuracy: float
    worst_class_recall: float
    error_share_explained: float
    accuracy_if_erased: float | None
    worst_group_accuracy_if_erased: float | None
    leak: dict[int, float]
    cosine_to_last: float
    penalty: float
    errors_seen: int
    images_seen: int
    seconds: float
    overhead: float
    verdict: str
    drift: dict[int, float] = field(default_factory=dict)
    new: tuple[int, ...] = ()
    vanished: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    seen_from: int = 0
    likely_seen_from: int = 0
    readable: dict[int, float] = field(default_factory=dict)
    accuracy_uncorrected: float | None = None
    worst_group_uncorrected: float | None = None
    groups: tuple[Group, ...] = ()
    withdrawn: tuple[int, ...] = ()

    @property
    def identity(self) -> str:
        """One line on which concepts stayed, came and went since the last round, or nothing."""
        if not (self.drift or self.new or self.vanished):
            return ""
        parts = [f"{len(self.drift)} concepts found again (mean cosine {self.cosine_to_last:.2f}"]
        if self.drift:
            least = min(self.drift, key=self.drift.__getitem__)
            parts[0] += f", least {self.drift[least]:.2f}: concept {least}"
        parts[0] += ")"
        parts += [f"new: {', '.join(map(str, self.new))}"] if self.new else []
        parts += [f"gone: {', '.join(map(str, self.vanished))}"] if self.vanished else []
        return "; ".join(parts)

    @property
    def flagged(self) -> tuple[int, ...]:
        """Ids of the concepts held to drive errors, strongest evidence first, each once."""
        held = [flag for flag in self.flags if flag.status not in _NOT_FLAGGED]
        return tuple(dict.fromkeys(flag.concept for flag in sorted(held, key=evidence)))


def evidence(flag: Flag) -> tuple[float, float]:
    """Return the sorting key that puts the flag with the strongest evidence first."""
    return flag.q_value, -flag.risk_difference


def named(names: Sequence[str] | None, index: int) -> str:
    """Return the name of a class or an image, or its index where names are not known."""
    return str(names[index]) if names is not None and index < len(names) else str(index)


def _rows(
    report: RoundReport, class_names: Sequence[str] | None, file_names: Sequence[str] | None
) -> list[tuple[str, ...]]:
    """Return one row of cells per flag, in the order of the header and the evidence."""
    return [
        (
            str(flag.concept),
            named(class_names, flag.class_index),
            f"{flag.risk_difference:+.2f} [{flag.interval[0]:+.2f}, {flag.interval[1]:+.2f}]",
            f"{flag.q_value:.2g}",
            f"{flag.fixed}/{flag.broken}",
            str(flag.present),
            _left(report.leak, flag.concept),
            _left(report.readable, flag.concept),
            flag.status,
            ", ".join(named(file_names, example) for example in flag.examples[:3]),
        )
        for flag in report.flags
    ]


def _left(values: Mapping[int, float], concept: int) -> str:
    return f"{values[concept]:.2f}" if concept in values else "-"


def table(
    report: RoundReport,
    class_names: Sequence[str] | None = None,
    file_names: Sequence[str] | None = None,
) -> str:
    """Return the flags of a round as aligned plain text, and the verdict below.

    Args:
        report: The round.
        class_names: Shown instead of class indices.
        file_names: Probe order; shown instead of probe indices in the column of examples.

    Returns:
        Lines without a final newline: flags if there are any, which concepts stayed, came and went
        since the last round, notes, the verdict.
    """
    rows = _rows(report, class_names, file_names)
    last = [line for line in (report.identity, *report.notes, report.verdict) if line]
    if not rows:
        return "\n".join(last)
    cells = [(*_HEADER, "examples"), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = (0, 2, 3, 4, 5, 6, 7)  # columns of numbers
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join((*lines, *last))


def markdown(
    report: RoundReport,
    class_names: Sequence[str] | None = None,
    file_names: Sequence[str] | None = None,
    slots: Mapping[int, int] | None = None,
) -> str:
    """Return the table of a round for TensorBoard's text page.

    Args:
        report: The round.
        class_names: Shown instead of class indices.
        file_names: Probe order; shown instead of probe indices in the column of examples.
        slots: Concept id to slot; adds the column that tells which tags belong to a concept.

    Returns:
        The verdict, a Markdown table if there are flags, then which concepts stayed, came and went,
        and notes.
    """
    lines = [f"**{escaped(report.verdict)}**"]
    rows = _rows(report, class_names, file_names)
    if rows:
        held = slots or {}
        header = ("slot", *_HEADER, "examples")
        lines += ["", _line(header), _line("---" for _ in header)]
        for flag, row in zip(report.flags, rows, strict=True):
            lines.append(_line((str(held.get(flag.concept, "-")), *row)))
    for line in (report.identity, *report.notes):
        lines += ["", escaped(line)] if line else []
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """Return a text so that Markdown shows it as it is, on one line."""
    for mark in "\\|*_`<":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
