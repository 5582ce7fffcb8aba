"""A correction is judged by the groups it is meant for, each counting alike."""

import pytest
import torch

from concept_guard.benefit import Trials, benefit


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
        == "+1.000 (standard error 0.000, 1 groups)"
    )


LABELS = torch.arange(400) % 4
CARRIED = torch.arange(400) % 8 < 4
RIGHT = torch.arange(400) % 3 > 0


def on_trial() -> Trials:
    trials = Trials()
    trials.begin(7, RIGHT)
    return trials


def changed(images: int, *, to: bool) -> torch.Tensor:
    """Return the right images with so many more or fewer of them."""
    now = RIGHT.clone()
    now[(now != to).nonzero().flatten()[:images]] = to
    return now


def test_a_correction_that_helps_goes_on() -> None:
    trials = on_trial()
    for _ in range(5):
        assert trials.verdicts({7: CARRIED}, RIGHT, changed(30, to=True), LABELS) == {}
    assert trials.verdicts({7: CARRIED}, RIGHT, RIGHT, LABELS) == {}  # nothing changed: no harm


def test_a_correction_that_clearly_harms_is_withdrawn_at_once() -> None:
    trials = on_trial()
    (reason,) = trials.verdicts({7: CARRIED}, RIGHT, changed(60, to=False), LABELS).values()
    assert reason.startswith("concept 7 is not corrected any more: the accuracy of its groups cha")


def test_one_that_does_not_help_is_withdrawn_after_two_rounds_in_a_row() -> None:
    trials, little, more = on_trial(), changed(1, to=False), changed(9, to=True)
    assert trials.verdicts({7: CARRIED}, RIGHT, little, LABELS) == {}
    assert trials.verdicts({7: CARRIED}, RIGHT, more, LABELS) == {}  # starts anew
    assert trials.verdicts({7: CARRIED}, RIGHT, little, LABELS) == {}
    assert list(trials.verdicts({7: CARRIED}, RIGHT, little, LABELS)) == [7]


def test_without_a_projection_the_beginning_is_what_counts() -> None:
    trials = on_trial()
    assert trials.verdicts({7: CARRIED}, None, changed(30, to=True), LABELS) == {}
    assert list(trials.verdicts({7: CARRIED}, None, changed(60, to=False), LABELS)) == [7]


def test_what_is_not_on_trial_is_not_judged() -> None:
    trials = on_trial()
    trials.end(7)
    assert trials.verdicts({7: CARRIED}, RIGHT, changed(60, to=False), LABELS) == {}
    assert on_trial().verdicts({7: CARRIED[:9]}, None, RIGHT[:9], LABELS[:9]) == {}  # other images


def test_a_trial_goes_on_from_its_state() -> None:
    trials, other, little = on_trial(), Trials(), changed(1, to=False)
    trials.verdicts({7: CARRIED}, RIGHT, little, LABELS)
    other.load_state_dict(trials.state_dict())
    assert list(other.verdicts({7: CARRIED}, RIGHT, little, LABELS)) == [7]
