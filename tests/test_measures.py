"""Stage 5: accuracies equal their counts, and the verdict says what was flagged or why not."""

from dataclasses import replace

import pytest
import torch
from planted import normal
from torch import Tensor

from concept_guard.association import Sensitivity
from concept_guard.flags import Flag
from concept_guard.measures import (
    accuracy,
    error_share_explained,
    pseudo_groups,
    verdict,
    worst_class_recall,
    worst_group_accuracy,
)

SEEN = Sensitivity(6, 14)
FLAG = Flag(3, 1, 0.9, (0.8, 0.95), 1e-9, 1e-8, 5, 1, 20, (4, 8), "found", "because")


def world(seed: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 2, 2, 2, 3])[torch.randint(0, 6, (200,), generator=rng)]
    logits = normal(rng, 200, 4) + 2 * torch.eye(4).double()[labels]
    carried = [torch.rand(200, generator=rng) < share for share in (0.3, 0.1)]
    logits[carried[1], 0] += 4
    return logits, labels, carried


def group_rates(logits: Tensor, labels: Tensor, carried: list[Tensor], least: int) -> list[float]:
    """Count right predictions image by image for every class and presence of every concept."""
    rates = []
    for concept in carried:
        for k in range(logits.shape[1]):
            for value in (True, False):
                right = seen = 0
                for n in range(len(labels)):
                    if int(labels[n]) == k and bool(concept[n]) is value:
                        seen += 1
                        right += int(logits[n].argmax()) == k
                if seen >= least:
                    rates.append(right / seen)
    return rates


def test_accuracy_and_worst_class_are_counts() -> None:
    logits, labels, _ = world()
    whole = group_rates(logits, torch.zeros(200).long(), [labels * 0 == 0], 1)
    assert len(whole) == 1  # the loop sees all images as one group
    right = [int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)]
    assert accuracy(logits, labels) == pytest.approx(sum(right) / 200)
    classes = group_rates(logits, labels, [torch.ones(200).bool()], 1)
    assert len(classes) == 3  # class 1 has no image
    assert worst_class_recall(logits, labels) == pytest.approx(min(classes))
    assert min(classes) < accuracy(logits, labels)  # control


def test_the_worst_group_equals_a_loop_over_classes_and_concepts() -> None:
    logits, labels, carried = world()
    rates = group_rates(logits, labels, carried, 5)
    found = worst_group_accuracy(logits, labels, carried)
    assert found == pytest.approx(min(rates))
    assert found == worst_group_accuracy(logits, labels, carried[::-1])
    # Control: neither the classes nor one concept alone hold the worst group.
    assert found < worst_class_recall(logits, labels)
    assert found < worst_group_accuracy(logits, labels, carried[:1])


@pytest.mark.parametrize(("size", "counts"), [(4, False), (5, True)])
def test_groups_of_fewer_than_five_images_say_nothing(size: int, counts: bool) -> None:
    labels, carried = torch.zeros(30).long(), torch.arange(30) < size
    logits = torch.where(carried[:, None], torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert worst_group_accuracy(logits, labels, [carried]) == (0.0 if counts else 1.0)


def test_without_concepts_or_large_groups_the_worst_class_stands_in() -> None:
    logits, labels, carried = world()
    assert worst_group_accuracy(logits, labels, []) == worst_class_recall(logits, labels)
    few = [carried[0][:6]]
    assert worst_group_accuracy(logits[:6], labels[:6], few) == worst_class_recall(
        logits[:6], labels[:6]
    )


def test_errors_are_explained_where_a_flag_holds_and_counted_once() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    predicted = torch.tensor([1, 1, 2, 0, 1, 0, 1, 2])
    logits = torch.eye(3)[predicted]
    carried = {
        3: torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool(),
        4: torch.tensor([1, 0, 0, 0, 0, 0, 1, 0]).bool(),
    }
    # Errors: images 0, 1, 2, 5, 6. Concept 3 towards class 1 explains 0 and 1, concept 4 0 and 6.
    also = replace(FLAG, concept=4)
    assert error_share_explained(logits, labels, [FLAG], carried) == pytest.approx(2 / 5)
    assert error_share_explained(logits, labels, [FLAG, also], carried) == pytest.approx(3 / 5)
    elsewhere = replace(FLAG, class_index=2)
    assert error_share_explained(logits, labels, [elsewhere], carried) == pytest.approx(1 / 5)
    assert error_share_explained(logits, labels, [], carried) == 0.0
    assert error_share_explained(torch.eye(3)[labels], labels, [FLAG], carried) == 0.0


@pytest.mark.parametrize("status", ["found", "erased", "waiting"])
def test_the_verdict_names_what_is_flagged(status: str) -> None:
    flags = [replace(FLAG, status=status), replace(FLAG, concept=8, status="unconfirmed")]
    assert verdict(flags, 12, 400, 0.05, SEEN) == "flagged: concept 3 drives errors towards class 1"
    said = verdict(flags, 12, 400, 0.05, SEEN, ["cat", "dog"])
    assert said == "flagged: concept 3 drives errors towards class dog"
    flags.append(replace(FLAG, concept=5, class_index=0))
    assert verdict(flags, 12, 400, 0.05, SEEN) == (
        "flagged: concept 3 drives errors towards class 1; concept 5 drives errors towards class 0"
    )


def test_without_a_flag_the_verdict_says_what_was_seen_and_why() -> None:
    assert verdict([], 12, 400, 0.05, SEEN) == (
        "no evidence: 12 errors seen on 400 probe images, no concept goes with them (q <= 0.05); "
        "a shortcut on fewer than 6 images of other classes cannot be seen with these; one that "
        "misleads on half of its images needs at least 14 of them"
    )
    flags = [replace(FLAG, status="unconfirmed"), replace(FLAG, status="vetoed")]
    assert verdict(flags[:1], 12, 400, 0.05, SEEN).startswith(
        "no evidence: 12 errors seen on 400 probe images, 1 concept"
    )
    assert "2 concepts go with some of them but are not confirmed" in verdict(
        flags, 12, 400, 0.05, SEEN
    )


def test_groups_are_counted_by_class_and_presence() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 1, 0, 1, 0, 2])
    presence = torch.tensor([True, True, False, False, False, True])
    found = pseudo_groups(torch.eye(3)[predicted], labels, {7: presence})
    assert [(g.concept, g.class_index, g.carried, g.images, g.accuracy) for g in found] == [
        (7, 0, False, 1, 1.0),
        (7, 0, True, 2, 0.5),
        (7, 1, False, 2, 0.5),
        (7, 1, True, 0, None),
        (7, 2, False, 0, None),
        (7, 2, True, 1, 1.0),
    ]
    assert pseudo_groups(torch.eye(3)[predicted], labels, {}) == ()
