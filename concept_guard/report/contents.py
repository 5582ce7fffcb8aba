"""Stage 5: what the page shows, as plain records.

Nothing here knows how it is drawn, or which program asks for the page.
"""

from dataclasses import dataclass

from concept_guard.history import RunHistory

HELD = ("found", "erased", "waiting")
NOT_HELD = ("vetoed", "unconfirmed")

Picture = bytes


@dataclass(frozen=True)
class ErrorRow:
    """A misclassified file.

    Attributes:
        file: Its path.
        label: Name of its true class.
        predicted: Name of the class it is taken for.
        after: Name of the class it is taken for after training; empty if there was none.
    """

    file: str
    label: str
    predicted: str
    after: str = ""


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
        errors: The misclassified files that a held concept drives, or for which one that is not
            held speaks most; the page counts them.
        card: Picture of the images that show the concept best.
        leak: The risk difference that is left of it under correction; None if it is under none.
        readable: How well a fresh linear probe still reads it, .5 if not at all; None if unknown.

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
    leak: float | None = None
    readable: float | None = None

    def __post_init__(self) -> None:
        if self.status not in HELD + NOT_HELD:
            raise ValueError(
                f"concept {self.id} has status {self.status!r}, expected one of "
                f"{', '.join(HELD + NOT_HELD)}"
            )


@dataclass(frozen=True)
class SuspectEntry:
    """A concept that speaks most for some errors, but does not go with errors by the tests.

    Attributes:
        id: Of the concept.
        reason: Why it is not even a flag.
        errors: The misclassified files for which it speaks most.
        card: Picture of the images that show the concept best.
    """

    id: int
    reason: str
    errors: tuple[ErrorRow, ...]
    card: Picture | None


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
        concept: Id of the concept that drives the prediction.
        marked: The image again, all but the place of that concept dark.
    """

    file: str
    label: str
    predicted: str
    picture: Picture | None
    contributions: tuple[Contribution, ...]
    flip: str
    repair: str
    concept: int | None = None
    marked: Picture | None = None


@dataclass(frozen=True)
class BeforeAfter:
    """A share of right predictions before and after.

    Attributes:
        name: What was measured, and on which images.
        before: Value before.
        after: Value after.
        notes: Of the two values, such as the class of which each is the recall.
    """

    name: str
    before: float
    after: float
    notes: tuple[str, str] = ("", "")


@dataclass(frozen=True)
class Comparison:
    """Some quantities of two models, or of one at two times.

    Attributes:
        title: What is compared.
        note: What may be concluded from it, and what not.
        before: Name of the first.
        after: Name of the second.
        rows: The quantities.
    """

    title: str
    note: str
    before: str
    after: str
    rows: tuple[BeforeAfter, ...]


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
        other_errors: Misclassified files that are listed under no concept.
        suspects: Concepts without a flag that speak most for errors, in this order.
        trained: The flags of the guard while the model was trained, in any order.
        history: What the guard saw and did while the model was trained, round by round.
        comparisons: Effects of the training with the guard.
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
    suspects: tuple[SuspectEntry, ...] = ()
    trained: tuple[ConceptEntry, ...] = ()
    history: RunHistory | None = None
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    command: str = ""
