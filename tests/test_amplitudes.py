"""Stage 2: amounts guide filters where they are bounded, and nowhere else."""

from dataclasses import replace

import pytest
import torch
from planted import MixtureWorld, normal, sparse_world, toy_world, true_directions, whitened
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions import amplitudes
from concept_guard.directions.amplitudes import by_amplitudes
from concept_guard.directions.candidates import Candidates

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 10))]


def discriminants(world: MixtureWorld) -> tuple[Tensor, Tensor, Candidates]:
    """Return white rows, the true filters, and filters that tell presence apart in closed form."""
    white = whitened(world.rows)
    on = world.present.double()
    apart = normalize((on - on.mean(dim=0)).T @ white, dim=1).float()
    truth = true_directions(white, world.amounts)
    white = white.float()
    return white, truth, Candidates.of(white, apart)


def cosines(candidates: Candidates, truth: Tensor) -> Tensor:
    return (candidates.directions.double() * truth).sum(dim=1)


def wrong(candidates: Candidates, present: Tensor) -> float:
    return float((candidates.present != present).double().mean())


def exact(world: MixtureWorld, white: Tensor) -> Tensor:
    """Return the filters that are blind to all else: five quantities span the rows of the toy."""
    signals = (world.amounts - world.amounts.mean(dim=0)).double()
    return normalize(torch.linalg.lstsq(white.double(), signals).solution.T, dim=1)


@pytest.mark.parametrize("seed", SEEDS)
def test_filters_of_bounded_amounts_turn_to_the_truth(seed: int) -> None:
    world = toy_world(seed)
    white, _, before = discriminants(world)
    truth = exact(world, white)
    after = by_amplitudes(white, before)
    assert float(cosines(before, truth).max()) < 0.97  # control: presence alone does not tell
    assert float(cosines(after, truth).min()) > 0.99
    assert wrong(after, world.present) < 0.02
    torch.testing.assert_close(after.factors, white @ after.directions.T)
    torch.testing.assert_close(after.directions.norm(dim=1), torch.ones(3))


def test_the_order_of_candidates_is_kept() -> None:
    world = toy_world(0)
    white, _, before = discriminants(world)
    order = torch.tensor([2, 0, 1])
    plain, turned = by_amplitudes(white, before), by_amplitudes(white, before.select(order))
    agree = (turned.directions * plain.directions[order]).sum(dim=1)
    assert float(agree.min()) > 0.999


@pytest.mark.parametrize("correlated", [False, True])
def test_filters_of_unbounded_amounts_stay_as_they_are(correlated: bool) -> None:
    white, _, before = discriminants(sparse_world(0, correlated=correlated, distractors=4))
    after = by_amplitudes(white, before)
    for name in ("directions", "factors", "thresholds"):
        assert torch.equal(getattr(after, name), getattr(before, name))


def test_normal_amounts_are_no_guide(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amplitudes, "SAME", -1.0)  # whatever is read afterwards
    world = toy_world(0)
    amounts = 4 * world.present + 0.7 * normal(rng, 6000, 3)
    rows = amounts @ world.signals + normal(rng, 6000, 2) @ normal(rng, 2, 16)
    white, _, before = discriminants(replace(world, rows=rows, amounts=amounts))
    after = by_amplitudes(white, before)
    assert torch.equal(after.directions, before.directions)


def test_only_the_bounded_ones_of_both_kinds_are_turned(rng: torch.Generator) -> None:
    world = toy_world(0)
    mark = torch.rand(6000, generator=rng) < 0.05
    size = normal(rng, 6000).exp() * mark  # long-tailed
    beside = torch.cat([5 * size[:, None], normal(rng, 6000, 3)], dim=1)
    white = whitened(torch.cat([world.rows, beside], dim=1))
    truth = true_directions(white, size[:, None]).float()
    white = white.float()
    on = world.present.float()
    apart = normalize((on - on.mean(dim=0)).T @ white, dim=1)
    before = Candidates.of(white, torch.cat([apart[:1], truth, apart[1:]]))
    after = by_amplitudes(white, before)
    assert torch.equal(after.directions[1], before.directions[1])
    assert torch.equal(after.factors[:, 1], before.factors[:, 1])
    assert torch.equal(after.thresholds[1], before.thresholds[1])
    turned = after.select(torch.tensor([0, 2, 3]))
    assert float(cosines(turned, exact(world, white)).min()) > 0.99
    assert float(cosines(before.select(torch.tensor([0, 2, 3])), exact(world, white)).max()) < 0.97


def test_fewer_than_two_candidates_stay_as_they_are() -> None:
    white, _, before = discriminants(toy_world(0))
    for at in ([], [1]):
        some = before.select(torch.tensor(at, dtype=torch.long))
        assert by_amplitudes(white, some) is some


def test_a_filter_that_would_read_something_else_is_not_turned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    white, _, before = discriminants(toy_world(0))
    monkeypatch.setattr(amplitudes, "SAME", 1.0)  # nothing but the same rows to the last
    assert by_amplitudes(white, before) is before


def test_the_threshold_agrees_with_presence_on_the_most_rows(rng: torch.Generator) -> None:
    factors = normal(rng, 60, 2)
    present = factors + 0.8 * normal(rng, 60, 2) > 0.5
    found = amplitudes._threshold_of(factors, present)
    for k in range(2):
        ranked = factors[:, k].sort().values
        tried = [0.5 * (a + b) for a, b in zip(ranked[:-1], ranked[1:], strict=True)]
        right = [int(((factors[:, k] > t) == present[:, k]).sum()) for t in tried]
        assert int(((factors[:, k] > found[k]) == present[:, k]).sum()) == max(right)
