"""When rounds run: schedules in epochs, and a budget that postpones rounds without losing any."""

import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from worlds import PROBE, correcting, fallen, net, stream, train, world

from concept_guard import ConceptGuard
from concept_guard.clock import Pace, Timetable, spacing


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
    guard.close()
    again = ConceptGuard(model, probe=probe, config={**config, "budget": None})
    again.load_state_dict(guard.state_dict())
    assert rounds(again, model, 1) == [1]  # update 4, for which none is scheduled


@pytest.mark.parametrize(("start", "every"), [(1, 1), (1, 8), (5, 3), (100, 200)])
def test_the_next_round_is_the_first_that_is_due(start: int, every: int) -> None:
    table = Timetable(start, every)
    for step in range(start + 3 * every):
        assert table.next_round(step) == next(
            n for n in range(step + 1, start + 5 * every) if table.is_round(n)
        )


def due(pace: Pace, misread: list[float | None], first: int = 0) -> list[int]:
    """Return the updates at which a pace asks for estimates that misread so much."""
    at, step = [], first
    for share in misread:
        step = next(n for n in range(step + 1, step + 1000) if pace.is_due(n))
        pace.estimated(step, share)
        at.append(step)
    return at


def test_pairs_that_stay_are_estimated_less_and_less_often_until_they_move() -> None:
    still, moving = 0.01, 0.0101
    at = due(Pace(3), [still, still, still, still, moving, moving, still])
    assert at == [1, 7, 19, 31, 43, 46, 49]  # intervals of 6, 12, 12, 12, 3, 3
    assert due(Pace(3), [moving] * 4) == [1, 4, 7, 10]
    assert due(Pace(3), [still, None, None]) == [1, 7, 13]  # not known: as long as before


def test_the_pace_is_kept_within_the_bounds_set_now() -> None:
    pace, again = Pace(3), Pace(3)
    due(pace, [0.0, 0.0])
    again.load_state_dict(pace.state_dict())
    assert due(again, [0.0] * 3, first=7) == due(pace, [0.0] * 3, first=7) == [19, 31, 43]
    slower, faster = Pace(100), Pace(1)
    for other in (slower, faster):
        other.load_state_dict(pace.state_dict())
    assert due(slower, [None, None], first=43) == [55, 155]
    assert due(faster, [None, None], first=43) == [55, 59]


def test_estimates_are_spaced_however_the_pairs_move() -> None:
    pace = Pace(3)
    pace.estimated(0, 1.0, spaced=5)
    assert [pace.is_due(step) for step in (4, 5)] == [False, True]
    pace.estimated(5, 1.0, spaced=2)  # control: fewer than the shortest
    assert [pace.is_due(step) for step in (7, 8)] == [False, True]


@pytest.mark.parametrize("batch", [1, 31, 32, 64, 89, 90, 320, 10_000])
def test_a_seventh_as_many_reference_images_as_training_images_are_read(batch: int) -> None:
    updates = spacing(320, batch)
    assert updates * batch >= 7 * 320
    assert (updates - 1) * batch < 7 * 320  # control: one fewer is too few
    assert (updates <= 25) == (batch >= 90)
    assert spacing(320, 0) == spacing(0, batch) == 1


@pytest.mark.parametrize(("track_every", "expected"), [("auto", 70), (30, 30)])
def test_small_batches_put_estimates_off_unless_an_interval_is_set(
    monkeypatch: pytest.MonkeyPatch, track_every: int | str, expected: int
) -> None:
    model = fallen()
    guard = correcting(model, start=10**6, every=10**6, track_every=track_every)
    assert sum(len(t.images) for t in guard._corrector.tracked) == 320
    at: list[int] = []

    def track() -> float:
        at.append(guard.steps)
        return 1.0

    monkeypatch.setattr(guard._corrector, "track", track)
    train(model, ((x[:32], y[:32]) for x, y in stream(160)), guard)
    assert guard.tap.batch == 32
    guard.close()
    assert {b - a for a, b in itertools.pairwise(at)} == {expected}


@pytest.mark.parametrize(("misread", "expected"), [(0.0, [6, 12]), (1.0, [3] * 7)])
def test_the_guard_tracks_at_the_pace_of_its_pairs(
    monkeypatch: pytest.MonkeyPatch, misread: float, expected: list[int]
) -> None:
    model = fallen()
    guard = correcting(model, every=10**6, track_every=3)
    at: list[int] = []

    def track() -> float:
        at.append(guard.steps)
        return misread

    monkeypatch.setattr(guard._corrector, "track", track)
    train(model, stream(25), guard)
    guard.close()
    assert [b - a for a, b in itertools.pairwise(at)] == expected


def test_what_a_guard_measures_is_how_much_presence_its_old_pairs_misread() -> None:
    model = fallen()
    guard = correcting(model)
    corrector = guard._corrector
    corrector.track()
    assert corrector.track() == 0.0  # nothing was trained in between
    (old,) = corrector.tracked
    pair = replace(old.pair, filter=-old.pair.filter)
    corrector.tracked = (replace(old, pair=pair),)
    assert corrector.track() > 0.3
    assert torch.equal(corrector.tracked[0].pair.filter, old.pair.filter)
    guard.close()
