"""Stage 2: the pair of a known concept is free of the classes, and presence can be sharpened."""

import pytest
import torch
from planted import OFFSET, MarkedWorld, auc, marked_world, normal
from sklearn.covariance import LedoitWolf
from torch import Tensor

from concept_guard.directions import (
    Membership,
    WithinClassPair,
    refine_membership,
    within_class_pair,
)
from concept_guard.directions.within_class import _cross_fitted, folds

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 8))]
EPS = torch.finfo(torch.float64).eps


def wide(world: MarkedWorld) -> tuple[Tensor, Tensor, Tensor]:
    return world.rows.double(), world.labels, world.mark


def estimated(
    rows: Tensor, labels: Tensor, present: Tensor, shrinkage: float | None = None
) -> WithinClassPair:
    pair = within_class_pair(rows, labels, present, shrinkage=shrinkage)
    assert pair is not None
    return pair


def written_out(
    rows: Tensor, labels: Tensor, present: Tensor, shrinkage: float | None
) -> tuple[Tensor, Tensor, float]:
    """Return signal, filter and shrinkage, class by class and group by group."""
    top, total, residuals = torch.zeros(rows.shape[1]).double(), 0.0, []
    for k in labels.unique():
        on, off = rows[(labels == k) & present], rows[(labels == k) & ~present]
        residuals += [group - group.mean(dim=0) for group in (on, off) if len(group)]
        if len(on) and len(off):
            weight = len(on) * len(off) / (len(on) + len(off))
            top += weight * (on.mean(dim=0) - off.mean(dim=0))
            total += weight
    signal = top / total
    residual = torch.cat(residuals)
    if shrinkage is None:
        shrinkage = LedoitWolf(assume_centered=True).fit(residual.numpy()).shrinkage_
    covariance = residual.T @ residual / len(rows)
    level = covariance.trace() / len(covariance)
    shrunk = (1 - shrinkage) * covariance + shrinkage * level * torch.eye(len(covariance)).double()
    direction = torch.linalg.inv(shrunk) @ signal
    return signal, direction / (direction @ signal), shrinkage


@pytest.mark.parametrize("shrinkage", [None, 0.3, 1.0])
def test_the_pair_equals_its_definition(rng: torch.Generator, shrinkage: float | None) -> None:
    rows = normal(rng, 90, 6) @ normal(rng, 6, 6) + 3
    labels = torch.tensor([0, 2, 2, 5, 7, 7])[torch.randint(0, 6, (90,), generator=rng)]
    present = torch.rand(90, generator=rng) < 0.3
    present |= labels == 0  # class 0 holds only carriers, class 5 none: neither moves the signal
    present &= labels != 5
    rows[present] += torch.arange(6)
    pair = estimated(rows, labels, present, shrinkage)
    signal, direction, used = written_out(rows, labels, present, shrinkage)
    tol = 1e3 * EPS * float(torch.linalg.cond(torch.cov(rows.T)))
    torch.testing.assert_close(pair.signal, signal, rtol=0, atol=1e3 * EPS)
    torch.testing.assert_close(pair.filter, direction, rtol=tol, atol=tol)
    assert pair.shrinkage == pytest.approx(used, rel=1e-9)
    factor = rows @ direction
    off, on = factor[~present], factor[present]
    assert pair.absent == pytest.approx(float(off.mean()), rel=1e-9)
    assert pair.gain == pytest.approx(float(on.median() - off.median()), rel=1e-9)
    half_way = float(off.mean() + (on.median() - off.median()) / 2)
    assert pair.threshold == pytest.approx(half_way, rel=1e-9)
    assert float(pair.filter @ pair.signal) == pytest.approx(1.0, abs=tol)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_planted_mark_is_recovered_free_of_the_classes(seed: int) -> None:
    world = marked_world(seed)
    rows, labels, mark = wide(world)
    pair = estimated(rows, labels, mark)
    cosine = torch.cosine_similarity(pair.signal, world.signal.double(), dim=0)
    assert cosine > 0.99
    assert auc(rows @ pair.filter, mark) > 0.999
    naive = rows[mark].mean(dim=0) - rows[~mark].mean(dim=0)
    assert torch.cosine_similarity(naive, world.signal.double(), dim=0) < 0.9  # control


