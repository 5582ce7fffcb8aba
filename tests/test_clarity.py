"""Stage 2: clarity is what its formula says, and thresholds go where rows split most clearly."""

import math

import pytest
import torch
from planted import normal, whitened
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.clarity import (
    GLANCE,
    LEAST,
    QUANTILES,
    clarity,
    excess,
    split,
    two_means,
)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def deviation(values: list[float]) -> float:
    return math.sqrt(mean([(v - mean(values)) ** 2 for v in values]))


def written_out(values: list[float], threshold: float) -> float:
    on = [v for v in values if v > threshold]
    off = [v for v in values if v <= threshold]
    return (mean(on) - mean(off)) / (deviation(on) + deviation(off))


def bimodal(rng: torch.Generator, share: float = 0.1, count: int = 1000) -> Tensor:
    """Return a mark on a share of the rows, 5 deviations away, the first ones."""
    return normal(rng, count) + 5.0 * (torch.arange(count) < share * count)


def middle(factors: Tensor, threshold: float) -> float:
    values = factors.tolist()
    on, off = [v for v in values if v > threshold], [v for v in values if v <= threshold]
    return 0.5 * (mean(on) + mean(off))


def test_clarity_is_the_distance_of_the_means_over_both_deviations(rng: torch.Generator) -> None:
    factors = torch.stack([normal(rng, 60), bimodal(rng, 0.3, 60)], dim=1)
    found = clarity(factors, factors > 0.5)
    for k in range(2):
        assert float(found[k]) == pytest.approx(written_out(factors[:, k].tolist(), 0.5))
    moved = clarity(7 * factors - 100, factors > 0.5)
    torch.testing.assert_close(moved, found)
    single = clarity(factors.float(), factors > 0.5)
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=0)  # sums of 60 in float32


def test_the_correction_leaves_every_row_out_of_its_own_mean(rng: torch.Generator) -> None:
    white = normal(rng, 40, 12)
    present = torch.arange(40) < 9
    apart = white[present].mean(dim=0) - white[~present].mean(dim=0)
    factors = white @ normalize(apart, dim=0)
    held_out = []  # factors along the difference of the means without the row's own share of it
    for at in range(40):
        others = torch.arange(40) != at
        high = white[present & others].sum(dim=0) / 9
        low = white[~present & others].sum(dim=0) / 31
        held_out.append(float(white[at] @ (high - low)) / float(apart.norm()))
    means = mean(held_out[:9]) - mean(held_out[9:])
    both = deviation(factors[:9].tolist()) + deviation(factors[9:].tolist())
    found = clarity(factors[:, None], present[:, None], white.square().sum(dim=1))
    assert float(found) == pytest.approx(means / both)
    assert float(clarity(factors[:, None], present[:, None])) > float(found) + 0.5  # control


def test_corrected_clarity_is_nothing_where_groups_were_drawn_at_random(
    rng: torch.Generator,
) -> None:
    white = whitened(normal(rng, 4000, 64))
    present = torch.arange(4000)[:, None] % 100 == torch.arange(100)  # 40 rows each
    apart = present.double().T @ white / 40 - (~present).double().T @ white / 3960
    factors = white @ normalize(apart, dim=1).T
    found = clarity(factors, present, white.square().sum(dim=1))
    # A held-out factor has mean 0 and deviation 1; 40 of them, divided by 2: .08, and a hundredth
    # of that for the mean of 100 groups.
    assert abs(float(found.mean())) < 4 * 0.08 / 10
    assert float(clarity(factors, present).mean()) > 0.5  # control: sqrt(64 / 40) / 2 = .63


def test_the_tail_of_a_normal_variable_is_less_clear_than_a_mark(rng: torch.Generator) -> None:
    factors = torch.stack([normal(rng, 20_000), bimodal(rng, count=20_000)], dim=1)
    found = clarity(factors, factors > split(factors))
    assert float(clarity(factors[:, :1], factors[:, :1] > 0.8416)) == pytest.approx(1.42, abs=0.02)
    assert float(found[0]) < 1.6  # no half-way split of a normal variable is clearer
    assert float(found[1]) == pytest.approx(2.4, abs=0.1)  # 5 / (1 + 1), less what is mistaken


@pytest.mark.parametrize(("carriers", "says"), [(LEAST - 1, False), (LEAST, True)])
def test_too_few_rows_on_either_side_say_nothing(carriers: int, says: bool) -> None:
    factors = (torch.arange(40) < carriers)[:, None].double() + 0.01 * torch.arange(40)[:, None]
    for present in (factors > 0.7, factors <= 0.7):
        assert (float(clarity(factors, present)) != -1) == says
        assert (float(clarity(factors, present, torch.ones(40).double())) != -1) == says


