"""Stage 2: signal vectors are the planted ones, and a concept without any keeps out NaN."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import concept_world, normal
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions import DirectionPairs, encoding
from concept_guard.directions.encoding import LEAST, Estimator, signal_vectors

EPS32 = torch.finfo(torch.float32).eps
ESTIMATORS: tuple[Estimator, ...] = ("joint", "positives", "pattern")


def scaled(signal: Tensor, w: Tensor) -> Tensor:
    return signal / (signal @ w)


def positives_oracle(rows: Tensor, w: Tensor, bias: float) -> Tensor:
    """Regress the rows with the concept on their factor, in two passes."""
    some = rows[rows @ w > bias]
    factor = some @ w - (some @ w).mean()
    slope = sum(z * (x - some.mean(dim=0)) for z, x in zip(factor, some, strict=True))
    return scaled(slope, w)


def pattern_oracle(rows: Tensor, w: Tensor, bias: float) -> Tensor:
    on = rows @ w > bias
    return scaled(rows[on].mean(dim=0) - rows[~on].mean(dim=0), w)


def joint_oracle(rows: Tensor, filters: Tensor, biases: Tensor) -> Tensor:
    """Regress rows on gated factors, by least squares with the ridge as further rows; shrink."""
    factors = rows @ filters.T
    gate = factors > biases
    base = torch.stack([z[~g].mean() for z, g in zip(factors.T, gate.T, strict=True)])
    gated = (factors - base) * gate
    gated = gated - gated.mean(dim=0)
    size = gated.std(dim=0, correction=0)
    ridge = torch.eye(len(filters)).double() * (len(rows) * encoding.RIDGE) ** 0.5
    wide = torch.cat([gated / size, ridge])
    slopes = torch.linalg.lstsq(
        wide, torch.cat([rows - rows.mean(dim=0), torch.zeros(len(filters), rows.shape[1])])
    ).solution
    left = rows - rows.mean(dim=0) - (gated / size) @ slopes
    shrunk = shrunk_oracle(slopes, torch.linalg.inv(wide.T @ wide).diagonal(), left)
    return torch.stack([scaled(s / d, w) for s, d, w in zip(shrunk, size, filters, strict=True)])


def shrunk_oracle(slopes: Tensor, variance: Tensor, left: Tensor) -> Tensor:
    """Shrink along one axis after the other, by t values; variance is that of slopes."""
    deviation = left.std(dim=0, correction=0)
    out = torch.zeros_like(slopes)
    for axis in torch.linalg.svd(left / deviation, full_matrices=False).Vh:
        noise = float((left / deviation @ axis).square().mean())
        along = slopes / deviation @ axis
        chance = (len(slopes) - 2) / float((along.square() / (variance * noise)).sum())
        out += torch.outer(along * max(0.0, 1 - chance), axis) * deviation
    return out


def some_rows(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, filters that overlap, and biases that a third of the rows are beyond."""
    rows, filters = normal(rng, 400, 6) @ normal(rng, 6, 6) + 5, normal(rng, 3, 6)
    return rows, filters, (rows @ filters.T).quantile(torch.tensor(0.67).double(), dim=0)


def oracle(estimator: Estimator, rows: Tensor, filters: Tensor, biases: Tensor) -> Tensor:
    if estimator == "joint":
        return joint_oracle(rows, filters, biases)
    alone = {"positives": positives_oracle, "pattern": pattern_oracle}[estimator]
    return torch.stack([alone(rows, w, b) for w, b in zip(filters, biases.tolist(), strict=True)])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_is_what_it_says(rng: torch.Generator, estimator: Estimator) -> None:
    rows, filters, biases = some_rows(rng)
    found = signal_vectors(rows, filters, biases, estimator)
    expected = oracle(estimator, rows, filters, biases)
    # Rows and factors are rounded to float32 at sizes of up to 30; some scale by up to 30 more.
    bound = 900 * EPS32 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
    for other in set(ESTIMATORS) - {estimator}:  # control
        assert (oracle(other, rows, filters, biases) - expected).abs().max() > 100 * bound
    assert torch.equal(signal_vectors(rows, filters, biases), found) == (estimator == "joint")


