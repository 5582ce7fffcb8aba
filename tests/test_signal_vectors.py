"""Stage 2: signal vectors are the planted ones, and a concept without any keeps out NaN."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import concept_world, normal
from torch import Tensor

from concept_guard.directions import DirectionPairs
from concept_guard.directions.encoding import signal_vectors

EPS = torch.finfo(torch.float64).eps


def regression(rows: Tensor, filters: Tensor) -> Tensor:
    """Regress rows on factors, one concept at a time, with two-pass moments."""
    slopes = []
    for w in filters:
        z = rows @ w
        spread = (z - z.mean()).square().sum()
        slopes.append(((z - z.mean())[:, None] * (rows - rows.mean(dim=0))).sum(dim=0) / spread)
    return torch.stack(slopes)


def test_the_planted_signals_are_recovered_from_positives_only() -> None:
    world = concept_world(0, noise=0.0)
    found, by_positives = signal_vectors(world.rows, world.filters, world.biases)
    assert by_positives.all()
    # Distractors are mirrored, so the regression is exact up to rounding: rows and filters are of
    # size 10, the spread of a factor is 0.6, and 300 rows are summed.
    bound = 300 * 10**2 / 0.6**2 * EPS
    torch.testing.assert_close(found, world.signals, rtol=0, atol=bound)
    # Control: the moments of all rows mix in the concepts that exclude this one.
    mixed = regression(world.rows, world.filters)
    assert (mixed - world.signals).norm(dim=1).min() > 0.1
    # Control: the filter is no stand-in for the signal.
    assert torch.cosine_similarity(world.filters, world.signals).max() < 0.99


def test_positives_only_is_the_regression_over_the_positive_rows(rng: torch.Generator) -> None:
    rows, filters = normal(rng, 300, 6) @ normal(rng, 6, 6) + 5, normal(rng, 3, 6)
    raw = rows @ filters.T
    biases = raw.quantile(torch.tensor(0.6).double(), dim=0)
    found, _ = signal_vectors(rows, filters, biases)
    for k in range(3):
        expected = regression(rows[raw[:, k] > biases[k]], filters[k : k + 1])[0]
        torch.testing.assert_close(found[k], expected, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, regression(rows, filters), atol=0.05)  # control


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_filter_and_signal_multiply_to_one(p: int, c: int, k: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows, filters = normal(rng, p, c) + 3, normal(rng, k, c)
    found, _ = signal_vectors(rows, filters, (rows @ filters.T).mean(dim=0))
    product = (found * filters).sum(dim=1)
    torch.testing.assert_close(product, torch.ones_like(product), rtol=0, atol=1e-6)


def test_a_filter_twice_as_long_has_a_signal_half_as_long(rng: torch.Generator) -> None:
    rows, filters = normal(rng, 100, 6) + 2, normal(rng, 3, 6)
    biases = torch.tensor([0.5, 1.0, -1.0]).double()
    scale = torch.tensor([2.0, 1e-6, 1e6]).double()
    plain, used = signal_vectors(rows, filters, biases)
    scaled, also_used = signal_vectors(rows, scale[:, None] * filters, scale * biases)
    assert torch.equal(used, also_used)
    torch.testing.assert_close(scale[:, None] * scaled, plain, rtol=1e-9, atol=1e-9)


def test_dead_concepts_give_zeros_and_leave_the_others_alone(rng: torch.Generator) -> None:
    rows = normal(rng, 100, 6)
    rows[:, 5] = 7.0
    alive = normal(rng, 1, 6)
    filters = torch.cat([alive, torch.zeros(1, 6), torch.eye(6)[5:]]).double()
    biases = (rows @ filters.T).mean(dim=0)
    found, by_positives = signal_vectors(rows, filters, biases)
    assert by_positives.tolist() == [True, False, False]
    assert torch.equal(found[1:], torch.zeros(2, 6).double())
    alone, _ = signal_vectors(rows, alive, biases[:1])
    torch.testing.assert_close(found[:1], alone, rtol=1e-12, atol=1e-12)
    rows[:, 4] = 0.1 - rows[:, 3]  # what they add up to varies by rounding only
    blind = (torch.eye(6)[3] + torch.eye(6)[4])[None].double()
    assert (rows @ blind.T).unique().numel() > 1
    rounding, _ = signal_vectors(rows, blind, torch.zeros(1).double())
    assert torch.equal(rounding, torch.zeros(1, 6).double())
    constant, _ = signal_vectors(torch.ones(10, 6).double(), filters, biases)
    assert torch.equal(constant, torch.zeros(3, 6).double())


@pytest.mark.parametrize(("positives", "used"), [(7, False), (8, True)])
def test_fewer_than_eight_positives_fall_back_to_all_rows(
    rng: torch.Generator, positives: int, used: bool
) -> None:
    rows, filters = normal(rng, 60, 5), normal(rng, 1, 5)
    raw = (rows @ filters.T)[:, 0].sort(descending=True).values
    bias = (raw[positives - 1] + raw[positives])[None] / 2
    found, by_positives = signal_vectors(rows, filters, bias)
    assert by_positives.tolist() == [used]
    assert torch.allclose(found, regression(rows, filters), atol=1e-9) is not used
    _, at_two = signal_vectors(rows, filters, bias, least=2)
    assert at_two.tolist() == [True]


@pytest.mark.parametrize(("factor", "used"), [(0.99, True), (1.01, False)])
def test_the_floor_is_relative_to_channel_variance_and_filter_length(
    rng: torch.Generator, factor: float, used: bool
) -> None:
    rows, filters = 1e3 * normal(rng, 200, 5) + 9, 1e-4 * normal(rng, 1, 5)
    raw = (rows @ filters.T)[:, 0]
    positive = raw[raw > 0]
    channel = (rows - rows.mean(dim=0)).square().mean()
    floor = float(positive.var(correction=0) / (channel * filters.square().sum()))
    _, by_positives = signal_vectors(rows, filters, torch.zeros(1), floor=factor * floor)
    assert by_positives.tolist() == [used]


def test_float32_filters_get_float32_signals_that_keep_five_digits() -> None:
    world = concept_world(1, noise=0.0)
    filters, biases = world.filters.float(), world.biases.float()
    found, _ = signal_vectors(world.rows.float(), filters, biases)
    assert found.dtype == torch.float32
    # Rounding the filters leaks distractors and others into a factor by eps, on values of size 10.
    torch.testing.assert_close(found.double(), world.signals, rtol=0, atol=2e-5)


def some_pairs(rng: torch.Generator) -> DirectionPairs:
    return DirectionPairs(normal(rng, 3, 5), normal(rng, 3, 5), normal(rng, 3))


def test_factors_are_read_minus_bias_and_present_where_positive(rng: torch.Generator) -> None:
    pairs, rows = some_pairs(rng), normal(rng, 2, 4, 5)
    factors, present = pairs.factors(rows), pairs.present(rows)
    for n in range(2):
        for q in range(4):
            for k in range(3):
                z = sum(float(a * b) for a, b in zip(rows[n, q], pairs.filters[k], strict=True))
                expected = z - float(pairs.biases[k])
                assert float(factors[n, q, k]) == pytest.approx(expected, rel=1e-12, abs=1e-12)
                assert bool(present[n, q, k]) is (expected > 0)
    assert pairs.factors(rows.half()).dtype == torch.float64
    one = DirectionPairs(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([2.0]))
    assert one.present(torch.tensor([[1.999], [2.0], [2.001]]))[:, 0].tolist() == [
        False,
        False,
        True,
    ]


def test_selected_pairs_come_in_the_order_asked_for(rng: torch.Generator) -> None:
    pairs, rows = some_pairs(rng), normal(rng, 4, 5)
    chosen = pairs.select([2, 0])
    torch.testing.assert_close(chosen.factors(rows), pairs.factors(rows)[:, [2, 0]])
    assert torch.equal(chosen.signals, pairs.signals[[2, 0]])


def test_saved_pairs_load_bit_for_bit(rng: torch.Generator, tmp_path: Path) -> None:
    whole = some_pairs(rng)
    for pairs in (whole, DirectionPairs(whole.filters.T, whole.signals.T, whole.biases)):
        pairs.save(tmp_path / "pairs.safetensors")
        back = DirectionPairs.load(tmp_path / "pairs.safetensors")
        for name in ("filters", "signals", "biases"):
            assert torch.equal(getattr(back, name), getattr(pairs, name))
