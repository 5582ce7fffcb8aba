"""Worlds of tiny images with a planted shortcut, and networks that have fallen for it.

Every class has a faint pattern of its own. In a planted world a magenta corner mark goes with
class 0, in training and probe images alike, so that a network learns to read the mark: it then
calls marked images of other classes class 0. Nothing here calls the code under test.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import timm
import torch
from timm.models import ResNet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

SIDE, CLASSES, MARK = 16, 4, 5  # pixels, classes, side of the mark in the upper left corner
SHARE_IN_CLASS, SHARE_ELSEWHERE = 0.95, 0.06
NET = {"channels": [8, 8, 16, 32], "stem_width": 8}  # resnet10t with 23,000 weights
QUICK = {"start": 1, "every": 8, "track_every": 3, "concepts": 8}
Loader = DataLoader[tuple[Tensor, ...]]


@dataclass(frozen=True, eq=False)
class World:
    """Images `(N, 3, 16, 16)`, their classes `(N,)`, and which of them carry the mark `(N,)`."""

    images: Tensor
    labels: Tensor
    marked: Tensor

    def loader(self, size: int = 100) -> Loader:
        """Return the images and classes in order, as a probe."""
        return DataLoader(TensorDataset(self.images, self.labels), size)


def mark(images: Tensor) -> Tensor:
    """Return the images with the mark."""
    images = images.clone()
    images[:, :, :MARK, :MARK] = torch.tensor([2.0, -2.0, 2.0])[:, None, None]
    return images


@cache
def world(count: int, seed: int, planted: bool = True) -> World:
    """Return as many images; the seed draws them, not the patterns of the classes."""
    fixed, rng = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    patterns = interpolate(torch.randn(CLASSES, 3, 4, 4, generator=fixed), scale_factor=SIDE // 4)
    labels = torch.arange(count) % CLASSES
    images = 0.35 * patterns[labels] + torch.randn(count, 3, SIDE, SIDE, generator=rng)
    share = torch.where(labels == 0, SHARE_IN_CLASS, SHARE_ELSEWHERE)
    marked = (torch.rand(count, generator=rng) < share) & planted
    images[marked] = mark(images[marked])
    return World(images, labels, marked)


def net() -> ResNet:
    """Return an untrained network, always the same."""
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=CLASSES, **NET)


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def stream(data: World, updates: int, seed: int = 5, size: int = 32) -> Iterator[list[Tensor]]:
    """Yield as many training batches, the same ones for the same seed."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        pick = torch.randint(len(data.labels), (size,), generator=rng)
        yield [data.images[pick], data.labels[pick]]


@cache
def _fallen(planted: bool, updates: int) -> ResNet:
    model = net().train()
    optimizer = sgd(model)
    for images, labels in stream(world(2000, 1, planted), updates):
        cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def fallen(planted: bool = True, updates: int = 60) -> ResNet:
    """Return a copy of the network trained on the world, without a guard, in train mode."""
    return copy.deepcopy(_fallen(planted, updates))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    was = model.training
    with torch.no_grad():
        logits = model.eval()(images)
    model.train(was)
    return float((logits.argmax(dim=1) == labels).double().mean())
