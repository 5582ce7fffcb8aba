"""Stage 2: rows are moved to where no detector can decide, and a head is asked there."""

import pytest
import torch
from planted import normal, overlapping_pairs
from torch import Tensor

from concept_guard.directions import losses
from concept_guard.directions.alignment import RIDGE, alignment, to_uncertainty

CLOSE = 1e3 * RIDGE  # the ridge leaves its share, times the condition of moderate matrices


def head(rows: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, 3 * rows.shape[-1], dtype=rows.dtype).reshape(3, -1)
    return rows @ weights.sin().mT + torch.tensor([0.3, 0.0, -0.2], dtype=rows.dtype)


def curved(rows: Tensor) -> Tensor:
    return head(rows.tanh())


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("shape", [(20,), (4, 5)])
def test_the_whole_move_ends_at_every_threshold(
    rng: torch.Generator, constrained: bool, shape: tuple[int, ...]
) -> None:
    filters, signals = overlapping_pairs(rng, 4, 9)
    biases, rows = normal(rng, 4), normal(rng, *shape, 9) + 2
    move = to_uncertainty(rows, filters, biases, signals if constrained else None)
    assert move.shape == rows.shape
    reads = (rows - move) @ filters.mT
    before = (rows @ filters.mT - biases).abs().max()
    assert float((reads - biases).abs().max()) < CLOSE * float(before)
    half = (rows - 0.5 * move) @ filters.mT - biases
    torch.testing.assert_close(
        half, (rows @ filters.mT - biases) / 2, rtol=0, atol=CLOSE * float(before)
    )
    assert float((half - 0).abs().max()) > 0.1  # control: half a move does not end there


def test_moves_are_the_shortest_or_stay_in_the_span_of_the_signals(rng: torch.Generator) -> None:
    filters, signals = overlapping_pairs(rng, 3, 8)
    biases, rows = normal(rng, 3), normal(rng, 10, 8)
    shortest = to_uncertainty(rows, filters, biases)
    expected = (rows @ filters.mT - biases) @ torch.linalg.pinv(filters).mT
    torch.testing.assert_close(shortest, expected, rtol=CLOSE, atol=CLOSE)
    along = to_uncertainty(rows, filters, biases, signals)
    inside = torch.linalg.pinv(signals) @ signals
    torch.testing.assert_close(along @ inside, along)
    assert not torch.allclose(shortest @ inside, shortest, atol=0.1)  # control
    assert (along.norm(dim=1) >= shortest.norm(dim=1) * (1 - CLOSE)).all()


@pytest.mark.parametrize("constrained", [False, True])
def test_more_detectors_than_channels_meet_in_the_least_squares_sense(
    rng: torch.Generator, constrained: bool
) -> None:
    filters, signals = normal(rng, 9, 4), normal(rng, 9, 4)
    biases, rows = normal(rng, 9), normal(rng, 6, 4)
    move = to_uncertainty(rows, filters, biases, signals if constrained else None)
    best = torch.linalg.lstsq(filters, (rows @ filters.mT - biases).mT).solution.mT
    torch.testing.assert_close(move, best, rtol=CLOSE, atol=CLOSE)


def test_detectors_that_repeat_give_a_finite_move_and_slope(rng: torch.Generator) -> None:
    one = normal(rng, 2, 5)
    filters = torch.cat([one, one[:1]]).requires_grad_()
    move = to_uncertainty(normal(rng, 7, 5), filters, torch.zeros(3).double())
    (slope,) = torch.autograd.grad(move.square().sum(), filters)
    assert bool(move.isfinite().all())
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("concepts", [3, 6])
def test_gradients_equal_finite_differences(
    rng: torch.Generator, constrained: bool, concepts: int
) -> None:
    filters, signals = normal(rng, concepts, 4), normal(rng, concepts, 4)
    rows, share = normal(rng, 3, 2, 4), torch.tensor([0.5, 0.7, 0.9]).double()

    def value(w: Tensor, b: Tensor, s: Tensor) -> Tensor:
        kept = s if constrained else None
        return alignment(rows, w, b, head=curved, share=share, signals=kept, pooled=True)

    inputs = [t.requires_grad_() for t in (filters, normal(rng, concepts), signals)]
    # With more concepts than channels the constrained solve is singular but for the ridge.
    loose = constrained and concepts > 4
    assert torch.autograd.gradcheck(value, inputs, eps=1e-7, atol=1e-3 if loose else 1e-5)


@pytest.mark.parametrize("constrained", [False, True])
def test_moving_the_mean_row_equals_moving_every_row(
    rng: torch.Generator, constrained: bool
) -> None:
    filters, signals = (t.requires_grad_() for t in overlapping_pairs(rng, 3, 6))
    biases = normal(rng, 3).requires_grad_()
    rows, share = normal(rng, 5, 4, 6), torch.rand(5, generator=rng, dtype=torch.float64)
    kept = signals if constrained else None
    short = alignment(rows, filters, biases, head=head, share=share, signals=kept)
    whole = alignment(
        rows,
        filters,
        biases,
        head=lambda images: head(images.mean(dim=1)),
        share=share,
        signals=kept,
        pooled=False,
    )
    torch.testing.assert_close(short, whole)
    inputs = [filters, biases, *([signals] if constrained else [])]
    for a, b in zip(
        torch.autograd.grad(short, inputs), torch.autograd.grad(whole, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    other = alignment(
        rows, filters, biases, head=lambda x: curved(x).mean(dim=1), share=share, pooled=False
    )
    wrong = alignment(rows, filters, biases, head=curved, share=share)
    assert (
        float((other - wrong).detach().abs()) > 1e-3
    )  # control: what bends before it averages needs all rows


def test_the_value_is_the_confidence_at_the_moved_rows(rng: torch.Generator) -> None:
    filters, biases = normal(rng, 2, 5), normal(rng, 2)
    rows, share = normal(rng, 6, 5), torch.rand(6, generator=rng, dtype=torch.float64)
    found = alignment(rows, filters, biases, head=head, share=share)
    moved = [
        x - float(k) * to_uncertainty(x, filters, biases) for x, k in zip(rows, share, strict=True)
    ]
    torch.testing.assert_close(found, losses.confidence(head(torch.stack(moved))))
    assert -torch.tensor(3.0).log() <= found <= 0


def test_detectors_that_hold_all_evidence_leave_the_head_undecided(rng: torch.Generator) -> None:
    weights = normal(rng, 3, 5)
    full = torch.ones(40).double()

    def linear(rows: Tensor) -> Tensor:
        return rows @ weights.mT

    rows, zero = 3 * normal(rng, 40, 5), torch.zeros(3).double()
    lowest = -float(torch.tensor(3.0).double().log())
    fitting = alignment(rows, weights, zero, head=linear, share=full)
    assert float(fitting) == pytest.approx(lowest, abs=1e-5)
    assert float(alignment(rows, normal(rng, 3, 5), zero, head=linear, share=full)) > lowest + 0.1
