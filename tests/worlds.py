"""Worlds of tiny images with a planted shortcut, and networks that have fallen for it.

Every class has a faint pattern under noise. In a planted world a magenta corner mark goes with
class 0 in nearly all training images, so that a network reads the mark and calls marked images of
other classes class 0; the held-out probe has enough of those to show it.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

SIDE, CLASSES, MARK = 16, 4, 5  # pixels, classes, side of the mark in the upper left corner
TRAIN, PROBE, TEST = 1, 2, 3  # seeds of the splits
SHARES = {TRAIN: (0.98, 0.01), PROBE: (0.90, 0.10), TEST: (0.0, 0.0)}  # in class 0, elsewhere
NET = {"channels": [8, 8, 16, 32], "stem_width": 8}  # resnet10t with 23,000 weights
UPDATES = 60  # after which a network has fallen
QUICK = {"start": 1, "every": 8, "track_every": 3, "concepts": 8}
KEPT = ("project", "rebalance")  # actions with which baking keeps the logits
Batch = tuple[Tensor, Tensor]
Untouched = Callable[[nn.Module], AbstractContextManager[None]]  # the fixture of that name


@dataclass(frozen=True, eq=False)
class World:
    """Images `(N, 3, 16, 16)`, their classes `(N,)`, and which of them carry the mark `(N,)`."""

    images: Tensor
    labels: Tensor
    marked: Tensor

    def loader(self, size: int = 100) -> DataLoader[tuple[Tensor, ...]]:
        """Return the images and classes in order, as a probe."""
        return DataLoader(TensorDataset(self.images, self.labels), size)


def mark(images: Tensor) -> Tensor:
    """Return the images with the mark."""
    images = images.clone()
    images[:, :, :MARK, :MARK] = torch.tensor([2.0, -2.0, 2.0])[:, None, None]
    return images


@cache
def world(split: int, count: int = 400, *, planted: bool = True) -> World:
    """Return as many images of a split, equally many of every class."""
    fixed, rng = torch.Generator().manual_seed(7), torch.Generator().manual_seed(split)
    patterns = 0.5 * interpolate(torch.randn(CLASSES, 3, 4, 4, generator=fixed), scale_factor=4)
    patterns[0] *= 0.8
    labels = torch.arange(count) % CLASSES
    images = patterns[labels] + torch.randn(count, 3, SIDE, SIDE, generator=rng)
    share = torch.where(labels == 0, *SHARES[split])
    marked = (torch.rand(count, generator=rng) < share) & planted
    images[marked] = mark(images[marked])
    return World(images, labels, marked)


def net(name: str = "resnet10t", **options: object) -> nn.Module:
    """Return an untrained network, always the same."""
    torch.manual_seed(0)
    options = {**NET, **options} if name == "resnet10t" else options
    return timm.create_model(name, num_classes=CLASSES, **options)


def sgd(model: nn.Module, lr: float = 0.005) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def stream(updates: int, *, first: int = 0, planted: bool = True) -> Iterator[Batch]:
    """Yield the training batches `first .. updates - 1`, always the same ones."""
    data = world(TRAIN, 2000, planted=planted)
    for update in range(first, updates):
        rng = torch.Generator().manual_seed(update)
        pick = torch.randint(len(data.labels), (32,), generator=rng)
        yield data.images[pick], data.labels[pick]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    guard: ConceptGuard | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train as a user would, with or without a guard."""
    model.train()
    optimizer = optimizer or sgd(model)
    for images, labels in batches:
        losses = cross_entropy(model(images), labels, reduction="none")
        loss = losses.mean() if guard is None else guard.loss(losses, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard is not None:
            guard.step()


@cache
def _fallen(planted: bool) -> nn.Module:
    model = net()
    train(model, stream(UPDATES, planted=planted), optimizer=sgd(model, lr=0.02))
    return model


def fallen(*, planted: bool = True) -> nn.Module:
    """Return a copy of the network trained on the world without a guard; it is in train mode."""
    return copy.deepcopy(_fallen(planted))


def without_bias() -> nn.Module:
    """Return a fallen network whose head has no bias to hold the reference level."""
    model = fallen()
    model.fc = nn.Linear(model.num_features, CLASSES, bias=False)
    return model


def logits(model: nn.Module, images: Tensor | None = None) -> Tensor:
    """Return the logits in eval mode, of marked images if none are given."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        result: Tensor = model.eval()(mark(world(PROBE).images[:64]) if images is None else images)
    for module, mode in modes.items():
        module.training = mode
    return result


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((logits(model, images).argmax(dim=1) == labels).double().mean())


def held_out(model: nn.Module) -> tuple[float, float]:
    """Return the accuracy on clean images, and on marked images of the other classes."""
    test = world(TEST, 800)
    others = test.labels != 0
    marked = accuracy(model, mark(test.images[others]), test.labels[others])
    return accuracy(model, test.images, test.labels), marked


@cache
def _first_round(action: str | None) -> dict[str, Any]:
    config = QUICK if action is None else {**QUICK, "action": action}
    guard = ConceptGuard(fallen(), probe=world(PROBE).loader(), config=config)
    guard.round()
    return guard.state_dict()


def flagging(model: nn.Module | None = None, **config: object) -> ConceptGuard:
    """Return a guard that has flagged the mark in its first round and corrects nothing yet."""
    guard = ConceptGuard(
        fallen() if model is None else model,
        probe=world(PROBE).loader(),
        config={**QUICK, **config},
    )
    guard.load_state_dict(copy.deepcopy(_first_round("observe")))
    return guard


def correcting(model: nn.Module | None = None, **config: object) -> ConceptGuard:
    """Return a guard that has flagged the mark in its first round and corrects it."""
    guard = flagging(model, **config)
    guard.load_state_dict(copy.deepcopy(_first_round(None)))
    return guard


def erased_at(model: nn.Module, tap: str, **config: object) -> ConceptGuard:
    """Return a guard that has erased a concept there, whatever it is."""
    settings = {"tap": tap, "concepts": 4, "action": "project", "max_erased": 1, **config}
    guard = ConceptGuard(model, probe=world(PROBE, 120).loader(), config=settings)
    report = guard.round()
    assert report is not None
    for concept in report.concepts:
        if not guard.erased and concept.presence_rate < 1:
            guard.erase(concept.id)
    assert guard.erased
    return guard


def the_flagged(guard: ConceptGuard) -> int:
    assert guard.report is not None
    (concept,) = guard.report.flagged
    return concept
