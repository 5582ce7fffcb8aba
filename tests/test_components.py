"""Stage 2: directions lie along concepts that are there or not, not along large distractors."""

import pytest
import torch
from planted import MixtureWorld, matched, normal, sparse_world, true_directions, whitened
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions import components as components_module
from concept_guard.directions.components import (
    SAME,
    begun,
    climbed,
    components,
    drawn,
    unexplained,
)

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 8))]


def searched(white: Tensor, count: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return components(white, count, drawn(white, max(300, 4 * count), rng), rng)


def white_and_truth(world: MixtureWorld) -> tuple[Tensor, Tensor]:
    white = whitened(world.rows)
    return white.float(), true_directions(white, world.amounts)


def best(found: Tensor, truth: Tensor) -> Tensor:
    return (found.double() @ truth.T).amax(dim=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_as_many_concepts_as_channels_are_all_found(seed: int) -> None:
    white, truth = white_and_truth(sparse_world(seed, concepts=24, channels=24))
    found = searched(white, 24)
    assert len(found) == 24
    torch.testing.assert_close(found.norm(dim=1), torch.ones(24), rtol=0, atol=1e-5)
    assert float(matched(truth, found)[0].min()) > 0.99
    turned = found.double() @ torch.linalg.qr(normal(torch.Generator(), 24, 24))[0]  # control
    assert float(matched(truth, turned)[0].max()) < 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_more_correlated_concepts_than_channels_show_in_what_the_first_ones_leave(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = sparse_world(seed, count=20_000, channels=64, concepts=96, active=6, correlated=True)
    white, truth = white_and_truth(world)
    found = best(searched(white, 96), truth)
    # A filter among 96 concepts in 64 channels cannot be blind to all others: .9 is nearest by far.
    assert int((found > 0.9).sum()) >= 94
    monkeypatch.setattr(components_module, "LAYERS", 0)
    single = best(searched(white, 96), truth)  # control
    assert int((single > 0.9).sum()) < 80
    assert float(single.min()) < 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_symmetric_distractors_of_larger_variance_are_not_returned(seed: int) -> None:
    world = sparse_world(seed, channels=24, concepts=12, active=2, distractors=4)
    white, truth = white_and_truth(world)
    found = searched(white, 16)  # more than there are
    assert float(matched(truth, found[:12])[0].min()) > 0.99
    centred = world.rows - world.rows.mean(dim=0)
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    assert float(variance[-4]) > 3 * float(variance[-5])  # the leading axes are the distractors'
    beside = true_directions(white, centred @ axes[:, -4:])
    assert float((found.double() @ beside.T).abs().max()) < 0.7


@pytest.mark.parametrize("seed", SEEDS)
def test_few_mixtures_of_correlated_concepts_are_returned(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = sparse_world(seed, count=20_000, channels=64, concepts=16, active=4, correlated=True)
    white, truth = white_and_truth(world)
    found = searched(white, 24)  # more than there are
    assert 16 <= len(found) <= 18
    assert float(matched(truth, found[:16])[0].min()) > 0.9
    monkeypatch.setattr(components_module, "OUTSIDE", -1.0)
    assert len(searched(white, 24)) == 24  # control


@pytest.mark.parametrize("shape", [(1000, 16), (2000, 64)])
def test_normal_rows_have_no_components(rng: torch.Generator, shape: tuple[int, int]) -> None:
    white = whitened(normal(rng, *shape)).float()
    assert len(searched(white, 8)) == 0
    marked = normal(rng, *shape)
    marked[::20, 0] += 4  # control
    assert 1 <= len(searched(whitened(marked).float(), 8)) <= 3  # and noise does not fill up


def test_what_is_returned_is_more_skewed_than_climbs_in_normal_rows() -> None:
    white, _ = white_and_truth(sparse_world(0, distractors=4, concepts=12, active=2))
    found = searched(white, 12)
    skewness = (white @ found.T).pow(3).mean(dim=0)
    noise = normal(torch.Generator(), *white.shape).float()
    chance = (noise @ climbed(noise, normalize(noise[:64], dim=1)).T).pow(3).mean(dim=0).max()
    assert float(skewness.min()) > float(chance)
    assert bool((skewness.diff() <= 1e-6).all())  # most skewed first


def test_climbs_end_where_the_direction_is_its_own_mean_of_squares() -> None:
    white, _ = white_and_truth(sparse_world(0))
    found = climbed(white, normalize(white[:100], dim=1))
    for direction in found:
        factors = (white @ direction).clamp_min(0)
        again = normalize((factors.square()[:, None] * white).mean(dim=0), dim=0)
        assert float(again @ direction) > 0.999
    alike = (found @ found.T).fill_diagonal_(0)
    assert float(alike.max()) <= SAME + 1e-6
    skewness = (white @ found.T).pow(3).mean(dim=0)
    assert bool((skewness.diff() <= 1e-6).all())
    some = begun(white, normalize(white[:100], dim=1))
    assert len(some) > len(found)  # a little climbing merges less


def test_only_the_most_promising_climbs_go_on_if_asked() -> None:
    white, truth = white_and_truth(sparse_world(0))
    starts = normalize(white[:100], dim=1)
    few = climbed(white, starts, most=4)
    assert 1 <= len(few) <= 4 < len(climbed(white, starts))
    assert float((few @ truth.T.float()).amax(dim=1).min()) > 0.9  # what is dropped is not them
    worst = starts[(white @ starts.T).pow(3).mean(dim=0).argsort()[:4]]
    control = climbed(white, worst, ((1, None, 0.95),))  # the least promising have no concept yet
    assert float((control @ truth.T.float()).amax(dim=1).max()) < 0.9


def test_nothing_of_found_concepts_is_left_of_the_rows() -> None:
    world = sparse_world(0, concepts=12, channels=24, active=2, noise=0.3)
    white, truth = white_and_truth(world)
    left = unexplained(white, truth[:6].float()).double()
    moments = left.T @ left / len(left)
    # An axis keeps 1e-3 of the largest variance, so float32 rounding grows by sqrt(1e3).
    torch.testing.assert_close(moments, torch.eye(left.shape[1]).double(), rtol=0, atol=1e-3)
    amounts = world.amounts - world.amounts.mean(dim=0)

    def told(rows: Tensor) -> Tensor:
        """Return the share of the variance of each amount that a regression on rows tells."""
        fit = rows @ torch.linalg.lstsq(rows, amounts).solution
        return fit.square().sum(dim=0) / amounts.square().sum(dim=0)

    assert float(told(white.double()).min()) > 0.6
    assert float(told(left)[:6].max()) < 0.02
    assert float(told(left)[6:].min()) > 0.6


def test_rows_are_drawn_without_replacement_as_unit_directions(rng: torch.Generator) -> None:
    rows = normal(rng, 1000, 5)
    some = drawn(rows, 100, rng)
    assert some.shape == (100, 5)
    hits = (some @ normalize(rows, dim=1).T > 1 - 1e-12).sum(dim=0)
    assert int(hits.max()) == 1
    torch.testing.assert_close(drawn(rows, 500, rng), normalize(rows, dim=1))  # few: all of them


def test_the_generator_decides() -> None:
    white, _ = white_and_truth(sparse_world(0))
    assert torch.equal(searched(white, 12, seed=1), searched(white, 12, seed=1))
    assert not torch.equal(searched(white, 12, seed=1), searched(white, 12, seed=2))
