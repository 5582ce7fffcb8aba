"""A correction is judged by the groups it is meant for, each counting alike."""

import pytest
import torch
from torch import Tensor

from concept_guard.benefit import PATIENCE, Probation, benefit


def test_the_gain_is_the_mean_of_the_groups_changes() -> None:
    own = torch.arange(40) < 20
    carried = torch.arange(40) % 20 < 5
    before = torch.zeros(40, dtype=torch.bool)
    after = before.clone()
    after[:4] = True  # own class, with: four of five
    after[25:28] = True  # other classes, without: three of fifteen
    found = benefit(before, after, own, carried)
    assert found.groups == 4
    assert found.gain == pytest.approx((0.8 + 0.0 + 0.0 + 0.2) / 4)
    variance = after[:5].double().var() / 5 + after[25:].double().var() / 15
    assert found.error == pytest.approx(float(variance) ** 0.5 / 4)


def test_a_small_group_counts_as_much_as_a_large_one() -> None:
    own = torch.zeros(1010, dtype=torch.bool)
    carried = torch.arange(1010) < 10
    before = ~carried
    after = carried | (torch.arange(1010) < 960)  # 10 repaired, 50 broken
    assert benefit(before, after, own, carried).gain > 0.4
    assert int(after.sum()) < int(before.sum())  # control: over all images it looks like harm


def test_groups_of_fewer_than_five_images_say_nothing() -> None:
    own, carried = torch.zeros(24, dtype=torch.bool), torch.arange(24) < 4
    found = benefit(carried, ~carried, own, carried)
    assert (found.groups, found.gain) == (1, 1.0)
    nothing = benefit(carried[:4], ~carried[:4], own[:4], carried[:4])
    assert (nothing.groups, nothing.gain, nothing.error) == (0, 0.0, 0.0)


def test_what_is_said_of_it() -> None:
    none = torch.zeros(5, dtype=torch.bool)
    said = str(benefit(none, ~none, none, none))
    assert said == "+1.000 (standard error 0.000, 1 groups)"


OWN = torch.arange(400) % 4 == 0
CARRIED = torch.arange(400) % 8 < 4
RIGHT = torch.arange(400) % 3 > 0
GROUPS = {7: (OWN, CARRIED)}


def on_probation() -> Probation:
    probation = Probation()
    probation.begin(7, RIGHT)
    return probation


def changed(images: int, *, to: bool) -> Tensor:
    """Return the right images with so many more or fewer of them."""
    now = RIGHT.clone()
    now[(now != to).nonzero().flatten()[:images]] = to
    return now


WORSE, BETTER = changed(9, to=False), changed(9, to=True)


def test_a_correction_that_helps_goes_on_and_so_does_one_that_changes_nothing() -> None:
    probation = on_probation()
    for now in (BETTER, RIGHT) * PATIENCE:
        assert probation.verdicts(GROUPS, now) == {}


def test_one_that_does_not_help_is_withdrawn_after_some_rounds_in_a_row() -> None:
    probation = on_probation()
    for now in [*[WORSE] * (PATIENCE - 1), BETTER, *[WORSE] * (PATIENCE - 1)]:
        assert probation.verdicts(GROUPS, now) == {}  # what helps in between starts anew
    (reason,) = probation.verdicts(GROUPS, WORSE).values()
    assert reason.startswith("concept 7 is not corrected any more: since its correction began, ")


def test_what_is_not_on_probation_is_not_judged() -> None:
    probation, fewer = on_probation(), on_probation()
    probation.end(7)
    for _ in range(PATIENCE):
        assert probation.verdicts(GROUPS, WORSE) == {}
        assert fewer.verdicts({7: (OWN[:9], CARRIED[:9])}, WORSE[:9]) == {}  # other images


def test_probation_goes_on_from_its_state() -> None:
    probation, other = on_probation(), Probation()
    for _ in range(PATIENCE - 1):
        probation.verdicts(GROUPS, WORSE)
    other.load_state_dict(probation.state_dict())
    assert list(other.verdicts(GROUPS, WORSE)) == [7]


@pytest.mark.parametrize("misled", [4, 5])
@pytest.mark.parametrize("side", ["others with it", "its own without"])
def test_where_too_few_images_are_misled_nothing_is_said(misled: int, side: str) -> None:
    """All that could be seen is what is lost where the concept was right."""
    own = torch.arange(400) < 200
    carried = own.clone()
    at = 200 if side == "others with it" else 0
    carried[at : at + misled] = ~carried[at : at + misled]
    probation = Probation()
    probation.begin(7, torch.ones(400, dtype=torch.bool))
    worse = torch.arange(400) % 2 > 0
    for _ in range(PATIENCE - 1):
        assert probation.verdicts({7: (own, carried)}, worse) == {}
    assert list(probation.verdicts({7: (own, carried)}, worse)) == ([7] if misled == 5 else [])
