"""When rounds run: schedules in epochs, and a budget that postpones rounds without losing any."""

import itertools
import time

import pytest
from torch import nn
from worlds import PROBE, net, world

from concept_guard import ConceptGuard
from concept_guard.clock import Timetable


def rounds(guard: ConceptGuard, model: nn.Module, updates: int) -> list[int]:
    """Return the updates after which a round ran."""
    ran = []
    for update in range(1, updates + 1):
        model(world(PROBE).images[:2])
        if guard.step() is not None:
            ran.append(update)
    return ran


SCHEDULED = {"concepts": 2, "action": "observe"}


def test_rounds_follow_a_schedule_in_epochs() -> None:
    model = net()
    config = {**SCHEDULED, "start": "1ep", "every": "0.5ep", "steps_per_epoch": 4}
    guard = ConceptGuard(model, probe=world(PROBE, 60).loader(), config=config)
    assert rounds(guard, model, 7) == [4, 6]
    assert guard.report is not None
    assert (guard.steps, guard.report.step) == (7, 6)


def test_a_budget_postpones_rounds_until_it_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a look costs a second
    model = net()
    config = {**SCHEDULED, "start": 1, "every": 2, "budget": "20%"}
    guard = ConceptGuard(model, probe=world(PROBE, 60).loader(), config=config)
    ran = rounds(guard, model, 60)
    assert ran[0] == 1  # nothing has been spent yet
    assert len(ran) > 2  # a round that is put off is not lost
    assert min(b - a for a, b in zip(ran, ran[1:], strict=False)) > 2  # but comes later
    assert guard.report is not None
    assert 0 < guard.report.overhead < 0.3


def test_a_postponed_round_is_made_up_for_after_resuming(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    model = net()
    probe = world(PROBE, 60).loader()
    config = {**SCHEDULED, "start": 1, "every": 2, "budget": "1%"}
    guard = ConceptGuard(model, probe=probe, config=config)
    assert rounds(guard, model, 3) == [1]  # the one after update 3 is postponed
    again = ConceptGuard(model, probe=probe, config={**config, "budget": None})
    again.load_state_dict(guard.state_dict())
    assert rounds(again, model, 1) == [1]  # update 4, for which none is scheduled


@pytest.mark.parametrize(("start", "every"), [(1, 1), (1, 8), (5, 3), (100, 200)])
def test_the_next_round_is_the_first_that_is_due(start: int, every: int) -> None:
    table = Timetable(start, every, 1)
    for step in range(start + 3 * every):
        assert table.next_round(step) == next(
            n for n in range(step + 1, start + 5 * every) if table.is_round(n)
        )
