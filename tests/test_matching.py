"""Stage 2: concept k stays concept k, and one that is new is not given an old name."""

import pytest
import torch
from planted import normal
from torch import Tensor

from concept_guard.directions import DirectionPairs, cosines, match
from concept_guard.directions.matching import agreement


def test_agreement_is_the_correlation_of_factors(rng: torch.Generator) -> None:
    last, new = normal(rng, 50, 3) + 7, normal(rng, 50, 2) - 4
    last[:, 0] += 3 * new[:, 1]
    found = agreement(last, new)
    expected = torch.corrcoef(torch.cat([last, new], dim=1).T)[:3, 3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    narrow = agreement(last.float(), new.float())
    torch.testing.assert_close(narrow, expected, rtol=0, atol=1e-6)


def test_a_factor_that_does_not_vary_agrees_with_nothing(rng: torch.Generator) -> None:
    last, new = normal(rng, 20, 2), normal(rng, 20, 2)
    last[:, 0] = 3.0
    found = agreement(last, new)
    assert found[0].tolist() == [0.0, 0.0]
    assert (found[1] != 0).all()
    assert match(last, last) == {1: 1}


def test_a_permutation_with_noise_and_rescaling_is_undone(rng: torch.Generator) -> None:
    last = normal(rng, 200, 5)
    order = [3, 0, 4, 1, 2]
    scale = torch.tensor([1.0, 5.0, 0.1, 2.0, 9.0])
    new = last[:, order] * scale + 0.1 * scale * normal(rng, 200, 5) + 1
    assert match(last, new) == dict(enumerate(order))
    assert match(new, last) == {o: n for n, o in enumerate(order)}


def test_concepts_without_a_likeness_are_new_and_turned_ones_too(rng: torch.Generator) -> None:
    last, fresh = normal(rng, 200, 3), normal(rng, 200, 2)
    new = torch.stack([fresh[:, 0], last[:, 2], -last[:, 0], fresh[:, 1], last[:, 1]], dim=1)
    assert match(last, new) == {1: 2, 4: 1}  # more now than before
    assert match(new, last) == {2: 1, 1: 4}  # fewer now than before


@pytest.mark.parametrize(("least", "matched"), [(0.79, {0: 0}), (0.81, {})])
def test_the_least_agreement_decides(
    rng: torch.Generator, least: float, matched: dict[int, int]
) -> None:
    x, y = torch.linalg.qr(normal(rng, 100, 2) - normal(rng, 100, 2).mean(dim=0))[0].T
    x, y = x - x.mean(), y - y.mean()
    y = y - (y @ x) / (x @ x) * x
    new = 0.8 * x / x.norm() + 0.6 * y / y.norm()  # correlation with x: exactly 0.8
    assert match(x[:, None], new[:, None], least=least) == matched


def test_the_best_pairing_as_a_whole_wins_over_the_best_single_pair() -> None:
    a, b = torch.tensor([[1, -1, 1, -1], [1, 1, -1, -1]]).double()  # orthogonal, mean 0

    def factor(degrees: float) -> Tensor:
        angle = torch.deg2rad(torch.tensor(degrees).double())
        return angle.cos() * a + angle.sin() * b  # correlation is the cosine of the difference

    last = torch.stack([factor(0), factor(43)], dim=1)
    new = torch.stack([factor(18), factor(-25)], dim=1)
    assert agreement(last, new).argmax() == 0  # last 0 and new 0 are most alike, by .951
    assert match(last, new) == {0: 1, 1: 0}  # .906 twice; .951 would leave .375


def pairs(filters: Tensor) -> DirectionPairs:
    return DirectionPairs(filters, filters, torch.zeros(len(filters)))


def test_cosines_compare_matched_filters_only() -> None:
    last = pairs(torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    new = pairs(torch.tensor([[3.0, 0.0], [1.0, 0.0], [3.0, 4.0]]))
    assert cosines(last, new, {0: 0}) == pytest.approx({0: 1.0})
    assert cosines(last, new, {0: 1}) == pytest.approx({0: 0.0})
    assert cosines(last, new, {0: 0, 2: 1}) == pytest.approx({0: 1.0, 2: 0.8})
    assert cosines(last, new, {}) == {}
