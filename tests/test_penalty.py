"""Penalizing takes the pull of concepts out of the tail, as far as it should, and nothing else."""

import statistics
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted import normal
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from concept_guard.config import GuardConfig
from concept_guard.correction import projection
from concept_guard.directions import Subspace
from concept_guard.penalty import (
    EVERY,
    MEASURED,
    MOST,
    Penalty,
    carried_behind,
    carried_by,
    spared,
    variance,
)
from concept_guard.taps import Tap

EPS = torch.finfo(torch.float64).eps
CLASSES, CHANNELS, COUNT = 3, 8, 600


@dataclass(frozen=True, eq=False)
class Leaning:
    """Rows whose class shows in themselves, faintly, and in marks that go with it."""

    rows: Tensor
    labels: Tensor
    factors: Tensor
    subspace: Subspace


def leaning(rng: torch.Generator, marks: int = 1) -> Leaning:
    """Plant marks along directions that are not at right angles to those of the classes."""
    basis = torch.eye(CHANNELS, dtype=torch.float64)
    basis[0, 3:5] = basis[1, 5:7] = 0.5
    basis @= torch.linalg.qr(normal(rng, CHANNELS, CHANNELS)).Q
    labels = torch.arange(COUNT) % CLASSES
    factors = normal(rng, COUNT, CHANNELS)
    carried = torch.rand(COUNT, marks, generator=rng) < torch.where(labels == 0, 0.9, 0.1)[:, None]
    factors[:, :marks] = 0.1 * factors[:, :marks] + 2.0 * carried
    factors[torch.arange(COUNT), 3 + labels] += 1.0  # the class itself, in factors 3 to 5
    level = torch.full((marks,), 0.2, dtype=torch.float64)
    filters = torch.linalg.inv(basis).T[:marks]
    return Leaning(factors @ basis, labels, factors, Subspace(filters, basis[:marks], level))


def linear(rng: torch.Generator, *, bias: bool = True) -> nn.Linear:
    head = nn.Linear(CHANNELS, CLASSES, bias=bias).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(normal(rng, *parameter.shape))
    return head


def penalty_on(world: Leaning, head: nn.Linear | None, **captured: object) -> Penalty:
    """Return a penalty whose tap has captured the world."""
    tap: Any = SimpleNamespace(captured=world.rows[:, None], classifier=head, images=None)
    vars(tap).update(captured)
    erasure: Any = SimpleNamespace(subspace=world.subspace)
    penalty = Penalty(tap, erasure, GuardConfig(action=("penalize",)))
    penalty.follow([7])
    return penalty


def share_in(rows: Tensor, head: nn.Linear, subspace: Subspace) -> Tensor:
    carried, whole = carried_by(rows, head, subspace)
    return (carried / whole).detach()


def share_by_hand(world: Leaning, head: nn.Linear) -> float:
    """Return the share that `w.x` carries, class by class and sample by sample."""
    s, total, carried = world.subspace, 0.0, 0.0
    for weight in head.weight.detach():
        logits = [float(x @ weight) for x in world.rows]
        pulls = [float(((x @ s.filters.T - s.absent) @ s.signals) @ weight) for x in world.rows]
        total += statistics.pvariance(logits)
        carried += statistics.pvariance(pulls)
    return carried / total


