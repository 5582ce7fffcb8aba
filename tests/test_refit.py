"""A classifier follows held-out images as far as images that were left out support it."""

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from concept_guard.refit import _fitted, refit

CLASSES, CHANNELS, HELD_OUT = 3, 6, 600


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def world(rng: torch.Generator, count: int, means: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows around the means of their classes, with unit scatter, and the classes."""
    labels = torch.randint(0, CLASSES, (count,), generator=rng)
    return means[labels] + normal(rng, count, CHANNELS), labels


def means_of(rng: torch.Generator) -> Tensor:
    """Return means of classes whose last channel says nothing."""
    means = 1.5 * normal(rng, CLASSES, CHANNELS)
    means[:, -1] = 0
    return means


def best(means: Tensor, *, leaning: float = 0.0) -> nn.Linear:
    """Return the best classifier of these classes, leaning on the last channel for class 0."""
    head = nn.Linear(CHANNELS, CLASSES).double()
    with torch.no_grad():
        head.weight.copy_(means)
        head.bias.copy_(-0.5 * means.square().sum(dim=1))
        head.weight[0, -1] += leaning
    return head


def accuracy(weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor) -> float:
    return float(((rows @ weight.T + bias).argmax(dim=1) == labels).double().mean())


def ones(labels: Tensor) -> Tensor:
    return torch.ones(len(labels), dtype=torch.float64)


def test_a_classifier_that_leans_on_what_says_nothing_is_mended(rng: torch.Generator) -> None:
    means = means_of(rng)
    head, ideal = best(means, leaning=12.0), best(means)
    found = refit(*(data := world(rng, HELD_OUT, means)), ones(data[1]), head, seed=0)
    assert found.supported
    new = world(rng, 20_000, means)
    of_head, of_ideal = (accuracy(h.weight, h.bias, *new) for h in (head, ideal))
    assert of_head < of_ideal - 0.1  # control: there was something to mend
    # 600 images determine 18 weights: the loss of accuracy is about 18 / 1200 of a nat.
    assert accuracy(found.weight, found.bias, *new) > of_ideal - 0.02
    leaning = float(found.weight[0, -1] - found.weight[1:, -1].mean())
    assert abs(leaning) < 0.1 * 12.0
    # Of the images of the fit, as many more are right as of new ones, but for chance.
    more = (found.mended - found.broken) / HELD_OUT
    assert more == pytest.approx(of_ideal - of_head, abs=0.05)
    assert found.broken > 0


def test_the_best_classifier_is_left_alone(rng: torch.Generator) -> None:
    means = means_of(rng)
    for _ in range(10):
        rows, labels = world(rng, HELD_OUT, means)
        assert not refit(rows, labels, ones(labels), best(means), seed=0).supported


def test_classes_drawn_by_lot_support_nothing(rng: torch.Generator) -> None:
    rows, labels = world(rng, HELD_OUT, means_of(rng))
    by_lot = labels[torch.randperm(len(labels), generator=rng)]
    head = nn.Linear(CHANNELS, CLASSES).double()
    assert not refit(rows, by_lot, ones(labels), head, seed=0).supported
    assert refit(rows, labels, ones(labels), head, seed=0).supported  # control


def test_wide_rows_do_not_betray_the_classes_of_images_that_were_left_out(
    rng: torch.Generator,
) -> None:
    """Rows made white within classes show the class that was used, if there are few of them."""
    wide = CHANNELS + 150
    spread = torch.cat([torch.ones(CHANNELS), torch.logspace(-2, 0, 150)]).double()
    means = torch.zeros(CLASSES, wide, dtype=torch.float64)
    means[:, :CHANNELS] = means_of(rng)
    head = nn.Linear(wide, CLASSES).double()
    with torch.no_grad():
        head.weight.copy_(means)
        head.bias.copy_(-0.5 * means.square().sum(dim=1))
    for seed in range(3):
        labels = torch.randint(0, CLASSES, (300,), generator=rng)
        rows = means[labels] + spread * normal(rng, 300, wide)
        by_lot = torch.rand(300, generator=rng) < 0.3
        told = torch.where(by_lot, torch.randint(0, CLASSES, (300,), generator=rng), labels)
        found = refit(rows, told, ones(labels), head, seed=seed)
        assert not found.supported
        assert found.gain < 0.02


def test_the_fit_is_that_of_a_logistic_regression(rng: torch.Generator) -> None:
    rows, labels = world(rng, HELD_OUT, means_of(rng))
    weights = 0.2 + torch.rand(HELD_OUT, generator=rng, dtype=torch.float64)
    start = torch.zeros(HELD_OUT, CLASSES, dtype=torch.float64)
    change = _fitted(rows, start, labels, weights, 10.0, None)
    oracle = LogisticRegression(C=0.1, tol=1e-10, max_iter=1000).fit(
        rows, labels, sample_weight=weights
    )
    torch.testing.assert_close(
        change.applied(rows, start).softmax(dim=1),
        torch.from_numpy(oracle.predict_proba(rows)),
        rtol=0,
        atol=1e-3,  # forty turns of L-BFGS end within 1e-9 nats of the least loss of 600 images
    )


def test_images_count_by_their_weight(rng: torch.Generator) -> None:
    means = means_of(rng)
    rows, labels = world(rng, HELD_OUT, means)
    turned = world(rng, HELD_OUT, means.flip(0))
    both = torch.cat([rows, turned[0]]), torch.cat([labels, turned[1]])
    weights = torch.cat([torch.full((HELD_OUT,), 2.0), torch.zeros(HELD_OUT)])
    head = nn.Linear(CHANNELS, CLASSES).double()
    found = refit(*both, weights.double(), head, seed=0)
    even = refit(*both, torch.ones_like(weights).double(), head, seed=0)
    new = world(rng, 5000, means)
    assert accuracy(found.weight, found.bias, *new) > 0.8
    assert accuracy(even.weight, even.bias, *new) < 0.7  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_classifier_given_is_not_changed(rng: torch.Generator, dtype: torch.dtype) -> None:
    means = means_of(rng)
    rows, labels = world(rng, HELD_OUT, means)
    head = best(means, leaning=12.0).to(dtype)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    with torch.no_grad():
        first = refit(rows.to(dtype), labels, ones(labels), head, seed=3)
    again = refit(rows.to(dtype), labels, ones(labels), head, seed=3)
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert head.weight.grad is None
    assert torch.equal(first.weight, again.weight)
    assert not first.weight.requires_grad


def test_where_rows_are_measured_from_and_in_which_unit_does_not_matter(
    rng: torch.Generator,
) -> None:
    means = means_of(rng)
    rows, labels = world(rng, HELD_OUT, means)
    head, moved = best(means, leaning=12.0), best(means, leaning=12.0)
    shift = 5 * normal(rng, CHANNELS)
    with torch.no_grad():  # the same logits of rows that are shifted and a hundred times as large
        moved.weight /= 100
        moved.bias -= head.weight @ shift
    found = refit(rows, labels, ones(labels), head, seed=0)
    other = refit(100 * (rows + shift), labels, ones(labels), moved, seed=0)
    torch.testing.assert_close(
        (100 * (rows + shift)) @ other.weight.T + other.bias,
        rows @ found.weight.T + found.bias,
        rtol=0,
        atol=1e-2,
    )
    assert other.gain == pytest.approx(found.gain, abs=1e-4)