def test_moving_whole_classes_changes_neither_direction(rng: torch.Generator) -> None:
    rows, labels, mark = wide(marked_world())
    moved = rows + 10 * normal(rng, 4, rows.shape[1])[labels]
    pair, after = estimated(rows, labels, mark), estimated(moved, labels, mark)
    tol = 1e6 * EPS  # conditions below 1e3, values of size 30, summed over 1,200 rows
    torch.testing.assert_close(after.signal, pair.signal, rtol=0, atol=tol)
    torch.testing.assert_close(after.filter, pair.filter, rtol=0, atol=tol)
    plain = [x[mark].mean(dim=0) - x[~mark].mean(dim=0) for x in (rows, moved)]
    assert (plain[0] - plain[1]).abs().max() > 1  # control: it contains the classes


def test_the_pair_turns_with_the_rows(rng: torch.Generator) -> None:
    rows, labels, mark = wide(marked_world())
    turn = torch.linalg.qr(normal(rng, rows.shape[1], rows.shape[1]))[0]
    pair, after = estimated(rows, labels, mark), estimated(rows @ turn, labels, mark)
    tol = 1e6 * EPS
    torch.testing.assert_close(after.signal, pair.signal @ turn, rtol=0, atol=tol)
    torch.testing.assert_close(after.filter, pair.filter @ turn, rtol=0, atol=tol)
    assert after.threshold == pytest.approx(pair.threshold, abs=tol)


def test_the_filter_cancels_distractors_that_the_mark_does_not_write() -> None:
    rows, labels, mark = wide(marked_world())
    pair = estimated(rows, labels, mark)
    spread = [float((rows @ w)[~mark & (labels == 1)].std()) for w in (pair.filter, pair.signal)]
    length = float(pair.signal @ pair.signal)
    # Both scaled to rise by 1 with the mark: noise .2 over 3 remains, instead of 1.3 over 10.
    assert spread[0] < 0.6 * spread[1] / length


def test_fewer_rows_than_channels_and_no_shrinkage_stay_finite(rng: torch.Generator) -> None:
    rows, labels = normal(rng, 12, 30), torch.arange(12) % 2
    rows[:, 7] = 1.0  # the covariance is singular, and exactly so
    present = torch.arange(12) % 3 == 0
    for shrinkage in (0.0, None):
        pair = estimated(rows, labels, present, shrinkage)
        assert bool(torch.isfinite(pair.filter).all())
        assert float(pair.filter @ pair.signal) == pytest.approx(1.0, abs=1e-6)


def test_float32_rows_give_a_float32_pair_that_keeps_three_digits() -> None:
    world = marked_world()
    pair = estimated(world.rows, world.labels, world.mark)
    exact = estimated(*wide(world))
    assert pair.filter.dtype == pair.signal.dtype == torch.float32
    torch.testing.assert_close(pair.signal.double(), exact.signal, rtol=0, atol=1e-6)
    # Condition of the covariance: 1.0 against 0.04 per channel, times eps, over 1,200 rows.
    torch.testing.assert_close(pair.filter.double(), exact.filter, rtol=0, atol=1e-4)


def test_presence_that_no_class_varies_in_gives_no_pair(rng: torch.Generator) -> None:
    rows, labels = normal(rng, 20, 4), torch.arange(20) % 2
    assert within_class_pair(rows, labels, labels == 1) is None
    assert within_class_pair(rows, labels, torch.zeros(20).bool()) is None
    assert within_class_pair(rows, labels, torch.ones(20).bool()) is None
    assert within_class_pair(torch.ones(20, 4), labels, torch.arange(20) < 9) is None
    mixed = (labels == 1) | (torch.arange(20) < 3)
    assert within_class_pair(rows, labels, mixed) is not None  # control


