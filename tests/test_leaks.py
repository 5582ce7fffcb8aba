"""Stage 4d: what is left of a concept under correction, and that its return is said."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import (
    PROBE,
    TEST,
    UPDATES,
    correcting,
    fallen,
    flagging,
    mark,
    sgd,
    stream,
    train,
    world,
)

from concept_guard import ConceptGuard, RoundReport
from concept_guard.association import associate
from concept_guard.directions import readability


def next_round(guard: ConceptGuard) -> RoundReport:
    report = guard.round()
    assert report is not None
    return report


def half_marked() -> tuple[Tensor, Tensor, Tensor]:
    """Return images of every class, half of which carry the mark, with labels and presence."""
    test = world(TEST, 800, planted=False)
    carried = torch.arange(800) % 8 < 4
    return torch.where(carried[:, None, None, None], mark(test.images), test.images), *(
        test.labels,
        carried,
    )


def afresh(guard: ConceptGuard) -> tuple[float, float]:
    """Return readability and risk difference on images that the guard has never seen."""
    images, labels, carried = half_marked()
    reading = guard.tap.read([(images, labels)], max_rows=10**6, seed=0)
    edit = guard.tap.edit
    rows = reading.rows if edit is None else edit(reading.rows)
    (read,) = readability(rows, labels, carried[:, None, None], seed=0)
    assert read is not None
    found = associate(carried[:, None], reading.logits.argmax(dim=1), labels, 4)
    return read, float(found.difference[0, 0])


@pytest.mark.parametrize("action", ["project", "rebalance"])
def test_what_is_left_is_what_unseen_images_show(action: str) -> None:
    guard = correcting(action=action)
    report = next_round(guard)
    (concept,) = report.erased
    readable, difference = afresh(guard)
    assert report.leak[concept] == pytest.approx(abs(difference), abs=0.1)
    assert report.readable[concept] == pytest.approx(readable, abs=0.15)
    flag = next(f for f in report.flags if f.concept == concept)
    if action == "rebalance":  # control: nothing has been weighed yet
        assert report.leak[concept] > 0.8 * flag.risk_difference
        assert report.readable[concept] > 0.95
    else:
        assert report.leak[concept] < 0.3 * flag.risk_difference


def test_the_images_that_chose_the_projection_would_deny_what_is_left() -> None:
    guard = correcting(action="project")
    report = next_round(guard)
    (concept,) = report.erased
    probe = world(PROBE)
    reading = guard.tap.read(probe.loader(), max_rows=10**6, seed=0)
    assert guard.tap.edit is not None
    own = guard.tap.edit(reading.rows)
    carriers = guard._corrector.tracked[0].carriers
    (denied,) = readability(own, probe.labels, carriers[:, :, None], seed=0)
    assert denied is not None
    assert denied < 0.45 < report.readable[concept]


def test_nothing_is_said_while_nothing_is_corrected() -> None:
    report = flagging(action="observe").report
    assert report is not None
    assert (report.leak, report.readable) == ({}, {})


def test_a_concept_that_comes_back_is_named_and_corrected_again() -> None:
    model = fallen()
    guard = correcting(model, action="project", start=10**6)
    next_round(guard)
    (concept,) = guard.erased
    again = next_round(guard)
    assert not [note for note in again.notes if "coming back" in note]  # control: no training
    train(model, stream(UPDATES + 200, first=UPDATES), optimizer=sgd(model, lr=0.02))
    pull = associate(
        guard._corrector.tracked[0].carriers.any(dim=1, keepdim=True),
        guard.tap.read(world(PROBE).loader(), max_rows=10**6, seed=0).logits.argmax(dim=1),
        world(PROBE).labels,
        4,
    )
    assert float(pull.low[0, 0]) > again.leak[concept]  # training has brought it back
    report = next_round(guard)
    (note,) = (note for note in report.notes if "coming back" in note)
    told = re.fullmatch(
        rf"concept {concept} is coming back: (\+0\.\d\d) towards class 0, (0\.\d\d) after the last "
        r"round; corrected again, (0\.\d\d)",
        note,
    )
    assert told is not None
    difference, last, left = map(float, told.groups())
    assert difference == pytest.approx(float(pull.difference[0, 0]), abs=0.006)
    assert last == pytest.approx(again.leak[concept], abs=0.006)
    assert left == pytest.approx(report.leak[concept], abs=0.006)
    assert left < 0.5 * difference


def test_what_is_left_survives_the_state() -> None:
    guard = correcting()
    report = next_round(guard)
    other: Any = flagging()
    other.load_state_dict(guard.state_dict())
    assert other.report.readable == report.readable
    assert replace(other.report, readable={}) != other.report
