"""Stage 3d: contributions are complete, and the smallest changes are those of a plain search."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from planted import normal
from torch import Tensor, nn
from torch.nn import functional
from worlds import PROBE, QUICK, correcting, fallen, net, world

from concept_guard import ConceptGuard, DirectionPairs, ProbeError
from concept_guard.changes import Levels, smallest_changes
from concept_guard.explanation import explain

CLASSES, CHANNELS, CONCEPTS, COUNT = 5, 12, 4, 60
Logits = Callable[[Tensor], Tensor]


def pairs_of(rng: torch.Generator, concepts: int = CONCEPTS) -> DirectionPairs:
    """Return pairs with `w . s = 1` that overlap a little."""
    filters = normal(rng, concepts, CHANNELS)
    signals = filters + 0.5 * normal(rng, concepts, CHANNELS)
    signals /= (filters * signals).sum(dim=1, keepdim=True)
    return DirectionPairs(filters, signals, normal(rng, concepts))


def linear(rng: torch.Generator) -> Logits:
    weight, bias = normal(rng, CLASSES, CHANNELS), normal(rng, CLASSES)
    return lambda rows: functional.linear(rows[:, 0], weight, bias)


def curved(rng: torch.Generator) -> Logits:
    """Return logits that bend and that mix the positions of an image."""
    first, second = normal(rng, 8, CHANNELS) / 4, normal(rng, CLASSES, 8)
    return lambda rows: torch.tanh(rows @ first.T).mean(dim=1) @ second.T


def told(
    rng: torch.Generator, logits_of: Logits, *, linear: bool, positions: int = 1
) -> tuple[list, Tensor, DirectionPairs, Tensor]:
    pairs, rows = pairs_of(rng), 2 * normal(rng, COUNT, positions, CHANNELS)
    labels = torch.randint(0, CLASSES, (COUNT,), generator=rng)
    levels = Levels.of(pairs.factors(rows), pairs)
    ids = (7, 3, 11, 0)
    return explain(rows, labels, pairs, ids, levels, logits_of, linear=linear), rows, pairs, labels


def test_contributions_add_up_to_the_difference_from_the_undecided_point(
    rng: torch.Generator,
) -> None:
    logits_of = linear(rng)
    told_of, rows, pairs, labels = told(rng, logits_of, linear=True)
    logits = logits_of(rows)
    for n, one in enumerate(told_of):
        assert one.predicted == int(logits[n].argmax())
        assert one.label == int(labels[n])
        for k, given, begin in (
            (one.predicted, one.to_predicted, one.undecided[0]),
            (one.label, one.to_label, one.undecided[1]),
        ):
            assert given is not None
            # float32 in the record, sums of 4 contributions of size up to about 100
            assert begin + float(given.sum()) == pytest.approx(float(logits[n, k]), abs=1e-4)
        assert max(map(abs, one.remainder)) < 1e-10
    # The undecided point lies on all thresholds: there the factors are 0.
    crossed = pairs.signals @ pairs.filters.T
    shift = torch.linalg.solve(crossed, pairs.factors(rows), left=False) @ pairs.signals
    torch.testing.assert_close(
        pairs.factors(rows - shift), torch.zeros(COUNT, 1, 4).double(), rtol=0, atol=1e-9
    )
    middle = logits_of(rows - shift)
    assert told_of[0].undecided[0] == pytest.approx(float(middle[0, told_of[0].predicted]))
    # Control: without the crossing of the pairs the sum is another one.
    naive = pairs.factors(rows)[:, 0] @ pairs.signals
    assert float((naive - shift[:, 0]).abs().max()) > 0.1


def test_a_contribution_is_the_amount_times_the_slope_along_the_signal(
    rng: torch.Generator,
) -> None:
    pairs, weight = pairs_of(rng, 2), normal(rng, CLASSES, CHANNELS)
    amounts = torch.tensor([3.0, -1.5]).double()
    # A row that is two amounts away from a row on both thresholds.
    base = normal(rng, CHANNELS)
    crossed = pairs.signals @ pairs.filters.T
    base = base - torch.linalg.solve(crossed.T, pairs.factors(base)) @ pairs.signals
    row = (base + amounts @ pairs.signals).view(1, 1, -1)
    half = torch.full((2,), 0.5).double()
    levels = Levels(-8 * half, 8 * half, half)
    (one,) = explain(
        row, None, pairs, (0, 1), levels, lambda r: functional.linear(r[:, 0], weight), linear=True
    )
    expected = amounts * (pairs.signals @ weight[one.predicted])
    torch.testing.assert_close(one.to_predicted.double(), expected, rtol=1e-5, atol=1e-5)
    usual = 0.5 * (pairs.signals @ weight[one.predicted])
    torch.testing.assert_close(one.usual[0].double(), usual, rtol=1e-5, atol=1e-5)
    assert one.driving == int((expected - usual).argmax())
    assert one.to_label is None
    assert one.repair is None
    assert len(one.undecided) == 1


def test_where_logits_bend_the_remainder_says_how_good_the_integral_is(
    rng: torch.Generator,
) -> None:
    state = rng.get_state()
    told_of, *_ = told(rng, curved(rng), linear=False, positions=6)
    size = max(abs(float(t.to_predicted.sum())) for t in told_of)
    assert max(abs(r) for t in told_of for r in t.remainder) < 0.02 * size
    rng.set_state(state)
    rough, *_ = told(rng, curved(rng), linear=True, positions=6)  # control: one point of the path
    assert max(abs(r) for t in rough for r in t.remainder) > 0.05 * size


def first_by_hand(
    row: Tensor,
    wanted: int,
    concept: int,
    kind: str,
    levels: Levels,
    pairs: DirectionPairs,
    logits_of: Logits,
) -> float:
    """Return the smallest share of a change, by trying 2,000 of them."""
    factor = float(pairs.factors(row)[0, concept])
    goal = float((levels.absent if kind == "erase" else levels.present)[concept])
    if (kind == "erase" and factor <= 0) or (kind == "insert" and factor >= goal):
        return math.inf
    shares = torch.linspace(0, 1, 2001).double()[1:]
    rows = row + shares[:, None, None] * (goal - factor) * pairs.signals[concept]
    before = int(logits_of(row[None]).argmax())
    now = logits_of(rows).argmax(dim=1)
    hits = (now != before) if wanted < 0 else (now == wanted)
    return float(shares[hits][0]) if bool(hits.any()) and wanted != before else math.inf


@pytest.mark.parametrize("towards_label", [False, True])
def test_the_smallest_change_is_that_of_a_plain_search(
    rng: torch.Generator, towards_label: bool
) -> None:
    logits_of = linear(rng)
    told_of, rows, pairs, labels = told(rng, logits_of, linear=True)
    levels = Levels.of(pairs.factors(rows), pairs)
    found = 0
    for n, one in enumerate(told_of):
        wanted = int(labels[n]) if towards_label else -1
        by_hand = {
            (concept, kind): first_by_hand(rows[n], wanted, concept, kind, levels, pairs, logits_of)
            for concept in range(CONCEPTS)
            for kind in ("erase", "insert")
        }
        least = min(by_hand.values())
        change = one.repair if towards_label else one.flip
        # Where a prediction is passed within an eighth of the way, the search may miss it.
        if change is None:
            assert least == math.inf or towards_label
            continue
        found += 1
        at = (one.concepts.index(change.concept), change.kind)
        assert change.size <= by_hand[at] + 1 / 512 + 1 / 2000
        assert change.size >= least - 1 / 2000
        if not towards_label:
            assert change.size == pytest.approx(least, abs=1 / 512 + 1 / 2000)
        move = levels.absent if change.kind == "erase" else levels.present
        step = change.size * (move[at[0]] - pairs.factors(rows[n])[0, at[0]])
        assert int(logits_of(rows[n : n + 1] + step * pairs.signals[at[0]]).argmax()) == (
            change.predicted
        )
        assert change.predicted == wanted or not towards_label
    assert found >= 5


def test_right_predictions_need_no_repair_and_absent_concepts_cannot_be_erased(
    rng: torch.Generator,
) -> None:
    pairs, logits_of = pairs_of(rng), linear(rng)
    rows = 2 * normal(rng, 20, 1, CHANNELS)
    predicted = logits_of(rows).argmax(dim=1)
    levels = Levels.of(pairs.factors(rows), pairs)
    everything = range(CONCEPTS)
    search = (pairs, range(CONCEPTS), levels, logits_of, everything)
    assert smallest_changes(rows, predicted, *search) == [None] * 20
    flips = smallest_changes(rows, torch.full((20,), -1), *search)
    for n, flip in enumerate(flips):
        if flip is not None and flip.kind == "erase":
            assert float(pairs.factors(rows)[n, 0, flip.concept]) > 0
    assert any(flip is not None and flip.kind == "erase" for flip in flips)
    assert any(flip is not None and flip.kind == "insert" for flip in flips)


def test_levels_are_the_means_of_both_sides() -> None:
    factors = torch.tensor([[[1.0, -1.0, 2.0]], [[3.0, -3.0, 4.0]], [[-4.0, -2.0, 6.0]]])
    levels = Levels.of(factors, DirectionPairs(torch.eye(3), torch.eye(3), torch.zeros(3)))
    assert levels.amounts.tolist() == pytest.approx([0.0, -2.0, 4.0])
    assert levels.present.tolist() == [2.0, 2.0, 4.0]  # where there is none: as far as the other
    assert levels.absent.tolist() == [-4.0, -2.0, -4.0]


@pytest.mark.parametrize("tap", ["pre_logits", "stage:-2"])
def test_a_guard_explains_the_errors_of_the_mark_and_leaves_the_model_alone(
    tap: str, untouched: Callable[[nn.Module], AbstractContextManager[None]]
) -> None:
    model, probe = fallen(), world(PROBE)
    with ConceptGuard(
        model, probe=probe.loader(), config={**QUICK, "tap": tap, "action": "observe"}
    ) as guard:
        report = guard.round()
        assert report is not None
        wrong = probe.marked & (probe.labels != 0)
        images, labels = probe.images[wrong][:8], probe.labels[wrong][:8]
        with untouched(model):
            told_of = guard.explain(images, labels)
        logits = guard.tap.logits(images, None)
    for n, one in enumerate(told_of):
        torch.testing.assert_close(one.logits, logits[n], rtol=0, atol=1e-5)
        assert one.concepts == tuple(c.id for c in report.concepts)
        total = one.undecided[0] + float(one.to_predicted.sum()) + one.remainder[0]
        assert total == pytest.approx(float(logits[n, one.predicted]), abs=1e-4)
        assert abs(one.remainder[0]) < (1e-4 if tap == "pre_logits" else 0.5)
        assert set(one.maps) == {one.driving}
        assert float(one.maps[one.driving or 0].max()) <= 1
    if tap == "pre_logits":
        (concept,) = report.flagged
        fooled = [one for one in told_of if one.predicted == 0]
        assert len(fooled) >= 4
        assert sum(one.driving == concept for one in fooled) >= 0.6 * len(
            fooled
        )  # else: lacks its own pattern
        assert sum(one.flip is not None and one.flip.concept == concept for one in fooled) >= 4
        places = [one.maps[concept] for one in fooled if one.driving == concept]
        in_corner = sum(float(place[:3, :3].sum() / place.sum()) > 0.25 for place in places)
        assert in_corner >= 0.5 * len(places)  # 9 of 64 cells


def test_an_explanation_takes_the_current_correction_into_account() -> None:
    with correcting() as guard:
        images = world(PROBE).images[:4]
        assert guard.erased
        told_of = guard.explain(images, maps=False)
        expected = guard.tap.logits(images, guard.tap.edit)
        plain = guard.tap.logits(images, None)
    for n, one in enumerate(told_of):
        assert one.label is None
        assert one.maps == {}
        torch.testing.assert_close(one.logits, expected[n], rtol=0, atol=1e-5)
        total = one.undecided[0] + float(one.to_predicted.sum())
        assert total == pytest.approx(float(expected[n, one.predicted]), abs=1e-4)
    assert float((expected - plain).abs().max()) > 0.1  # control


def test_what_cannot_be_explained_is_refused_with_the_way_out() -> None:
    images = world(PROBE).images[:4]
    with ConceptGuard(net(), probe=world(PROBE).loader(), config=QUICK) as guard:
        with pytest.raises(ValueError, match=r"no round has found concepts yet; call guard.round"):
            guard.explain(images)
        guard.round()
        with pytest.raises(ValueError, match=r"labels have shape \(3,\), images \(4, 3, 16, 16\)"):
            guard.explain(images, torch.zeros(3).long())
        with pytest.raises(ProbeError, match=r"image 2 has 9"):
            guard.explain(images, torch.tensor([0, 1, 9, 2]))


def test_without_concepts_an_explanation_is_empty_but_true(rng: torch.Generator) -> None:
    none = DirectionPairs(torch.zeros(0, CHANNELS), torch.zeros(0, CHANNELS), torch.zeros(0))
    rows = normal(rng, 3, 1, CHANNELS).float()
    weight = normal(rng, CLASSES, CHANNELS).float()
    levels = Levels.of(none.factors(rows), none)
    for one in explain(rows, None, none, (), levels, lambda r: r[:, 0] @ weight.T, linear=True):
        assert one.driving is None
        assert one.flip is None
        assert one.undecided[0] == pytest.approx(float(one.logits[one.predicted]), abs=1e-5)
