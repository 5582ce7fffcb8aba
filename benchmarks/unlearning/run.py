"""Does unlearning stick: the guard against every rival, on the same networks and images.

Question: with a shortcut nobody named, how many test images without it, or with it on the wrong
class, are right after the same amount of training; and what does it cost where there is none?
Data: see `splits.py`; CIFAR-10 (Krizhevsky 2009) and BAR (Nam et al. 2020) as npz of JPEG bytes,
MNIST's 10,000 test digits, squares and glyphs drawn by a seed. Networks: see `tasks.py`.
Command: python benchmarks/unlearning/run.py [--tasks "cifar patch"] [--methods guard] [--seeds 5]
Expected: see ../README.md. Run time on 2 cores: hours for everything, one to ten minutes a cell.

The rows go into `--out` as they come and what is there already is not computed again. All methods
of a seed start from the same stored network. "Guard" rows have one configuration for all tasks.
"""

import argparse
import copy
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from guarded import NEVER, controls, guarded
from labelled import LABELLED, probe_refitted
from rivals import group_dro, jtt, lff, probe_added
from splits import Splits
from tables import Rows, draw, print_tables
from tasks import Task, base, logits_of, plain, registry
from torch import nn

GUARD = {
    "guard": {},
    "guard, project and rebalance": {"action": ["project", "rebalance"]},
    "guard, project": {"action": ["project"]},
    "guard, penalize": {"action": ["penalize"]},
    "guard, rebalance": {"action": ["rebalance"]},
    "guard, augment": {"action": ["augment"]},
    "guard without augment": {"action": ["project", "rebalance", "refit"]},
    "guard, refit": {"action": ["refit"]},
    "guard, fixed": {"action": ["project"], "every": NEVER, "track_every": NEVER},
}
CONTROLS = ("erased once, signal", "erased once, filter", "erased once, random")
FREE = {"JTT": jtt, "LfF": lff}
GIVEN = {"probe refitted": probe_refitted, "probe added": probe_added}
METHODS = (
    "plain",
    "plain longer",
    *GUARD,
    *CONTROLS,
    *FREE,
    *GIVEN,
    "GroupDRO",
    *LABELLED,
)


def scores(model: nn.Module, data: Splits) -> dict[str, float]:
    """Return the accuracy on every test, and in the worst group where there are groups."""
    found = {}
    for name, test in data.tests.items():
        right = (logits_of(model, test.images).argmax(1) == test.labels).float()
        found[name] = float(right.mean())
        if len(test.marks.unique()) > 1:
            group = test.labels * (int(test.marks.max()) + 1) + test.marks
            found["worst group"] = min(float(right[group == g].mean()) for g in group.unique())
    return found


def trained(
    task: Task, data: Splits, start: nn.Module, seed: int, wanted: set[str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield every wanted method's network with a note."""
    marked = bool((data.train.marks >= 0).all()) and len(data.train.marks.unique()) > 1
    if "plain" in wanted:
        yield "plain", start, ""
    if "plain longer" in wanted:
        model = copy.deepcopy(start)
        plain(task, model, data.train, task.epochs, seed + 1)
        yield "plain longer", model, ""
    for name, changes in GUARD.items():
        if name in wanted:
            yield name, *guarded(task, start, data, seed, **changes)
    if wanted & {*CONTROLS}:
        yield from controls(task, start, data, seed)
    for name, train in FREE.items():
        if name in wanted:
            yield name, train(task, data, seed), ""
    for name, fit in GIVEN.items():
        if name in wanted:
            yield name, fit(task, start, data, seed), ""
    if not marked:  # nothing that needs the attribute
        return
    if "GroupDRO" in wanted:
        yield "GroupDRO", group_dro(task, data, seed), ""
    for name, fit in LABELLED.items():
        if name in wanted:
            yield name, fit(task, start, data, seed), ""


def arguments(tasks: list[str]) -> argparse.Namespace:
    """Return the checked arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default=",".join(tasks), help="comma separated")
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("unlearning_results"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("../shared/weights/mobilenetv2_100.tf_ptq_in1k.safetensors"),
    )
    args = parser.parse_args()
    args.tasks, args.methods = args.tasks.split(","), args.methods.split(";")
    for option, given, known in (
        ("--tasks", args.tasks, tasks),
        ("--methods", args.methods, METHODS),
    ):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{option}: {unknown} are not there, only {', '.join(known)}")
    for name in ("cifar10_jpg_20k10k.npz", "mnist_t10k.npz", "bar4_licensed_128.npz"):
        if not (args.data / name).is_file():
            parser.error(f"--data {args.data}: no {name}; expected the packs described above")
    return args


def main() -> None:
    """Fill in what is missing, print the tables, draw the figure."""
    args = arguments(list(registry(Path(), Path())))
    rows = Rows(args.out / "unlearning.csv")
    tasks = registry(args.data, args.weights)
    for seed in range(args.seeds):
        for task in map(tasks.__getitem__, args.tasks):
            wanted = {m for m in args.methods if not rows.has(task.name, seed, m)}
            if not wanted:
                continue
            data = task.draw(seed)
            start = base(task, data, seed, args.out / "networks")
            began = time.perf_counter()
            for name, model, note in trained(task, data, copy.deepcopy(start), seed, wanted):
                seconds = time.perf_counter() - began
                rows.add(task.name, seed, name, scores(model, data), note, seconds)
                began = time.perf_counter()
    print_tables(rows.read)
    draw(rows.read, args.out / "unlearning.png")
    print(f"torch {torch.__version__} on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
