"""Stage 2, find: filters get what true decoders have in axes not searched, and no noise."""

import torch
from planted import matched, normal, sparse_world
from torch import Tensor

from concept_guard.directions.basis import Basis
from concept_guard.directions.candidates import Candidates
from concept_guard.directions.clarity import excess
from concept_guard.directions.widening import widened

CONCEPTS = 12


def searched(rank: int, *, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return filters before and after, and the true ones, of which some axes hold a part."""
    world = sparse_world(0, channels=48, concepts=CONCEPTS, active=2, noise=noise)
    rows = world.rows * torch.linspace(0.5, 2, 48).double()  # so that axes mix signal and noise
    basis = Basis.of(rows, rank=rank)
    white, others = basis.white(rows.float()), basis.others(rows.float())
    every = torch.cat([white, others], dim=1).double()
    amounts = world.amounts - world.amounts.mean(dim=0)
    true = (amounts.T @ every / len(rows)).float()  # the regression on all axes
    found = Candidates.of(white, torch.nn.functional.normalize(true[:, :rank], dim=1))
    further = widened(white, others, found)
    before = found.directions @ basis.inward.T
    after = before + further @ basis.beyond.T
    inward = torch.cat([basis.inward, basis.beyond], dim=1)
    return before, after, true @ inward.T, further


def cosine(one: Tensor, other: Tensor) -> float:
    return float(matched(one.double(), other.double())[0].mean())


def test_filters_come_nearer_to_the_true_decoders() -> None:
    before, after, true, _ = searched(24)
    assert cosine(true, after) > 0.99
    assert cosine(true, before) < 0.98  # control: the searched axes alone


def test_axes_of_noise_add_nothing(rng: torch.Generator) -> None:
    _, _, _, further = searched(24)
    white = normal(rng, 8000, 24).float()
    present = torch.rand(8000, CONCEPTS, generator=rng) < 0.1
    factors = 4 * present + 0.2 * normal(rng, 8000, CONCEPTS)
    white[:, :CONCEPTS] = factors.float() / factors.std(dim=0).float()
    white = white - white.mean(dim=0)
    found, others = Candidates.of(white, torch.eye(24)[:CONCEPTS]), normal(rng, 8000, 24).float()
    added = widened(white, others, found)
    every = torch.cat([white, others], dim=1)
    every = every - every.mean(dim=0)
    gated = excess(found.factors, found.present)
    slopes = torch.linalg.lstsq(every, gated - gated.mean(dim=0)).solution.T
    plain = slopes[:, 24:] / (slopes[:, :24] * found.directions).sum(dim=1, keepdim=True)
    torch.testing.assert_close(
        added, plain * (added.norm(dim=0) / plain.norm(dim=0)), rtol=1e-2, atol=1e-5
    )  # one factor per axis
    # Of noise James and Stein keep on average a small share; half is far beyond chance.
    assert float(added.square().sum()) < 0.5 * float(plain.square().sum())
    assert float((added == 0).all(dim=0).float().mean()) > 0.3
    assert float(further.square().sum(dim=1).sqrt().min()) > 0.05  # control: where there is a part


def test_too_little_to_tell_adds_nothing(rng: torch.Generator) -> None:
    white, others = normal(rng, 60, 20).float(), normal(rng, 60, 20).float()
    few_rows = Candidates.of(white, torch.eye(20)[:5])
    assert torch.equal(widened(white, others, few_rows), torch.zeros(5, 20))
    white, others = normal(rng, 600, 20).float(), normal(rng, 600, 20).float()
    few_concepts = Candidates.of(white, torch.eye(20)[:2])
    assert torch.equal(widened(white, others, few_concepts), torch.zeros(2, 20))
    no_axes = widened(white, others[:, :0], Candidates.of(white, torch.eye(20)[:5]))
    assert no_axes.shape == (5, 0)


def test_further_axes_are_white_and_uncorrelated_with_the_searched_ones(
    rng: torch.Generator,
) -> None:
    rows = normal(rng, 2000, 10) * torch.linspace(0.1, 3, 10).double()
    basis = Basis.of(rows, rank=4)
    every = torch.cat([basis.white(rows), basis.others(rows)], dim=1).double()
    torch.testing.assert_close(every.T @ every / 2000, torch.eye(10).double(), rtol=0, atol=1e-4)
    assert Basis.of(rows, rank=10).others(rows).shape == (2000, 0)
