"""Embedded data: scikit-learn's handwritten digits, with a shortcut planted on demand.

Nothing here knows about models, recipes or the guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from concept_guard.strict import StrictModel
from concept_guard.training.images import held_out

TEST_IMAGES = 447
_COLOUR = (1.0, 0.45, 0.1)  # orange: differs from grey in every channel


class Planted(StrictModel):
    """A shortcut: a colour that goes with one class in training and probe images alike.

    Attributes:
        kind: `tint` colours the whole image, `mark` only a corner.
        label: The class that carries it (`class` in a recipe).
        share_in_class: Share of that class's images that carry it.
        share_elsewhere: Share of the other classes' images that carry it.
        strength: How much of the image's own colour it replaces; 1 hides the image.
    """

    kind: Literal["tint", "mark"] = "tint"
    label: int = Field(default=3, alias="class", ge=0, le=9)
    share_in_class: float = Field(default=0.95, ge=0, le=1)
    share_elsewhere: float = Field(default=0.025, ge=0, le=1)
    strength: float = Field(default=0.3, gt=0, le=1)


@dataclass(frozen=True, eq=False)
class Digits:
    """Images of one split and which of them carry the planted shortcut.

    Attributes:
        images: `(B, 3, H, W)` float32 in [0, 1].
        labels: `(B,)` int64 digits.
        planted: `(B,)` bool, the images that carry the shortcut.
    """

    images: Tensor
    labels: Tensor
    planted: Tensor


def load_digits(
    size: int, planted: Planted | None, val_fraction: float, seed: int
) -> dict[str, Digits]:
    """Return the digits as `train`, `probe`, `clean` and, with a shortcut, `marked`.

    The splits are stratified and depend on the seed alone. `clean` and `marked` are the same
    held-out images, without the shortcut and all with it; `train` and `probe` carry it on
    exactly the given shares, rounded to whole images.

    Args:
        size: Side in pixels to which the 8 x 8 images are enlarged.
        planted: The shortcut, or None for the digits as they are.
        val_fraction: Share of the images that are not test images which becomes the probe.
        seed: Decides the splits and which images carry the shortcut.

    Returns:
        The splits by name.
    """
    from sklearn.datasets import load_digits as read  # heavy, and only needed here

    bunch = read()
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16
    large = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    images, labels = large.clamp(0, 1).repeat(1, 3, 1, 1), torch.from_numpy(bunch.target).long()
    rest, test = held_out(labels, TEST_IMAGES / len(labels), seed)
    kept, held = held_out(labels[rest], val_fraction, seed + 1)
    splits = {"train": rest[kept], "probe": rest[held], "clean": test}
    found = {name: _without(images[at], labels[at]) for name, at in splits.items()}
    if planted is None:
        return found
    for offset, name in enumerate(("train", "probe")):
        carried = _carriers(found[name].labels, planted, seed + 2 + offset)
        found[name] = _with(found[name], planted, carried)
    everywhere = torch.ones_like(test, dtype=torch.bool)
    return {**found, "marked": _with(found["clean"], planted, everywhere)}


def _without(images: Tensor, labels: Tensor) -> Digits:
    return Digits(images, labels, torch.zeros_like(labels, dtype=torch.bool))


def _with(split: Digits, planted: Planted, carried: Tensor) -> Digits:
    return Digits(plant(split.images, planted, carried), split.labels, carried)


def _carriers(labels: Tensor, planted: Planted, seed: int) -> Tensor:
    """Return `(B,)` bool: the given shares of the class and of the others, whole images."""
    generator = torch.Generator().manual_seed(seed)
    carried = torch.zeros_like(labels, dtype=torch.bool)
    inside = labels == planted.label
    for group, share in ((inside, planted.share_in_class), (~inside, planted.share_elsewhere)):
        members = group.nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        carried[members[order[: round(share * len(members))]]] = True
    return carried


def plant(images: Tensor, planted: Planted, carried: Tensor) -> Tensor:
    """Return the images with the shortcut on some of them; the others stay bit for bit.

    Args:
        images: `(B, 3, H, W)` in [0, 1]; stays in [0, 1].
        planted: Kind and strength of the shortcut.
        carried: `(B,)` bool, the images that get it.

    Returns:
        `(B, 3, H, W)` new images.
    """
    side = images.shape[-1] if planted.kind == "tint" else images.shape[-1] * 3 // 16
    colour = images.new_tensor(_COLOUR)[:, None, None]
    area = images[..., :side, :side]
    coloured = area * (1 - planted.strength) + colour * planted.strength
    result = images.clone()
    result[..., :side, :side] = torch.where(carried[:, None, None, None], coloured, area)
    return result
