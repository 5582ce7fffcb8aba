"""What does the guard cost: per update, and per round?

Question: by how much does the guard lengthen an update at the default schedule, while it observes,
while it has nothing to correct, and while concepts are projected out, rebalanced and tracked? How
long is a round, next to the forward pass over the same probe images?
Data: CIFAR-10 as one npz of JPEG bytes, as for `cifar_patch.py`; random images if the file is not
there. Batches of 64 (`--batch`), a probe of 4,096 images, four shortcuts as in `flags_networks.py`.
Networks: resnet18, convnext_atto and vit_tiny_patch16_224 of timm at 64 px, eager and compiled; on
request `cnn` and `vit`, a resnet10t and a small vision transformer at 32 px. All are trained for a
few updates first (`--learn`), as what an update costs does not depend on what was learnt.
Command: python benchmarks/overhead.py
         python benchmarks/overhead.py --networks cnn vit --modes eager --rounds --learn 125
Expected: see README.md beside this file. Run time: about an hour on one
idle thread. `--cpu-time` counts processor time, for machines that are shared.

Rows of the table (bound):
    observe   `action: observe`, between rounds (1 %)
    nothing   the default actions, nothing flagged, between rounds (1 %)
    active    the default actions, four concepts corrected and tracked every 35 updates (8 %)
    round     a round in that state, over the forward pass alone (2 times); with `--rounds`
Updates with and without the guard take turns of 5 in changing order; 35 of either make a pair, 10
where nothing is tracked, and the figure is the median of the quotients of the pairs, with
quartiles. Rounds and forward passes take turns likewise.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import timm
import torch
from cifar_patch import normalised, read_images
from flags_networks import MODELS, built, planted
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

PROBE, TRAIN = 4096, 8000
TURN, TRACKED = 5, 35  # updates per turn, and between trackings of 320 images at batches of 64
TURNS = {"observe": 2, "nothing": 2, "active": TRACKED // TURN}  # per pair; one tracking in each
NEVER = 10**9
CONCEPTS = 4  # under correction, as many as there are shortcuts
BOUNDS = {"observe": 1.01, "nothing": 1.01, "active": 1.08, "round": 2.0}
NETWORKS = {"resnet18": 64, "convnext_atto": 64, "vit_tiny_patch16_224": 64, "cnn": 32, "vit": 32}
Pair = tuple[Tensor, Tensor]


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


def network(name: str, seed: int) -> nn.Module:
    """Return an untrained network for ten classes."""
    torch.manual_seed(seed)
    if name in MODELS:
        return built(name)
    options = {"img_size": NETWORKS[name]} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=10, **options)


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[Pair]:
    """Yield full batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for at in order.split(size)[: len(order) // size]:
            yield images[at], labels[at]


def correct(guard: ConceptGuard) -> None:
    """Bring four concepts under correction: what a round flags, then others of its concepts."""
    report = guard.round()
    found = [] if report is None else list(report.concepts)
    for concept in sorted(found, key=lambda c: abs(c.presence_rate - 0.1)):
        if len(guard.erased) >= CONCEPTS:
            return
        try:
            guard.erase(concept.id)
        except ValueError:  # its images do not tell a direction: the next one
            continue


def stepping(
    model: nn.Module, guard: ConceptGuard | None, *, compiled: bool = False
) -> Callable[[list[Pair]], None]:
    """Return a function that trains a network on some batches, with a guard or without.

    At a rate at which tracked pairs move, so that they are estimated again as often as ever.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    called = torch.compile(model, dynamic=False) if compiled else model
    model.train()

    def updates(block: list[Pair]) -> None:
        for images, labels in block:
            losses = cross_entropy(called(images), labels, reduction="none")
            (losses.mean() if guard is None else guard.loss(losses, labels)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if guard is not None:
                guard.step()

    return updates


def seconds(work: Callable[[], object], *, of_cpu: bool) -> float:
    """Return how long a piece of work takes, or how much time of the processor."""
    clock = time.process_time if of_cpu else time.perf_counter
    began = clock()
    work()
    return clock() - began


def update_quotients(
    base: nn.Module, row: str, data: tuple[Tensor, ...], args: argparse.Namespace, *, compiled: bool
) -> tuple[list[float], str]:
    """Return the quotients of the times of some updates with the guard and without, and a remark.

    Args:
        base: The network to train.
        row: Of the table.
        data: Images and labels to learn, and of the probe.
        args: From the command line.
        compiled: Whether both networks are compiled.
    """
    x, y, probe_x, probe_y = data
    torch.compiler.reset()
    guarded = copy.deepcopy(base).train()
    config = {"start": NEVER, "every": NEVER}
    config |= {"action": "observe"} if row == "observe" else {}
    probe = DataLoader(TensorDataset(probe_x, probe_y), batch_size=256)
    stream, quotients, plain = batches(x, y, args.batch, 0), [], []
    with ConceptGuard(guarded, probe=probe, config=config) as guard:
        if row == "active":
            correct(guard)
        remark = f", {len(guard.erased)} concepts" if guard.erased else ""
        unguarded = stepping(copy.deepcopy(base), None, compiled=compiled)
        run = (unguarded, stepping(guarded, guard, compiled=compiled))
        for _ in range(args.pairs + 1):
            spent = [0.0, 0.0]
            for turn in range(TURNS[row]):
                block = [next(stream) for _ in range(TURN)]
                for kind in (turn % 2, 1 - turn % 2):
                    work = partial(run[kind], block)
                    spent[kind] += seconds(work, of_cpu=args.cpu_time)
            quotients.append(spent[1] / spent[0])
            plain.append(1000 * spent[0] / (TURN * TURNS[row]))
    # The first pair warms up and compiles.
    return quotients[1:], f"{statistics.median(plain[1:]):.0f} ms per update without{remark}"


def round_quotients(
    base: nn.Module, data: tuple[Tensor, ...], args: argparse.Namespace, seed: int
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
        for _ in range(max(3, args.pairs // 3)):
            passes.append(seconds(forward, of_cpu=args.cpu_time))
            quotients.append(seconds(guard.round, of_cpu=args.cpu_time) / passes[-1])
    return quotients, statistics.median(passes)


def measured(args: argparse.Namespace, seed: int) -> Iterator[tuple[str, str, list[float], str]]:
    """Yield network with mode, row, quotients and a remark."""
    images, labels = images_of(args.data, seed)
    parts = [slice(TRAIN), slice(TRAIN, TRAIN + args.probe)]
    learn, probe = (planted(images[at], labels[at], seed + n) for n, at in enumerate(parts))
    y, probe_y = (labels[at] for at in parts)
    for name in args.networks:
        x, probe_x = (interpolate(normalised(part), NETWORKS[name]) for part in (learn, probe))
        data, base = (x, y, probe_x, probe_y), network(name, seed)
        stream = batches(x, y, args.batch, seed)
        stepping(base, None)([next(stream) for _ in range(args.learn)])
        for mode in args.modes:
            for row in args.rows:
                quotients, remark = update_quotients(
                    base, row, data, args, compiled=mode == "compiled"
                )
                yield f"{name}, {mode}", row, quotients, remark
        if args.rounds:
            quotients, forward = round_quotients(base, data, args, seed)
            yield f"{name}, eager", "round", quotients, f"forward pass {forward:.1f} s"


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10_jpg_20k10k.npz"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS)[:3], choices=NETWORKS)
    parser.add_argument(
        "--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"]
    )
    parser.add_argument("--rows", nargs="+", default=list(TURNS), choices=TURNS)
    parser.add_argument("--cpu-time", action="store_true", help="in place of wall time")
    parser.add_argument("--rounds", action="store_true", help="also time rounds")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=12, help="pairs of stretches per row")
    parser.add_argument("--batch", type=int, default=64, help="images per update")
    parser.add_argument("--learn", type=int, default=20, help="updates before anything is timed")
    parser.add_argument("--probe", type=int, default=PROBE, help="images of the probe")
    return parser.parse_args()


def main() -> None:
    """Measure all, print the table."""
    args, began = options(), time.perf_counter()
    # Or the plain network would be run by the graph of the guarded one, and the other way round.
    dynamo.skip_nnmodule_hook_guards = False
    print(f"images: {args.data if args.data.is_file() else 'random, no file at --data'}")
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.seeds):
        for name, row, quotients, remark in measured(args, seed):
            print(f"{seed} {line(name, row, quotients)} {remark}", flush=True)
            found.setdefault((name, row), []).extend(quotients)
    print(f"\nall {args.seeds} seeds, batches of {args.batch}")
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
        f"{name:30} {row:8} {middle:6.3f} [{low:.3f}, {high:.3f}] of {len(quotients):3} pairs, "
        f"bound {BOUNDS[row]:.2f}: {kept}"
    )


if __name__ == "__main__":
    main()