@pytest.mark.parametrize("marks", [1, 2])
def test_the_share_is_the_variance_of_the_contribution_over_that_of_the_logits(
    rng: torch.Generator, marks: int
) -> None:
    world, head = leaning(rng, marks), linear(rng)
    found = share_in(world.rows, head, world.subspace)
    assert float(found) == pytest.approx(share_by_hand(world, head), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_share_does_not_change_with_the_scale_of_rows_or_classifier(
    rng: torch.Generator, scale: float
) -> None:
    world, head = leaning(rng, 2), linear(rng)
    share = share_in(world.rows, head, world.subspace)
    s = world.subspace
    larger = Subspace(s.filters / scale, s.signals * scale, s.absent)
    same = share_in(world.rows * scale, head, larger)
    torch.testing.assert_close(same, share, rtol=1e3 * EPS, atol=0)
    plain = variance(head(world.rows))
    with torch.no_grad():
        head.weight *= scale
    assert not torch.isclose(variance(head(world.rows)), plain, rtol=0.1)  # control
    same = share_in(world.rows, head, world.subspace)
    torch.testing.assert_close(same, share, rtol=1e3 * EPS, atol=0)


def test_spared_directions_are_the_damped_natural_ones(rng: torch.Generator) -> None:
    world, s = leaning(rng, 2), leaning(rng, 2).subspace.signals
    for rows in (world.rows, world.rows[:3]):  # more and fewer than channels
        moment = rows.T @ rows / len(rows)
        level = moment.diagonal().mean()
        found = spared(s, rows)
        by_hand = s @ torch.linalg.inv(moment + torch.diag(level.expand(CHANNELS)))
        expected = by_hand * (s * s).sum() / (by_hand * s).sum()
        torch.testing.assert_close(found, expected, rtol=1e5 * EPS, atol=1e5 * EPS)


@pytest.mark.parametrize("marks", [1, 2])
def test_a_step_takes_of_the_pull_and_shifts_the_logits_less_than_the_plain_gradient(
    rng: torch.Generator, marks: int
) -> None:
    world = leaning(rng, marks)
    rows = world.rows + 3.0  # activations are not centred
    s, f, shifts = world.subspace.signals, world.subspace.filters, []
    for is_plain in (False, True):
        head = linear(torch.Generator().manual_seed(1))
        logits, centred = head(rows).detach(), rows - rows.mean(dim=0)
        carried, whole = carried_by(rows, head, world.subspace)
        assert not whole.requires_grad  # larger logits are no way out
        if is_plain:
            carried = variance(centred @ f.T @ s @ head.weight.T)
        carried.backward()
        assert head.bias.grad is None
        if not is_plain:
            factors = centred @ f.T
            expected = 2 / COUNT * head.weight @ s.T @ factors.T @ factors @ spared(s, rows)
            torch.testing.assert_close(head.weight.grad, expected, rtol=1e6 * EPS, atol=1e6 * EPS)
        before = carried.item()
        with torch.no_grad():
            head.weight -= 0.01 * head.weight.grad
        gone = 1 - variance(centred @ f.T @ s @ head.weight.T).item() / before
        assert 0 < gone < 1
        shifts.append((head(rows) - logits).mean(dim=0).norm().item() / gone)
    assert shifts[0] < 0.5 * shifts[1]


def trained(
    rng: torch.Generator, strength: float | None, optimizer: str = "sgd"
) -> tuple[float, float, float, Penalty]:
    """Train a head that leans on the mark on.

    Returns:
        The share before and after; how much less it makes of rows without the mark than a head
        that is trained on these; the penalty.
    """
    world, head = leaning(rng), linear(rng)
    with torch.no_grad():
        head.weight *= 0.1
    descend = {
        "sgd": lambda: torch.optim.SGD(head.parameters(), lr=0.02, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(head.parameters(), lr=5e-3),
    }[optimizer]()
    for _ in range(1000):  # the head falls for the mark
        cross_entropy(head(world.rows), world.labels).backward()
        descend.step()
        descend.zero_grad()
    before = float(share_in(world.rows, head, world.subspace))
    penalty = penalty_on(world, head)
    for _ in range(1200):
        loss = cross_entropy(head(world.rows), world.labels)
        if strength is not None:
            term, problem = penalty.term(strength)
            assert not problem
            loss = loss if term is None else loss + term
        loss.backward()
        descend.step()
        descend.zero_grad()
    edit = projection(world.subspace, 1.0)
    without = edit(world.rows)
    right = (head(without).argmax(dim=1) == world.labels).double().mean()
    best = torch.optim.LBFGS(head.parameters(), max_iter=500)
    after = float(share_in(world.rows, head, world.subspace))

    def loss_without() -> Tensor:
        best.zero_grad()
        value = cross_entropy(head(without), world.labels)
        value.backward()
        return value

    best.step(loss_without)
    most = (head(without).argmax(dim=1) == world.labels).double().mean()
    return before, after, float(right - most), penalty


@pytest.mark.thorough
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("strength", "left"), [(1.0, 0.0), (0.5, 0.25), (0.2, 0.64)])
def test_the_share_is_driven_to_its_aim_and_the_rest_still_works(
    rng: torch.Generator, optimizer: str, strength: float, left: float
) -> None:
    before, after, behind, penalty = trained(rng, strength, optimizer)
    assert before > 0.15
    # The multiplier is bounded: at full strength the cross entropy keeps a trace of the pull.
    assert after / before == pytest.approx(left, abs=0.05)
    assert penalty.share == pytest.approx(after, abs=0.03 * before)
    assert 0 < penalty.multiplier <= MOST
    assert strength < 1 or behind > -0.03


def test_without_it_the_share_stays(rng: torch.Generator) -> None:
    before, after, behind, _ = trained(rng, None)
    assert after > 0.8 * before
    assert behind < -0.06  # nor does the head learn to do without the mark


def test_the_multiplier_falls_when_the_share_is_below_its_aim(rng: torch.Generator) -> None:
    world, head = leaning(rng), linear(rng)
    penalty = penalty_on(world, head)
    for _ in range(MEASURED + 170):  # the head never learns: the multiplier ends at its bound
        penalty.term(1.0)
    assert penalty.multiplier == MOST
    for _ in range(10):
        penalty.term(0.0)  # the start of a ramp: all of it may stay
    assert penalty.multiplier == MOST
    bake = (head.weight @ world.subspace.signals.T) @ world.subspace.filters
    with torch.no_grad():
        head.weight -= bake
    for _ in range(800):
        penalty.term(0.5)
    assert penalty.share < 1e-3
    assert penalty.multiplier == 0.0
    assert penalty.term(0.5) == (None, "")


def test_concepts_that_join_add_their_share_to_the_aim(rng: torch.Generator) -> None:
    world, head = leaning(rng, 2), linear(rng)
    both, s = world.subspace, world.subspace
    one = Subspace(s.filters[:1], s.signals[:1], s.absent[:1])
    penalty = penalty_on(Leaning(world.rows, world.labels, world.factors, one), head)
    first = float(share_in(world.rows, head, one))
    for _ in range(MEASURED + 1):
        penalty.term(1.0)
    assert penalty.state_dict()["reference"] == pytest.approx(first)
    with torch.no_grad():  # .75 of the variance is taken away, when another concept comes
        head.weight -= 0.5 * (head.weight @ one.signals.T) @ one.filters
    for _ in range(80):
        penalty.term(1.0)
    now = float(share_in(world.rows, head, one))
    penalty._erasure.subspace = both
    penalty.follow([7, 8])
    penalty.follow([8, 7])  # the same ones: nothing begins anew
    for _ in range(MEASURED):
        penalty.term(1.0)
    together = float(share_in(world.rows, head, both))
    expected = together + first - now
    assert penalty.state_dict()["reference"] == pytest.approx(expected, rel=1e-3)
    penalty.follow([])
    assert (penalty.share, penalty.multiplier) == (0.0, 0.0)


def test_a_restored_penalty_goes_on_alike(rng: torch.Generator) -> None:
    world, head = leaning(rng), linear(rng)
    penalty, other = penalty_on(world, head), penalty_on(world, head)
    for _ in range(MEASURED + 5):
        penalty.term(0.7)
    other.load_state_dict(penalty.state_dict())
    for _ in range(3):
        (term, _), (same, _) = penalty.term(0.7), other.term(0.7)
        assert term is not None
        assert same is not None
        assert torch.equal(term, same)
    assert other.state_dict() == penalty.state_dict()


def test_autocast_does_not_coarsen_the_penalty(rng: torch.Generator) -> None:
    world, head = leaning(rng), linear(rng)
    results = []
    for enabled in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            carried, whole = carried_by(world.rows, head, world.subspace)
            carried.backward()
        results.append((carried.detach(), whole, head.weight.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


BAD: dict[str, tuple[Tensor | None, str]] = {
    "one sample": (torch.ones(1, 1, CHANNELS).double(), "one sample, and a variance takes two"),
    "zero": (torch.zeros(9, 1, CHANNELS).double(), "do not vary, or are not finite; lower"),
    "constant": (torch.ones(9, 1, CHANNELS).double(), "do not vary, or are not finite; lower"),
    "nan": (torch.full((9, 1, CHANNELS), torch.nan).double(), "do not vary, or are not finite"),
    "huge": (1e200 * torch.eye(CHANNELS)[:, None].double(), "do not vary, or are not finite"),
    "no pass": (None, "the last forward pass gave no rows to the tap"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_batch_that_shows_nothing_is_named_and_changes_nothing(
    rng: torch.Generator, case: str
) -> None:
    rows, message = BAD[case]
    world, head = leaning(rng), linear(rng, bias=False)
    penalty = penalty_on(world, head)
    for _ in range(MEASURED + 5):
        penalty.term(1.0)
    before = (penalty.share, penalty.multiplier)
    penalty._tap.captured = rows  # type: ignore[misc]
    term, problem = penalty.term(1.0)
    assert term is None
    assert message in problem
    assert (penalty.share, penalty.multiplier) == before
    penalty._tap.captured = world.rows[:, None]  # type: ignore[misc]
    term, problem = penalty.term(1.0)
    assert term is not None
    assert problem == ""


class Forked(nn.Module):
    """A front, a tap with positions, and a linear tail that the front also reaches past the tap."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.front, self.tapped = nn.Conv2d(3, channels, 1), nn.Identity()
        self.past = nn.Conv2d(3, 4, 1)
        self.tail = nn.Conv2d(channels, 4, 1, bias=False)
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        past = self.past(x)
        mapped = self.tail(self.tapped(self.front(x))) + past
        logits: Tensor = self.fc(mapped.mean(dim=(2, 3)))
        return logits


def forked(rng: torch.Generator) -> tuple[Forked, Tap, Tensor, Subspace]:
    torch.manual_seed(0)
    model, images = Forked(5).train(), torch.randn(40, 3, 2, 2, generator=rng)
    tap = Tap(model, "module:tapped", images[:2], training=True)
    tap.listening = True
    model(images)
    signal = torch.randn(1, 5, generator=rng)
    filter = torch.randn(1, 5, generator=rng)
    subspace = Subspace(filter / (filter @ signal.T), signal, torch.zeros(1))
    return model, tap, images, subspace


def test_behind_a_linear_tail_the_difference_is_the_variance_of_the_contribution(
    rng: torch.Generator,
) -> None:
    model, tap, images, subspace = forked(rng)
    rows = tap.captured
    assert rows is not None
    assert tap.images is not None
    torch.testing.assert_close(tap.images, images, rtol=0, atol=0)
    factors = rows @ subspace.filters.T  # (B, Q, 1)
    factors = factors.sum(dim=1, keepdim=True).expand_as(factors) / 4  # alike at all positions
    same = factors @ subspace.signals + rows - rows @ subspace.filters.T @ subspace.signals
    carried, whole = carried_behind(tap, images, same, subspace)
    weight = model.fc.weight @ model.tail.weight[:, :, 0, 0]  # (M, C)
    expected = variance((factors @ subspace.signals).mean(dim=1) @ weight.T)
    torch.testing.assert_close(carried, expected, rtol=1e-4, atol=0)
    carried.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {"tail.weight", "fc.weight", "fc.bias"}  # not the front, not past the tap
    expected_gradients = torch.autograd.grad(expected, [model.tail.weight, model.fc.weight])
    for parameter, gradient in zip(
        (model.tail.weight, model.fc.weight), expected_gradients, strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert not whole.requires_grad
    some = torch.linspace(0, 39, 8).round().long()
    logits = model.fc((same @ model.tail.weight[:, :, 0, 0].T + past(model, images)).mean(dim=1))
    torch.testing.assert_close(whole, variance(logits[some].detach()), rtol=1e-4, atol=0)


def past(model: Forked, images: Tensor) -> Tensor:
    """Return what reaches the logits past the tap, `(B, Q, 4)`."""
    found: Tensor = model.past(images).flatten(2).mT
    return found


def test_a_difference_is_taken_every_few_updates_and_counts_for_all_of_them(
    rng: torch.Generator,
) -> None:
    model, tap, _, subspace = forked(rng)
    erasure: Any = SimpleNamespace(subspace=subspace)
    penalty = Penalty(tap, erasure, GuardConfig(action=("penalize",)))
    penalty.follow([0])
    terms = [penalty.term(1.0) for _ in range(EVERY * (MEASURED + 3))]
    assert all(problem == "" for _, problem in terms)
    given = [number for number, (term, _) in enumerate(terms, 1) if term is not None]
    assert given == [EVERY * (MEASURED + n) for n in (1, 2, 3)]
    assert penalty.multiplier == pytest.approx(3 * EVERY * 0.05)
    term, rows, images = terms[-1][0], tap.captured, tap.images
    assert term is not None
    assert rows is not None
    assert images is not None
    carried, whole = carried_behind(tap, images, rows, subspace)
    weight = EVERY * (penalty.multiplier + penalty.excess)
    torch.testing.assert_close(term, weight * (carried + whole / 100).sqrt())
    penalty._tap.forget()
    tap._shared.captured = rows  # as after a call with the images by keyword
    term, problem = penalty.term(1.0)
    assert term is None
    assert "called without a tensor of images as first argument" in problem
    del model