def test_constant_factors_are_finite(rng: torch.Generator) -> None:
    factors = torch.zeros(20, 2).double()
    factors[:10, 1] = 1.0  # two values and no spread: as clear as can be
    found = clarity(factors, factors > 0.5, normal(rng, 20).square())
    assert found.isfinite().all()
    assert float(found[0]) == -1.0
    assert float(clarity(factors, factors > 0.5)[1]) > 1e6


def test_a_bimodal_factor_is_split_between_its_groups(rng: torch.Generator) -> None:
    shares = (0.05, 0.1, 0.2, 0.4)
    factors = torch.stack([bimodal(rng, share) for share in shares], dim=1)
    thresholds = split(factors)
    assert bool(((thresholds > 1.5) & (thresholds < 4)).all())
    # 2.5 but for rows that are mistaken, at 50 carriers of 1,000 the most: .6 % of the absent ones.
    assert bool((clarity(factors, factors > thresholds) > 1.7).all())
    for k, threshold in enumerate(thresholds.tolist()):
        assert threshold == pytest.approx(middle(factors[:, k], threshold), abs=0.01)


def test_many_rows_are_split_half_way_on_all_of_them(rng: torch.Generator) -> None:
    factors = bimodal(rng, 0.1, 3 * GLANCE)[:, None]
    threshold = float(split(factors))
    assert threshold == pytest.approx(middle(factors[:, 0], threshold), abs=1e-6)
    some = factors[::3]
    glanced = float(two_means(some, torch.tensor([2.5]).double(), rounds=50))
    assert threshold != pytest.approx(glanced, abs=1e-6)  # control: not that of the glance


def test_the_clearest_of_all_searches_is_taken() -> None:
    groups = torch.tensor([0.0, 1.0, 9.0]).repeat_interleave(torch.tensor([880, 100, 20]))
    factors = groups.double()[:, None] + 0.3 * torch.linspace(-1, 1, 1000)[:, None]
    ends = torch.cat(
        [two_means(factors, q[None]) for q in factors[:, 0].quantile(torch.tensor([0.8]).double())]
    )
    clear = float(clarity(factors, factors > split(factors)))
    assert clear >= float(clarity(factors, factors > ends)) > 0
    assert 1.5 < float(split(factors)) < 8
    assert len(QUANTILES) == 3


def test_a_glance_sees_marks_at_every_period(rng: torch.Generator) -> None:
    count = 2 * GLANCE
    mark = (torch.arange(count) % 40 == 7).double()  # odd rows only, as a column of an image
    factors = (normal(rng, count) + 6 * mark)[:, None]
    shuffled = factors[torch.randperm(count, generator=rng)]
    assert 2.5 < float(split(shuffled)) < 3.5
    assert 2.5 < float(split(factors)) < 3.5


def test_half_way_is_a_fixed_point_and_reached_from_either_side(rng: torch.Generator) -> None:
    factors = bimodal(rng, 0.3)[:, None].expand(-1, 3)
    at = two_means(factors, torch.tensor([-1.0, 2.0, 6.0]).double(), rounds=50)
    assert float(at.max() - at.min()) < 1e-12
    assert float(at[0]) == pytest.approx(middle(factors[:, 0], float(at[0])))
    torch.testing.assert_close(two_means(factors, at, rounds=1), at)


def test_a_threshold_beyond_all_rows_stays_where_it_is() -> None:
    factors = torch.arange(20.0)[:, None]
    for beyond in (50.0, -3.0):
        assert float(two_means(factors, torch.tensor([beyond]))) == beyond
    assert float(two_means(factors, torch.tensor([3.0]))) == 9.5
    assert float(two_means(factors, torch.tensor([3.5]), rounds=1)) == pytest.approx(
        0.5 * (1.5 + 11.5)
    )


def test_no_factors_have_no_thresholds() -> None:
    assert split(torch.zeros(10, 0)).shape == (0,)


def test_excess_is_zero_in_absence_and_counted_from_its_mean(rng: torch.Generator) -> None:
    factors = torch.stack([bimodal(rng, 0.3), bimodal(rng, 0.1)], dim=1)
    present = factors > 2.5
    found = excess(factors, present)
    for k in range(2):
        base = mean(factors[~present[:, k], k].tolist())
        for p in range(0, 1000, 50):
            expected = float(factors[p, k]) - base if present[p, k] else 0.0
            assert float(found[p, k]) == pytest.approx(expected, abs=1e-12)
    assert excess(factors, torch.ones_like(present)).isfinite().all()
