"""How a script like timm's train.py comes to build a task with a guard, without a changed line.

The probe is the script's validation loader. The settings stand under `concept_guard:` in the YAML
of `--config`, or in a file named by CONCEPT_GUARD_CONFIG; `log_dir` beside them names the folder
for TensorBoard, `output/concept_guard/<time>-<model>` if it is not there.
"""

import argparse
import atexit
import copy
import os
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import yaml
from torch.utils.data import DataLoader

from concept_guard.errors import ConfigError
from concept_guard.integrations.held_out import warn_if_trained_on
from concept_guard.integrations.timm_task import ConceptGuardTask
from concept_guard.probe import is_share, reordered

VARIABLE = "CONCEPT_GUARD_CONFIG"
KEY = "concept_guard"
OTHER_TASKS = ("LogitDistillationTask", "FeatureDistillationTask", "TokenDistillationTask")


def settings(arguments: list[str]) -> dict[str, Any]:
    """Return the settings of the guard that a command line or the environment leads to.

    A `ConfigError` says which file cannot be read, or holds something else.

    Args:
        arguments: Of the script.

    Returns:
        Keys of `GuardConfig`, and possibly `log_dir`.
    """
    file, named = _given(arguments).config, os.environ.get(VARIABLE)
    if named:
        return _mapping(_read(named), f"{VARIABLE}={named}")
    return _mapping(_mapping(_read(file), file).get(KEY), f"{file}: {KEY}") if file else {}


def updates_in(loader: Any, arguments: list[str]) -> int:
    """Return the optimizer updates in an epoch of a script.

    Args:
        loader: Of its training images.
        arguments: Of the script.

    Returns:
        Their number, one per `--grad-accum-steps` batches.
    """
    given = _given(arguments)
    batches = given.grad_accum_steps
    if batches is None:
        whole = _mapping(_read(given.config), given.config) if given.config else {}
        batches = whole.get("grad_accum_steps", 1)
    return -(-len(loader) // max(1, int(batches)))


def undivided(loader: Any) -> Any:
    """Return a loader of timm over the whole dataset, not this process's share of it.

    Args:
        loader: Of timm; with a prefetcher it has another one inside.

    Returns:
        The same loader where it is not divided.
    """
    inner = getattr(loader, "loader", loader)
    if not isinstance(inner, DataLoader) or not is_share(inner.sampler):
        return loader
    new = reordered(inner, range(len(inner.dataset)), seed=0)  # type: ignore[arg-type]
    if inner is loader:
        return new
    prefetching = copy.copy(loader)
    prefetching.loader = new
    return prefetching


def _given(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--grad-accum-steps", type=int)
    return parser.parse_known_args(arguments)[0]


def _read(path: str) -> Any:
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _mapping(found: Any, place: str) -> dict[str, Any]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(
            f"{place} is a {type(found).__name__}, expected settings such as `every: 200`"
        )
    return dict(found)


def guard_script(script: ModuleType, arguments: list[str]) -> None:
    """Have a script like timm's train.py build a task with a guard.

    Args:
        script: The module of the script, usually `__main__`.
        arguments: Its command line.

    Raises:
        ConfigError: If the script is not one of that kind, or the settings cannot be read.
    """
    missing = [n for n in ("ClassificationTask", "create_loader") if not hasattr(script, n)]
    if missing:
        raise ConfigError(
            f"{getattr(script, '__file__', script.__name__)} has no {' and no '.join(missing)}, "
            "expected a train.py of timm 1.0.31 or later; in another script build "
            "concept_guard.integrations.timm_task.ConceptGuardTask, or use ConceptGuard"
        )
    config = settings(arguments)
    log_dir = config.pop("log_dir", None)
    loaders: list[Any] = []
    trained: list[Any] = []
    make_loader: Callable[..., Any] = script.create_loader

    @wraps(make_loader)
    def create_loader(*args: Any, **kwargs: Any) -> Any:
        loader = make_loader(*args, **kwargs)
        if kwargs.get("is_training", False):
            trained.append(loader)
            config.setdefault("steps_per_epoch", updates_in(loader, arguments))
        else:
            loaders.append(loader)
        return loader

    def task(model: Any, *args: Any, **kwargs: Any) -> ConceptGuardTask:
        if not loaders:
            raise ConfigError(
                "the guard reads held-out images, and the script built no validation loader; "
                "give it a validation split (--val-split)"
            )
        for loader in trained:
            warn_if_trained_on(loaders[-1], loader)
        folder = log_dir or _folder(type(model).__name__)
        new = ConceptGuardTask(
            model, *args, probe=undivided(loaders[-1]), config=config, log_dir=folder, **kwargs
        )
        atexit.register(new.guard.close)
        return new

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ConfigError("distillation is not guarded; leave out --kd-model-name, or the guard")

    script.create_loader = create_loader  # type: ignore[attr-defined]
    script.ClassificationTask = task  # type: ignore[attr-defined]
    for name in OTHER_TASKS:
        if hasattr(script, name):
            setattr(script, name, refuse)


def _folder(model: str) -> str:
    return str(Path("output", "concept_guard", f"{datetime.now():%Y%m%d-%H%M%S}-{model.lower()}"))
