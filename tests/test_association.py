"""Stage 3b: effect, exact test and multiplicity, with the true class held fixed."""

import math
from itertools import permutations, product

import pytest
import torch
from scipy.stats import binomtest, fisher_exact
from torch import Tensor

from concept_guard.association import associate, sensitivity
from concept_guard.flags import candidates


def drawn(seed: int, count: int = 60, concepts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return presence, predictions and labels at random, with some association."""
    rng = torch.Generator().manual_seed(seed)
    present = torch.rand(count, concepts, generator=rng) < 0.4
    labels = torch.randint(0, 3, (count,), generator=rng)
    predicted = torch.where(
        torch.rand(count, generator=rng) < 0.6,
        labels,
        torch.where(present[:, 0], 1, torch.randint(0, 3, (count,), generator=rng)),
    )
    return present, predicted, labels


def of_one_class(
    present: Tensor, predicted: Tensor, labels: Tensor, c: int, i: int, k: int
) -> list[list[int]]:
    """Count the images of class c: with or without concept i by predicted as k or not."""
    table = [[0, 0], [0, 0]]
    for carries, guess, label in zip(present[:, i], predicted, labels, strict=True):
        if label == c:
            table[0 if carries else 1][0 if guess == k else 1] += 1
    return table


@pytest.mark.parametrize("seed", range(3))
def test_the_difference_is_the_weighted_mean_over_the_other_classes(seed: int) -> None:
    present, predicted, labels = drawn(seed)
    present[:, 2], present[:, 3] = True, False  # everywhere, nowhere
    found = associate(present, predicted, labels, 3)
    for i, k in product(range(2), range(3)):
        weights, differences = [], []
        for c in {0, 1, 2} - {k}:
            (a, b), (x, y) = of_one_class(present, predicted, labels, c, i, k)
            if a + b and x + y:
                weights.append((a + b) * (x + y) / (a + b + x + y))
                differences.append(a / (a + b) - x / (x + y))
        mean = sum(w * d for w, d in zip(weights, differences, strict=True)) / sum(weights)
        assert float(found.difference[i, k]) == pytest.approx(mean, abs=1e-12)
        assert float(found.low[i, k]) < mean < float(found.high[i, k])
        of_others = int((present[:, i] & (labels != k)).sum())
        assert int(found.present[i, k]) == of_others
    for empty in (found.difference[2:], found.low[2:], found.high[2:]):
        assert float(empty.abs().max()) == 0.0
    assert float(found.q_value[2:].min()) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_with_one_other_class_it_is_fisher_and_newcombe(seed: int) -> None:
    present, predicted, labels = drawn(seed, count=80)
    labels, predicted = labels.clamp_max(1), predicted.clamp_max(1)
    found = associate(present, predicted, labels, 2)
    for i, k in product(range(4), range(2)):
        (a, b), (c, d) = table = of_one_class(present, predicted, labels, 1 - k, i, k)
        expected = fisher_exact(table, alternative="greater").pvalue
        assert float(found.p_value[i, k]) == pytest.approx(expected, rel=1e-9)
        p1, p0 = a / (a + b), c / (c + d)
        one, none = (
            binomtest(h, n).proportion_ci(method="wilson") for h, n in ((a, a + b), (c, c + d))
        )
        low = p1 - p0 - math.hypot(p1 - one.low, none.high - p0)
        high = p1 - p0 + math.hypot(one.high - p1, p0 - none.low)
        assert float(found.low[i, k]) == pytest.approx(low, abs=1e-9)
        assert float(found.high[i, k]) == pytest.approx(high, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_that_of_all_permutations_within_classes(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    present = torch.rand(10, 1, generator=rng) < 0.5
    predicted = torch.randint(0, 3, (10,), generator=rng)
    found = associate(present, predicted, labels, 3)
    of_class = [(labels == c).nonzero().flatten().tolist() for c in range(3)]
    for k in range(3):
        others = [at for c, at in enumerate(of_class) if c != k]
        seen = int((present[:, 0] & (labels != k) & (predicted == k)).sum())
        counts = [
            sum(
                int(present[at, 0]) * int(predicted[source] == k)
                for own, order in zip(others, orders, strict=True)
                for at, source in zip(own, order, strict=True)
            )
            for orders in product(*(permutations(at) for at in others))
        ]
        share = sum(count >= seen for count in counts) / len(counts)
        assert float(found.p_value[0, k]) == pytest.approx(share, rel=1e-9)


def any_found(present: Tensor, predicted: Tensor, labels: Tensor) -> tuple[bool, bool]:
    """Return whether something is found, and whether it is with all classes in one table."""
    found = associate(present, predicted, labels, 4)
    tests = present.shape[1] * 4
    together = False
    for i, k in product(range(present.shape[1]), range(4)):
        other, carries = labels != k, present[:, i]
        hit = predicted == k
        table = [
            [int((other & side & hit).sum()), int((other & side & ~hit).sum())]
            for side in (carries, ~carries)
        ]
        together |= fisher_exact(table, alternative="greater").pvalue <= 0.05 / tests
    return bool((found.q_value <= 0.05).any()), together


def test_predictions_permuted_within_classes_are_rarely_found_to_go_with_a_concept() -> None:
    rng = torch.Generator().manual_seed(0)
    draws, labels = 200, torch.arange(400) % 4
    # Concepts of classes that depend on each other, and errors that most classes make towards 0.
    rate = torch.tensor([[0.05, 0.1, 0.3, 0.6], [0.1, 0.1, 0.3, 0.5], [0.3, 0.3, 0.2, 0.3]])
    level = torch.rand(400, 1, generator=rng) * 0.5 + torch.rand(400, 3, generator=rng) * 0.5
    present = level < rate.T[labels]
    towards = torch.tensor([0.0, 0.1, 0.2, 0.5])[labels]
    alarms, together = 0, 0
    for _ in range(draws):
        predicted = torch.where(torch.rand(400, generator=rng) < towards, 0, labels)
        found, pooled = any_found(present, predicted, labels)
        alarms, together = alarms + found, together + pooled
    error = math.sqrt(0.05 * 0.95 / draws)
    assert alarms / draws <= 0.05 + 3 * error
    assert together / draws > 0.5  # control: one table over all classes


def test_intervals_hold_the_true_difference_in_95_of_100_draws() -> None:
    rng = torch.Generator().manual_seed(0)
    draws, size = 400, 120
    labels = torch.arange(3 * size) // size
    rate = torch.tensor([0.0, 0.3, 0.1])[labels]
    held = tight = 0
    for _ in range(draws):
        present = (
            torch.rand(3 * size, 1, generator=rng) < torch.tensor([0.5, 0.3, 0.06])[labels, None]
        )
        lifted = rate + 0.25 * present[:, 0]
        wrong = (torch.rand(3 * size, generator=rng) < lifted) & (labels != 0)
        found = associate(present, torch.where(wrong, 0, labels), labels, 3)
        low, high = float(found.low[0, 0]), float(found.high[0, 0])
        held += low <= 0.25 <= high
        middle, half = (low + high) / 2, (high - low) / 4
        tight += abs(middle - 0.25) <= half
    error = math.sqrt(0.05 * 0.95 / draws)
    assert abs(held / draws - 0.95) <= 3 * error
    assert tight / draws < 0.85  # control: intervals of half the width


def test_the_test_is_one_sided_and_about_the_other_classes_only() -> None:
    labels = torch.tensor([0] * 20 + [1] * 40)
    present = torch.zeros(60, 1).bool()
    present[20:30] = True
    predicted = labels.clone()
    predicted[30:50] = 0  # errors where the concept is absent
    found = associate(present, predicted, labels, 2)
    assert float(found.difference[0, 0]) == pytest.approx(-20 / 30)
    assert float(found.p_value[0, 0]) > 0.99
    turned = associate(~present, predicted, labels, 2)  # control
    assert float(turned.p_value[0, 0]) < 1e-3
    in_class = torch.where(labels[:, None] == 0, ~present, present)
    again = associate(in_class, predicted, labels, 2)
    assert float(again.p_value[0, 0]) == float(found.p_value[0, 0])


def test_q_values_are_those_of_benjamini_and_hochberg() -> None:
    present, predicted, labels = drawn(5)
    present[:, 3] = True
    predicted[predicted == 2] = 0  # nothing is predicted as class 2: these tables say nothing
    found = associate(present, predicted, labels, 3)
    assert found.q_value[:, 2].tolist() == [1.0] * 4
    telling = [(i, k) for i in range(3) for k in range(2)]
    ranked = sorted(telling, key=lambda cell: float(found.p_value[cell]))
    least = 1.0
    for rank in range(len(ranked), 0, -1):
        cell = ranked[rank - 1]
        least = min(least, float(found.p_value[cell]) * len(ranked) / rank)
        assert float(found.q_value[cell]) == pytest.approx(least, rel=1e-12)
    assert float(found.q_value[ranked[0]]) > float(found.p_value[ranked[0]])  # control


def test_nothing_to_tell_gives_q_one_everywhere() -> None:
    present, _, labels = drawn(0)
    found = associate(present, labels, labels, 3)  # no errors
    assert torch.equal(found.q_value, torch.ones(4, 3).double())
    assert torch.equal(found.difference, torch.zeros(4, 3).double())


def test_a_class_without_images_changes_nothing() -> None:
    present, predicted, labels = drawn(1)
    found, wider = (associate(present, predicted, labels, size) for size in (3, 5))
    torch.testing.assert_close(wider.p_value[:, :3], found.p_value, rtol=0, atol=0)
    torch.testing.assert_close(wider.difference[:, :3], found.difference, rtol=0, atol=1e-15)
    assert float(wider.q_value[:, 3:].min()) == 1.0


def test_a_planted_shortcut_has_the_smallest_q(rng: torch.Generator) -> None:
    present = torch.rand(400, 6, generator=rng) < 0.15
    labels = torch.arange(400) % 4
    chance = torch.rand(400, generator=rng)
    predicted = torch.where(chance < 0.1, torch.randint(0, 4, (400,), generator=rng), labels)
    predicted[present[:, 2] & (chance > 0.5)] = 1
    found = associate(present, predicted, labels, 4)
    assert divmod(int(found.q_value.argmin()), 4) == (2, 1)
    assert candidates(found, 0.05, 10) == [(2, 1)]
    shuffled = present[torch.randperm(400, generator=rng)]
    control = associate(shuffled, predicted, labels, 4)
    assert candidates(control, 0.05, 10) == []


def seen(carriers: int, pull: float, rng: torch.Generator) -> bool:
    """Return whether a shortcut on so many images passes a test among 16 concepts."""
    labels = torch.arange(1000) % 4
    wrong = torch.rand(1000, generator=rng) < 0.1
    predicted = torch.where(wrong, torch.randint(0, 4, (1000,), generator=rng), labels)
    present = torch.zeros(1000, 1).bool()
    others = (labels != 0).nonzero().flatten()
    present[others[torch.randperm(len(others), generator=rng)[:carriers]]] = True
    pulled = present[:, 0] & (torch.rand(1000, generator=rng) < pull)
    found = associate(present, torch.where(pulled, 0, predicted), labels, 4)
    return float(found.p_value[0, 0]) <= 0.05 / (16 * 4)


def test_the_sensitivity_is_what_the_test_can_do(rng: torch.Generator) -> None:
    labels = torch.arange(1000) % 4
    wrong = torch.rand(1000, generator=rng) < 0.1
    predicted = torch.where(wrong, torch.randint(0, 4, (1000,), generator=rng), labels)
    limits = sensitivity(predicted, labels, 4, concepts=16, alpha=0.05)
    draws = 200
    assert all(seen(limits.least, 1.0, rng) for _ in range(20))
    rate = sum(seen(limits.likely, 0.5, rng) for _ in range(draws)) / draws
    assert 0.8 - 3 * math.sqrt(0.8 * 0.2 / draws) <= rate < 0.97
    half = sum(seen(limits.likely // 2, 0.5, rng) for _ in range(draws)) / draws
    assert half < 0.6  # control
    stricter = sensitivity(predicted, labels, 4, concepts=1600, alpha=0.05)
    assert stricter.likely > limits.likely


@pytest.mark.parametrize(("images", "wrong"), [(1, 0), (3, 3), (12, 12), (200, 200), (40, 0)])
def test_sensitivity_of_hopeless_or_perfect_probes_is_a_number(images: int, wrong: int) -> None:
    labels = torch.arange(images) % 2
    predicted = torch.where(torch.arange(images) < wrong, 1 - labels, labels)
    limits = sensitivity(predicted, labels, 2, concepts=4, alpha=0.05)
    assert 5 <= limits.least <= limits.likely <= 200
    if images <= 12 or wrong == images:
        assert limits.likely == 200  # nothing can be seen
    assert sensitivity(predicted, labels, 2, concepts=0, alpha=0.05).least >= 5
