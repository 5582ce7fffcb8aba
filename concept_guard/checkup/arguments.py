"""Checkup: what timm's train.py would be told, by its YAML, its command line, or key=value.

Nothing here knows what is wrong with it. Only those of its arguments are known here that matter to
a guard; like the script itself, all others pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from timm.utils import ParseKwargs

from concept_guard.config import read_yaml
from concept_guard.strict import Location, StrictModel, validated
from concept_guard.training.overrides import override_all

_Dtype = Literal["float32", "float16", "bfloat16"]


def _as_size(value: object) -> object:
    # One number is the side of a square image of three channels; YAML has lists.
    if isinstance(value, int) and not isinstance(value, bool):
        return (3, value, value)
    if isinstance(value, list | tuple) and len(value) != 3:
        raise ValueError("expected a side in pixels, or [channels, height, width]")
    return tuple(value) if isinstance(value, list) else value


class Arguments(StrictModel):
    """Arguments of timm's train.py, under its own names.

    Attributes:
        model: timm's name of the model.
        model_kwargs: Further arguments of `timm.create_model`.
        num_classes: Default: what the model was made for.
        in_chans: Channels of the images.
        img_size: Side of the images; default: what the model was made for.
        input_size: Channels, height and width; one number stands for a side.
        gp: Global pooling.
        drop: Dropout rate.
        drop_path: Rate of stochastic depth.
        initial_checkpoint: Weights to start from; without it they are drawn at random here.
        model_dtype: Precision of the weights.
        amp: Mixed precision, to `amp_dtype`.
        amp_dtype: float16 or bfloat16.
        channels_last: Memory format.
        grad_checkpointing: Gradient checkpointing.
        torchcompile: Backend of torch.compile.
        torchcompile_mode: Its mode.
        torchscript: Whether the model is scripted.
        batch_size: Images per batch.
        grad_accum_steps: Batches per update.
        epochs: Of the training.
        mixup: Alpha of Mixup, 0 for none.
        cutmix: Alpha of CutMix, 0 for none.
        cutmix_minmax: Ratios of CutMix, which switch it on.
        jsd_loss: Loss over augmented splits.
        kd_model_name: Teacher of a distillation.
        naflex_loader: Loader of dicts with patches.
        data_dir: Image folder.
        dataset: Kind of data set; empty for an image folder.
        train_split: Of the training.
        val_split: Held-out images.
        device_modules: Modules that the script imports first.
        device: Where to examine; here `auto` unless given.
    """

    model: str = "resnet50"
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    num_classes: int | None = Field(default=None, ge=0)
    in_chans: int | None = Field(default=None, ge=1)
    img_size: int | None = Field(default=None, ge=1)
    input_size: Annotated[tuple[int, ...] | None, BeforeValidator(_as_size)] = None
    gp: str | None = None
    drop: float = 0.0
    drop_path: float | None = None
    initial_checkpoint: str = ""
    model_dtype: _Dtype | None = None
    amp: bool = False
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    channels_last: bool = False
    grad_checkpointing: bool = False
    torchcompile: str | None = None
    torchcompile_mode: str | None = None
    torchscript: bool = False
    batch_size: int = Field(default=128, ge=1)
    grad_accum_steps: int = Field(default=1, ge=1)
    epochs: int = Field(default=300, ge=1)
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: list[float] | None = None
    jsd_loss: bool = False
    kd_model_name: str | None = None
    naflex_loader: bool = False
    data_dir: str | None = None
    dataset: str = ""
    train_split: str = "train"
    val_split: str | None = "validation"
    device_modules: list[str] | None = None
    device: str = "auto"


class Asked(Arguments):
    """What `concept-guard doctor MODEL key=value ...` may say.

    Attributes:
        tap: Short for `guard.tap`.
        guard: The guard's settings.
    """

    tap: str | None = None
    guard: dict[str, Any] = Field(default_factory=dict)


def asked(model: str, words: Sequence[str]) -> Asked:
    """Return what the command line asks about a model; a `ConfigError` names every offender.

    Args:
        model: timm's name of it.
        words: For example `num_classes=4` or `guard.alpha=0.01`; values are read as YAML.

    Returns:
        The arguments; settings of the guard are not checked yet.
    """
    data: dict[str, object] = {"model": model}
    places: dict[Location, int | str] = {("model",): "command line"}
    override_all(data, places, words)
    return validated(Asked, data, places, "command line")


def of_script(
    words: Sequence[str], changes: Sequence[str] = ()
) -> tuple[Arguments, dict[str, object]]:
    """Return what a command line of train.py says, its YAML included.

    A `ConfigError` says that the YAML cannot be read, or which values have the wrong type.

    Args:
        words: What follows `train.py`.
        changes: To the YAML, as `key=value`.

    Returns:
        The arguments, and all that is in the YAML.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("-c", "--config")
    file, rest = first.parse_known_args(list(words))
    path = file.config
    data, lines = read_yaml(path) if path else ({}, {})
    places: dict[Location, int | str] = {**lines}
    override_all(data, places, changes)
    known = {k: v for k, v in data.items() if k in Arguments.model_fields and v is not None}
    given, rest = _parser().parse_known_args(rest)
    if rest and not rest[0].startswith("-"):
        known["data_dir"] = rest[0]
    for key, value in vars(given).items():
        known[key], places[key,] = value, "command line"
    return validated(Arguments, known, places, path or "command line"), data


def guard_of(arguments: Asked) -> dict[str, Any]:
    """Return the settings of the guard that were asked for, `tap` among them."""
    short = {} if arguments.tap is None else {"tap": arguments.tap}
    return {**short, **arguments.guard}


def _parser() -> argparse.ArgumentParser:
    """Return a parser of options of train.py; what is not given is left out of its result."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )
    add = parser.add_argument
    for name in ("model", "gp", "initial-checkpoint", "model-dtype", "amp-dtype", "device"):
        add(f"--{name}")
    for name in ("torchcompile-mode", "kd-model-name", "data-dir", "dataset", "train-split"):
        add(f"--{name}")
    add("--val-split")
    for name in ("num-classes", "in-chans", "img-size", "grad-accum-steps", "epochs"):
        add(f"--{name}", type=int)
    add("-b", "--batch-size", type=int)
    add("--input-size", type=int, nargs=3)
    for name in ("drop", "drop-path", "mixup", "cutmix"):
        add(f"--{name}", type=float)
    add("--cutmix-minmax", type=float, nargs="+")
    for name in ("amp", "channels-last", "grad-checkpointing", "torchscript", "jsd-loss"):
        add(f"--{name}", action="store_true")
    add("--naflex-loader", action="store_true")
    add("--torchcompile", nargs="?", const="inductor")
    add("--model-kwargs", nargs="*", action=ParseKwargs)
    add("--device-modules", nargs="+")
    return parser
