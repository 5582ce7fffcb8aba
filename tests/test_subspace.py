"""Stage 2: the joint subspace is the one that presence spans, and its level fits the classes."""

import pytest
import torch
from planted import normal
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, one_hot

from concept_guard.correction import calibrated, projection
from concept_guard.directions import Scatter, Subspace, joint_subspace, within_class_pair
from concept_guard.influence import moved

CLASSES, CHANNELS = 4, 24


def world(
    rng: torch.Generator, signals: Tensor, present: Tensor, labels: Tensor, noise: float = 1.0
) -> Tensor:
    """Return float64 rows: a mean per class, the signals of what is present, correlated noise."""
    means = 5 * normal(rng, CLASSES, CHANNELS)
    mixing = torch.eye(CHANNELS, dtype=torch.float64) + 0.2 * normal(rng, CHANNELS, CHANNELS)
    beside = noise * normal(rng, len(labels), CHANNELS) @ mixing
    return means[labels] + present.double() @ signals + beside


def drawn(rng: torch.Generator, concepts: int, rows: int = 2000) -> tuple[Tensor, Tensor]:
    """Return presence that goes with the class, and classes."""
    labels = torch.randint(CLASSES, (rows,), generator=rng)
    chance = torch.where(labels[:, None] == torch.arange(concepts), 0.9, 0.1)
    return torch.rand(rows, concepts, generator=rng) < chance, labels


def inside(found: Tensor, span: Tensor) -> float:
    """Return the smallest cosine between the unit vectors of a span and another one."""
    q, p = (torch.linalg.qr(t.double().T).Q for t in (span, found))
    return float(torch.linalg.svdvals(q.T @ p).min())


def erased(rows: Tensor, subspace: Subspace) -> Tensor:
    return projection(subspace, 1.0)(rows)


def test_the_signals_of_several_concepts_are_spanned_and_their_factors_erased(
    rng: torch.Generator,
) -> None:
    present, labels = drawn(rng, 3)
    signals = 4 * normal(rng, 3, CHANNELS)
    rows = world(rng, signals, present, labels)
    found = joint_subspace(rows, labels, present)
    assert found is not None
    assert len(found.filters) == 3
    assert inside(found.signals, signals) > 0.99
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found.filters @ found.signals.T, identity, rtol=0, atol=1e-9)
    left = erased(rows, found)
    factors = left @ found.filters.T
    torch.testing.assert_close(factors, found.absent.expand_as(factors), rtol=0, atol=1e-8)


def test_of_one_concept_it_is_the_pair_of_that_concept(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 1, rows=300)
    rows = world(rng, 4 * normal(rng, 1, CHANNELS), present, labels)
    found, pair = (
        joint_subspace(rows, labels, present),
        within_class_pair(Scatter(rows, labels), present[:, 0]),
    )
    assert found is not None
    assert pair is not None
    for own, known in ((found.filters[0], pair.filter), (found.signals[0], pair.signal)):
        assert abs(float(cosine_similarity(own, known, dim=0))) > 1 - 1e-9
    edit = moved(pair, pair.signal, 1.0)
    torch.testing.assert_close(erased(rows, found), edit(rows), rtol=0, atol=1e-6)


def test_a_reader_of_presence_is_left_with_the_class_alone(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 2, rows=4000)
    rows = world(rng, 4 * normal(rng, 2, CHANNELS), present, labels)
    found = joint_subspace(rows, labels, present)
    assert found is not None
    of_class = one_hot(labels).double()

    def read(x: Tensor) -> float:
        x = torch.cat([x, 5 * of_class], dim=1)
        half = len(x) // 2
        reader = LogisticRegression(max_iter=1000).fit(x[:half], present[:half, 0])
        return float(reader.score(x[half:], present[half:, 0]))

    by_class_alone = read(torch.zeros_like(rows))
    assert read(rows) > 0.99  # control
    assert read(erased(rows, found)) < by_class_alone + 0.02


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_concept_in_several_copies_is_one_direction(rng: torch.Generator, copies: int) -> None:
    present, labels = drawn(rng, 1)
    rows = world(rng, 4 * normal(rng, 1, CHANNELS), present, labels)
    once = joint_subspace(rows, labels, present)
    again = joint_subspace(rows, labels, present.expand(-1, copies))
    assert once is not None
    assert again is not None
    assert again.filters.shape == (1, CHANNELS)
    torch.testing.assert_close(erased(rows, again), erased(rows, once), rtol=0, atol=1e-8)


def test_concepts_of_which_one_is_always_there_have_one_direction_less(
    rng: torch.Generator,
) -> None:
    labels = torch.randint(CLASSES, (3000,), generator=rng)
    which = torch.randint(5, labels.shape, generator=rng)
    present, signals = one_hot(which, 5).bool(), 4 * normal(rng, 5, CHANNELS)
    rows = world(rng, signals, present, labels)
    found = joint_subspace(rows, labels, present)
    assert found is not None
    assert found.filters.shape == (4, CHANNELS)
    assert inside(found.signals, signals[1:] - signals[0]) > 0.99
    left = erased(rows, found)
    for k in range(CLASSES):
        means = torch.stack([left[(labels == k) & (which == j)].mean(dim=0) for j in range(5)])
        assert float((means - means.mean(dim=0)).norm(dim=1).max()) < 1.5  # signals: about 20
    # Nearly every row carries one: the level is that of all rows.
    level = (rows @ found.filters.T).mean(dim=0)
    torch.testing.assert_close(found.absent, level, rtol=0, atol=1e-8)


