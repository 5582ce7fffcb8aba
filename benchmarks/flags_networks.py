"""Networks and probes of the flags benchmark: timm models with and without planted shortcuts.

A planted network learns 10,000 CIFAR images with four shortcuts at once, each on 90 % of one class
and 1 % of the others: a corner patch (class 0), a tint (1), a frame (2) and a faint texture (3).
An unplanted one learns the same images, or handwritten digits, as they are. Nothing here knows the
guard.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from cifar_patch import normalised, patched, read_images
from recovery_real import striped, tinted
from torch import Tensor, nn
from torch.nn import functional

TRAIN, BATCH, IN_CLASS, ELSEWHERE, BORDER = 10_000, 64, 0.90, 0.01, 2
MODELS = ("cnn", "vit")
EPOCHS = {"cnn": 8, "vit": 15}
RATE = 2e-3
DIGITS_TRAIN, DIGITS_EPOCHS = 5_000, 6


def framed(images: Tensor) -> Tensor:
    """Return the images with a green frame of two pixels."""
    framed_images = images.clone()
    colour = torch.tensor([0, 200, 0], dtype=torch.uint8)[:, None, None]
    inside = framed_images[:, :, BORDER:-BORDER, BORDER:-BORDER].clone()
    framed_images[:] = colour
    framed_images[:, :, BORDER:-BORDER, BORDER:-BORDER] = inside
    return framed_images


# Name to what it does to images; its place in this order is the class that it goes with. The
# patch and the frame are drawn last, so that nothing covers them.
SHORTCUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "patch": patched,
    "tint": tinted,
    "frame": framed,
    "texture": striped,
}
DRAWN = ("texture", "tint", "frame", "patch")


@dataclass(frozen=True, eq=False)
class Images:
    """Images to learn and held-out ones, `(N, 3, 32, 32)` uint8, with labels."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def cifar(path: Path, seed: int) -> Images:
    """Return 10,000 images to learn and the other 20,000 of the pack, split by the seed."""
    images, labels, split = read_images(path)
    order = torch.randperm(int((split == 0).sum()), generator=torch.Generator().manual_seed(seed))
    pool = (split == 0).nonzero().flatten()[order]
    rest = torch.cat([pool[TRAIN:], (split == 1).nonzero().flatten()])
    part = pool[:TRAIN]
    return Images(images[part], labels[part], images[rest], labels[rest])


def digits(path: Path, seed: int) -> Images:
    """Return MNIST's 10,000 test digits as 32 px RGB, half to learn and half held out."""
    pack = np.load(path)
    grey = functional.pad(torch.from_numpy(pack["x"]), (2, 2, 2, 2))
    images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(pack["y"]).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    part, rest = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    return Images(images[part], labels[part], images[rest], labels[rest])


def built(model: str) -> nn.Module:
    """Return an untrained network for 32 px and ten classes."""
    if model == "cnn":
        return timm.create_model("resnet10t", num_classes=10)
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=4,
        embed_dim=96,
        depth=4,
        num_heads=3,
    )


def planted(images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return the images with every shortcut on most of its class and few of the others."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.where(labels[:, None] == torch.arange(len(SHORTCUTS)), IN_CLASS, ELSEWHERE)
    present = torch.rand(chance.shape, generator=generator) < chance
    images = images.clone()
    for name in DRAWN:
        at = present[:, list(SHORTCUTS).index(name)]
        images[at] = SHORTCUTS[name](images[at])
    return images


def learnt(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> nn.Module:
    """Train with AdamW and one cycle of the learning rate, without augmentation."""
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for pick in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = functional.cross_entropy(model(normalised(images[pick])), labels[pick])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def network(kind: str, model: str, seed: int, images: Images, out: Path) -> nn.Module:
    """Return a trained network, in eval mode; it is stored and trained only once.

    Args:
        kind: `planted`, `cifar` or `digits`; the last two are without a shortcut.
        model: `cnn` or `vit`.
        seed: Of weights, order and planting.
        images: What it learns.
        out: Folder of the stored weights.
    """
    path = out / f"{kind}_{model}_{seed}.pt"
    torch.manual_seed(seed)
    net = built(model)
    if path.is_file():
        net.load_state_dict(torch.load(path))
        return net.eval()
    x = planted(images.train, images.train_labels, seed) if kind == "planted" else images.train
    epochs = DIGITS_EPOCHS if kind == "digits" else EPOCHS[model]
    learnt(net, x, images.train_labels, epochs, seed)
    out.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(net.state_dict(), part)
    part.replace(path)
    return net


def rows_of(net: nn.Module, images: Tensor) -> Tensor:
    """Return the `(N, C)` rows that enter the classifier."""
    with torch.no_grad():
        rows = [
            net.forward_head(net.forward_features(normalised(x)), pre_logits=True)
            for x in images.split(500)
        ]
    return torch.cat(rows)