def first_guess(world: MarkedWorld, bar: float) -> Tensor:
    """Return where a direction that reads the mark and a distractor alike exceeds a bar."""
    return (world.rows - OFFSET) @ (world.seen + 0.8 * world.beside) > bar


def quality(guess: Tensor, truth: Tensor) -> tuple[float, float]:
    right = float((guess & truth).sum())
    return right / max(1.0, float(guess.sum())), right / float(truth.sum())


@pytest.mark.parametrize("bar", [1.5, 2.4], ids=["too many", "too few"])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_imperfect_guess_of_a_mark_is_sharpened(seed: int, bar: float) -> None:
    world = marked_world(seed)
    guess = first_guess(world, bar)
    others = world.labels != 0
    assert min(quality(guess[others], world.mark[others])) < 0.85  # control: there is work to do
    state = torch.get_rng_state()
    sharp = refine_membership(world.rows, world.labels, guess, 0, seed=0)
    assert sharp is not None
    assert min(quality(sharp.present, world.mark)) > 0.95
    assert min(quality(sharp.present[others], world.mark[others])) > 0.95
    assert sharp.separation > 0.5
    assert torch.equal(torch.get_rng_state(), state)
    again = refine_membership(world.rows, world.labels, guess, 0, seed=0)
    assert again is not None
    assert torch.equal(again.present, sharp.present)


def test_the_upper_tail_of_a_continuous_quantity_does_not_stand_apart() -> None:
    amount = normal(torch.Generator().manual_seed(5), 4800)
    world = marked_world(count=4800, amount=amount)
    sharp = refine_membership(world.rows, world.labels, amount > 1.3, 0, seed=0)
    assert sharp is not None
    assert sharp.separation < 0.05  # -.11 for a Gaussian cut in the middle, give or take .04
    binary = marked_world(count=4800)  # control: the same world with a mark that is there or not
    apart = refine_membership(binary.rows, binary.labels, binary.mark, 0, seed=0)
    assert apart is not None
    assert apart.separation > 0.5


def test_valley_and_peak_are_counted_where_documented() -> None:
    # Scaled amounts of the mark in the other classes; class 0 does not count.
    places = {
        0.0: 300,
        1.0: 100,
        0.45: 5,
        0.55: 7,
        0.33: 2,
        0.67: 2,
        0.87: 3,
        1.13: 4,
        1.2: 2,
        -3.0: 10,
    }
    other = torch.tensor([a for a, n in places.items() for _ in range(n)]).double()
    inside = torch.tensor([0.0, 0.5, 2.0, 3.0, 3.0, 3.0]).double().repeat(50)
    amount = torch.cat([other, inside])
    labels = torch.cat([1 + torch.arange(len(other)) % 3, torch.zeros(len(inside)).long()])
    rng = torch.Generator().manual_seed(0)
    rows = amount[:, None] * torch.tensor([4.0, 1, 0, 2, 0]) + 1e-3 * normal(rng, len(amount), 5)
    sharp = refine_membership(rows.float(), labels, amount > 0.5, 0, seed=0)
    assert sharp is not None
    assert (sharp.valley, sharp.peak) == (5 + 7, 100 + 3 + 4)
    # On the scale of the class itself presence is 3: the .5 and the 2 are neither here nor there.
    assert (sharp.own_absence, sharp.own_valley, sharp.own_peak) == (50, 0, 150)
    halves = torch.where((labels == 0) & (amount == 2.0), 1.35, amount)
    rows += (halves - amount)[:, None] * torch.tensor([4.0, 1, 0, 2, 0])
    sharp = refine_membership(rows.float(), labels, halves > 0.5, 0, seed=0)
    assert sharp is not None
    assert (sharp.own_absence, sharp.own_valley, sharp.own_peak) == (50, 50, 150)
    assert torch.equal(sharp.present[: len(other)], other > 0.5)


