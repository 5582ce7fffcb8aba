"""Stage 5: the rounds of a run, told concept by concept.

Nothing here knows how a story is drawn.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from concept_guard.entries import ConceptEntry, FlagEntry, RoundEntry
from concept_guard.history import RunHistory
from concept_guard.report.charts import Domain
from concept_guard.report.contents import HELD

MOST_CONCEPTS = 16  # that have a row of the timeline and are shown in full
MOST_CARDS = 40  # of a concept
LAST_UPDATE = 2**53  # what an entry says beyond it is no update of a training


@dataclass(frozen=True, eq=False)
class Story:
    """What the rounds said of one concept.

    Attributes:
        id: Of the concept.
        told: The rounds that spoke of it, and what they said.
        cards: Updates at which there is a card of it, and the slot under which it stands.
    """

    id: int
    told: tuple[tuple[RoundEntry, ConceptEntry], ...]
    cards: dict[int, int]

    @cached_property
    def flag(self) -> FlagEntry | None:
        """The strongest evidence of the last round that had any."""
        return next((entry.flags[0] for _, entry in reversed(self.told) if entry.flags), None)

    @cached_property
    def states(self) -> list[tuple[str, bool]]:
        """What each round took it for, in one word, and whether that round held it to mislead."""
        return [(status(entry), is_held(entry)) for _, entry in self.told]

    @cached_property
    def raised(self) -> RoundEntry | None:
        """The first round that held it to drive errors."""
        held = (n for n, (_, is_so) in enumerate(self.states) if is_so)
        return next((self.told[n][0] for n in held), None)

    @property
    def class_name(self) -> str:
        """The class it pulls towards; empty if that was never said."""
        return self.flag.class_name if self.flag else ""

    @property
    def status(self) -> str:
        """What the last round that spoke of it took it for."""
        return self.states[-1][0]

    @cached_property
    def weight(self) -> tuple[bool, bool, int]:
        """What makes it worth showing: correction, flags, then how lately it was spoken of."""
        ever = any(state == "erased" for state, _ in self.states)
        return ever, self.raised is not None, self.told[-1][0].step

    @cached_property
    def changes(self) -> list[int]:
        """The updates at which its state was another than in the round before it."""
        before = ["", *(state for state, _ in self.states)]
        now = zip(self.told, self.states, before, strict=False)
        return [at.step for (at, _), (state, _), last in now if state != last]


def is_held(entry: ConceptEntry) -> bool:
    """Tell whether a round held a concept to drive errors.

    Args:
        entry: What it said of the concept.

    Returns:
        Whether a flag of it says so.
    """
    return any(flag.status in HELD for flag in entry.flags)


def status(entry: ConceptEntry) -> str:
    """Return the state of a concept in one word; `erased` whenever it is under correction."""
    if entry.erased:
        return "erased"
    return entry.flags[0].status if entry.flags else "not flagged"


def stories(run: RunHistory) -> list[Story]:
    """Return what was said of each concept, the most important first.

    Args:
        run: Whose rounds are told.

    Returns:
        One story per concept that mattered in any round.
    """
    told: dict[int, list[tuple[RoundEntry, ConceptEntry]]] = {}
    cards: dict[int, dict[int, int]] = {}
    for entry in run.rounds:
        for concept in entry.concepts:
            told.setdefault(concept.id, []).append((entry, concept))
            if concept.slot is not None and (entry.step, concept.slot) in run.cards:
                cards.setdefault(concept.id, {})[entry.step] = concept.slot
    made = [Story(concept, tuple(said), cards.get(concept, {})) for concept, said in told.items()]
    return sorted(made, key=lambda story: story.weight, reverse=True)


def divided(run: RunHistory) -> tuple[list[Story], list[Story]]:
    """Return the concepts that are shown in full, and those that are only named.

    Args:
        run: Whose concepts they are.

    Returns:
        The most important of those that were flagged or corrected, have a card, or that a person
        decided about; and all others.
    """
    told = stories(run)
    acted = {concept for act in run.acts for concept in act.concepts}
    first = [s for s in told if s.weight[0] or s.weight[1] or s.cards or s.id in acted]
    shown = first[:MOST_CONCEPTS]
    left = {story.id for story in told} - {story.id for story in shown}
    return shown, [story for story in told if story.id in left]


def by_importance(story: Story) -> list[int]:
    """Return the updates of its cards so that any number of the first tells most.

    Args:
        story: Of a concept.

    Returns:
        The last, the first, those of a new state, then others; each spread evenly in time. At
        most `MOST_CARDS`.
    """
    steps = sorted(story.cards)
    changed = [step for step in story.changes if step in story.cards]
    ordered = [*steps[-1:], *steps[:1], *_spread(changed), *_spread(steps)]
    return list(dict.fromkeys(ordered))[:MOST_CARDS]


def _spread(steps: Sequence[int]) -> list[int]:
    """Return some, in an order in which any number of the first is spread over all."""
    most = 2 * MOST_CARDS
    if len(steps) > most:
        steps = [steps[len(steps) * n // most] for n in range(most)]
    bits = len(steps).bit_length()
    return [steps[n] for n in sorted(range(len(steps)), key=lambda n: f"{n:0{bits}b}"[::-1])]


def updates(run: RunHistory) -> list[int]:
    """Return the updates of all entries of a run that can be those of a training.

    Args:
        run: Whose entries.

    Returns:
        Updates in no order.
    """
    steps = [entry.step for entry in run.starts]
    steps += [entry.step for entry in run.rounds]
    steps += [entry.step for entry in run.acts]
    return [step for step in steps if 0 <= step <= LAST_UPDATE]


def domain(runs: Iterable[RunHistory]) -> Domain:
    """Return the first and the last update that any entry of the runs stands at."""
    steps = [step for run in runs for step in updates(run)]
    return (min(steps), max(steps)) if steps else (0, 0)
