"""Data and network of the recipes for other training loops; it answers no question of its own.

Data: scikit-learn's 1,797 handwritten digits (BSD-3; from the UCI repository, CC BY 4.0) with an
orange tint on 96 % of the 3s and 2.5 % of the other digits.
"""

import timm
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

GUARD = {"start": 60, "every": 20, "track_every": 10}


def tint(images: torch.Tensor) -> torch.Tensor:
    """Return `(N, 3, 32, 32)` images half covered with orange."""
    return 0.5 * images + 0.5 * torch.tensor([1.0, 0.45, 0.1])[:, None, None]


def drawn() -> tuple[TensorDataset, TensorDataset]:
    """Return 900 images to train on and 540 to hold out; 357 more are for `scores`."""
    images, labels, draw = *digits(), torch.Generator().manual_seed(0)
    share = torch.where(labels == 3, 0.96, 0.025)
    tinted = torch.rand(len(labels), generator=draw) < share
    images[tinted] = tint(images[tinted])
    return TensorDataset(images[:900], labels[:900]), TensorDataset(
        images[900:1440], labels[900:1440]
    )


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images without the tint, and their classes, in a fixed order."""
    loaded = load_digits()
    images = torch.tensor(loaded.images[:, None], dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    images = F.interpolate(images[order], size=32).repeat(1, 3, 1, 1)
    return images, torch.tensor(loaded.target)[order]


def network() -> torch.nn.Module:
    """Return an untrained small resnet10t; the seed is fixed."""
    torch.manual_seed(0)
    shape = {"channels": [32, 64, 96, 128], "stem_width": 16}
    return timm.create_model("resnet10t", num_classes=10, **shape)


def scores(model: torch.nn.Module) -> str:
    """Return what is right of 357 new digits: without the tint, and all but the 3s with it."""
    images, labels = (t[1440:] for t in digits())
    others = labels != 3
    model.eval()
    with torch.no_grad():
        clean = (model(images).argmax(dim=1) == labels).double().mean()
        marked = (model(tint(images[others])).argmax(dim=1) == labels[others]).double().mean()
    return f"right without the tint {clean:.3f}, other digits with the tint {marked:.3f}"