def overlapping(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return rows of concepts that overlap; true signals, filters, biases and leaky filters."""
    part = torch.rand(6000, 2, generator=rng) < 0.3
    present = torch.cat([part, part ^ (torch.rand(6000, 2, generator=rng) < 0.1)], dim=1)
    amounts = present * (1 + torch.rand(6000, 4, generator=rng, dtype=torch.float64))
    written = normalize(normal(rng, 7, 10), dim=1)
    rows = torch.cat([amounts, 3 * normal(rng, 6000, 3)], dim=1) @ written + 2
    exact = torch.linalg.pinv(written).T
    leaky = exact[:4] + 0.012 * normal(rng, 4, 3) @ exact[4:]
    return rows, written[:4], exact[:4], 2 * exact[:4].sum(dim=1) + 0.5, leaky


def test_joint_shares_out_rows_with_several_concepts(rng: torch.Generator) -> None:
    rows, truth, filters, biases, _ = overlapping(rng)
    quiet = truth.T @ ((rows - 2) @ filters.T).T  # the same rows without what no concept writes
    rows = quiet.T + 2
    biases = 2 * filters.sum(dim=1) + 0.5
    exact = signal_vectors(rows, filters, biases)
    # Concepts of correlation .8 share their signals by the ridge of 1e-4: 1e-3 at most.
    torch.testing.assert_close(exact, truth, rtol=0, atol=2e-3)
    for estimator in ("positives", "pattern"):  # control: the companions leak in
        mixed = signal_vectors(rows, filters, biases, estimator)
        assert (mixed - truth).norm(dim=1).max() > 0.1


def test_joint_is_nearer_to_the_truth_where_filters_leak_a_distractor(
    rng: torch.Generator,
) -> None:
    rows, truth, _, _, leaky = overlapping(rng)
    biases = 2 * leaky.sum(dim=1) + 0.5
    joint, alone = (
        torch.cosine_similarity(signal_vectors(rows, leaky, biases, e), truth).min()
        for e in ("joint", "positives")
    )
    assert joint > 0.9
    assert alone < joint - 0.02


def crowded(concepts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return few rows of concepts beside distractors ten times as large; truth and filters."""
    rng = torch.Generator().manual_seed(1)
    present = torch.rand(1500, concepts, generator=rng) < 0.08
    amounts = present * (1 + torch.rand(present.shape, generator=rng, dtype=torch.float64))
    written = normalize(normal(rng, concepts + 12, 64), dim=1)
    rows = torch.cat([amounts, 10 * normal(rng, 1500, 12)], dim=1) @ written
    rows += 0.02 * normal(rng, 1500, 64)
    filters = torch.linalg.pinv(written).T[:concepts]
    return rows, written[:concepts], filters, torch.full((concepts,), 0.5).double()


def test_shrinkage_takes_most_of_the_noise_of_large_distractors_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, truth, filters, biases = crowded(40)
    close = torch.cosine_similarity(signal_vectors(rows, filters, biases), truth)
    shift, scale = normal(torch.Generator().manual_seed(2), 64), 2.0 ** (torch.arange(64) % 8 - 4)
    moved = signal_vectors(rows * scale + shift, filters / scale, biases + filters / scale @ shift)
    torch.testing.assert_close(
        torch.cosine_similarity(moved / scale, truth), close, rtol=0, atol=1e-3
    )
    monkeypatch.setattr(encoding, "_shrunk", lambda slopes, *_: slopes)
    plain = torch.cosine_similarity(signal_vectors(rows, filters, biases), truth)  # control
    assert float(1 / close.square().mean() - 1) < 0.3 * float(1 / plain.square().mean() - 1)
    assert float((close > plain).float().mean()) > 0.9


def test_two_concepts_are_not_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, filters, biases = crowded(2)
    found = signal_vectors(rows, filters, biases)
    monkeypatch.setattr(encoding, "_shrunk", lambda slopes, *_: slopes)
    plain = signal_vectors(rows, filters, biases)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-9 * float(plain.abs().max()))


