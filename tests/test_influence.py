"""Stage 3a: erasing sets factors exactly, reads only through filters, moves only along signals."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import normal, overlapping_pairs
from scipy.stats import kstest
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.influence import Effect, effect, erase, global_influence, steps

EPS = torch.finfo(torch.float64).eps
NEAR = 1e3 * EPS  # times the condition number of S W' (below 100 here), for values of size 10


def bound(filters: Tensor, signals: Tensor) -> float:
    return float(NEAR * torch.linalg.cond(signals @ filters.T) * signals.norm() * filters.norm())


def row_by_row(rows: Tensor, filters: Tensor, signals: Tensor, reference: Tensor) -> Tensor:
    """Solve, for every row on its own, for the amounts of each signal that must go."""
    moved = []
    for x in rows:
        reads = torch.stack([torch.stack([s @ w for s in signals]) for w in filters])  # (w, s)
        excess = torch.stack([x @ w - r for w, r in zip(filters, reference, strict=True)])
        amounts = torch.linalg.inv(reads) @ excess
        moved.append(x - sum(a * s for a, s in zip(amounts, signals, strict=True)))
    return torch.stack(moved)


@pytest.mark.parametrize(("k", "c"), [(1, 1), (1, 12), (4, 12), (5, 5)])
def test_factors_equal_the_reference_afterwards(rng: torch.Generator, k: int, c: int) -> None:
    filters, signals = overlapping_pairs(rng, k, c)
    rows, reference = 3 * normal(rng, 7, c) + 2, normal(rng, k)
    done = erase(rows, filters, signals, reference)
    tol = bound(filters, signals)
    torch.testing.assert_close(done @ filters.T, reference.expand(7, k), rtol=0, atol=tol)
    expected = row_by_row(rows, filters, signals, reference)
    torch.testing.assert_close(done, expected, rtol=0, atol=tol)
    again = erase(done, filters, signals, reference)
    torch.testing.assert_close(again, done, rtol=0, atol=tol)


def test_the_planted_coupling_would_catch_a_transposed_one(rng: torch.Generator) -> None:
    # Control for the test above: identity or symmetric coupling would hide the mistake.
    filters, signals = overlapping_pairs(rng, 4, 12)
    coupling = signals @ filters.T
    rows, reference = normal(rng, 7, 12), normal(rng, 4)
    wrong = rows - (rows @ filters.T - reference) @ torch.linalg.solve(coupling.T, signals)
    assert (wrong @ filters.T - reference).abs().max() > 0.5
    separately = rows - (rows @ filters.T - reference) @ signals
    assert (separately @ filters.T - reference).abs().max() > 0.5


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(3, 8), st.integers(0, 10**6))
def test_erasing_reads_through_filters_and_moves_along_signals(
    p: int, k: int, c: int, seed: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    filters, signals = overlapping_pairs(rng, k, c)
    rows, reference = normal(rng, p, c), normal(rng, k)
    tol = 10 * bound(filters, signals) * float(torch.linalg.cond(filters))
    moved = erase(rows, filters, signals, reference) - rows
    span = torch.linalg.pinv(signals) @ signals
    torch.testing.assert_close(moved @ span, moved, rtol=0, atol=tol)
    blind = torch.eye(c, dtype=torch.float64) - torch.linalg.pinv(filters) @ filters
    unread = 5 * normal(rng, p, c) @ blind
    also = erase(rows + unread, filters, signals, reference) - (rows + unread)
    torch.testing.assert_close(also, moved, rtol=0, atol=tol)


def test_the_order_and_the_scale_of_concepts_do_not_matter(rng: torch.Generator) -> None:
    filters, signals = overlapping_pairs(rng, 3, 8)
    rows, reference = normal(rng, 5, 8), normal(rng, 3)
    plain = erase(rows, filters, signals, reference)
    order = [2, 0, 1]
    turned = erase(rows, filters[order], signals[order], reference[order])
    scale = torch.tensor([2.0, -0.5, 7.0]).double()
    longer = erase(rows, scale[:, None] * filters, signals / scale[:, None], scale * reference)
    for other in (turned, longer):
        torch.testing.assert_close(other, plain, rtol=0, atol=10 * bound(filters, signals))


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_strength_is_the_share_of_the_way(rng: torch.Generator, strength: float) -> None:
    filters, signals = overlapping_pairs(rng, 3, 8)
    rows, reference = normal(rng, 5, 8), normal(rng, 3)
    part = erase(rows, filters, signals, reference, strength=strength)
    left = part @ filters.T - reference
    expected = (1 - strength) * (rows @ filters.T - reference)
    torch.testing.assert_close(left, expected, rtol=0, atol=bound(filters, signals))


def test_steps_are_the_signals_where_pairs_do_not_overlap(rng: torch.Generator) -> None:
    signals = normal(rng, 3, 8)
    filters = torch.linalg.pinv(signals).T
    torch.testing.assert_close(steps(filters, signals), signals, rtol=0, atol=1e-12)
    overlap = overlapping_pairs(rng, 3, 8)
    assert not torch.allclose(steps(*overlap), overlap[1], atol=0.1)  # control
    assert steps(filters.half(), signals.half()).dtype == torch.float64


def test_any_shape_and_precision_of_rows_is_kept(rng: torch.Generator) -> None:
    filters, signals = overlapping_pairs(rng, 2, 6)
    rows, reference = normal(rng, 2, 3, 4, 6), normal(rng, 2)
    before = rows.clone()
    done = erase(rows, filters, signals, reference)
    flat = erase(rows.flatten(0, 2), filters, signals, reference)
    torch.testing.assert_close(done.flatten(0, 2), flat, rtol=0, atol=NEAR)
    assert torch.equal(rows, before)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        narrow = erase(rows.to(dtype), filters.float(), signals.float(), reference.float())
        assert narrow.dtype == dtype
        # Inputs are rounded once, results once: some eps of the dtype, on values of size 10.
        atol = 40 * max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
        torch.testing.assert_close(narrow.double(), done, rtol=0, atol=atol)


def counted(before: Tensor, after: Tensor, labels: Tensor, present: Tensor, k: int) -> Effect:
    tally = dict.fromkeys(("fixed", "broken", "driven", "freed", "repaired"), 0)
    changes = []
    for n, label in enumerate(labels.tolist()):
        was, now = int(before[n].argmax()), int(after[n].argmax())
        tally["fixed"] += was != label and now == label
        tally["broken"] += was == label and now != label
        if bool(present[n]) and label != k and was == k:
            tally["driven"] += 1
            tally["freed"] += now != k
            tally["repaired"] += now == label
            changes.append(float(after[n, k] - before[n, k]))
    return Effect(**tally, logit_change=sum(changes) / len(changes) if changes else 0.0)


@pytest.mark.parametrize("k", [0, 2])
def test_effects_are_counted_image_by_image(rng: torch.Generator, k: int) -> None:
    before, after = normal(rng, 200, 3), normal(rng, 200, 3)
    labels = torch.randint(0, 3, (200,), generator=rng)
    present = torch.rand(200, generator=rng) < 0.4
    found, expected = (
        effect(before, after, labels, present, k),
        counted(before, after, labels, present, k),
    )
    assert found.logit_change == pytest.approx(expected.logit_change, rel=1e-12)
    names = ("fixed", "broken", "driven", "freed", "repaired")
    assert [getattr(found, n) for n in names] == [getattr(expected, n) for n in names]
    assert 0 < found.repaired < found.freed < found.driven  # the counts differ


def test_without_driven_images_the_logit_change_is_zero(rng: torch.Generator) -> None:
    logits, labels = normal(rng, 20, 3), torch.zeros(20).long()
    found = effect(logits, normal(rng, 20, 3), labels, torch.zeros(20).bool(), 1)
    assert (found.driven, found.logit_change) == (0, 0.0)


def head_of(rng: torch.Generator) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    weight = normal(rng, 4, 8)
    return weight, lambda rows: rows.mean(dim=1) @ weight.T


def test_a_direction_that_the_head_reads_moves_its_class_and_one_it_ignores_does_not(
    rng: torch.Generator,
) -> None:
    weight, logits_of = head_of(rng)
    rows = normal(rng, 200, 3, 8)
    towards = torch.linalg.pinv(weight)[:, 2]  # raises logit 2 and no other
    ignored = torch.linalg.svd(weight).Vh[-1]
    found = global_influence(
        rows, torch.stack([towards, ignored]), torch.tensor([1.0, 9.0]), logits_of, seed=0
    )
    assert float(found.score[0, 2]) == 1.0
    assert float(found.change[0, 2]) > 0.1
    assert float(found.p_value[0, 2]) <= 0.02
    assert float(found.change[1].abs().max()) < 1e-12
    assert float(found.p_value[1].min()) == 1.0
    # The closed form for a linear head: all images are shifted alike, by the length times A s.
    length = torch.stack([towards.norm(), 9 * ignored.norm()]).median()
    shifted = (logits_of(rows) + length * weight @ normalize(towards, dim=0)).softmax(dim=1)
    torch.testing.assert_close(found.change[0], (shifted - logits_of(rows).softmax(1)).mean(0))


def test_p_values_of_random_directions_are_uniform(rng: torch.Generator) -> None:
    _, logits_of = head_of(rng)
    scale = torch.linspace(0.2, 3, 8).double()
    rows = normal(rng, 300, 1, 8) * scale
    directions = normal(rng, 400, 8) * scale  # from the distribution of the null
    found = global_influence(rows, directions, torch.ones(400), logits_of, seed=0)
    for k in range(4):
        # Kolmogorov's bound at level .001, widened by that of the 199 directions of the null.
        bound = 1.95 * (1 / 400 + 1 / 199) ** 0.5
        assert float(kstest(found.p_value[:, k].numpy(), "uniform").statistic) < bound
    flat = normal(rng, 400, 8) / scale  # control: directions of little variance
    other = global_influence(rows, flat, torch.ones(400), logits_of, seed=0)
    statistics = [float(kstest(other.p_value[:, k].numpy(), "uniform").statistic) for k in range(4)]
    assert max(statistics) > bound


def test_no_concepts_have_no_influence(rng: torch.Generator) -> None:
    _, logits_of = head_of(rng)
    none = global_influence(
        normal(rng, 5, 1, 8), torch.zeros(0, 8).double(), torch.zeros(0), logits_of, seed=0
    )
    assert none.score.shape == none.change.shape == none.p_value.shape == (0, 4)
