"""Checkup: from what stands on the command line to a model, a sample and the loop around them.

Nothing here examines them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from concept_guard.checkup.arguments import Arguments, asked, guard_of, of_script
from concept_guard.checkup.script import against, images_in
from concept_guard.config import GuardConfig, read_yaml
from concept_guard.errors import ConfigError
from concept_guard.examination import Loop, Problem, offenders, settled
from concept_guard.integrations.timm_script import KEY, settings
from concept_guard.training.building import REFUSALS, build_model, first_lines
from concept_guard.training.overrides import override
from concept_guard.training.recipe import Recipe, load_recipe
from concept_guard.training.splits import data_config, open_splits, ordered, updates_per_epoch

SAMPLE = 8  # images
CLASSES = 10  # where neither data nor model tell


@dataclass(eq=False)
class Case:
    """What is examined.

    Attributes:
        name: Of the model.
        config: Settings of the guard, checked or not.
        loop: Around it.
        model: None if it cannot be built.
        sample: A batch for it.
        problems: What is wrong so far.
        facts: What is to be known about the examination.
    """

    name: str
    config: GuardConfig | Mapping[str, object] | None = None
    loop: Loop = field(default_factory=Loop)
    model: nn.Module | None = None
    sample: Tensor | tuple[Tensor, Tensor] | None = None
    problems: list[Problem] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def case_of(source: str, words: Sequence[str]) -> Case:
    """Return what a command line asks to be examined.

    Args:
        source: A timm model, a recipe or a YAML of timm's train.py, or that script.
        words: `key=value`; behind a script its own arguments.

    Returns:
        The case.
    """
    if source.endswith(".py"):
        return _of_script(list(words), [], whole=True)
    if source.endswith((".yaml", ".yml")):
        data, _ = read_yaml(source)
        if _is_recipe(data):
            return _of_recipe(source, words)
        return _of_script(["--config", source], words, whole=False)
    return _of_model(source, words)


def _is_recipe(data: Mapping[str, object]) -> bool:
    if "guard" in data or KEY in data:
        return "guard" in data
    return not any(k in Arguments.model_fields and k not in Recipe.model_fields for k in data)


def _of_model(source: str, words: Sequence[str]) -> Case:
    arguments = asked(source, words)
    case = Case(source, guard_of(arguments))
    case.loop = _loop(arguments)
    _build(case, arguments, fits_the_size=True)
    case.facts.append("random weights and random images; data are not looked at")
    return case


def _of_script(words: list[str], changes: Sequence[str], *, whole: bool) -> Case:
    arguments, data = of_script(words, changes)
    case = Case(arguments.model, loop=_loop(arguments))
    block: dict[str, object] = {KEY: {}}
    try:
        block[KEY] = settings(words)
    except ConfigError as error:
        case.problems += offenders(KEY, error)
    for text in changes:
        if text.startswith(f"{KEY}."):
            override(block, {}, text)
    config: Any = block[KEY]
    config.pop("log_dir", None)
    case.config = config
    if not config:
        case.facts.append(f"no {KEY}: block, so that the guard has its default settings")
    action = settled(config)[0].action
    case.problems += against(arguments, data, action, whole=whole)
    _build(case, arguments, fits_the_size=False)
    if case.model is not None:
        _count(case, arguments, config)
    case.facts.append("random weights and random images of the size that the script would use")
    return case


def _of_recipe(path: str, words: Sequence[str]) -> Case:
    try:
        recipe = load_recipe(path, words)
    except ConfigError as error:
        return _of_broken_recipe(path, words, offenders(path, error))
    case = Case(recipe.model, recipe.guard)
    try:
        splits = open_splits(recipe)
        size = int(data_config(recipe)["input_size"][-1])
        case.model = build_model(recipe, len(splits.classes), size).to(_device(recipe.device, case))
        images, labels = next(iter(ordered(splits.probe, recipe)))
    except ConfigError as error:
        case.problems += [Problem.of(path, error)]
        return case
    steps = updates_per_epoch(splits.sizes["train"], recipe.batch_size)
    if recipe.guard.steps_per_epoch is None:
        case.config = recipe.guard.model_copy(update={"steps_per_epoch": steps})
    case.sample = images[:SAMPLE], labels[:SAMPLE]
    case.loop = Loop(
        batch_size=recipe.batch_size,
        updates=steps * recipe.epochs,
        probe_images=splits.sizes["probe"],
    )
    return case


def _of_broken_recipe(path: str, words: Sequence[str], problems: list[Problem]) -> Case:
    """Return what can be examined of a recipe that cannot be run."""
    data, _ = read_yaml(path)
    for text in words:
        try:
            override(data, {}, text)
        except (ConfigError, ValueError):
            continue  # listed already
    guard = data.get("guard")
    config = settled(guard)[0] if isinstance(guard, dict) else GuardConfig()
    if config.steps_per_epoch is None:  # that is known only to a recipe that can be run
        config = config.model_copy(update={"steps_per_epoch": 100})
    kept = {k: data[k] for k in ("model", "model_kwargs", "img_size") if data.get(k) is not None}
    case = Case(str(kept.get("model", path)), config, Loop(batch_size=64), problems=problems)
    try:
        arguments = Arguments(num_classes=CLASSES, **kept)  # type: ignore[arg-type]
    except ConfigError:
        return case
    if not _is_model(arguments.model):
        return case  # listed already
    _build(case, arguments, fits_the_size=True)
    case.facts.append("examined as far as the recipe can be read")
    return case


def _loop(arguments: Arguments) -> Loop:
    return Loop(
        compile=arguments.torchcompile,
        compile_mode=arguments.torchcompile_mode,
        grad_checkpointing=arguments.grad_checkpointing,
        autocast=arguments.amp_dtype if arguments.amp else None,
        channels_last=arguments.channels_last,
        batch_size=arguments.batch_size,
    )


def _build(case: Case, arguments: Arguments, *, fits_the_size: bool) -> None:
    """Build the model and a sample of random images for it, or say why that cannot be done."""
    import timm
    from timm.data import resolve_data_config

    name, kwargs = arguments.model, dict(arguments.model_kwargs)
    if not _is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        mend = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        case.problems.append(Problem("model", f"timm has no model {name!r}", "", mend, stops=True))
        return
    known = timm.models.get_pretrained_cfg(name)
    size = (arguments.input_size or (3, arguments.img_size, arguments.img_size))[1:]
    if fits_the_size and size[0] and known is not None and known.fixed_input_size:
        kwargs.setdefault("img_size", size)
    if arguments.initial_checkpoint and not Path(arguments.initial_checkpoint).is_file():
        found = f"no file {arguments.initial_checkpoint}"
        case.problems.append(
            Problem("--initial-checkpoint", found, "", "give the weights", stops=True)
        )
        arguments = arguments.model_copy(update={"initial_checkpoint": ""})
    channels = arguments.in_chans or (arguments.input_size or (3,))[0]
    torch.manual_seed(0)
    try:
        model: nn.Module = timm.create_model(
            name,
            num_classes=arguments.num_classes,
            in_chans=channels,
            drop_rate=arguments.drop,
            drop_path_rate=arguments.drop_path,
            global_pool=arguments.gp,
            checkpoint_path=arguments.initial_checkpoint,
            **kwargs,
        )
    except REFUSALS as error:
        found = f"timm.create_model({name!r}) refuses its arguments: {first_lines(error)}"
        mend = "change model_kwargs, num_classes or the weights"
        case.problems.append(Problem("model", found, "", mend, stops=True))
        return
    dtype = None if arguments.model_dtype is None else getattr(torch, arguments.model_dtype)
    case.model = model.to(_device(arguments.device, case), dtype)
    shape = resolve_data_config(vars(arguments), model=model)["input_size"]
    generator = torch.Generator().manual_seed(0)
    case.sample = torch.randn(SAMPLE, *shape, generator=generator)


def _is_model(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


def _count(case: Case, arguments: Arguments, config: dict[str, Any]) -> None:
    """Say how long the training is and how large the probe, as far as an image folder tells."""
    num_classes = int(getattr(case.model, "num_classes", 0))
    sizes = images_in(arguments, num_classes, case.problems)
    steps = math.ceil(sizes.get("train", 0) // arguments.batch_size / arguments.grad_accum_steps)
    if steps:
        config.setdefault("steps_per_epoch", steps)
        case.loop = replace(case.loop, updates=steps * arguments.epochs)
    else:
        config.setdefault("steps_per_epoch", 1000)  # whatever it is, the script knows
        case.facts.append("the length of an epoch is not known here; 1000 updates are assumed")
    if "val" in sizes:
        case.loop = replace(case.loop, probe_images=sizes["val"])


def _device(name: str, case: Case) -> torch.device:
    there = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and there == "cpu":
        case.facts.append(f"examined on the CPU: {name} is not available here")
    return torch.device(there if name == "auto" or name.startswith("cuda") else name)
