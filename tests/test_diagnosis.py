"""Diagnosis: errors are listed with the concept that drives them, and the model is left alone."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import PROBE, fallen, net, world

from concept_guard import GuardConfig, ProbeError
from concept_guard.diagnosis import Analysis, History, Subject, analyse, write_report
from concept_guard.diagnosis.contents import contents
from concept_guard.localisation import location_maps
from concept_guard.picturing import filters_of
from concept_guard.report import Report
from concept_guard.taps import Tap

CONFIG = GuardConfig(concepts=8)


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse(subject(fallen(), world(PROBE).loader()), CONFIG)


def subject(model: nn.Module, images: Iterable[Any], broken: Tensor | None = None) -> Subject:
    names = ("circle", "dot", "line", "wave")
    return Subject(model, images, "net", "ours", names, "world", "{}.png".format, broken)


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
    card = analysis.cards[concept]
    assert (
        card.wrong[:4] == (True,) * 4
    )  # first images that it misleads, then those with most of it
    assert not all(card.wrong)


def test_the_model_is_left_as_it_is(
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
) -> None:
    model = fallen()
    with untouched(model):
        analyse(subject(model, world(PROBE, 100).loader()), CONFIG)
    blank = net()
    for parameter in blank.parameters():
        parameter.data.fill_(torch.nan)
    with untouched(blank), pytest.raises(ProbeError, match=r"NaN or infinite.*check the weights"):
        analyse(subject(blank, world(PROBE, 100).loader()), CONFIG)


def test_images_that_cannot_be_read_are_left_out() -> None:
    probe = world(PROBE, 200)
    broken = torch.zeros(200, dtype=torch.bool)
    broken[[3, 50]] = True
    found = analyse(subject(fallen(), probe.loader(), broken), CONFIG)
    assert found.unreadable == (3, 50)
    assert found.report.images_seen == 198
    assert not {3, 50} & {error.index for error in found.errors}
    with pytest.raises(ProbeError, match="none of the 200 images can be read"):
        analyse(subject(fallen(), probe.loader(), ~torch.zeros_like(broken)), CONFIG)
    with pytest.raises(ProbeError, match="there is no image"):
        analyse(subject(fallen(), []), CONFIG)


def test_a_model_that_is_always_right_has_no_errors_and_says_so() -> None:
    model, probe = fallen(), world(PROBE, 100)
    with torch.no_grad():
        predicted = model.eval()(probe.images).argmax(dim=1)
    batches = [(probe.images, predicted)]
    found = analyse(subject(model, batches), CONFIG)
    assert found.errors == ()
    assert found.report.verdict.startswith("no evidence: 0 errors seen on 100 probe images")
    wrong = [(probe.images, (predicted + 1) % 4)]  # control: everything is wrong
    assert len(analyse(subject(model, wrong), CONFIG).errors) == 100


def test_the_pictures_are_of_each_concept_in_turn_and_show_its_place(analysis: Analysis) -> None:
    shown = analysis.shown
    assert len(shown) == 24
    drivers = list(dict.fromkeys(e.concept for e in analysis.errors))
    assert {s.error.concept for s in shown[: len(drivers)]} == set(drivers)
    (concept,) = analysis.report.flagged
    assert shown[0].error is analysis.errors[0]
    probe = world(PROBE)
    places = [s.place for s in shown if s.error.concept == concept and s.place is not None]
    assert len(places) >= 2
    for entry in shown:  # the picture is that of the error, whatever its range
        pixels = probe.images[entry.error.index]
        pair = torch.stack([entry.image.flatten(), pixels.flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.999
    tap, filters = Tap(fallen(), "pre_logits", probe.images[:2]), filters_of(analysis.findings)
    for entry in shown:
        assert entry.error.concept is not None
        image = probe.images[entry.error.index][None]
        (place,) = location_maps(tap, image, filters[entry.error.concept])
        torch.testing.assert_close(
            torch.zeros_like(place) if entry.place is None else entry.place, place
        )
    corner = [float(place[:4, :4].sum() / place.sum()) for place in places]
    assert sum(corner) / len(corner) > 0.7  # the mark is in the upper left quarter


def test_concepts_without_a_flag_that_speak_for_errors_have_cards(analysis: Analysis) -> None:
    harmless = subject(fallen(planted=False), world(PROBE, planted=False).loader())
    found = analyse(harmless, CONFIG, explained=2, next_id=50)
    tested = {flag.concept for flag in found.report.flags}
    counted = Counter(e.concept for e in found.errors if e.concept not in tested)
    assert len(counted) > 2
    assert set(found.suspects) == set(counted)
    numbers = [counted[i] for i in found.suspects]
    assert numbers == sorted(numbers, reverse=True)
    assert set(found.cards) == tested | set(found.suspects)
    assert len(found.shown) == 2
    assert min(found.findings.ids) == 50  # ids can go on from those of a training run
    assert set(analysis.cards) >= {flag.concept for flag in analysis.report.flags}


def page_of(analysis: Analysis, history: History | None = None) -> Report:
    examined = subject(fallen(), world(PROBE).loader())
    return contents(examined, analysis, history or History(), "Title", "command")


def test_a_held_concept_lists_confirmed_errors_alone_and_no_error_is_lost(
    analysis: Analysis,
) -> None:
    page = page_of(analysis)
    (held,) = [entry for entry in page.concepts if entry.status == "found"]
    assert {row.predicted for row in held.errors} == {held.class_name} == {"circle"}
    assert len(held.errors) == sum(error.confirmed for error in analysis.errors)
    assert any(e.concept == held.id and not e.confirmed for e in analysis.errors)  # control
    rows = [*(row for entry in page.concepts + page.suspects for row in entry.errors)]
    rows += page.other_errors
    assert sorted(row.file for row in rows) == sorted(f"{e.index}.png" for e in analysis.errors)


def test_the_classes_that_a_concept_misleads_are_also_one_group(analysis: Analysis) -> None:
    (concept,) = analysis.report.flagged
    carried = analysis.findings.candidates[concept].present.any(dim=1)
    right = analysis.reading.logits.argmax(dim=1) == analysis.reading.labels
    rows = [row for row in page_of(analysis).groups if row.class_name == "all classes but circle"]
    assert [row.carried for row in rows] == [False, True]
    for row in rows:
        of = right[(carried == row.carried) & (analysis.reading.labels != 0)]
        assert row.images == len(of)
        assert row.accuracy == pytest.approx(float(of.float().mean()))


def test_flags_of_the_training_tell_what_became_of_their_errors(analysis: Analysis) -> None:
    predicted = analysis.reading.logits.argmax(dim=1)
    right = (predicted == analysis.reading.labels).nonzero().flatten()[:2].tolist()
    (first, *_) = analysis.report.flags
    flag = replace(first, concept=70, status="erased", examples=(*first.examples[:3], *right))
    page = page_of(analysis, History(flags=(flag,)))
    (entry,) = page.trained
    names = ("circle", "dot", "line", "wave")
    assert [row.after for row in entry.errors] == [names[predicted[n]] for n in flag.examples]
    assert sum(row.after == row.label for row in entry.errors) == 2
    assert page.verdict.startswith(
        "While training: concept 70 drove errors towards circle (erased)"
    )


@pytest.mark.parametrize("where", ["stage:-2", "module:layer4"])
def test_at_other_taps_every_error_is_explained_too(where: str) -> None:
    config = GuardConfig(concepts=4, tap=where)
    model, probe = fallen(), world(PROBE, 100)
    with torch.no_grad():
        predicted = model.eval()(probe.images).argmax(dim=1)
    found = analyse(subject(model, probe.loader()), config, explained=2)
    wrong = (predicted != probe.labels).nonzero().flatten().tolist()
    assert {e.index: e.predicted for e in found.errors} == {n: int(predicted[n]) for n in wrong}
    assert all(e.explanation.predicted == e.predicted for e in found.errors)
    assert len(found.shown) == 2


def test_the_page_of_four_thousand_images_with_many_errors_stays_small(tmp_path: Path) -> None:
    images = world(PROBE).images.repeat(10, 1, 1, 1)
    images += torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) / 2
    labels = (torch.arange(4000) + torch.arange(4000) // 4 % 2) % 4  # wrong for every other four
    many = subject(fallen(), list(zip(images.split(200), labels.split(200), strict=True)))
    folder = "photographs/of/all/sorts/in/a/rather/deep/folder"
    many = replace(many, file=lambda index: f"{folder}/IMG_20240101_{index:06d}.jpeg")
    found = analyse(many, CONFIG)
    assert len(found.errors) > 1500
    write_report(tmp_path, many, found, title="Audit", command="concept-guard audit")
    page = (tmp_path / "report.html").read_text(encoding="utf8")
    assert page.count(folder) >= len(found.errors)
    assert len(page) < 2_500_000  # pictures of photographs may take as much again
