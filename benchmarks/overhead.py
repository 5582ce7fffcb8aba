"""What does the guard cost: per update, and per round?

Question: by how much does the guard lengthen an update at the default schedule, while it observes,
while it has nothing to correct, and while a concept is projected out, rebalanced and tracked? How
long is a round, next to the forward pass over the same probe images?
Data: CIFAR-10 as one npz of JPEG bytes, as for `cifar_patch.py`; random images if the file is not
there. Batches of 64, a probe of 4,096 images, four shortcuts as in `flags_networks.py`; a resnet10t
and a small vision transformer of timm at 32 px, trained for one epoch of 8,000 images.
Command: python benchmarks/overhead.py [--seeds 3]
Expected: see README.md beside this file. Run time: 20 minutes for one seed with `--pairs 8`
on one thread beside other work.

Rows of the table (bound):
    observe   `action: observe`, between rounds (1 %)
    nothing   the default actions, nothing flagged, between rounds (1 %)
    active    the default actions with what a round flags under correction, tracked (8 %)
    round     a round in that state, over the forward pass alone (2 times)
Updates with and without the guard take turns of 5 in changing order; 25 of either make a pair, and
the figure is the median of the quotients of the pairs, with quartiles. Rounds and forward passes
take turns likewise.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from cifar_patch import normalised, read_images
from flags_networks import MODELS, built, learnt, planted
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

BATCH, PROBE, TRAIN = 64, 4096, 8000
TURN, TURNS, TRACKED = 5, 5, 25  # updates per turn, turns per pair, updates between trackings
NEVER = 10**9
BOUNDS = {"observe": 1.01, "nothing": 1.01, "active": 1.08, "round": 2.0}
assert TURN * TURNS == TRACKED  # every pair holds one re-estimation, as every such stretch does


def images_of(path: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Return `(N, 3, 32, 32)` uint8 images in random order with labels; noise if there is no file.

    Args:
        path: The pack.
        seed: Of the order, or of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    if path.is_file():
        images, labels, split = read_images(path)
        pool = (split == 0).nonzero().flatten()
        order = pool[torch.randperm(len(pool), generator=generator)]
        return images[order], labels[order]
    size = (TRAIN + PROBE, 3, 32, 32)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, size[:1], generator=generator)


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield full batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for at in order.split(BATCH)[: len(order) // BATCH]:
            yield images[at], labels[at]


def correct(guard: ConceptGuard) -> None:
    """Bring what a round flags under correction; one concept if it flags nothing."""
    report = guard.round()
    if report is None or guard.erased:
        return
    for concept in sorted(report.concepts, key=lambda c: abs(c.presence_rate - 0.1)):
        try:
            guard.erase(concept.id)
        except ValueError:  # its images do not tell a direction: the next one
            continue
        return


def stepping(
    model: nn.Module, guard: ConceptGuard | None
) -> Callable[[list[tuple[Tensor, Tensor]]], None]:
    """Return a function that trains a network on some batches, with a guard or without.

    At a rate at which tracked pairs move, so that they are estimated again as often as ever.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()

    def updates(block: list[tuple[Tensor, Tensor]]) -> None:
        for images, labels in block:
            losses = cross_entropy(model(images), labels, reduction="none")
            (losses.mean() if guard is None else guard.loss(losses, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if guard is not None:
                guard.step()

    return updates


def seconds(work: Callable[[], object]) -> float:
    """Return how long a piece of work takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def update_quotients(
    base: nn.Module, row: str, data: tuple[Tensor, ...], pairs: int, seed: int
) -> list[float]:
    """Return the quotients of the times of 25 updates with the guard and without."""
    x, y, probe_x, probe_y = data
    guarded = copy.deepcopy(base).train()
    config = {"start": NEVER, "every": NEVER, "seed": seed}
    config |= {"action": "observe"} if row == "observe" else {}
    probe = DataLoader(TensorDataset(probe_x, probe_y), batch_size=256)
    stream, quotients = batches(x, y, seed), []
    with ConceptGuard(guarded, probe=probe, config=config) as guard:
        if row == "active":
            correct(guard)
        run = (stepping(copy.deepcopy(base), None), stepping(guarded, guard))
        for _ in range(pairs + 1):
            spent = [0.0, 0.0]
            for turn in range(TURNS):
                block = [next(stream) for _ in range(TURN)]
                for kind in (turn % 2, 1 - turn % 2):
                    spent[kind] += seconds(lambda: run[kind](block))  # noqa: B023 - called at once
            quotients.append(spent[1] / spent[0])
    return quotients[1:]  # the first pair warms up


def round_quotients(
    base: nn.Module, data: tuple[Tensor, ...], pairs: int, seed: int
) -> tuple[list[float], float]:
    """Return the quotients of rounds and forward passes, and the seconds of a forward pass."""
    _, _, probe_x, probe_y = data
    model = copy.deepcopy(base).eval()
    probe = DataLoader(TensorDataset(probe_x, probe_y), batch_size=256)

    def forward() -> None:
        with torch.no_grad():
            for images, _ in probe:
                model(images)

    quotients, passes = [], []
    with ConceptGuard(model, probe=probe, config={"start": NEVER, "seed": seed}) as guard:
        correct(guard)
        for _ in range(pairs):
            passes.append(seconds(forward))
            quotients.append(seconds(guard.round) / passes[-1])
    return quotients, statistics.median(passes)


def measured(seed: int, path: Path, pairs: int) -> Iterator[tuple[str, str, list[float], str]]:
    """Yield network, row, quotients and a remark."""
    images, labels = images_of(path, seed)
    parts = [slice(TRAIN), slice(TRAIN, TRAIN + PROBE)]
    learn, probe = (planted(images[at], labels[at], seed + n) for n, at in enumerate(parts))
    y, probe_y = (labels[at] for at in parts)
    data = (normalised(learn), y, normalised(probe), probe_y)
    for name in MODELS:
        torch.manual_seed(seed)
        base = learnt(built(name), learn, y, epochs=1, seed=seed)
        for row in ("observe", "nothing", "active"):
            yield name, row, update_quotients(base, row, data, pairs, seed), ""
        quotients, forward = round_quotients(base, data, max(3, pairs // 3), seed)
        yield name, "round", quotients, f"forward pass {forward:.1f} s"


def main() -> None:
    """Measure all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10_jpg_20k10k.npz"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of 25 updates per row")
    args = parser.parse_args()
    began = time.perf_counter()
    print(f"images: {args.data if args.data.is_file() else 'random, no file at --data'}")
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.seeds):
        for name, row, quotients, remark in measured(seed, args.data, args.pairs):
            print(f"{seed} {line(name, row, quotients)} {remark}", flush=True)
            found.setdefault((name, row), []).extend(quotients)
    print(f"\nall {args.seeds} seeds")
    for (name, row), quotients in found.items():
        print(line(name, row, quotients))
    print(
        f"{time.perf_counter() - began:.0f} s, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, timm {timm.__version__}"
    )


def line(name: str, row: str, quotients: list[float]) -> str:
    """Return a row of the table: the median quotient, its quartiles, and the bound."""
    middle = statistics.median(quotients)
    low, _, high = statistics.quantiles(quotients, n=4)
    kept = "kept" if middle <= BOUNDS[row] else "NOT kept"
    return (
        f"{name:4} {row:8} {middle:6.3f} [{low:.3f}, {high:.3f}] of {len(quotients):3} pairs, "
        f"bound {BOUNDS[row]:.2f}: {kept}"
    )


if __name__ == "__main__":
    main()
