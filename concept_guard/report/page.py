"""Stage 5: one HTML page on which concepts drive errors, with all its pictures inside.

Nothing here knows how concepts were found or confirmed, or which program asks for the page.
"""

import base64
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

HELD = ("found", "erased", "waiting")
NOT_HELD = ("vetoed", "unconfirmed")
SMALL_GROUP = 5  # images; the accuracy of fewer says nothing
WORST_GROUPS = 3  # that stand out in the table
STRONGEST = 8  # contributions in the bars of an image
TRUE_CLASSES = 12  # counted above a list of errors

Picture = bytes
_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class ErrorRow:
    """A misclassified file.

    Attributes:
        file: Its path.
        label: Name of its true class.
        predicted: Name of the class it is taken for.
    """

    file: str
    label: str
    predicted: str


@dataclass(frozen=True)
class ConceptEntry:
    """A flag: a concept that goes with errors towards a class, and the evidence.

    Attributes:
        id: Of the concept.
        class_name: The class it pulls towards.
        status: `found`, `erased`, `waiting`, `vetoed` or `unconfirmed`; the first three are held
            to drive errors and come first.
        reason: Why it is held to drive errors, or why not.
        risk_difference: How much more often images of other classes are predicted as this class
            when they carry the concept, the true class held fixed.
        interval: Its 95 % interval.
        q_value: Of the difference, after false-discovery control.
        fixed: Predictions that erasing turns right.
        broken: Predictions that erasing turns wrong.
        present: Images of other classes that carry the concept.
        images: All images that were examined.
        errors: Every misclassified file that the concept drives; the page counts them.
        card: Picture of the images that show the concept best.

    Raises:
        ValueError: If the status is none of the five.
    """

    id: int
    class_name: str
    status: str
    reason: str
    risk_difference: float
    interval: tuple[float, float]
    q_value: float
    fixed: int
    broken: int
    present: int
    images: int
    errors: tuple[ErrorRow, ...]
    card: Picture | None

    def __post_init__(self) -> None:
        if self.status not in HELD + NOT_HELD:
            raise ValueError(
                f"concept {self.id} has status {self.status!r}, expected one of "
                f"{', '.join(HELD + NOT_HELD)}"
            )


@dataclass(frozen=True)
class GroupRow:
    """The images of a class that carry a concept, or those that do not.

    Attributes:
        class_name: Their true class.
        concept: Id of the concept.
        carried: Whether these images carry it.
        images: How many there are.
        accuracy: Share of them that is predicted right; None if there are none.
    """

    class_name: str
    concept: int
    carried: bool
    images: int
    accuracy: float | None


@dataclass(frozen=True)
class InfluenceRow:
    """How a concept moves the probability of a class, over many images.

    Attributes:
        concept: Id of the concept.
        class_name: The class.
        score: Between -1 (always down) and 1 (always up).
        p_value: Of such a score without influence.
    """

    concept: int
    class_name: str
    score: float
    p_value: float


@dataclass(frozen=True)
class Contribution:
    """What a concept adds to the logits of one image.

    Attributes:
        concept: Id of the concept.
        to_predicted: To the logit of the predicted class.
        to_label: To the logit of the true class; None if that is not known.
    """

    concept: int
    to_predicted: float
    to_label: float | None


@dataclass(frozen=True)
class ImageEntry:
    """Why one image is predicted as it is.

    Attributes:
        file: Its path.
        label: Name of its true class; empty if not known.
        predicted: Name of the predicted class.
        picture: The image itself.
        contributions: Of the concepts, in any order; the strongest are drawn.
        flip: One sentence on the smallest change that changes the prediction.
        repair: One sentence on the smallest change that makes it right.
    """

    file: str
    label: str
    predicted: str
    picture: Picture | None
    contributions: tuple[Contribution, ...]
    flip: str
    repair: str


@dataclass(frozen=True)
class BeforeAfter:
    """A quantity before and after the correction.

    Attributes:
        name: Of the quantity.
        before: Value without the correction.
        after: Value with it.
    """

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        title: Heading of the page.
        subtitle: The line below it, such as the model and the folder.
        verdict: One sentence: what was found, or why nothing could be.
        facts: Names and values of what was examined and how.
        concepts: The flags, in any order.
        groups: Accuracy by class and presence of a concept, in any order.
        influence: Influence of concepts on classes, in any order.
        images: Explanations of single images, in this order.
        other_errors: Misclassified files that no concept drives.
        before_after: Effect of the correction, if there was one.
        notes: What else the reader must know.
        command: The command that wrote the page.
    """

    title: str
    subtitle: str
    verdict: str
    facts: tuple[tuple[str, str], ...]
    concepts: tuple[ConceptEntry, ...]
    groups: tuple[GroupRow, ...]
    influence: tuple[InfluenceRow, ...]
    images: tuple[ImageEntry, ...]
    other_errors: tuple[ErrorRow, ...]
    before_after: tuple[BeforeAfter, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""


def render(report: Report) -> str:
    """Return the page as one HTML document that needs no other file and no network.

    Args:
        report: What to show. Texts are plain text: whatever looks like HTML in them is escaped.
            A picture that is neither PNG nor JPEG is refused with a ValueError.

    Returns:
        The document. The same report gives the same document.
    """
    environment = Environment(
        loader=PackageLoader("concept_guard.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bar": _bar,
        "classes": _true_classes,
        "data_uri": _data_uri,
        "number": _number,
        "sentence": _sentence,
        "signed": _signed,
        "small": _small,
        "strength": _strength,
        "strongest": _strongest,
    }
    ordered = sorted(report.concepts, key=lambda entry: (entry.q_value, -entry.risk_difference))
    held = [entry for entry in ordered if entry.status in HELD]
    return environment.get_template("template.html.j2").render(
        report=report,
        held=held,
        not_held=[entry for entry in ordered if entry.status in NOT_HELD],
        anchors={entry.id: n for n, entry in reversed(list(enumerate(held, start=1)))},
        pairs=_group_pairs(report.groups),
        worst=_worst(report.groups),
        influence=sorted(report.influence, key=lambda row: -abs(row.score)),
        small_group=SMALL_GROUP,
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
    if 0 < driven <= entry.present:
        return (
            f"{driven} of the {entry.present} images of other classes that carry it {verb} "
            f"predicted as {entry.class_name}, among {entry.images} images examined."
        )
    carried = f"Of {entry.images} images examined, {entry.present} of other classes carry it"
    return f"{carried}; {driven or 'none'} {verb} listed as driven towards {entry.class_name}."


def _true_classes(errors: Sequence[ErrorRow]) -> str:
    """Return the most frequent true classes of the errors with their counts, in that order."""
    counted = Counter(row.label for row in errors).most_common()
    parts = [f"{label} ({count})" for label, count in counted[:TRUE_CLASSES]]
    left = len(counted) - len(parts)
    return ", ".join(parts) + (f" and {left} more" if left else "")


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _number(value: float) -> str:
    return f"{value:.2g}"


def _data_uri(picture: Picture) -> str:
    """Return a picture as text that stands where its address would.

    Args:
        picture: Bytes of a file.

    Returns:
        A data URI.

    Raises:
        ValueError: If it is neither PNG nor JPEG.
    """
    for magic, kind in _KINDS.items():
        if picture.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"
    raise ValueError(
        f"picture of {len(picture)} bytes begins with {picture[:8]!r}, expected the bytes of a "
        "PNG or JPEG file; encode it with concept_guard.report.png or jpeg"
    )
