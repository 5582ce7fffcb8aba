"""Does what was unlearnt come back: after baking, and while the guard stays on.

Question: a network that the guard corrected is trained on, once plainly after baking and once with
the guard; how many images with the shortcut are right then, and how many of a network that never
saw the shortcut in training and is then trained on it for as long?
Data and networks: the task "cifar patch" of `run.py`; every leg has the task's own few epochs.
Command: python benchmarks/unlearning/leak.py [--seeds 5]
Expected: see ../README.md. Run time on 2 cores: about 10 minutes per seed.
"""

import argparse
import copy
from pathlib import Path

from guarded import descend_guarded, probe_of, settings
from run import scores
from splits import Split, Splits
from tables import Rows
from tasks import Descent, Task, base, batches, plain, registry
from torch import nn

from concept_guard import ConceptGuard

TASK = "cifar patch"


def with_guard(task: Task, start: nn.Module, data: Splits, seed: int, legs: int) -> nn.Module:
    """Return the network after so many times the task's epochs with one guard, baked at the end."""
    model = copy.deepcopy(start)
    config = settings(task, data, seed)
    with ConceptGuard(model, probe=probe_of(data.probe), config=config) as guard:
        for leg in range(legs):
            optimizer = Descent(task, model, len(data.train), task.epochs)
            stream = batches(task, data.train, task.epochs, seed + 1 + leg)
            descend_guarded(model, optimizer, guard, stream)
        guard.bake()
    return model


def further(task: Task, model: nn.Module, train: Split, seed: int) -> nn.Module:
    """Return a copy of the network after the task's epochs of plain training."""
    new = copy.deepcopy(model)
    plain(task, new, train, task.epochs, seed)
    return new


def main() -> None:
    """Fill in what is missing and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("unlearning_results"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    args = parser.parse_args()
    rows = Rows(args.out / "leak.csv")
    tasks = registry(args.data, Path())
    task, clean = tasks[TASK], tasks["cifar clean"]
    networks = args.out / "networks"
    for seed in range(args.seeds):
        if rows.has(TASK, seed, "never saw it, plain epochs on it"):
            continue
        data = task.draw(seed)
        start = base(task, data, seed, networks)
        baked = with_guard(task, start, data, seed, legs=1)
        longer = further(task, start, data.train, seed + 1)
        innocent = base(clean, clean.draw(seed), seed, networks)
        for name, model in (
            ("baked", baked),
            ("baked, plain epochs", further(task, baked, data.train, seed + 2)),
            ("guard left on", with_guard(task, start, data, seed, legs=2)),
            ("plain longer", longer),
            ("plain longer, as many more", further(task, longer, data.train, seed + 2)),
            ("never saw it", innocent),
            ("never saw it, plain epochs on it", further(task, innocent, data.train, seed + 2)),
        ):
            rows.add(TASK, seed, name, scores(model, data), "", 0.0)


if __name__ == "__main__":
    main()
