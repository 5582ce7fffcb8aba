"""The output folder of a run: claiming it, and saving and loading what a resumed run needs.

Nothing here knows how training works.
"""

from __future__ import annotations

import csv
import os
import pickle
import random
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from concept_guard.errors import StateError
from concept_guard.training.recipe import Recipe

SCHEMA_VERSION = 1
CHECKPOINT = "last.pth.tar"
# Keys that may differ between a run and its continuation, because they do not change the result.
_FREE = ("resume", "output", "experiment", "log_interval", "workers", "device")


def claim_folder(recipe: Recipe, size: int) -> Path:
    """Return the output folder of a run, made if it is new.

    Args:
        recipe: Names the folder, or leaves the name to time, model and size.
        size: Side of the images, part of the default name.

    Returns:
        The folder, which may not exist yet; `write_args` makes it this run's.

    Raises:
        StateError: If the folder holds another run, or there is nothing to resume in it.
    """
    if recipe.experiment is None:
        folder = _unused(Path(recipe.output), f"{recipe.model}-{size}")
    else:
        folder = Path(recipe.output, recipe.experiment)
    taken = (folder / "args.yaml").exists() or (folder / CHECKPOINT).exists()
    if taken and not recipe.resume:
        raise StateError(
            f"{folder} holds the state of another run, which is kept. Choose another folder "
            "(experiment=NAME), or continue that run (resume=true)."
        )
    if recipe.resume and not taken:
        raise StateError(
            f"{folder} holds no run to resume. Expected args.yaml in it; {_runs(folder)}"
        )
    return folder


def _unused(output: Path, name: str) -> Path:
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{name.replace('.', '_')}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(output / name for name in names if not (output / name).exists())


def _runs(folder: Path) -> str:
    found = sorted(path.parent.name for path in folder.parent.glob("*/args.yaml"))
    return f"runs in {folder.parent}: {', '.join(found[-5:]) or 'none'}."


def write_args(folder: Path, recipe: Recipe) -> None:
    """Write the recipe with every default filled in as `args.yaml`, a recipe itself.

    Args:
        folder: The run's folder.
        recipe: The recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plain_recipe(recipe), sort_keys=False, allow_unicode=True)
    replace_text(folder / "args.yaml", text)


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain data, loadable under `weights_only=True`."""
    return recipe.model_dump(mode="json", by_alias=True)


def write_summary(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write `summary.csv`, one row per finished epoch, in the manner of timm.

    Args:
        folder: The folder of the run.
        history: The rows; all have the keys of the first.
    """
    with (folder / "summary.csv.part").open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    os.replace(folder / "summary.csv.part", folder / "summary.csv")


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that an interruption leaves the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf8")
    os.replace(part, path)


def save_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `last.pth.tar` so that an interruption leaves the old or the new one.

    Args:
        folder: The folder of the run.
        state: timm's keys, and the loop's under `concept_guard`; tensors and plain data only.
    """
    part = folder / f"{CHECKPOINT}.part"
    torch.save(dict(state), part)
    os.replace(part, folder / CHECKPOINT)


def load_checkpoint(folder: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote, if it belongs to this recipe.

    Args:
        folder: The folder of the run.
        recipe: The recipe that is to be continued.

    Returns:
        The state, or None if the run was stopped before the first checkpoint.

    Raises:
        StateError: If the file is damaged, of another schema, or of another recipe.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        own = state["concept_guard"]
        version, written = own["schema_version"], state["args"]
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
        raise StateError(
            f"{path}: not a checkpoint of concept-guard run ({type(error).__name__}). "
            "Move it away, or choose another experiment=NAME."
        ) from error
    if version != SCHEMA_VERSION:
        raise StateError(
            f"{path}: written with schema {version}, expected {SCHEMA_VERSION}. Resume it with "
            "the version that wrote it, or choose another experiment=NAME."
        )
    _same_recipe(path, written, plain_recipe(recipe))
    return state


def _same_recipe(path: Path, written: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    keys = [key for key in {**written, **asked} if key not in _FREE]
    changed = [
        f"{key}: {written.get(key)!r} then, {asked.get(key)!r} now"
        for key in keys
        if written.get(key) != asked.get(key)
    ]
    if changed:
        raise StateError(
            f"{path}: belongs to another recipe ({'; '.join(changed)}). Set these keys as they "
            "were, or choose another experiment=NAME."
        )


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator as tensors and plain data.

    Args:
        device: The device that is trained on.

    Returns:
        What `set_random_state` takes.
    """
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": random.getstate(),
        "numpy": (
            str(kind),
            [int(key) for key in keys],
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put every global generator back to where `random_state` found it.

    Args:
        state: The return value of `random_state`.
        device: The device that is trained on.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    cuda: Tensor | None = state["cuda"]
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(cuda, device)


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators.

    Args:
        seed: The same seed gives the same weights, data order and noise.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - models and transforms may draw from it
    torch.manual_seed(seed)
