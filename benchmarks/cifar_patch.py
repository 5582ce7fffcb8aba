"""Does the guard unlearn a planted patch that it was never told about, and does that last?

Question: a network learnt to call everything with a magenta corner patch an airplane. Three more
epochs are trained on the same biased images. How many patched test images are right afterwards,
and at what cost on clean ones?
Data: CIFAR-10 (Krizhevsky 2009) as one npz of JPEG bytes with the columns data, offsets, label and
split (20,000 training, 10,000 test images); 8,000 are trained on, 4,000 are the probe, and the
10,000 test images are looked at only for the table. In training and probe alike the patch covers
6 x 6 pixels of 90 % of class 0 and of 1 % of the other classes.
Command: python benchmarks/cifar_patch.py --data ../shared/data/cifar10_jpg_20k10k.npz
Expected: see README.md beside this file. Run time: about 15 minutes for 3 seeds on 2 cores.

Rows of the table (three more epochs each, same order of the same images):
    plain              the network before the three epochs
    plain longer       without any correction
    guard              label-free, the default actions: project and rebalance
    guard, project     label-free, projection alone
    fixed projection   label-free, projection that is never estimated again
    oracle             projection from the true patch membership, estimated again as the guard does
"""

import argparse
import copy
import csv
import io
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

BATCH, BASE_EPOCHS, BASE_LR, EPOCHS, LR = 64, 8, 0.03, 3, 0.02
TRAIN, PROBE, CLASS, IN_CLASS, ELSEWHERE, SIDE = 8000, 4000, 0, 0.90, 0.01, 6
GUARD = {"start": 1, "every": 125, "track_every": 25}
NEVER = 10**6


