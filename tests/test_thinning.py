"""Stage 2: of directions that are nearly the same the best one is kept."""

import math

import torch
from planted import normal
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.thinning import different


def at_angles(*degrees: float) -> Tensor:
    radians = [math.radians(d) for d in degrees]
    return torch.tensor([[math.cos(r), math.sin(r)] for r in radians], dtype=torch.float64)


def written_out(directions: Tensor, worth: Tensor, same: float) -> list[int]:
    kept: list[int] = []
    for at in sorted(range(len(worth)), key=lambda i: -float(worth[i])):
        if all(float(directions[at] @ directions[k]) <= same for k in kept):
            kept.append(at)
    return kept


def test_the_better_of_two_alike_ones_is_kept_best_first() -> None:
    directions = at_angles(0, 10, 90, 95)
    kept = different(directions, torch.tensor([1.0, 2.0, 4.0, 3.0]), same=0.9)
    assert kept.tolist() == [2, 1]


def test_alike_begins_above_the_cosine() -> None:
    directions = at_angles(0, 60)
    worth = torch.tensor([2.0, 1.0])
    assert different(directions, worth, same=0.51).tolist() == [0, 1]
    assert different(directions, worth, same=0.49).tolist() == [0]


def test_opposite_directions_differ_and_a_dropped_one_drops_none() -> None:
    assert different(at_angles(0, 180), torch.ones(2), same=0.1).tolist() == [0, 1]
    chain = at_angles(0, 20, 40)  # the second is alike to both, the third only to the second
    assert different(chain, torch.tensor([3.0, 2.0, 1.0]), same=0.9).tolist() == [0, 2]


def test_many_directions_are_thinned_as_by_a_loop(rng: torch.Generator) -> None:
    directions, worth = normalize(normal(rng, 80, 3), dim=1), normal(rng, 80)
    kept = different(directions, worth, same=0.8)
    assert kept.tolist() == written_out(directions, worth, 0.8)
    assert 3 < len(kept) < 80


def test_no_directions_leave_none() -> None:
    kept = different(torch.zeros(0, 4), torch.zeros(0), same=0.9)
    assert kept.shape == (0,)
    assert kept.dtype == torch.long