def test_what_a_concept_does_in_one_class_alone_is_erased_too(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 1, rows=4000)
    signal, own = 4 * normal(rng, 1, CHANNELS), 4 * normal(rng, 1, CHANNELS)
    rows = world(rng, signal, present, labels)
    rows[(labels == 2) & present[:, 0]] += own
    found = joint_subspace(rows, labels, present)
    assert found is not None
    assert len(found.filters) == 2
    assert inside(found.signals, torch.cat([signal, own])) > 0.98
    alike = joint_subspace(world(rng, signal, present, labels), labels, present)
    assert alike is not None
    assert len(alike.filters) == 1  # control: classes that do not differ


@pytest.mark.parametrize("seed", range(10))
def test_noise_adds_no_direction(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    present, labels = drawn(rng, 2, rows=600)
    rows = world(rng, torch.zeros(2, CHANNELS).double(), present, labels)
    found = joint_subspace(rows, labels, present)
    assert found is not None
    assert len(found.filters) == 1  # at least one, whatever it is worth


def test_rows_of_one_image_tell_no_more_than_one(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 1, rows=200)
    rows = world(rng, 4 * normal(rng, 1, CHANNELS), present, labels)
    alike = rows.repeat_interleave(49, dim=0)
    found = joint_subspace(
        alike, labels.repeat_interleave(49), present.repeat_interleave(49, 0), positions=49
    )
    assert found is not None
    assert len(found.filters) == 1


def test_presence_that_no_class_has_both_ways_is_no_subspace(rng: torch.Generator) -> None:
    labels = torch.arange(400) % CLASSES
    whole = (labels == 1)[:, None]
    assert joint_subspace(normal(rng, 400, CHANNELS), labels, whole) is None
    nobody = torch.zeros(400, 1, dtype=torch.bool)
    assert joint_subspace(normal(rng, 400, CHANNELS), labels, nobody) is None
    present, labels = drawn(rng, 1, rows=400)
    assert joint_subspace(torch.zeros(400, CHANNELS), labels, present) is None


def test_single_precision_rows_are_worked_on_in_their_own_type(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 2)
    rows = world(rng, 4 * normal(rng, 2, CHANNELS), present, labels)
    found, exact = (joint_subspace(x, labels, present) for x in (rows.float(), rows))
    assert found is not None
    assert exact is not None
    assert found.filters.dtype == torch.float32
    # Sums of 2,000 float32 products of rows of size 30.
    torch.testing.assert_close(
        erased(rows.float(), found).double(), erased(rows, exact), rtol=0, atol=1e-2
    )


def a_head(rng: torch.Generator) -> nn.Linear:
    head = nn.Linear(CHANNELS, CLASSES).double()
    with torch.no_grad():
        head.weight.copy_(normal(rng, CLASSES, CHANNELS) / CHANNELS**0.5)
    return head


def test_the_level_is_that_of_the_highest_likelihood(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 3)
    rows, head = world(rng, 4 * normal(rng, 3, CHANNELS), present, labels), a_head(rng)
    start = joint_subspace(rows, labels, present)
    assert start is not None
    carried = present.any(dim=1)
    fitted = calibrated(start, rows, labels, carried, head)
    assert torch.equal(fitted.filters, start.filters)
    groups = [(labels == k) & (carried == c) for k in range(CLASSES) for c in (False, True)]
    weight = torch.zeros(len(rows), dtype=rows.dtype)
    for with_and_without in zip(groups[::2], groups[1::2], strict=True):
        most = max(int(g.sum()) for g in with_and_without)
        for g in with_and_without:
            weight[g] = most / int(g.sum())
    weight *= len(rows) / weight.sum()

    def objective(level: Tensor) -> float:
        edit = projection(Subspace(start.filters, start.signals, level), 1.0)
        with torch.no_grad():
            loss = (weight * cross_entropy(head(edit(rows)), labels, reduction="none")).sum()
        return float(loss + 0.5 * (level - start.absent).square().sum())

    best = objective(fitted.absent)
    assert best < objective(start.absent) - 1  # control: there was something to gain
    for _ in range(50):
        assert best <= objective(fitted.absent + 0.1 * normal(rng, 3)) + 1e-6


def test_fitting_the_level_leaves_the_head_and_gradients_alone(rng: torch.Generator) -> None:
    present, labels = drawn(rng, 1)
    rows, head = world(rng, 4 * normal(rng, 1, CHANNELS), present, labels), a_head(rng)
    weight = head.weight.detach().clone()
    start = joint_subspace(rows, labels, present)
    assert start is not None
    with torch.no_grad():
        fitted = calibrated(start, rows, labels, present.any(dim=1), head)
    assert not fitted.absent.requires_grad
    assert torch.equal(head.weight, weight)
    assert head.weight.grad is None
