"""Stage 2: every term of the decoding objective equals its formula, written out with loops."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import normal
from torch import Tensor

from concept_guard.directions import losses

EPS = torch.finfo(torch.float64).eps
BITS = 64 * EPS  # relative error of a few dozen float64 operations


def memberships(factors: Tensor) -> list[list[float]]:
    return [[1 / (1 + math.exp(-z)) for z in row] for row in factors.tolist()]


def slow_sparsity(factors: Tensor) -> Tensor:
    rows = [[y / sum(row) for y in row] for row in memberships(factors)]
    values = [-sum(q * math.log2(q) for q in row) for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def slow_max_activation(factors: Tensor) -> Tensor:
    rows = memberships(factors)
    values = [-sum(y / sum(row) * math.log2(y) for y in row) for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def slow_inactive(factors: Tensor, share: float, gamma: float) -> float:
    short = 0.0
    columns = list(zip(*memberships(factors), strict=True))
    for column in columns:
        held = sum(y**gamma for y in column) / len(column)
        short += max(0.0, share - held)
    return short / len(columns) / share


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
def test_sparsity_and_maximum_activation_equal_their_formulas(p: int, k: int, seed: int) -> None:
    factors = 3 * normal(torch.Generator().manual_seed(seed), p, k)
    sparse, active = losses.sparsity(factors), losses.max_activation(factors)
    torch.testing.assert_close(sparse, slow_sparsity(factors), rtol=BITS, atol=BITS)
    torch.testing.assert_close(active, slow_max_activation(factors), rtol=BITS, atol=BITS)
    total = torch.sigmoid(factors).sum(dim=1)
    torch.testing.assert_close(active, sparse - total.log2(), rtol=BITS, atol=k * BITS)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.1, 2.0])
def test_inactive_equals_its_formula(rng: torch.Generator, share: float, gamma: float) -> None:
    factors = 2 * normal(rng, 7, 4) - torch.tensor([0.0, 1.0, 3.0, 6.0])
    expected = slow_inactive(factors, share, gamma)
    assert float(losses.inactive(factors, share, gamma)) == pytest.approx(expected, rel=1e-12)
    assert slow_inactive(factors, share, 1.0) != pytest.approx(expected, rel=1e-3)  # control


def test_the_exponent_of_inactive_is_that_of_the_source(rng: torch.Generator) -> None:
    factors = normal(rng, 5, 3)
    assert torch.equal(losses.inactive(factors, 1.0), losses.inactive(factors, 1.0, 1.1))


def test_margin_is_the_mean_length_of_the_filters(rng: torch.Generator) -> None:
    filters = normal(rng, 5, 8)
    lengths = [math.sqrt(sum(w * w for w in row)) for row in filters.tolist()]
    assert float(losses.margin(filters)) == pytest.approx(sum(lengths) / 5, rel=BITS)


def test_confidence_is_the_negative_mean_entropy(rng: torch.Generator) -> None:
    logits = 2 * normal(rng, 6, 3)
    entropies = []
    for row in logits.tolist():
        odds = [math.exp(v) for v in row]
        shares = [o / sum(odds) for o in odds]
        entropies.append(-sum(p * math.log(p) for p in shares))
    expected = -sum(entropies) / len(entropies)
    assert float(losses.confidence(logits)) == pytest.approx(expected, rel=BITS)
    undecided = float(losses.confidence(torch.zeros(4, 3).double()))
    assert undecided == pytest.approx(-math.log(3), rel=BITS)
    assert float(losses.confidence(50 * torch.eye(3).double())) == pytest.approx(0, abs=1e-18)


def test_rows_that_belong_to_one_to_all_and_to_no_concept_score_as_documented() -> None:
    one, every, none = (
        torch.tensor([row]).double() for row in ([60, -60, -60], [60] * 3, [-9] * 3)
    )
    assert float(losses.sparsity(one)) == pytest.approx(0, abs=1e-20)
    assert float(losses.max_activation(one)) == pytest.approx(0, abs=1e-20)
    for alike in (every, none):
        assert float(losses.sparsity(alike)) == pytest.approx(math.log2(3), rel=BITS)
    assert float(losses.max_activation(every)) == pytest.approx(0, abs=1e-20)
    assert float(losses.max_activation(none)) == pytest.approx(9 / math.log(2), rel=1e-4)
    assert float(losses.inactive(every, 1.0)) == 0.0
    assert float(losses.inactive(torch.full((4, 2), -60.0).double(), 0.5)) == pytest.approx(1.0)


def slow_self_weighted(values: list[float], eta: float) -> float:
    return sum(v ** (eta + 1) for v in values) / sum(v**eta for v in values)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.sampled_from([0.0, 1.0, 4.0]))
def test_the_self_weighted_mean_equals_its_formula(values: list[float], eta: float) -> None:
    found = float(losses.self_weighted(torch.tensor(values).double(), eta))
    values = torch.tensor(values).double().tolist()  # as float32 rounds them
    assert found == pytest.approx(slow_self_weighted(values, eta), rel=1e-12)
    mean, largest = sum(values) / len(values), max(values)
    assert mean * (1 - 1e-12) <= found <= largest * (1 + 1e-12)


def test_the_self_weighted_mean_nears_the_maximum_and_survives_zeros_and_extremes() -> None:
    values = torch.tensor([0.1, 0.2, 1.0]).double()
    reductions = [float(losses.self_weighted(values, eta)) for eta in (0.0, 2.0, 4.0, 40.0)]
    assert reductions == sorted(reductions)
    assert reductions[0] == pytest.approx(1.3 / 3)
    assert reductions[-1] == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(losses.self_weighted(values), losses.self_weighted(values, 4.0))
    nothing = torch.zeros(3, requires_grad=True)
    reduced = losses.self_weighted(nothing)
    (slope,) = torch.autograd.grad(reduced, nothing)
    assert float(reduced.detach()) == 0.0
    assert bool(torch.isfinite(slope).all())
    for size in (1e-30, 1e30):  # the fifth power of neither is a float32
        alike = losses.self_weighted(torch.full((2,), size))
        assert float(alike) == pytest.approx(size, rel=1e-6)


def test_the_sparsity_bound_is_the_self_weighted_sparsity(rng: torch.Generator) -> None:
    factors = 3 * normal(rng, 9, 4)
    expected = slow_self_weighted(slow_sparsity(factors).tolist(), 4.0)
    bound = float(losses.sparsity_bound(factors))
    assert bound == pytest.approx(expected, rel=1e-12)
    assert float(losses.sparsity(factors).mean()) < bound < 2.0


@pytest.mark.parametrize("ceiling", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("gamma", [1.1, 2.0])
def test_excessive_equals_its_formula(rng: torch.Generator, ceiling: float, gamma: float) -> None:
    factors = 2 * normal(rng, 7, 4) + torch.tensor([4.0, 3.0, 0.0, -3.0])
    columns = list(zip(*memberships(factors), strict=True))
    held = [sum(y**gamma for y in column) / len(column) for column in columns]
    over = [max(0.0, h - ceiling) / (1 - ceiling) for h in held]
    found = float(losses.excessive(factors, ceiling, gamma))
    assert found == pytest.approx(slow_self_weighted(over, 4.0), rel=1e-12)
    assert 0 < found < 1
    if gamma == 1.1:
        assert float(losses.excessive(factors, ceiling)) == found


def test_excessive_is_nothing_below_the_ceiling_and_one_when_all_rows_are_held() -> None:
    off, on = torch.full((4, 2), -60.0).double(), torch.full((4, 2), 60.0).double()
    assert float(losses.excessive(off, 0.3)) == 0.0
    assert float(losses.excessive(on, 0.3)) == pytest.approx(1.0)


def test_cross_reading_equals_its_formula(rng: torch.Generator) -> None:
    filters, signals = normal(rng, 4, 6), normal(rng, 4, 6)
    total = 0.0
    for i, w in enumerate(filters):
        for j, s in enumerate(signals):
            if i != j:
                total += (float(w @ s) / float(w.norm() * s.norm())) ** 2
    found = float(losses.cross_reading(filters, signals))
    assert found == pytest.approx(math.sqrt(total / 16), rel=1e-12)
    scaled = losses.cross_reading(3 * filters, signals / 7)
    assert float(scaled) == pytest.approx(found, rel=1e-12)
    blind = torch.linalg.pinv(signals).mT  # dual directions read no other signal
    assert float(losses.cross_reading(blind, signals)) < 1e-12
    assert found > 0.1  # control


def test_the_slope_of_cross_reading_is_finite_where_nothing_is_read() -> None:
    filters = torch.eye(3, requires_grad=True)
    (slope,) = torch.autograd.grad(losses.cross_reading(filters, torch.eye(3)), filters)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("penalty", [0.3, 5.0])
def test_a_limit_adds_nothing_while_kept_and_pushes_by_what_its_multiplier_becomes(
    penalty: float,
) -> None:
    violation = torch.tensor([-0.4, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    none, some = torch.zeros(3).double(), torch.full((3,), 2.0).double()
    (slope,) = torch.autograd.grad(losses.limited(violation, some, penalty).sum(), violation)
    expected = torch.relu(some + penalty * violation.detach())
    torch.testing.assert_close(slope, expected)
    added = losses.limited(violation, none, penalty)
    assert added.tolist() == pytest.approx([0.0, 0.0, penalty * 0.49 / 2])


def test_multipliers_that_follow_their_violation_find_the_constrained_minimum() -> None:
    at, multiplier = torch.zeros(()).double().requires_grad_(), torch.zeros(()).double()
    for _ in range(400):  # minimise (x - 3)^2 where x <= 1
        loss = (at - 3).square() + losses.limited(at - 1, multiplier, 1.0)
        (slope,) = torch.autograd.grad(loss, at)
        multiplier = torch.relu(multiplier + 0.2 * (at.detach() - 1))
        at = (at.detach() - 0.2 * slope).requires_grad_()
    assert float(at.detach()) == pytest.approx(1.0, abs=1e-6)
    assert float(multiplier) == pytest.approx(4.0, abs=1e-5)  # the slope of (x - 3)^2 at 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_factors_give_finite_values_and_gradients(size: float, dtype: torch.dtype) -> None:
    signs = torch.tensor([[1, -1, 0], [-1, -1, -1], [1, 1, 1], [0, 0, -1]], dtype=dtype)
    factors = (size * signs).requires_grad_()
    terms = [losses.sparsity(factors), losses.max_activation(factors)]
    terms += [losses.inactive(factors, 0.9)[None], losses.confidence(factors)[None]]
    terms += [losses.sparsity_bound(factors)[None], losses.excessive(factors, 0.1)[None]]
    assert all(bool(torch.isfinite(term).all()) for term in terms)
    (slope,) = torch.autograd.grad(torch.cat(terms).mean(), factors)
    assert bool(torch.isfinite(slope).all())


@pytest.mark.parametrize(
    "term",
    [
        losses.sparsity,
        losses.max_activation,
        lambda z: losses.inactive(z, 0.99),  # every concept falls short: away from the kink
        losses.margin,
        losses.confidence,
        losses.sparsity_bound,
        lambda z: losses.excessive(z, 0.01),  # every concept goes beyond: away from the kink
        lambda w: losses.self_weighted(w.square().flatten()),
        lambda w: losses.cross_reading(w, torch.linspace(-1, 2, 12).double().reshape(4, 3)),
    ],
    ids=[
        "sparsity",
        "max_activation",
        "inactive",
        "margin",
        "confidence",
        "sparsity_bound",
        "excessive",
        "self_weighted",
        "cross_reading",
    ],
)
def test_gradients_equal_finite_differences(
    rng: torch.Generator, term: Callable[[Tensor], Tensor]
) -> None:
    assert torch.autograd.gradcheck(term, normal(rng, 4, 3).requires_grad_())


def test_float32_keeps_five_digits(rng: torch.Generator) -> None:
    factors = 3 * normal(rng, 50, 6)
    bound = 64 * torch.finfo(torch.float32).eps  # some dozen operations, no cancellation
    for term in (losses.sparsity, losses.max_activation):
        narrow = term(factors.float()).double()
        torch.testing.assert_close(narrow, term(factors), rtol=bound, atol=bound)
