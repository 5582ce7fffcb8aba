"""Diagnosis: what happened while a model was trained with the guard, for the page of a run.

Nothing here knows how the model was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from concept_guard.cards import Card
from concept_guard.flags import Flag
from concept_guard.history import RunHistory
from concept_guard.report import Comparison

Cards = Mapping[int, Card]


@dataclass(frozen=True, eq=False)
class History:
    """What the guard found while the model was trained, and what that changed.

    Attributes:
        flags: Of the guard's last round, with the evidence of the round that raised each.
        cards: Concept id to card, of that round.
        comparisons: Shares of right predictions, before and after.
        next_id: First id that no concept has had while training.
        leak: Concept id to the risk difference that the last round left of it.
        readable: Concept id to how well a fresh linear probe read it then.
        rounds: What was seen and done, round by round, as the run's log has it.
    """

    flags: tuple[Flag, ...] = ()
    cards: Cards = field(default_factory=dict)
    comparisons: tuple[Comparison, ...] = ()
    next_id: int = 0
    leak: Mapping[int, float] = field(default_factory=dict)
    readable: Mapping[int, float] = field(default_factory=dict)
    rounds: RunHistory | None = None
