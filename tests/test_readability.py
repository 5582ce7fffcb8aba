"""Stage 2: a fresh linear probe reads what can be read, and nothing else."""

import itertools

import pytest
import torch
from planted import marked_world, normal
from torch import Tensor

from concept_guard.directions import folds, readability, within_class_pair
from concept_guard.directions.within_class import cross_fitted

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 6))]


def counted(factor: Tensor, labels: Tensor, present: Tensor, fold: Tensor) -> float:
    """Return the weighted share of pairs in the right order, pair by pair."""
    won = weights = 0.0
    for k, f in itertools.product(labels.unique(), fold.unique()):
        at = (labels == k) & (fold == f)
        on, off = factor[at & present], factor[at & ~present]
        if len(on) and len(off):
            higher = (on[:, None] > off).double() + 0.5 * (on[:, None] == off).double()
            weight = len(on) * len(off) / (len(on) + len(off) + 1)
            won += weight * float(higher.mean())
            weights += weight
    return won / weights


@pytest.mark.parametrize("seed", SEEDS)
def test_it_equals_the_count_of_all_pairs_within_classes_and_folds(seed: int) -> None:
    world = marked_world(seed, count=400)
    rows = (world.rows + 4 * normal(torch.Generator().manual_seed(seed), 400, 16).float()).round()
    found = readability(rows[:, None], world.labels, world.mark[:, None], seed=3)
    assert found is not None
    fold = folds(world.labels * 2 + world.mark.long(), 3)
    read = cross_fitted(rows - rows.mean(dim=0), world.labels, world.mark, None, fold)
    assert read is not None
    expected = counted(read[0], world.labels, world.mark, fold)
    assert found.auc == pytest.approx(expected, abs=1e-6)
    assert 0.6 < found.auc < 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_not_there_is_not_read_however_much_goes_with_the_class(seed: int) -> None:
    world = marked_world(seed)
    found = readability(world.rows[:, None], world.labels, world.mark[:, None], seed=0)
    assert found is not None
    assert found.auc > 0.99
    unmarked = world.rows - world.amount[:, None] * world.signal
    nothing = readability(unmarked[:, None], world.labels, world.mark[:, None], seed=0)
    assert nothing is not None
    assert abs(nothing.auc - 0.5) < 4 * nothing.error
    # Control: whoever does not hold the class fixed reads the mark there, from the class.
    pair = within_class_pair(unmarked, torch.zeros_like(world.labels), world.mark)
    assert pair is not None
    on, off = ((unmarked @ pair.filter)[m] for m in (world.mark, ~world.mark))
    assert float((on[:, None] > off).double().mean()) > 0.8


def test_the_error_is_that_of_shuffled_presence() -> None:
    world = marked_world(count=800)
    rng = torch.Generator().manual_seed(1)
    aucs, error = [], 0.0
    for _ in range(60):
        order = torch.cat([(world.labels == k).nonzero()[:, 0] for k in range(4)])
        mixed = torch.cat([at[torch.randperm(len(at), generator=rng)] for at in order.split(200)])
        present = torch.empty_like(world.mark)
        present[order] = world.mark[mixed]
        found = readability(world.rows[:, None], world.labels, present[:, None], seed=0)
        assert found is not None
        aucs.append(found.auc)
        error = found.error
    spread = torch.tensor(aucs)
    assert abs(float(spread.mean()) - 0.5) < 0.05
    assert 0.6 * error < float(spread.std()) < 1.6 * error


def test_the_rows_of_an_image_are_in_one_fold() -> None:
    world = marked_world(count=400)
    rng = torch.Generator().manual_seed(0)
    present = (torch.rand(400, generator=rng) < 0.3)[:, None].expand(-1, 3)
    own = 20 * normal(rng, 400, 1, 16).float()  # what shows which image a row is of
    rows = own + 0.01 * normal(rng, 400, 3, 16).float()
    found = readability(rows, world.labels, present, seed=0)
    assert found is not None
    assert abs(found.auc - 0.5) < 0.15


@pytest.mark.parametrize(("carriers", "read"), [(7, False), (8, True), (192, True), (193, False)])
def test_too_few_images_with_or_without_cannot_be_read(carriers: int, read: bool) -> None:
    world = marked_world(count=400)
    half = (world.labels % 2 == 0).nonzero().flatten()
    present = world.labels == 1  # a class of which all images carry it does not count
    present[half[:carriers]] = True
    found = readability(world.rows[:, None], world.labels, present[:, None], seed=0)
    assert (found is not None) is read
