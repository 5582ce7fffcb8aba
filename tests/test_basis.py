"""Stage 2: white coordinates have unit covariance, and lose nothing that can be read back."""

import pytest
import torch
from planted import normal
from torch import Tensor

from concept_guard.directions import basis as basis_module
from concept_guard.directions.basis import CHUNK, Basis, moments

EPS32 = torch.finfo(torch.float32).eps


def some_rows(rng: torch.Generator, count: int = 600, channels: int = 7) -> Tensor:
    """Return correlated rows far from zero, with channel scales from 1/16 to 4."""
    mixed = normal(rng, count, channels) @ normal(rng, channels, channels)
    return mixed * 2.0 ** torch.arange(-4, channels - 4) + 3


def covariance(rows: Tensor) -> Tensor:
    """Return the biased covariance, in two passes in float64."""
    centred = rows.double() - rows.double().mean(dim=0)
    return centred.T @ centred / len(rows)


def condition(rows: Tensor) -> float:
    """Return the condition number of the correlation matrix, which whitening divides by."""
    return float(torch.linalg.cond(torch.corrcoef(rows.double().T)))


def test_white_rows_have_mean_zero_and_unit_covariance(rng: torch.Generator) -> None:
    rows = some_rows(rng)
    basis = Basis.of(rows, rank=7)
    white = basis.white(rows)
    assert white.dtype == torch.float32
    # Rows and products are rounded to float32; an axis of small variance is divided by it.
    bound = 20 * EPS32 * condition(rows)
    torch.testing.assert_close(covariance(white), torch.eye(7).double(), rtol=0, atol=bound)
    assert float(white.double().mean(dim=0).abs().max()) < bound
    control = Basis.of(rows[:50], rank=7).white(rows)  # moments of other rows do not whiten these
    assert (covariance(control) - torch.eye(7)).abs().max() > 0.1


def test_axes_come_in_order_of_the_variance_of_standardised_channels(rng: torch.Generator) -> None:
    rows = some_rows(rng)
    basis = Basis.of(rows, rank=7)
    standard = (rows - rows.mean(dim=0)) / rows.std(dim=0, correction=0)
    along = basis.outward.double() / rows.std(dim=0, correction=0)
    variances = along.square().sum(dim=1)
    expected = torch.linalg.eigvalsh(covariance(standard)).flip(0)
    torch.testing.assert_close(variances, expected, rtol=1e-3, atol=0)
    few = Basis.of(rows, rank=2)
    assert torch.equal(few.inward, basis.inward[:, :2])
    assert torch.equal(few.outward, basis.outward[:2])


def test_outward_undoes_inward(rng: torch.Generator) -> None:
    rows = some_rows(rng)
    basis = Basis.of(rows, rank=7)
    back = basis.mean + basis.white(rows) @ basis.outward
    bound = 20 * EPS32 * condition(rows) * float(rows.abs().max())
    torch.testing.assert_close(back.double(), rows, rtol=0, atol=bound)
    product = basis.outward.double() @ basis.inward.double()
    bound = 20 * EPS32 * condition(rows)
    torch.testing.assert_close(product, torch.eye(7).double(), rtol=0, atol=bound)


@pytest.mark.parametrize("value", [0.0, 5.0, -1e4])
def test_dead_channels_contribute_nothing(rng: torch.Generator, value: float) -> None:
    rows = some_rows(rng)
    alone = Basis.of(rows[:, [0, 1, 3, 4, 5, 6]], rank=7)
    rows[:, 2] = value
    basis = Basis.of(rows, rank=7)
    assert basis.inward.shape == (7, 6)
    # Projecting onto the span of the rows rounds in float64; inverse deviations are up to 16.
    assert float(basis.inward[2].abs().max()) < 1e-12
    assert not basis.outward[:, 2].any()
    live = torch.arange(7) != 2
    # The sign of an axis is arbitrary.
    torch.testing.assert_close(basis.inward[live].abs(), alone.inward.abs(), rtol=1e-4, atol=1e-4)
    assert float(basis.mean[2]) == value