def read_images(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(N, 3, 32, 32)` uint8 images, `(N,)` labels and `(N,)` split (1 is test)."""
    pack = np.load(path)
    data, ends = pack["data"], pack["offsets"]
    decoded = [
        np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(pack["label"]).long(), torch.from_numpy(pack["split"]).long()


def patched(images: Tensor) -> Tensor:
    """Return the images with a magenta patch in the upper left corner."""
    images = images.clone()
    images[:, :, :SIDE, :SIDE] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    return images


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images as network input in [-1, 1]."""
    return images.float().div(127.5).sub(1.0)


def planted(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patch most images of the class and few of the others; return images, labels, membership."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.where(labels == CLASS, IN_CLASS, ELSEWHERE)
    has_patch = torch.rand(len(labels), generator=generator) < chance
    images = images.clone()
    images[has_patch] = patched(images[has_patch])
    return normalised(images), labels, has_patch


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right predictions in eval mode."""
    model.eval()
    with torch.no_grad():
        right = [
            int((model(normalised(x)).argmax(1) == y).sum())
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(right) / len(labels)


def batches(
    images: Tensor, labels: Tensor, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over the batches of all epochs, the same for every treatment."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for pick in torch.randperm(len(labels), generator=generator).split(BATCH):
            yield images[pick], labels[pick]


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Return the optimizer of all treatments."""
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def train(
    model: nn.Module,
    stream: Iterator[tuple[Tensor, Tensor]],
    lr: float,
    guard: ConceptGuard | None = None,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train at a constant rate, with a guard or with something to call after every update."""
    model.train()
    optimizer = sgd(model, lr)
    for step, (images, labels) in enumerate(stream):
        loss = cross_entropy(model(images), labels, reduction="none")
        (loss.mean() if guard is None else guard.loss(loss, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard is not None:
            guard.step()
        if after is not None:
            after(step)


class Oracle:
    """Projection of the patch from its true membership, estimated again every 25 updates.

    Written on its own, from the formulas alone, as a check on the guard's.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, has_patch: Tensor) -> None:
        self.model, self.images, self.labels, self.has_patch = model, images, labels, has_patch
        self.move: tuple[Tensor, Tensor, Tensor] | None = None
        self.seen = torch.empty(0)
        self.handle = model.get_classifier().register_forward_pre_hook(self.hook)
        self.estimate(0)

    def hook(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Project the input of the classifier."""
        (x,) = args
        self.seen = x.detach()
        if self.move is None:
            return (x,)
        w, s, level = self.move
        return (x - (x @ w - level)[:, None] * s,)

    def estimate(self, step: int) -> None:
        """Estimate the pair within classes."""
        if step % 25:
            return
        self.model.eval()
        with torch.no_grad():
            rows = []
            for x in self.images.split(500):
                self.model(x)
                rows.append(self.seen)
        self.model.train()
        rows_now = torch.cat(rows)
        signal, weight = torch.zeros(rows_now.shape[1]), 0.0
        residual = rows_now.clone()
        for k in range(10):
            on = (self.labels == k) & self.has_patch
            off = (self.labels == k) & ~self.has_patch
            for group in (on, off):
                residual[group] -= rows_now[group].mean(0)
            share = float(on.sum() * off.sum() / (on.sum() + off.sum()))
            if share:
                signal += share * (rows_now[on].mean(0) - rows_now[off].mean(0))
                weight += share
        signal /= weight
        covariance = residual.T @ residual / len(residual)
        a = float(ledoit_wolf_shrinkage(residual.numpy(), assume_centered=True))
        covariance = (1 - a) * covariance + a * covariance.diagonal().mean() * torch.eye(
            len(signal)
        )
        w = torch.linalg.solve(covariance, signal)
        w /= w @ signal
        self.move = (w, signal, (rows_now[~self.has_patch] @ w).mean())

    def bake(self) -> None:
        """Fold the projection into the classifier."""
        assert self.move is not None
        w, s, level = self.move
        head = self.model.get_classifier()
        pull = head.weight.detach() @ s
        with torch.no_grad():
            head.weight -= torch.outer(pull, w)
            head.bias += pull * level
        self.handle.remove()


def run_seed(
    seed: int, data: tuple[Tensor, Tensor, Tensor], base_epochs: int
) -> list[dict[str, Any]]:
    """Return the table rows of one seed."""
    images, labels, split = data
    order = torch.randperm(int((split == 0).sum()), generator=torch.Generator().manual_seed(seed))
    pool = (split == 0).nonzero().flatten()[order]
    train_part, probe_part = pool[:TRAIN], pool[TRAIN : TRAIN + PROBE]
    x, y, _ = planted(images[train_part], labels[train_part], seed)
    px, py, has_patch = planted(images[probe_part], labels[probe_part], seed + 1000)
    probe = DataLoader(TensorDataset(px, py), batch_size=500)
    test, truth = images[split == 1], labels[split == 1]
    torch.manual_seed(seed)
    base = timm.create_model("resnet10t", num_classes=10)
    train(base, batches(x, y, base_epochs, seed), BASE_LR)

    def measured(name: str, model: nn.Module, note: str = "") -> dict[str, Any]:
        row = {
            "seed": seed,
            "treatment": name,
            "clean": accuracy(model, test, truth),
            "patched": accuracy(model, patched(test), truth),
            "note": note,
        }
        print(
            f"{seed} {name:18} clean {row['clean']:.3f} patched {row['patched']:.3f} {note}",
            flush=True,
        )
        return row

    def more() -> Iterator[tuple[Tensor, Tensor]]:
        return batches(x, y, EPOCHS, seed + 1)

    rows = [measured("plain", base)]
    model = copy.deepcopy(base)
    train(model, more(), LR)
    rows.append(measured("plain longer", model))
    settings = {
        "guard": GUARD,
        "guard, project": {**GUARD, "action": ["project"]},
        "fixed projection": {**GUARD, "action": ["project"], "every": NEVER, "track_every": NEVER},
    }
    for name, config in settings.items():
        model = copy.deepcopy(base)
        with ConceptGuard(model, probe=probe, config={**config, "seed": seed}) as guard:
            train(model, more(), LR, guard)
            report = guard.report
            erased = [f for f in report.flags if f.status == "erased"] if report else []
            right = [sum(bool(has_patch[i]) for i in f.examples) for f in erased]
            note = ", ".join(
                f"concept {f.concept} to class {f.class_index} "
                f"({hits} of {len(f.examples)} examples patched)"
                for f, hits in zip(erased, right, strict=True)
            )
            guard.bake()
        rows.append(measured(name, model, note or "nothing flagged"))
    model = copy.deepcopy(base)
    oracle = Oracle(model, px[:2000], py[:2000], has_patch[:2000])
    train(model, more(), LR, after=lambda step: oracle.estimate(step + 1))
    oracle.bake()
    rows.append(measured("oracle", model))
    return rows


def main() -> None:
    """Run all seeds, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10_jpg_20k10k.npz"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--base-epochs", type=int, default=BASE_EPOCHS)
    parser.add_argument("--csv", type=Path, default=None, help="also write all rows here")
    args = parser.parse_args()
    if not args.data.is_file():
        parser.error(
            f"--data {args.data}: no such file; expected the CIFAR-10 pack described above"
        )
    began = time.perf_counter()
    data = read_images(args.data)
    rows = [row for seed in range(args.seeds) for row in run_seed(seed, data, args.base_epochs)]
    print(f"\n{'treatment':18} {'clean':>15} {'patched':>15}   mean +- sd of {args.seeds} seeds")
    names = dict.fromkeys(r["treatment"] for r in rows)
    for name in names:
        cells = []
        for column in ("clean", "patched"):
            values = [r[column] for r in rows if r["treatment"] == name]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):8.3f} +- {spread:.3f}")
        print(f"{name:18} {cells[0]:>15} {cells[1]:>15}")
    print(
        f"{time.perf_counter() - began:.0f} s, torch {torch.__version__}, timm {timm.__version__}"
    )
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
