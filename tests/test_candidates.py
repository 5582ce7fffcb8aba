"""Stage 2: polishing never makes a candidate less clear, and one per concept is kept."""

import pytest
import torch
from planted import concept_world, normal, whitened
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.candidates import ALIKE, EQUAL, Candidates, chosen, polished


def exclusive(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return white rows of five concepts that exclude each other, true directions, membership."""
    member = torch.randint(10, (6000, 1), generator=rng) == torch.arange(5)
    sources = member * (1 + torch.rand(6000, 5, generator=rng, dtype=torch.float64))
    white = whitened(torch.cat([sources, 2 * normal(rng, 6000, 3)], dim=1) @ normal(rng, 8, 8))
    return white, normalize((sources - sources.mean(dim=0)).T @ white, dim=1), member


def test_polishing_leads_to_the_true_filters_of_dependent_concepts(rng: torch.Generator) -> None:
    white, truth, member = exclusive(rng)
    off = normalize(truth + 0.3 * normalize(normal(rng, 5, 8), dim=1), dim=1)
    before = Candidates.of(white, off)
    after = polished(white, before)
    assert (before.directions * truth).sum(dim=1).min() < 0.98
    assert (after.directions * truth).sum(dim=1).min() > 0.9999
    assert bool((after.clarities() >= before.clarities()).all())
    assert torch.equal(after.present, member)
    torch.testing.assert_close(after.factors, white @ after.directions.T)


def test_the_true_filter_is_a_fixed_point(rng: torch.Generator) -> None:
    white, truth, member = exclusive(rng)
    # Absence is a constant without noise, so the excess is the amount and its regression the
    # filter; rounding is of float64 over 6,000 rows.
    torch.testing.assert_close(
        polished(white, Candidates.of(white, truth)).directions, truth, rtol=0, atol=1e-9
    )
    gated = (white @ truth.T) * member  # control: not counted from the mean in absence
    turned = normalize((gated - gated.mean(dim=0)).T @ white, dim=1)
    assert (turned - truth).abs().amax(dim=1).min() > 1e-4


def test_what_polishing_does_not_make_clearer_stays_as_it_was(rng: torch.Generator) -> None:
    white, truth, _ = exclusive(rng)
    done = polished(white, Candidates.of(white, truth))
    again = polished(white, done)
    for name in ("directions", "factors", "thresholds"):
        assert torch.equal(getattr(again, name), getattr(done, name))


def test_polishing_never_lowers_clarity(rng: torch.Generator) -> None:
    world = concept_world(0)
    white = whitened(world.rows)
    before = Candidates.of(white, normalize(normal(rng, 60, white.shape[1]), dim=1))
    after = polished(white, before)
    assert bool((after.clarities() >= before.clarities()).all())
    assert bool((after.clarities() > before.clarities() + 0.1).any())
    torch.testing.assert_close(after.factors, white @ after.directions.T)
    torch.testing.assert_close(after.directions.norm(dim=1), torch.ones(60).double())


def test_a_turn_that_is_less_clear_is_not_taken(rng: torch.Generator) -> None:
    white = whitened(normal(rng, 500, 64))
    some = torch.arange(500)[:, None] % 50 == torch.arange(50)  # clear by the rows' own pull
    apart = normalize((some.double() - 0.02).T @ white, dim=1)
    factors = white @ apart.T
    before = Candidates(apart, factors, factors.quantile(torch.tensor(0.98).double(), dim=0))
    after = polished(white, before)
    assert bool((after.clarities() >= before.clarities()).all())
    gated = (factors - factors.mean(dim=0)) * before.present
    turned = Candidates.of(white, normalize((gated - gated.mean(dim=0)).T @ white, dim=1))
    assert bool((turned.clarities() < before.clarities()).any())  # control


def test_thresholds_are_those_given_or_the_clearest(rng: torch.Generator) -> None:
    white, truth, member = exclusive(rng)
    read = Candidates.of(white, truth)
    assert torch.equal(read.present, member)
    torch.testing.assert_close(read.factors, white @ truth.T)
    at = torch.full((5,), 100.0).double()
    assert not Candidates.of(white, truth, at).present.any()
    assert torch.equal(Candidates.of(white, truth, at).clarities(), -torch.ones(5).double())


def test_candidates_are_selected_replaced_and_joined_by_position(rng: torch.Generator) -> None:
    white, truth, _ = exclusive(rng)
    pool = Candidates.of(white, truth)
    some = pool.select(torch.tensor([3, 0]))
    assert torch.equal(some.directions, truth[[3, 0]])
    assert torch.equal(some.factors, pool.factors[:, [3, 0]])
    assert torch.equal(some.thresholds, pool.thresholds[[3, 0]])
    both = some + pool
    assert len(both) == 7
    assert torch.equal(both.factors, torch.cat([some.factors, pool.factors], dim=1))
    swapped = pool.replaced(torch.tensor([1, 2]), some)
    assert torch.equal(swapped.directions, truth[[0, 3, 0, 3, 4]])
    assert torch.equal(swapped.factors, pool.factors[:, [0, 3, 0, 3, 4]])
    assert torch.equal(swapped.thresholds, pool.thresholds[[0, 3, 0, 3, 4]])
    assert torch.equal(pool.directions, truth)  # nobody wrote into it


def test_the_worthiest_of_each_concept_is_kept_and_equals_never(rng: torch.Generator) -> None:
    white, truth, _ = exclusive(rng)
    # Of unit vectors in 8 coordinates, this far apart: correlations of .85 or so.
    near = normalize(truth + 0.6 * normalize(normal(rng, 5, 8), dim=1), dim=1)
    pool = Candidates.of(white, torch.cat([near, truth, truth]))
    worth = pool.clarities()
    kept = chosen(pool, worth, 5)
    assert sorted((pool.directions[kept] @ truth.T).argmax(dim=1).tolist()) == [0, 1, 2, 3, 4]
    assert bool((kept >= 5).all())  # the true ones are clearer
    assert bool((worth[kept].diff() <= 0).all())
    whole = chosen(pool, worth, 15)
    assert whole[:5].tolist() == kept.tolist()
    assert 5 < len(whole) <= 10  # alike ones fill up, equal ones do not
    factors, present = pool.factors[:, whole], pool.present[:, whole].double()
    for values in (factors, present):
        alike = torch.corrcoef(values.T).fill_diagonal_(0)
        assert float(alike.max()) <= EQUAL
        assert float(alike[:5, :5].max()) <= ALIKE
    control = worth.topk(5).indices  # without a look at likeness
    assert len(set((pool.directions[control] @ truth.T).argmax(dim=1).tolist())) < 5


def test_a_second_reading_of_a_concept_waits_for_all_others(rng: torch.Generator) -> None:
    one, beside, other = normal(rng, 3, 3000)
    factors = torch.stack([one, 0.8 * one + 0.6 * beside, other], dim=1)
    pool = Candidates(torch.eye(3).double(), factors, torch.ones(3).double())
    worth = torch.tensor([3.0, 2.0, 1.0])
    assert chosen(pool, worth, 2).tolist() == [0, 2]
    assert chosen(pool, worth, 3).tolist() == [0, 2, 1]


def test_candidates_with_the_same_presence_are_alike_though_their_factors_are_not() -> None:
    mark = (torch.arange(200) % 10 == 0).double()
    beside = torch.tensor([1.0, -1.0]).repeat(100).double() * torch.arange(200) / 100
    factors = torch.stack([3 * mark + beside, 3 * mark - beside], dim=1)
    at = torch.tensor([2.5, 2.5]).double()
    pool = Candidates(torch.eye(2).double(), torch.stack([factors[:, 0], mark], dim=1), at - 2)
    assert float(torch.corrcoef(pool.factors.T)[0, 1]) < 0.8
    same = Candidates(torch.eye(2).double(), 6 * mark[:, None] + factors * (1 - mark)[:, None], at)
    assert float(torch.corrcoef(same.factors.T)[0, 1]) < EQUAL
    assert torch.equal(same.present[:, 0], same.present[:, 1])
    assert chosen(same, torch.tensor([1.0, 2.0]), 2).tolist() == [1]


def test_what_is_worth_nothing_is_never_chosen(rng: torch.Generator) -> None:
    white, truth, _ = exclusive(rng)
    pool = Candidates.of(white, truth)
    worth = torch.tensor([-torch.inf, 1.0, -torch.inf, 3.0, -5.0])
    assert chosen(pool, worth, 5).tolist() == [3, 1, 4]
    assert chosen(pool, worth, 2).tolist() == [3, 1]
    assert chosen(pool, torch.full((5,), -torch.inf), 5).tolist() == []
    assert chosen(pool.select(torch.tensor([], dtype=torch.long)), worth[:0], 5).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_candidate_is_finite_and_comes_last(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    white, truth, _ = exclusive(rng)
    pool = Candidates.of(white.to(dtype), torch.cat([torch.zeros(1, 8), truth]).to(dtype))
    worth = pool.clarities()
    assert bool(worth.isfinite().all())
    assert chosen(pool, worth, 6).tolist()[-1] == 0
    assert bool(polished(white.to(dtype), pool).directions.isfinite().all())
