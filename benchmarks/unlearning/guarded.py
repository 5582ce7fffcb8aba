"""The guard in the unlearning benchmark, and the controls that share its discovery.

Everything here goes through the public front door. One configuration serves all tasks.
"""

import copy
from collections.abc import Iterator

import torch
from labelled import head_of, rows_of
from splits import Split, Splits
from tasks import Descent, Task, batches, normalised
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import ConceptGuard

NEVER = 10**6


def probe_of(split: Split) -> DataLoader[tuple[Tensor, ...]]:
    """Return the probe as the guard takes it: images and labels, no marks."""
    return DataLoader(TensorDataset(normalised(split.images), split.labels), batch_size=250)


def settings(task: Task, data: Splits, seed: int) -> dict[str, object]:
    """Return the guard's settings: a round per epoch, from the first update on; else defaults."""
    per_epoch = -(-len(data.train) // task.batch)
    return {"start": 1, "every": per_epoch, "seed": seed}


def guarded(
    task: Task, model: nn.Module, data: Splits, seed: int, **changes: object
) -> tuple[nn.Module, str]:
    """Train on with the guard and fold its correction in; return the network and what was flagged.

    Args:
        task: How it is trained.
        model: The plainly trained network; a copy is trained.
        data: The training images are learnt, the probe is watched.
        seed: Of the order and the guard.
        **changes: To the guard's settings.

    Returns:
        The network and one word per erased concept: its class and, if the marks are known, the
        share of the examples of its flag that have the mark the most of them have.
    """
    new = copy.deepcopy(model)
    optimizer = Descent(task, new, len(data.train), task.epochs)
    config = settings(task, data, seed) | changes
    with ConceptGuard(new, probe=probe_of(data.probe), config=config) as guard:
        descend_guarded(new, optimizer, guard, batches(task, data.train, task.epochs, seed + 1))
        note = flagged(guard, data.probe)
        guard.bake()
    return new, note


def descend_guarded(
    model: nn.Module,
    optimizer: Descent,
    guard: ConceptGuard,
    stream: Iterator[tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Train in the loop of the README."""
    model.train()
    for images, labels, _ in stream:
        loss = functional.cross_entropy(model(images), labels, reduction="none")
        optimizer.step(guard.loss(loss, labels))
        guard.step()


def flagged(guard: ConceptGuard, probe: Split) -> str:
    """Return the erased concepts: class, and the commonest mark of the flag's examples."""
    words = []
    for flag in guard.report.flags if guard.report else ():
        if flag.status == "erased":
            marks = probe.marks[list(flag.examples)]
            value, count = marks.mode().values, int((marks == marks.mode().values).sum())
            words.append(f"{flag.class_index}:{int(value)}({count}/{len(marks)})")
    return " ".join(words) or "nothing"


def controls(
    task: Task, model: nn.Module, data: Splits, seed: int
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the network erased once along signal, filter and random directions, never trained on.

    The guard's first round says which concepts; each move is as long as the guard's projection is.
    """
    del task
    new = copy.deepcopy(model).eval()
    config = {"action": ["project"], "seed": seed}
    with ConceptGuard(new, probe=probe_of(data.probe), config=config) as guard:
        guard.round()
        note = flagged(guard, data.probe)
        concepts = (
            [c for c in guard.report.concepts if c.id in guard.erased] if guard.report else []
        )
        rows = rows_of(model, data.probe.images)
        moved = rows - rows_of(new, data.probe.images)
        guard.bake()
    yield "erased once, signal", new, note
    filters = [functional.normalize(c.filter, dim=0) for c in concepts]
    draw = torch.Generator().manual_seed(seed)
    for name in ("filter", "random"):
        yield f"erased once, {name}", turned(model, rows, moved, filters, name, draw), note


def turned(
    model: nn.Module,
    rows: Tensor,
    moved: Tensor,
    filters: list[Tensor],
    name: str,
    draw: torch.Generator,
) -> nn.Module:
    """Return the network whose rows are moved as far as the projection moves them, elsewhere."""
    new = copy.deepcopy(model)
    if not filters:
        return new
    _, sizes, signals = torch.linalg.svd(moved - moved.mean(dim=0), full_matrices=False)
    signals = signals[: min(len(filters), int((sizes > 1e-4 * sizes[0]).sum()))]
    other = torch.stack(filters)[: len(signals)]
    if name == "random":
        other = functional.normalize(torch.randn(signals.shape, generator=draw), dim=1)
    ones = torch.ones(len(rows), 1)
    affine = torch.linalg.lstsq(torch.cat([rows, ones], 1).double(), (moved @ signals.T).double())
    read, level = affine.solution[:-1].float(), affine.solution[-1].float()
    head = head_of(new)
    with torch.no_grad():  # x -> x - (x R + r) D
        pull = head.weight @ other.T
        head.weight -= pull @ read.T
        head.bias -= pull @ level
    return new
