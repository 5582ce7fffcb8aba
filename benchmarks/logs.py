"""What do the TensorBoard events of the guard cost: time, and room on the disk?

Question: how much longer is a training at the default schedule because the guard has a log_dir?
Data: CIFAR-10 with four shortcuts and a probe of 4,096 images, as in `overhead.py`; random images
if the file is not there. Four concepts are under correction from the start.
Networks: resnet18 and vit_tiny_patch16_224 of timm at 64 px, batches of 64.
Command: python benchmarks/logs.py [--updates 900]
Expected: see README.md beside this file. Run time on 2 cores: about 15 minutes.

Two copies of a network are trained alike, batch by batch, one with a log_dir. What is compared is
the processor time within `guard.step()`, where all events are written: the rest of an update is
the same code. The figure is the difference over the time of the whole training without log_dir.
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from cifar_patch import normalised
from flags_networks import planted
from overhead import NETWORKS, PROBE, TRAIN, batches, correct, images_of, network, stepping
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

BOUND = 0.005  # of the training time
MOST_MEGABYTES = 20  # for 100 rounds


class Copy:
    """A copy of a network in training with its guard.

    Args:
        base: The network.
        probe: Its probe.
        log_dir: Of the guard.

    Attributes:
        in_step: Seconds of the processor within `guard.step()`.
        rounds: How many ran.
    """

    def __init__(self, base: nn.Module, probe: DataLoader[tuple[Tensor, ...]], log_dir: str | None):
        self.model = copy.deepcopy(base).train()
        self.guard = ConceptGuard(self.model, probe=probe, log_dir=log_dir)
        correct(self.guard)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.005, momentum=0.9)
        self.in_step, self.rounds = 0.0, 0

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Train by one batch."""
        losses = cross_entropy(self.model(images), labels, reduction="none")
        self.guard.loss(losses, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        began = time.process_time()
        self.rounds += self.guard.step() is not None
        self.in_step += time.process_time() - began


def measured(name: str, path: Path, updates: int) -> tuple[float, float, int, float]:
    """Return the share of the time, the seconds of a training, rounds, and megabytes."""
    images, labels = images_of(path, 0)
    parts = [slice(TRAIN), slice(TRAIN, TRAIN + PROBE)]
    learn, held_out = (planted(images[at], labels[at], n) for n, at in enumerate(parts))
    x, probe_x = (interpolate(normalised(part), NETWORKS[name]) for part in (learn, held_out))
    base, stream = network(name, 0), batches(x, labels[parts[0]], 64, 0)
    stepping(base, None)([next(stream) for _ in range(60)])
    probe = DataLoader(TensorDataset(probe_x, labels[parts[1]]), batch_size=256)
    with tempfile.TemporaryDirectory() as folder:
        silent, logged = Copy(base, probe, None), Copy(base, probe, folder)
        spent = 0.0
        for n in range(updates):
            batch = next(stream)
            for one in (silent, logged) if n % 2 else (logged, silent):
                began = time.process_time()
                one.update(*batch)
                spent += time.process_time() - began if one is silent else 0.0
        for one in (silent, logged):
            one.guard.close()
        size = sum(file.stat().st_size for file in Path(folder).rglob("events*")) / 1e6
    return (logged.in_step - silent.in_step) / spent, spent, logged.rounds, size


def main() -> None:
    """Measure, print a row per network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10_jpg_20k10k.npz"))
    parser.add_argument(
        "--networks", nargs="+", default=["resnet18", "vit_tiny_patch16_224"], choices=NETWORKS
    )
    parser.add_argument("--updates", type=int, default=900)
    args = parser.parse_args()
    for name in args.networks:
        share, spent, rounds, size = measured(name, args.data, args.updates)
        kept = "kept" if share <= BOUND else "NOT kept"
        each = 100 * size / max(1, rounds)
        print(
            f"{name:22} {share:+.2%} of {spent:.0f} s, {args.updates} updates, {rounds} rounds "
            f"(bound {BOUND:.1%}: {kept}); {size:.2f} MB, {each:.1f} MB for 100 rounds (bound "
            f"{MOST_MEGABYTES})",
            flush=True,
        )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
