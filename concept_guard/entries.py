"""Stage 5: what is kept of a run, round by round and act by act, so that it can be shown later.

Nothing here knows how entries are stored or drawn, or imports torch: TensorBoard reads them too.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

SCHEMA_VERSION = 1
TAG = "concept_guard/history"  # under which entries stand in the events of a run
PLUGIN = "concept_guard"  # whose data they are
CARD_TAG = "concept_guard/cards/slot_{}"  # of the pictures that belong to them

ActName = Literal[
    "flag", "erase", "restore", "veto", "approve", "withdraw", "re_estimate", "bake", "not_done"
]
Number = float | None  # None stands for what is unknown or not finite


class Entry(BaseModel):
    """Plain data; what another version wrote beside it is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class FlagEntry(Entry):
    """The evidence that a concept drives errors towards a class; see `flags.Flag`.

    Attributes:
        class_name: The class it pulls towards.
        risk_difference: Of being predicted as this class, with and without the concept.
        interval: Its 95 % interval.
        q_value: After false-discovery control.
        fixed: Probe predictions that erasing turns right.
        broken: Probe predictions that erasing turns wrong.
        present: Probe images of other classes that carry it.
        status: `found`, `erased`, `waiting`, `vetoed` or `unconfirmed`.
        reason: Why, in words.
        examples: Names of the probe images whose errors it drives.
    """

    class_name: str
    risk_difference: Number
    interval: tuple[Number, Number]
    q_value: Number
    fixed: int
    broken: int
    present: int
    status: str
    reason: str = ""
    examples: tuple[str, ...] = ()


class ConceptEntry(Entry):
    """A concept that mattered in a round: it was flagged, had a slot or was under correction.

    Attributes:
        id: Of the concept, the same in all rounds.
        slot: Of the TensorBoard page, under which its card stands; None if it had none.
        presence_rate: Share of the probe images that carry it.
        flags: The evidence, strongest first.
        erased: Whether it was under correction after the round.
        leak: The risk difference that was left of it under correction.
        readable: How well a fresh linear probe still read it; .5 is not at all.
        drift: Cosine of its filter to that of the last round.
    """

    id: int
    slot: int | None = None
    presence_rate: Number = None
    flags: tuple[FlagEntry, ...] = ()
    erased: bool = False
    leak: Number = None
    readable: Number = None
    drift: Number = None


class GroupEntry(Entry):
    """The probe images of one class that carry a concept, or of those that do not.

    Attributes:
        concept: Id of the concept.
        class_name: Their true class.
        carried: Whether they carry it.
        images: How many there are.
        accuracy: Share of right predictions of the network as it is.
        accuracy_uncorrected: The same without what is projected out; None if nothing is.
    """

    concept: int
    class_name: str
    carried: bool
    images: int
    accuracy: Number = None
    accuracy_uncorrected: Number = None


class StartEntry(Entry):
    """A guard that began to write, or went on after the run had stopped.

    Attributes:
        step: Optimizer updates so far.
        time: Date and time.
        version: Of concept_guard.
        model: Class of the network.
        settings: Of the guard, as text.
        classes: Names of the classes; empty if the guard was not told.
    """

    kind: Literal["start"] = "start"
    schema_version: int = SCHEMA_VERSION
    step: int
    time: str
    version: str
    model: str
    settings: dict[str, str] = Field(default_factory=dict)
    classes: tuple[str, ...] = ()


class RoundEntry(Entry):
    """One round.

    Attributes:
        step: Optimizer updates when it ran.
        time: Date and time.
        verdict: One sentence.
        notes: What else the round had to say.
        numbers: The scalars of the round by their tag, without `concept_guard/`.
        images: Probe images read.
        errors: Of them predicted wrongly.
        concepts: Those that mattered, strongest evidence first.
        groups: Of the concepts that are flagged or under correction.
        new: Ids of concepts that the last round did not have.
        vanished: Ids of concepts that only the last round had.
        found: How many concepts the round had in all.
    """

    kind: Literal["round"] = "round"
    schema_version: int = SCHEMA_VERSION
    step: int
    time: str
    verdict: str
    notes: tuple[str, ...] = ()
    numbers: dict[str, Number] = Field(default_factory=dict)
    images: int = 0
    errors: int = 0
    concepts: tuple[ConceptEntry, ...] = ()
    groups: tuple[GroupEntry, ...] = ()
    new: tuple[int, ...] = ()
    vanished: tuple[int, ...] = ()
    found: int = 0


class ActEntry(Entry):
    """Something that the guard or a person did.

    Attributes:
        step: Optimizer updates so far.
        time: Date and time.
        act: What was done.
        concepts: Ids of the concepts it was done to.
        text: The same in words, with the reason if there is one.
        by: Who did it.
    """

    kind: Literal["act"] = "act"
    schema_version: int = SCHEMA_VERSION
    step: int
    time: str
    act: ActName
    concepts: tuple[int, ...] = ()
    text: str = ""
    by: Literal["guard", "person"] = "guard"


AnyEntry = StartEntry | RoundEntry | ActEntry
_ADAPTER: TypeAdapter[AnyEntry] = TypeAdapter(Annotated[AnyEntry, Field(discriminator="kind")])


def dumped(entry: AnyEntry) -> bytes:
    """Return an entry as JSON; what is not finite becomes null.

    Args:
        entry: What to write.

    Returns:
        UTF-8 without line breaks.
    """
    return entry.model_dump_json(exclude_defaults=False).encode()


def parsed(data: bytes) -> AnyEntry:
    """Return the entry that `dumped` wrote.

    Args:
        data: JSON. A `ValueError` says what is wrong with it.

    Returns:
        The entry.

    Raises:
        ValueError: If another version of the schema wrote it.
    """
    entry = _ADAPTER.validate_json(data)
    if entry.schema_version != SCHEMA_VERSION:
        raise ValueError(
            f"an entry of schema version {entry.schema_version}, expected {SCHEMA_VERSION}"
        )
    return entry
