"""What do the TensorBoard events of the guard cost: time, and room on the disk?

Question: how much longer is a training at the default schedule because the guard has a log_dir?
Data: CIFAR-10 with four shortcuts and a probe of 4,096 images, as in `overhead.py`; random images
if the file is not there. Four concepts are under correction from the start.
Networks: resnet18 and vit_tiny_patch16_224 of timm at 64 px, batches of 64.
Command: python benchmarks/logs.py [--updates 900]
Expected: see README.md beside this file. Run time on 2 cores: about 15 minutes.

Two copies of a network are trained alike, batch by batch, one with a log_dir. What is compared is
the processor time within `guard.step()`, where all events are written: the rest of an update is
the same code. The first round with a concept draws its card, which takes longest; later ones are
drawn within a share of the time. So the figure is for the 100 rounds of the bound: the first
round's difference and 99 times the mean of the others and of what lies between rounds, over 100
times as many updates without log_dir. The share of the short run itself is printed beside it.
"""

import argparse
import copy
import statistics
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


class Copy:
    """A copy of a network in training with its guard.

    Args:
        base: The network.
        probe: Its probe.
        log_dir: Of the guard.

    Attributes:
        between: Seconds of the processor within `guard.step()` where no round ran.
        rounds: The same for every round.
    """

    def __init__(self, base: nn.Module, probe: DataLoader[tuple[Tensor, ...]], log_dir: str | None):
        self.model = copy.deepcopy(base).train()
        self.guard = ConceptGuard(self.model, probe=probe, log_dir=log_dir)
        correct(self.guard)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.005, momentum=0.9)
        self.between, self.rounds = 0.0, list[float]()

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Train by one batch."""
        losses = cross_entropy(self.model(images), labels, reduction="none")
        self.guard.loss(losses, labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        began = time.process_time()
        ran = self.guard.step() is not None
        spent = time.process_time() - began
        if ran:
            self.rounds.append(spent)
        else:
            self.between += spent


def measured(name: str, path: Path, updates: int) -> tuple[list[float], float, float, float]:
    """Return what each round and all else took longer, the whole time without, and megabytes."""
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
    longer = [a - b for a, b in zip(logged.rounds, silent.rounds, strict=True)]
    return longer, logged.between - silent.between, spent, size


def main() -> None:
    """Measure, print a row per network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10_jpg_20k10k.npz"))
    parser.add_argument(
        "--networks", nargs="+", default=["resnet18", "vit_tiny_patch16_224"], choices=NETWORKS
    )
    parser.add_argument("--updates", type=int, default=700)
    args = parser.parse_args()
    for name in args.networks:
        (first, *later), between, spent, size = measured(name, args.data, args.updates)
        rounds = 1 + len(later)
        whole = first + 99 * statistics.mean(later) + 100 * between / rounds
        share = whole / (100 * spent / rounds)
        kept = "kept" if share <= BOUND else "NOT kept"
        print(
            f"{name:22} {share:+.2%} for 100 rounds (bound {BOUND:.1%}: {kept}); measured: first "
            f"round {first:+.2f} s, others {', '.join(f'{s:+.2f}' for s in later)} s, between "
            f"{between:+.2f} s, of {spent:.0f} s in {args.updates} updates; {size:.2f} MB",
            flush=True,
        )
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == "__main__":
    main()