def test_separation_lies_between_minus_one_and_one() -> None:
    none = torch.zeros(0).bool()
    pairs = [(0, 8), (8, 0), (5, 5), (0, 0), (1, 3)]
    assert [Membership(none, *p).separation for p in pairs] == [1.0, -1.0, 0.0, 0.0, 0.5]


def test_the_class_itself_is_judged_by_its_rows_without_the_concept() -> None:
    own = Membership(torch.zeros(0).bool(), 0, 0, 12, 1, 90)
    assert own.own_separation == pytest.approx(11 / 13)
    assert own.own_chance == pytest.approx(14 / 2**13)
    nothing = Membership(torch.zeros(0).bool(), 0, 0, 0, 0, 90)  # the whole class has it
    assert (nothing.own_separation, nothing.own_chance) == (0.0, 1.0)


def test_reading_is_cross_fitted_so_that_noise_does_not_confirm_itself(
    rng: torch.Generator,
) -> None:
    labels = torch.arange(100) % 2
    for _ in range(3):
        rows = (normal(rng, 100, 200) * torch.logspace(0, 1, 200)).float()
        guess = torch.rand(100, generator=rng) < 0.3
        pair = estimated(rows, labels, guess)
        assert auc(rows @ pair.filter, guess) > 0.95  # control: a pair does confirm its own rows
        sharp = refine_membership(rows, labels, guess, 0, seed=0)
        # By chance .3 to .7 of the rows agree; without cross-fitting .9 and more.
        assert sharp is None or (sharp.present == guess).float().mean() < 0.75


@pytest.mark.parametrize("shrinkage", [None, 0.2])
def test_every_row_is_read_by_the_pair_of_the_other_folds(
    rng: torch.Generator, shrinkage: float | None
) -> None:
    rows, labels, mark = wide(marked_world(count=400))
    present = mark ^ (torch.rand(400, generator=rng) < 0.05)
    centred = rows - rows.mean(dim=0)
    read = _cross_fitted(centred, labels, present, shrinkage, 7)
    assert read is not None
    fold = folds(labels * 2 + present.long(), 7)
    count = torch.stack([torch.bincount(fold[labels == k], minlength=4) for k in range(4)])
    assert bool((count == 25).all())
    for left_out in range(4):
        keep = fold != left_out
        pair = estimated(centred[keep], labels[keep], present[keep], shrinkage)
        shrinkage = pair.shrinkage  # that of the first fold serves all
        tol = 1e5 * EPS * float(torch.linalg.cond(torch.cov(rows.T)))
        expected = centred[~keep] @ pair.filter
        torch.testing.assert_close(read[0][~keep], expected, rtol=0, atol=tol)
    assert read[1] == pytest.approx(shrinkage, rel=1e-9)


@pytest.mark.parametrize(
    ("carriers", "refined"), [(0, False), (2, False), (3, True), (297, True), (298, False)]
)
def test_fewer_than_three_rows_on_either_side_cannot_be_refined(
    carriers: int, refined: bool
) -> None:
    world = marked_world(count=400)
    others = (world.labels != 0).nonzero()[:, 0]
    guess = torch.zeros(400).bool()
    guess[others[:carriers]] = True
    guess[::8] = True  # half of class 0, which does not count
    rows = world.rows + 20.0 * guess[:, None] * world.signal  # a guess that will not change
    sharp = refine_membership(rows, world.labels, guess, 0, seed=0)
    assert (sharp is not None) is refined


def test_presence_that_no_class_varies_in_cannot_be_refined() -> None:
    world = marked_world(count=400)
    assert refine_membership(world.rows, world.labels, world.labels == 2, 0, seed=0) is None
