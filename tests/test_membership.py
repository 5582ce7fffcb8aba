"""Stage 2: presence is told more sharply than by its first guess, by pairs that did not see it."""

import pytest
import torch
from planted import OFFSET, MarkedWorld, auc, marked_world, normal
from torch import Tensor

from concept_guard.directions import Membership, Scatter, refine_membership, within_class_pair
from concept_guard.directions.membership import _cross_fitted
from concept_guard.directions.scatter import folds

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 8))]
EPS = torch.finfo(torch.float64).eps


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
    sharp = refine_membership(Scatter(world.rows, world.labels), guess, 0)
    assert sharp is not None
    assert min(quality(sharp.present, world.mark)) > 0.95
    assert min(quality(sharp.present[others], world.mark[others])) > 0.95
    assert sharp.separation > 0.5
    assert torch.equal(torch.get_rng_state(), state)
    again = refine_membership(Scatter(world.rows, world.labels), guess, 0)
    assert again is not None
    assert torch.equal(again.present, sharp.present)


def test_the_upper_tail_of_a_continuous_quantity_does_not_stand_apart() -> None:
    amount = normal(torch.Generator().manual_seed(5), 4800)
    world = marked_world(count=4800, amount=amount)
    sharp = refine_membership(Scatter(world.rows, world.labels), amount > 1.3, 0)
    assert sharp is not None
    assert sharp.separation < 0.05  # -.11 for a Gaussian cut in the middle, give or take .04
    binary = marked_world(count=4800)  # control: the same world with a mark that is there or not
    apart = refine_membership(Scatter(binary.rows, binary.labels), binary.mark, 0)
    assert apart is not None
    assert apart.separation > 0.5


def test_valley_and_peak_are_counted_where_documented() -> None:
    # Scaled amounts of the mark in the other classes; class 0 does not count.
    places = {
        0.0: 300,
        1.0: 100,
        0.45: 5,
        0.55: 7,
        0.3: 2,
        0.7: 2,
        0.9: 3,
        1.1: 4,
        1.2: 2,
        -3.0: 10,
    }
    other = torch.tensor([a for a, n in places.items() for _ in range(n)]).double()
    inside = torch.tensor([0.0, 0.5, 2.0, 3.0, 3.0, 3.0]).double().repeat(50)
    amount = torch.cat([other, inside])
    labels = torch.cat([1 + torch.arange(len(other)) % 3, torch.zeros(len(inside)).long()])
    rng = torch.Generator().manual_seed(0)
    rows = amount[:, None] * torch.tensor([4.0, 1, 0, 2, 0]) + 1e-3 * normal(rng, len(amount), 5)
    strata = labels * 2 + (amount > 0.5).long()
    sharp = refine_membership(Scatter(rows.float(), labels, strata), amount > 0.5, 0)
    assert sharp is not None
    assert (sharp.valley, sharp.peak) == (5 + 7, 100 + 3 + 4)
    # On the scale of the class itself presence is 3: the .5 and the 2 are neither here nor there.
    assert (sharp.own_absence, sharp.own_valley, sharp.own_peak) == (50, 0, 150)
    halves = torch.where((labels == 0) & (amount == 2.0), 1.35, amount)
    rows += (halves - amount)[:, None] * torch.tensor([4.0, 1, 0, 2, 0])
    sharp = refine_membership(Scatter(rows.float(), labels, strata), halves > 0.5, 0)
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
        pair = within_class_pair(Scatter(rows, labels), guess)
        assert pair is not None
        assert auc(rows @ pair.filter, guess) > 0.95  # control: a pair does confirm its own rows
        sharp = refine_membership(Scatter(rows, labels), guess, 0)
        # By chance .3 to .7 of the rows agree; without cross-fitting .9 and more.
        assert sharp is None or (sharp.present == guess).float().mean() < 0.75


@pytest.mark.parametrize("shrinkage", [None, 0.2])
def test_every_row_is_read_by_the_pair_of_the_other_folds(
    rng: torch.Generator, shrinkage: float | None
) -> None:
    world = marked_world(count=400)
    rows, labels, mark = world.rows.double(), world.labels, world.mark
    present = mark ^ (torch.rand(400, generator=rng) < 0.05)
    centred = rows - rows.mean(dim=0)
    strata = labels * 2 + present.long()
    read = _cross_fitted(Scatter(centred, labels, strata, 7), present, shrinkage)
    assert read is not None
    fold = folds(strata, 7)
    count = torch.stack([torch.bincount(fold[labels == k], minlength=4) for k in range(4)])
    assert bool((count == 25).all())
    for left_out in range(4):
        keep = fold != left_out
        kept = Scatter(centred[keep], labels[keep])
        pair = within_class_pair(kept, present[keep], shrinkage=shrinkage)
        assert pair is not None
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
    sharp = refine_membership(Scatter(rows, world.labels), guess, 0)
    assert (sharp is not None) is refined


def test_presence_that_no_class_varies_in_cannot_be_refined() -> None:
    world = marked_world(count=400)
    assert refine_membership(Scatter(world.rows, world.labels), world.labels == 2, 0) is None
