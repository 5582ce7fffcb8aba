"""Stage 2: fresh linear probes read what can be read, and nothing else."""

import pytest
import torch
from planted import marked_world, normal
from torch import Tensor

from concept_guard.directions import Scatter, folds, readability, within_class_pair

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 6))]


def auc(rows: Tensor, labels: Tensor, present: Tensor, seed: int = 0) -> float:
    """Return the readability of one concept in `(P, C)` rows."""
    (value,) = readability(rows[:, None], labels, present[:, None, None], seed=seed)
    assert value is not None
    return value


def counted(rows: Tensor, labels: Tensor, present: Tensor, seed: int) -> float:
    """Return the weighted share of right comparisons, pair by pair, with a pair for every fold."""
    fold = folds(labels * 2 + present.long(), seed)
    won = weights = 0.0
    for f in range(4):
        pair = within_class_pair(Scatter(rows[fold != f], labels[fold != f]), present[fold != f])
        assert pair is not None
        factor = rows @ pair.filter
        for k in labels.unique():
            on, off = (factor[(labels == k) & (fold == f) & (present == p)] for p in (True, False))
            if len(on) and len(off):
                weight = len(on) * len(off) / (len(on) + len(off) + 1)
                won += weight * float((on[:, None] > off).double().mean())
                weights += weight
    return won / weights


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_what_the_pairs_of_the_other_folds_tell_apart(seed: int) -> None:
    world = marked_world(seed, count=400)
    rows = world.rows + 4 * normal(torch.Generator().manual_seed(seed), 400, 16).float()
    value = auc(rows, world.labels, world.mark, seed=3)
    assert value == pytest.approx(counted(rows, world.labels, world.mark, 3), abs=0.01)
    assert 0.55 < value < 0.95


def test_several_concepts_are_read_as_each_alone(rng: torch.Generator) -> None:
    world = marked_world(count=400)
    other = torch.rand(400, generator=rng) < 0.3
    rows = world.rows + other[:, None] * normal(rng, 16).float()
    both = torch.stack([world.mark, other], dim=1)[:, None]
    together = readability(rows[:, None], world.labels, both, seed=0)
    for found, present in zip(together, (world.mark, other), strict=True):
        assert found == pytest.approx(auc(rows, world.labels, present), abs=0.03)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_not_there_is_not_read_however_much_goes_with_the_class(seed: int) -> None:
    world = marked_world(seed)
    assert auc(world.rows, world.labels, world.mark) > 0.99
    unmarked = world.rows - world.amount[:, None] * world.signal
    assert abs(auc(unmarked, world.labels, world.mark) - 0.5) < 0.12
    # Control: whoever does not hold the class fixed reads the mark there, from the class.
    assert auc(unmarked, torch.zeros_like(world.labels), world.mark) > 0.8


def test_ties_count_half(rng: torch.Generator) -> None:
    labels = torch.arange(400) % 4
    present = torch.rand(400, generator=rng) < 0.4
    assert auc(torch.ones(400, 5), labels, present) == 0.5


def test_the_rows_of_an_image_are_in_one_fold(rng: torch.Generator) -> None:
    labels = torch.arange(80) % 2
    present = torch.rand(80, generator=rng) < 0.4
    own = normal(rng, 80, 1, 120).float()  # shows which image a row is of, and nothing else
    rows = own + 0.01 * normal(rng, 80, 6, 120).float()
    (value,) = readability(rows, labels, present[:, None, None].expand(-1, 6, 1), seed=0)
    assert value is not None
    assert abs(value - 0.5) < 0.25
    alone = auc(rows.flatten(0, 1), labels.repeat_interleave(6), present.repeat_interleave(6))
    assert alone > 0.95  # control: as images of their own they give each other away


@pytest.mark.parametrize(("carriers", "read"), [(7, False), (8, True), (192, True), (193, False)])
def test_too_few_images_with_or_without_cannot_be_read(carriers: int, read: bool) -> None:
    world = marked_world(count=400)
    half = (world.labels % 2 == 0).nonzero().flatten()
    present = world.labels == 1  # a class of which all images carry it does not count
    present[half[:carriers]] = True
    found = readability(world.rows[:, None], world.labels, present[:, None, None], seed=0)
    assert (found[0] is not None) is read
