"""A correction is judged by the groups it is meant for, each counting alike."""

import pytest
import torch

from concept_guard.benefit import benefit, groups, half


def test_the_gain_is_the_mean_of_the_groups_changes() -> None:
    labels = torch.tensor([0] * 10 + [1] * 10)
    carried = torch.tensor([True] * 5 + [False] * 5 + [False] * 10)
    before = torch.zeros(20, dtype=torch.bool)
    after = before.clone()
    after[:4] = True  # group (0, with): four of five
    after[10:13] = True  # group (1, without): three of ten
    found = benefit(before, after, labels, carried)
    assert found.groups == 3
    assert found.gain == pytest.approx((0.8 + 0.0 + 0.3) / 3)
    variance = torch.stack([after[:5].double().var() / 5, after[10:].double().var() / 10]).sum()
    assert found.error == pytest.approx(float(variance) ** 0.5 / 3)
    assert not found.harms


def test_a_small_group_counts_as_much_as_a_large_one() -> None:
    labels = torch.zeros(1010, dtype=torch.long)
    carried = torch.arange(1010) < 10
    before = ~carried
    after = carried | (torch.arange(1010) < 960)  # 10 repaired, 50 broken
    assert benefit(before, after, labels, carried).gain > 0.4
    assert int(after.sum()) < int(before.sum())  # control: over all images it looks like harm


def test_harm_is_what_chance_does_not_explain() -> None:
    labels = torch.arange(400) % 4
    carried = torch.arange(400) % 8 < 4
    before = torch.ones(400, dtype=torch.bool)
    broken = before.clone()
    broken[::5] = False
    assert benefit(before, broken, labels, carried).harms
    one = before.clone()
    one[0] = False
    assert not benefit(before, one, labels, carried).harms  # control
    assert not benefit(before, before, labels, carried).harms


def test_groups_of_fewer_than_five_images_say_nothing() -> None:
    labels, carried = torch.zeros(24, dtype=torch.long), torch.arange(24) < 4
    found = benefit(carried, ~carried, labels, carried)
    assert (found.groups, found.gain) == (1, 1.0)
    nothing = benefit(carried[:4], ~carried[:4], labels[:4], carried[:4])
    assert (nothing.groups, nothing.gain, nothing.error, nothing.harms) == (0, 0.0, 0.0, False)


def test_halves_have_the_same_groups(rng: torch.Generator) -> None:
    labels = torch.randint(0, 5, (501,), generator=rng)
    carried = torch.rand(501, generator=rng) < 0.1
    first = half(labels, carried, seed=3)
    group = groups(labels, carried)
    for g in group.unique():
        assert abs(int(first[group == g].sum()) - int((~first)[group == g].sum())) <= 1
    assert torch.equal(first, half(labels, carried, seed=3))
    assert not torch.equal(first, half(labels, carried, seed=4))


def test_what_is_said_of_it() -> None:
    assert (
        str(
            benefit(
                torch.zeros(5).bool(),
                torch.ones(5).bool(),
                torch.zeros(5).long(),
                torch.zeros(5).bool(),
            )
        )
        == "+1.000 (standard error 0.000) over 1 groups"
    )
