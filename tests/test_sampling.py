"""Stage 4c: a sampler draws what losses would have been weighed by, and shuffles until then."""

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset
from worlds import TRAIN, UPDATES, correcting, fallen, flagging, stream, world

from concept_guard import ConceptGuard, StateError

COUNT = 2000


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown(guard: ConceptGuard, model: Any, count: int = COUNT) -> None:
    """Pass the first training samples by the guard, in order, without an update."""
    data = world(TRAIN, COUNT)
    for at in torch.arange(count).split(100):
        losses = cross_entropy(model(data.images[at]), data.labels[at], reduction="none")
        guard.loss(losses, data.labels[at], indices=at)


def drawn(sampler: Sampler[int], epochs: int = 30) -> Tensor:
    """Return how often each sample is drawn per epoch."""
    counts = torch.zeros(COUNT)
    for _ in range(epochs):
        epoch = torch.tensor(list(sampler))
        assert len(epoch) == len(sampler) == COUNT
        counts += torch.bincount(epoch, minlength=COUNT)
    return counts / epochs


def test_the_rarer_group_of_a_class_is_drawn_up_to_five_times_as_often() -> None:
    model, data = fallen(), world(TRAIN, COUNT)
    guard = correcting(model, start=10**6)
    sampler = guard.sampler(COUNT, generator=generator())
    plain = drawn(sampler)
    assert bool((plain == 1).all())  # control: nothing is known yet, so that all are shuffled
    shown(guard, model)
    counts = drawn(sampler)
    for k in range(4):
        own = data.labels == k
        on, off = (counts[own & (data.marked == m)].mean() for m in (True, False))
        share = float(data.marked[own].float().mean())
        expected = min(5.0, max(share, 1 - share) / min(share, 1 - share))
        ratio = float(off / on) if share > 0.5 else float(on / off)
        assert ratio == pytest.approx(expected, rel=0.25)
        assert expected > 4


def test_until_something_is_corrected_it_is_the_random_sampler() -> None:
    for guard in (flagging(), flagging(action="observe"), correcting(action="project")):
        ours, theirs = (guard.sampler(50, generator=generator()), generator())
        state = torch.get_rng_state()
        for _ in range(3):
            assert list(ours) == list(RandomSampler(range(50), generator=theirs))
        assert torch.equal(torch.get_rng_state(), state)
        own = [list(guard.sampler(50)) for _ in range(2)]
        assert torch.equal(torch.get_rng_state(), state)
        assert own[0] != own[1]
        assert sorted(own[0]) == list(range(50))


def test_drawing_by_weight_leaves_the_global_random_state_alone() -> None:
    model = fallen()
    guard = correcting(model, start=10**6)
    sampler = guard.sampler(COUNT)
    shown(guard, model)
    state = torch.get_rng_state()
    assert len(set(sampler)) < COUNT  # control: with replacement
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_that_no_batch_has_shown_weigh_one() -> None:
    model = fallen()
    guard = correcting(model, start=10**6)
    guard.sampler(COUNT)
    shown(guard, model, 1000)
    weights = guard._samples.weights
    assert weights is not None
    assert bool((weights[1000:] == 1).all())
    assert float(weights[:1000].mean()) == pytest.approx(1.0, abs=0.01)
    assert float(weights.max() / weights.min()) > 4


def test_losses_are_not_weighed_as_well() -> None:
    model = fallen()
    images, labels = next(stream(UPDATES + 1, first=UPDATES))
    losses = torch.rand(len(labels), generator=generator())
    weighed = correcting(model, action="rebalance", start=10**6)
    model(images)
    assert not torch.equal(weighed.loss(losses, labels), losses.mean())  # control
    weighed.close()
    guard = correcting(model, action="rebalance", start=10**6)
    guard.sampler(COUNT)
    model(images)
    assert torch.equal(guard.loss(losses, labels, indices=torch.arange(32)), losses.mean())