def test_collinear_channels_leave_fewer_axes_and_are_read_back(rng: torch.Generator) -> None:
    rows = some_rows(rng, channels=4) @ normal(rng, 4, 7)
    basis = Basis.of(rows, rank=7)
    assert basis.inward.shape == (7, 4)
    white = basis.white(rows)
    bound = 0.01  # float32 rounding over axes that keep 1e-4 of the variance; FLAT is 1e-6
    torch.testing.assert_close(covariance(white), torch.eye(4).double(), rtol=0, atol=bound)
    back = basis.mean + white @ basis.outward
    torch.testing.assert_close(back.double(), rows, rtol=0, atol=1e-3 * float(rows.abs().max()))


@pytest.mark.parametrize(("share", "axes"), [(3e-3, 3), (3e-4, 2)])
def test_axes_below_a_millionth_of_the_variance_are_empty(
    rng: torch.Generator, share: float, axes: int
) -> None:
    rows = normal(rng, 500, 3)
    rows = torch.linalg.qr(rows - rows.mean(dim=0))[0]  # uncorrelated, exactly
    rows[:, 2] = rows[:, 1] + share * rows[:, 2]  # the third axis has share^2 / 4 of the largest
    assert Basis.of(rows, rank=3).inward.shape == (3, axes)


def test_a_large_mean_costs_no_accuracy(rng: torch.Generator) -> None:
    rows = torch.round(64 * normal(rng, 600, 5) @ normal(rng, 5, 5)) / 64
    moved = (rows + 2.0**14).float()
    assert torch.equal(moved.double() - 2.0**14, rows)  # exact, so only the method can lose digits
    white = Basis.of(moved, rank=5).white(moved).double()
    bound = 20 * EPS32 * condition(rows)
    torch.testing.assert_close(covariance(white), torch.eye(5).double(), rtol=0, atol=bound)
    # The mean itself is kept in float32; that shifts all rows alike.
    basis = Basis.of(moved, rank=5)
    shift = 2.0**14 * EPS32 * float(basis.inward.abs().sum(dim=0).max())
    assert float(white.mean(dim=0).abs().max()) < shift
    control = moved.T @ moved / len(moved) - torch.outer(moved.mean(dim=0), moved.mean(dim=0))
    assert (control - covariance(rows)).abs().max() > 1  # squares before centring


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_summed_in_full(rng: torch.Generator, dtype: torch.dtype) -> None:
    rows = some_rows(rng, 5000).to(dtype)  # sums of 5,000 are beyond both types
    half, full = Basis.of(rows, rank=7), Basis.of(rows.float(), rank=7)
    for name in ("mean", "inward", "outward"):
        assert torch.equal(getattr(half, name), getattr(full, name))
    assert torch.equal(half.white(rows), full.white(rows.float()))


def test_moments_are_mean_and_covariance(rng: torch.Generator) -> None:
    rows = some_rows(rng)
    mean, found = moments(rows)
    assert mean.dtype == found.dtype == torch.float64
    # Products of deviations up to about 10 are rounded to float32 and averaged.
    bound = 600 * EPS32 * 10**2 / 600
    torch.testing.assert_close(mean, rows.mean(dim=0), rtol=0, atol=bound)
    torch.testing.assert_close(found, torch.cov(rows.T, correction=0), rtol=0, atol=10 * bound)


@pytest.mark.parametrize("chunk", [1, 7, 599, 600])
def test_the_chunk_does_not_matter(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    rows = some_rows(rng)
    rows[300:] += 2  # the mean of the first chunk is not that of all
    monkeypatch.setattr(basis_module, "CHUNK", chunk)
    mean, found = moments(rows)
    torch.testing.assert_close(mean, rows.mean(dim=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, covariance(rows), rtol=1e-5, atol=1e-5)
    basis = Basis.of(rows, rank=7)
    assert len(basis.white(rows)) == len(rows)


def test_more_rows_than_a_chunk_have_the_moments_of_all(rng: torch.Generator) -> None:
    first = 4 * CHUNK
    rows = some_rows(rng, first + 500, 3)
    rows[first:] += 20
    mean, found = moments(rows)
    torch.testing.assert_close(mean, rows.mean(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, covariance(rows), rtol=1e-5, atol=1e-5)
    assert (found - covariance(rows[:first])).abs().max() > 1  # control
    white = Basis.of(rows, rank=3).white(rows)
    bound = 20 * EPS32 * condition(rows)
    torch.testing.assert_close(covariance(white), torch.eye(3).double(), rtol=0, atol=bound)
    assert (covariance(white[:first]) - torch.eye(3)).abs().max() > 2 * bound  # control
