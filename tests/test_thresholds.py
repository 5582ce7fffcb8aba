"""Stage 3: a threshold parts two groups as well as any other, and lies between two scores."""

import math

import pytest
import torch
from torch import Tensor

from concept_guard.thresholds import balanced_accuracy, threshold_of


def best_of_all(scores: Tensor, carried: Tensor) -> float:
    """Try every threshold there is."""
    levels = [-math.inf, *scores.tolist(), math.inf]
    return max(balanced_accuracy(scores > level, carried) for level in levels)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rounded", [False, True])
def test_no_threshold_parts_the_groups_better(seed: int, rounded: bool) -> None:
    rng = torch.Generator().manual_seed(seed)
    carried = torch.rand(60, generator=rng) < 0.2
    carried[:2] = torch.tensor([True, False])
    scores = torch.randn(60, generator=rng) + carried
    scores = (2 * scores).round() if rounded else scores  # many are the same then
    found = threshold_of(scores, carried)
    best = best_of_all(scores, carried)
    assert balanced_accuracy(scores > found, carried) == pytest.approx(best, abs=1e-12)
    far_off = float(scores.quantile(0.05))  # control
    assert balanced_accuracy(scores > far_off, carried) < best


def test_the_threshold_lies_far_off_between_two_scores() -> None:
    scores = torch.tensor([0.0, 1.0, 4.0, 6.0])
    carried = torch.tensor([False, False, True, True])
    assert threshold_of(scores, carried) == 2.5
    assert threshold_of(scores, torch.tensor([False, False, False, True])) == 5.0


def test_scores_that_say_nothing_part_nothing() -> None:
    carried = torch.tensor([True, False, True])
    for scores in (torch.zeros(3), torch.tensor([0.0, 1.0, 0.0])):  # the same, the wrong way round
        assert not bool((scores > threshold_of(scores, carried)).any())


def test_both_groups_count_alike() -> None:
    carried = torch.tensor([True] + 9 * [False])
    assert balanced_accuracy(torch.zeros(10).bool(), carried) == 0.5  # 9 of 10 are right
    assert balanced_accuracy(carried, carried) == 1.0
    assert balanced_accuracy(~carried, carried) == 0.0