def test_patterns_leak_where_concepts_exclude_each_other() -> None:
    world = concept_world(0, noise=0.0)
    by = {e: signal_vectors(world.rows, world.filters, world.biases, e) for e in ESTIMATORS}
    # Distractors are mirrored, so the regressions are exact up to the ridge and float32.
    torch.testing.assert_close(by["positives"], world.signals, rtol=0, atol=1e-4)
    torch.testing.assert_close(by["joint"], world.signals, rtol=0, atol=2e-3)
    assert (by["pattern"] - world.signals).norm(dim=1).min() > 0.1
    assert torch.cosine_similarity(world.filters, world.signals).max() < 0.99  # control


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(1, 7), st.integers(1, 4), st.integers(0, 10**6))
def test_filter_and_signal_multiply_to_one_or_nothing(
    estimator: Estimator, p: int, c: int, k: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows, filters = normal(rng, p, c) + 3, normal(rng, k, c)
    found = signal_vectors(rows, filters, (rows @ filters.T).mean(dim=0), estimator)
    assert bool(found.isfinite().all())
    product = (found * filters).sum(dim=1)
    dead = ~found.any(dim=1)
    expected = torch.where(dead, 0.0, 1.0).double()
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-6)
    assert not dead.any() or c > 1 or p < 10  # two filters of one channel: still one signal each


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_filter_twice_as_long_has_a_signal_half_as_long(
    rng: torch.Generator, estimator: Estimator
) -> None:
    rows, filters, biases = some_rows(rng)
    scale = torch.tensor([2.0, 1e-6, 1e6]).double()
    plain = signal_vectors(rows, filters, biases, estimator)
    other = signal_vectors(rows, scale[:, None] * filters, scale * biases, estimator)
    torch.testing.assert_close(scale[:, None] * other, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_where_rows_lie_does_not_matter(rng: torch.Generator, estimator: Estimator) -> None:
    rows, filters, biases = some_rows(rng)
    shift = 2.0 ** torch.arange(6)
    plain = signal_vectors(rows, filters, biases, estimator)
    moved = signal_vectors(rows + shift, filters, biases + filters @ shift.double(), estimator)
    # Rows of up to 40 are rounded to float32, and a row may change sides at the threshold.
    torch.testing.assert_close(moved, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("chunk", [1, 33, 399])
def test_the_chunk_does_not_matter(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, estimator: Estimator, chunk: int
) -> None:
    rows, filters, biases = some_rows(rng)
    rows[200:] += 1.0
    whole = signal_vectors(rows, filters, biases, estimator)
    monkeypatch.setattr(encoding, "CHUNK", chunk)
    parts = signal_vectors(rows, filters, biases, estimator)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dead_filters_give_zeros_and_leave_the_others_alone(
    rng: torch.Generator, estimator: Estimator
) -> None:
    rows = normal(rng, 100, 6)
    rows[:, 5] = 7.0
    alive = normal(rng, 1, 6)
    filters = torch.cat([alive, torch.zeros(1, 6), torch.eye(6)[5:]]).double()
    biases = (rows @ filters.T).mean(dim=0)
    found = signal_vectors(rows, filters, biases, estimator)
    assert torch.equal(found[1:], torch.zeros(2, 6).double())
    alone = signal_vectors(rows, alive, biases[:1], estimator)
    torch.testing.assert_close(found[:1], alone, rtol=1e-6, atol=1e-6)
    constant = signal_vectors(torch.ones(10, 6).double(), filters, biases, estimator)
    assert torch.equal(constant, torch.zeros(3, 6).double())
    none = signal_vectors(rows, filters[:0], biases[:0], estimator)
    assert none.shape == (0, 6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bias", [-1e6, 1e6])
def test_a_concept_in_no_row_or_in_all_gets_the_signal_of_all_rows(
    rng: torch.Generator, estimator: Estimator, bias: float
) -> None:
    rows, filters, biases = some_rows(rng)
    biases[2] = bias
    found = signal_vectors(rows, filters, biases, estimator)
    assert bool(found.isfinite().all())
    factors = (rows - rows.mean(dim=0)) @ filters.T
    slopes = torch.linalg.lstsq(factors, rows - rows.mean(dim=0)).solution
    if bias > 0 or estimator == "pattern":  # present everywhere: the gate changes nothing
        torch.testing.assert_close(found[2], scaled(slopes[2], filters[2]), rtol=0, atol=1e-2)


@pytest.mark.parametrize(("positives", "used"), [(LEAST - 1, False), (LEAST, True)])
def test_fewer_than_eight_positives_fall_back_to_all_rows(
    rng: torch.Generator, positives: int, used: bool
) -> None:
    rows, filters = normal(rng, 60, 5), normal(rng, 1, 5)
    raw = (rows @ filters.T)[:, 0].sort(descending=True).values
    bias = (raw[positives - 1] + raw[positives])[None] / 2
    found = signal_vectors(rows, filters, bias, "positives")
    expected = positives_oracle(rows, filters[0], float(bias))
    assert torch.allclose(found[0], expected, atol=1e-4) is used


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_worked_on_in_float32(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    rows, filters, biases = some_rows(rng)
    rows, filters, biases = rows.to(dtype), filters.float(), biases.float()
    found = signal_vectors(rows, filters, biases)
    assert found.dtype == torch.float32
    assert torch.equal(found, signal_vectors(rows.float(), filters, biases))


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