def test_the_classifier_still_learns_to_do_without() -> None:
    model = fallen()
    images, labels = next(stream(UPDATES + 1, first=UPDATES))
    guard = correcting(model, start=10**6)
    guard.sampler(COUNT)
    losses = cross_entropy(model(images), labels, reduction="none")
    loss = guard.loss(losses, labels, indices=torch.arange(32))
    assert torch.equal(loss, losses.mean())
    (plain,) = torch.autograd.grad(losses.mean(), model.fc.weight, retain_graph=True)
    (taught,) = torch.autograd.grad(loss, model.fc.weight)
    assert not torch.equal(plain, taught)


def test_restoring_a_concept_ends_the_rebalancing_at_the_next_epoch() -> None:
    model = fallen()
    guard = correcting(model, start=10**6)
    sampler = guard.sampler(COUNT)
    shown(guard, model)
    assert len(set(sampler)) < COUNT
    guard.restore(guard.erased)
    assert sorted(sampler) == list(range(COUNT))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_resumed_run_draws_the_same_epochs(when: str) -> None:
    model = fallen()
    guard = correcting(model, start=10**6)
    sampler = guard.sampler(COUNT)
    list(sampler)
    shown(guard, model)
    file = io.BytesIO()
    torch.save(guard.state_dict(), file)
    file.seek(0)
    expected = [list(sampler) for _ in range(2)]
    other = flagging(fallen(), start=10**6)
    made = other.sampler(COUNT) if when == "before" else None
    other.load_state_dict(torch.load(file, weights_only=True))
    resumed = other.sampler(COUNT) if made is None else made
    assert [list(resumed) for _ in range(2)] == expected


def test_a_state_of_another_training_set_is_refused() -> None:
    guard = correcting()
    guard.sampler(50)
    other = flagging()
    other.sampler(51)
    with pytest.raises(StateError, match="over 50 training samples, there are 51 here; resume on"):
        other.load_state_dict(copy.deepcopy(guard.state_dict()))


def test_a_sampler_in_a_loader_learns_while_it_trains() -> None:
    model, data = fallen(), world(TRAIN, COUNT)
    guard = correcting(model, start=10**6)
    indexed = TensorDataset(data.images, data.labels, torch.arange(COUNT))
    loader = DataLoader(indexed, batch_size=100, sampler=guard.sampler(COUNT))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    shares = []
    for _ in range(2):
        marked = torch.zeros(0)
        for images, labels, at in loader:
            losses = cross_entropy(model(images), labels, reduction="none")
            guard.loss(losses, labels, indices=at).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step()
            marked = torch.cat([marked, data.marked[at][labels != 0].float()])
        shares.append(float(marked.mean()))
    assert shares[1] > 3 * shares[0]


BATCH = torch.arange(8)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.tensor([0, 50, -1, 3, 4, 5, 6, 7]), r"indices \[-1, 50\] are outside \[0, 50\)"),
        (torch.arange(7), "7 indices for 8 targets, expected one each"),
        (torch.rand(8), "indices are torch.float32 of shape"),
        (torch.arange(8)[:, None], r"of shape \(8, 1\), expected one whole number per sample"),
    ],
)
def test_indices_that_cannot_be_are_refused(indices: Tensor, message: str) -> None:
    for guard in (flagging(), correcting()):
        guard.sampler(50)
        with pytest.raises(ValueError, match=message):
            guard.loss(torch.ones(8), BATCH % 4, indices=indices)


def test_indices_without_a_sampler_and_odd_lengths_are_refused() -> None:
    guard = flagging()
    with pytest.raises(ValueError, match=r"no sampler to learn from them; make one with guard.sam"):
        guard.loss(torch.ones(8), BATCH % 4, indices=BATCH)
    for size in (0, -3, 2.5, True):
        with pytest.raises(ValueError, match=f"sampler got {size}, expected the length of the tra"):
            guard.sampler(size)  # type: ignore[arg-type]
    guard.sampler(50)
    with pytest.raises(ValueError, match="a length of 51, expected 50 as before"):
        guard.sampler(51)


def test_a_sampler_that_cannot_learn_says_so_once() -> None:
    model = fallen()
    guard = correcting(model, start=10**6)
    guard.sampler(50)
    images, labels = next(stream(UPDATES + 1, first=UPDATES))
    losses = cross_entropy(model(images), labels, reduction="none")
    with pytest.warns(UserWarning, match="the sampler cannot learn what samples carry; call"):
        guard.loss(losses, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard.loss(losses, labels)
