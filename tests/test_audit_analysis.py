"""Audit: errors are listed with the concept that drives them, and the model is left alone."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from worlds import PROBE, fallen, net, world

from concept_guard import GuardConfig, ProbeError
from concept_guard.audit import Analysis, analyse
from concept_guard.probe import probe_batches

CONFIG = GuardConfig(concepts=8)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(fallen(), probe_batches(world(PROBE).loader(), 0), CONFIG)


def test_every_error_is_listed_once_with_what_drives_it(analysis: Analysis) -> None:
    probe, report = world(PROBE), analysis.report
    assert len(analysis.errors) == report.errors_seen > 20
    assert len({error.index for error in analysis.errors}) == len(analysis.errors)
    (concept,) = report.flagged
    for error in analysis.errors:
        assert error.label == int(probe.labels[error.index]) != error.predicted
        assert 0 < error.confidence <= 1
        assert error.explanation.label == error.label
        assert error.explanation.predicted == error.predicted
    confirmed = [error for error in analysis.errors if error.confirmed]
    assert list(analysis.errors[: len(confirmed)]) == confirmed
    assert all(error.concept == concept for error in confirmed)
    # They are the errors of the mark: marked images of other classes, taken for class 0.
    fooled = [e for e in analysis.errors if probe.marked[e.index] and e.predicted == 0]
    assert len(confirmed) >= 0.9 * len(fooled) >= 15
    assert all(error in fooled for error in confirmed)
    chances = [error.confidence for error in confirmed]
    assert chances == sorted(chances, reverse=True)


def test_every_error_of_the_mark_has_a_small_change_that_repairs_it(analysis: Analysis) -> None:
    (concept,) = analysis.report.flagged
    repairs = [e.explanation.repair for e in analysis.errors if e.confirmed]
    assert sum(repair is not None for repair in repairs) >= 0.9 * len(repairs)
    # Either the mark goes, or the pattern of the true class comes.
    ways = [repair.kind for repair in repairs if repair is not None and repair.concept == concept]
    assert ways == ["erase"] * len(ways)
    assert len(ways) >= 0.25 * len(repairs)


def test_the_groups_show_where_the_network_fails(analysis: Analysis) -> None:
    (concept,) = analysis.report.flagged
    rates = {(g.class_index, g.carried): g.accuracy for g in analysis.groups}
    assert {g.concept for g in analysis.groups} == {concept}
    assert all((rates[k, True] or 0.0) < 0.5 < (rates[k, False] or 0.0) for k in (1, 2, 3))
    assert (rates[0, True] or 0.0) > 0.9


def test_the_flagged_concept_raises_its_class_more_than_chance(analysis: Analysis) -> None:
    (concept,) = analysis.report.flagged
    at = analysis.findings.ids.index(concept)
    assert float(analysis.influence.score[at, 0]) > 0.9
    assert float(analysis.influence.p_value[at, 0]) <= 0.05
    assert set(analysis.cards) >= {concept}


def test_the_model_is_left_as_it_is(
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    model = fallen()
    with untouched(model):
        analyse(model, probe_batches(world(PROBE, 100).loader(), 0), CONFIG)
    blank = net()
    for parameter in blank.parameters():
        parameter.data.fill_(torch.nan)
    with untouched(blank), pytest.raises(ProbeError, match=r"NaN or infinite.*check the weights"):
        analyse(blank, probe_batches(world(PROBE, 100).loader(), 0), CONFIG)


def test_images_that_cannot_be_read_are_left_out() -> None:
    probe = world(PROBE, 200)
    broken = torch.zeros(200, dtype=torch.bool)
    broken[[3, 50]] = True
    found = analyse(fallen(), probe_batches(probe.loader(), 0), CONFIG, broken=broken)
    assert found.unreadable == (3, 50)
    assert found.report.images_seen == 198
    assert not {3, 50} & {error.index for error in found.errors}
    with pytest.raises(ProbeError, match="none of the 200 images can be read"):
        analyse(
            fallen(), probe_batches(probe.loader(), 0), CONFIG, broken=~torch.zeros_like(broken)
        )
    with pytest.raises(ProbeError, match="there is no image"):
        analyse(fallen(), probe_batches([], 0), CONFIG)


def test_a_model_that_is_always_right_has_no_errors_and_says_so() -> None:
    model, probe = fallen(), world(PROBE, 100)
    with torch.no_grad():
        predicted = model.eval()(probe.images).argmax(dim=1)
    batches = [(probe.images, predicted)]
    found = analyse(model, probe_batches(batches, 0), CONFIG)
    assert found.errors == ()
    assert found.report.verdict.startswith("no evidence: 0 errors seen on 100 probe images")
    wrong = [(probe.images, (predicted + 1) % 4)]  # control: everything is wrong
    assert len(analyse(model, probe_batches(wrong, 0), CONFIG).errors) == 100
