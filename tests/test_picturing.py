"""Cards are made anew when their images change and there is time for it, and not otherwise."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from worlds import PROBE, QUICK, fallen, the_flagged, world

from concept_guard import ConceptGuard, picturing, watch
from concept_guard.cards import Card
from concept_guard.picturing import _outdated


def reading(levels: list[float]) -> Any:
    rows = torch.tensor(levels)[:, None, None]
    return SimpleNamespace(rows=rows, indices=torch.arange(len(levels)))


def card(of: tuple[int, ...], errors: tuple[int, ...] = ()) -> Card:
    return Card(torch.zeros(len(of), 3, 4, 4), torch.zeros(len(of), 2, 2), of=of, of_errors=errors)


@pytest.mark.parametrize(
    ("shown", "errors", "outdated"),
    [
        ((9, 8, 7, 6, 5, 4, 3, 2), (1,), False),
        ((2, 3, 4, 5, 6, 7, 8, 9), (1,), False),  # in another order
        ((0, 1, 4, 5, 6, 7, 8, 9), (1,), False),  # two are others
        ((0, 1, 10, 5, 6, 7, 8, 9), (1,), True),
        ((9, 8, 7, 6, 5, 4, 3, 2), (), True),
        ((9,), (1,), False),
        ((8,), (1,), True),
    ],
)
def test_a_card_is_outdated_when_most_of_its_images_or_its_errors_are_others(
    shown: tuple[int, ...], errors: tuple[int, ...], outdated: bool
) -> None:
    now = reading([*map(float, range(10)), -1.0])
    assert _outdated(card(shown, errors), now, torch.ones(1), (1,)) == outdated


def test_without_time_a_card_stays_and_a_new_concept_still_gets_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[bool] = []
    real = picturing.cards

    def cards(*args: Any, renew: bool, **options: Any) -> dict[int, Card]:
        asked.append(renew)
        return real(*args, renew=renew, **options)

    monkeypatch.setattr(picturing, "cards", cards)
    monkeypatch.setattr(watch, "MOST_DRAWING", 0.0)
    settings = {**QUICK, "action": "observe"}
    guard = ConceptGuard(fallen(), probe=world(PROBE).loader(), config=settings, log_dir=tmp_path)
    guard.round()
    concept = the_flagged(guard)
    first = guard.cards[concept]
    last = guard._watch.last
    guard._watch.last = replace(last, cards={concept: replace(first, of=tuple(range(8)))})
    kept = guard._watch.last.cards[concept]
    guard.round()
    assert asked == [True, False]
    assert guard.cards[concept] is kept
    monkeypatch.setattr(watch, "MOST_DRAWING", 1.0)
    guard.round()
    assert guard.cards[concept].of == first.of, "with time it is made anew"
