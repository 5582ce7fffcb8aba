"""Stage 2: the pair of a known concept is free of the classes."""

import pytest
import torch
from planted import MarkedWorld, auc, marked_world, normal
from sklearn.covariance import LedoitWolf
from torch import Tensor

from concept_guard.directions import Scatter, WithinClassPair, within_class_pair

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 8))]
EPS = torch.finfo(torch.float64).eps


def wide(world: MarkedWorld) -> tuple[Tensor, Tensor, Tensor]:
    return world.rows.double(), world.labels, world.mark


def estimated(
    rows: Tensor, labels: Tensor, present: Tensor, shrinkage: float | None = None
) -> WithinClassPair:
    pair = within_class_pair(Scatter(rows, labels), present, shrinkage=shrinkage)
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


@pytest.mark.parametrize("shrinkage", [0.01, 0.3, 1.0])
def test_fewer_rows_than_channels_give_the_pair_of_the_definition(
    rng: torch.Generator, shrinkage: float
) -> None:
    rows, labels = normal(rng, 24, 40) + 3, torch.arange(24) % 3
    present = torch.rand(24, generator=rng) < 0.4
    pair = estimated(rows, labels, present, shrinkage)
    signal, direction, _ = written_out(rows, labels, present, shrinkage)
    tol = 1e3 * EPS * 40 / shrinkage  # the smallest eigenvalue is the shrinkage of the mean one
    torch.testing.assert_close(pair.signal, signal, rtol=0, atol=1e3 * EPS)
    torch.testing.assert_close(pair.filter, direction, rtol=tol, atol=tol)
    half = estimated(rows, labels, present, shrinkage / 2).filter
    assert (half - direction).abs().max() > 1e3 * tol  # control: the shrinkage counts


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
    assert within_class_pair(Scatter(rows, labels), labels == 1) is None
    assert within_class_pair(Scatter(rows, labels), torch.zeros(20).bool()) is None
    assert within_class_pair(Scatter(rows, labels), torch.ones(20).bool()) is None
    assert within_class_pair(Scatter(torch.ones(20, 4), labels), torch.arange(20) < 9) is None
    mixed = (labels == 1) | (torch.arange(20) < 3)
    assert within_class_pair(Scatter(rows, labels), mixed) is not None  # control


@pytest.mark.parametrize("outshining", [1e2, 1e3, 1e4, 1e5])
def test_a_direction_that_outshines_the_others_leaves_a_pair(
    rng: torch.Generator, outshining: float
) -> None:
    # Rows as of a network that has seen nothing but the mark: float32 products round by more
    # than all other variance.
    rows, labels = normal(rng, 60, 200).float(), torch.arange(60) % 2
    present = torch.arange(60) // 2 % 3 == 0
    rows += outshining * (present + 0.1 * torch.randn(60, generator=rng))[:, None] * rows[:1]
    for shrinkage in (0.0, None):
        pair = estimated(rows, labels, present, shrinkage)
        factor = rows @ pair.filter
        assert bool(torch.isfinite(pair.filter).all())
        assert factor[present].min() > factor[~present].max()
