"""What the last round found, as the next one, people and reports need it.

Nothing here knows how a round is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from concept_guard import state
from concept_guard.cards import Card
from concept_guard.directions import DirectionPairs
from concept_guard.records import RoundReport


@dataclass(frozen=True, eq=False)
class LastRound:
    """The concepts of the last round and its record; the defaults are those before the first.

    Attributes:
        pairs: Direction pairs, from which the next round starts.
        ids: Ids of the pairs, in order.
        next_id: The id that the next new concept gets.
        report: The record.
        slots: Concept id to its slot of the TensorBoard page.
        cards: Concept id to its card; not part of the state.
    """

    pairs: DirectionPairs | None = None
    ids: tuple[int, ...] = ()
    next_id: int = 0
    report: RoundReport | None = None
    slots: dict[int, int] = field(default_factory=dict)
    cards: dict[int, Card] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer updates when the round ran; -1 before the first."""
        return -1 if self.report is None else self.report.step

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the guard's state that is kept here.

        Returns:
            Tensors and plain data.
        """
        return {
            "pairs": state.from_pairs(self.pairs),
            "ids": list(self.ids),
            "next_id": self.next_id,
            "report": state.from_report(self.report),
            "slots": dict(self.slots),
        }

    @classmethod
    def from_state(cls, saved: Mapping[str, Any], device: torch.device) -> Self:
        """Return the round that `state_dict` wrote.

        Args:
            saved: Holds the keys of `state_dict`, and possibly more.
            device: Where the pairs are to be.

        Returns:
            The round, without cards.
        """
        return cls(
            pairs=state.to_pairs(saved["pairs"], device),
            ids=tuple(saved["ids"]),
            next_id=saved["next_id"],
            report=state.to_report(saved["report"]),
            slots=dict(saved["slots"]),
        )
