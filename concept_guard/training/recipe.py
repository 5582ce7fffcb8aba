"""The recipe of a training run: its keys, their values, and how the command line changes them.

Nothing here knows how data are read, how a model is trained or what the guard does.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from concept_guard.config import GuardConfig
from concept_guard.strict import (
    Location,
    StrictModel,
    expand_path,
    read_yaml,
    validated,
)
from concept_guard.training.digits import Planted
from concept_guard.training.images import split_folder
from concept_guard.training.overrides import override_all

_FOLDER_DEFAULTS: dict[str, object] = {
    "train_split": "train",
    "test_split": "test",
    "val_split": None,
    "crop_pct": None,
    "aug": "rrc",
    "on_unreadable": "skip",
    "workers": 0,
}


def _expanded(value: object) -> object:
    return expand_path(value) if isinstance(value, str) else value


def _three(value: object) -> object:
    # YAML has lists, a frozen model holds tuples.
    if isinstance(value, list | tuple) and len(value) != 3:
        raise ValueError("expected three numbers, one per colour channel")
    return tuple(value) if isinstance(value, list) else value


def _usable(device: str) -> str:
    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"not usable here ({reason}); use auto or cpu") from error
    return device


def _one_folder(name: str) -> str:
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError("expected the name of one folder, without slashes")
    return name


# Also of the settings of an audit.
PathText = Annotated[str, BeforeValidator(_expanded)]
Device = Annotated[str, AfterValidator(_usable)]
FolderName = Annotated[str, AfterValidator(_one_folder)]
_Colour = Annotated[tuple[float, ...] | None, BeforeValidator(_three)]
_Share = Annotated[float, Field(gt=0, lt=1)]


class Recipe(StrictModel):
    """Everything that decides a training run; keys are timm's flags with underscores.

    Attributes:
        data_dir: Image folder: `<split>/<class>/<image>`. Either this or `dataset`.
        dataset: `digits`: scikit-learn's 1,797 handwritten digits, embedded.
        train_split: Sub-folder with the training images.
        val_split: Sub-folder with the probe; without it `val_fraction` is held out.
        test_split: Sub-folder with the images of the final table.
        val_fraction: Share of the training images held out as probe, by class and seed.
        planted: Shortcut planted into the digits.
        model: Any timm model name.
        model_kwargs: Further arguments of `timm.create_model`.
        checkpoint_path: Weights to start from; their head is replaced if the classes differ.
        img_size: Side of the images in pixels; default: what the model was made for.
        mean: Mean per channel for normalisation; default: the model's.
        std: Standard deviation per channel; default: the model's.
        crop_pct: Central share of the image that is evaluated; default: the model's.
        aug: Training augmentation: none, flip, or rrc (random resized crop and flip).
        on_unreadable: Leave unreadable images out with a warning, or stop.
        workers: Processes that read images.
        batch_size: Images per optimizer update.
        epochs: Passes over the training images.
        opt: Optimizer, made by timm.
        lr: Peak learning rate.
        momentum: Momentum of SGD, 0.9 by default.
        weight_decay: Weight decay, not applied to norms and biases.
        sched: Learning rate schedule, set after every update.
        warmup_epochs: Epochs of linear warm-up.
        seed: Seed of splits, weights, data order and, unless set there, of the guard.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        log_interval: Updates between log lines where there is no progress bar.
        output: Folder that collects runs.
        experiment: Folder of this run in `output`; default: time, model and size.
        resume: Continue the run in `experiment` from its last checkpoint.
        compare: Train the same model without the guard first, and print both.
        guard: The guard's settings.
    """

    model_config = ConfigDict(validate_default=True)

    data_dir: PathText | None = None
    dataset: Literal["digits"] | None = None
    train_split: str | None = None
    val_split: str | None = None
    test_split: str | None = None
    val_fraction: _Share | None = None
    planted: Planted | None = None
    model: str
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    checkpoint_path: PathText | None = None
    img_size: int | None = Field(default=None, ge=8)
    mean: _Colour = None
    std: _Colour = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    aug: Literal["none", "flip", "rrc"] | None = None
    on_unreadable: Literal["skip", "stop"] | None = None
    workers: int | None = Field(default=None, ge=0)
    batch_size: int = Field(default=64, ge=2)
    epochs: int = Field(ge=1)
    opt: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    sched: Literal["cosine"] = "cosine"
    warmup_epochs: float = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: Device = "auto"
    log_interval: int = Field(default=50, ge=1)
    output: PathText = "output/train"
    experiment: FolderName | None = None
    resume: bool = False
    compare: bool = False
    guard: GuardConfig = Field(default_factory=GuardConfig)

    @field_validator("data_dir")
    @classmethod
    def _folder_exists(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_dir():
            raise ValueError("no such folder; give it on the command line as data_dir=FOLDER")
        return value

    @field_validator("dataset")
    @classmethod
    def _one_source(cls, value: str | None, info: ValidationInfo) -> str | None:
        if "data_dir" in info.data and (value is None) == (info.data["data_dir"] is None):
            raise ValueError("expected either data_dir (an image folder) or dataset: digits")
        return value

    @field_validator(*_FOLDER_DEFAULTS, mode="before")
    @classmethod
    def _folder_only(cls, value: object, info: ValidationInfo) -> object:
        digits = info.data.get("dataset") == "digits"
        if digits and value is not None:
            raise ValueError("has no effect on dataset: digits; remove it")
        return _FOLDER_DEFAULTS[str(info.field_name)] if value is None and not digits else value

    @field_validator("train_split", "val_split", "test_split")
    @classmethod
    def _split_exists(cls, value: str | None, info: ValidationInfo) -> str | None:
        root = info.data.get("data_dir")
        if root and value and split_folder(root, value) is None:
            folders = ", ".join(sorted(item.name for item in Path(root).iterdir() if item.is_dir()))
            raise ValueError(f"no folder {value!r} in {root}; set it to one of: {folders or '-'}")
        return value

    @field_validator("val_fraction")
    @classmethod
    def _one_probe(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.data.get("val_split") is None:
            return value or (1 / 3 if info.data.get("dataset") else 0.2)
        if value is not None:
            raise ValueError("expected either val_split or val_fraction; remove one")
        return value

    @field_validator("planted")
    @classmethod
    def _digits_only(cls, value: Planted | None, info: ValidationInfo) -> Planted | None:
        if value is not None and info.data.get("dataset", "digits") != "digits":
            raise ValueError("only dataset: digits can carry a planted shortcut; remove the block")
        return value

    @field_validator("model")
    @classmethod
    def _known_model(cls, value: str) -> str:
        import timm  # heavy, and only needed to check a name

        if not timm.is_model(value):
            near = get_close_matches(value, timm.list_models(), n=3)
            raise ValueError(f"timm has no such model; nearest: {', '.join(near) or '(none)'}")
        return value

    @field_validator("checkpoint_path")
    @classmethod
    def _weights_exist(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_file():
            raise ValueError("no such file; give it on the command line as checkpoint_path=FILE")
        return value

    @field_validator("img_size", "mean", "std")
    @classmethod
    def _digits_size(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.data.get("dataset") == "digits":
            return 32 if info.field_name == "img_size" else (0.5, 0.5, 0.5)
        return value

    @field_validator("momentum")
    @classmethod
    def _sgd_only(cls, value: float | None, info: ValidationInfo) -> float | None:
        sgd = info.data.get("opt") == "sgd"
        if value is not None and not sgd:
            raise ValueError("only opt: sgd has a momentum; remove it")
        return 0.9 if value is None and sgd else value

    @field_validator("warmup_epochs")
    @classmethod
    def _shorter_than_run(cls, value: float, info: ValidationInfo) -> float:
        if value >= info.data.get("epochs", float("inf")):
            raise ValueError(f"expected less than epochs = {info.data['epochs']}")
        return value

    @field_validator("resume")
    @classmethod
    def _names_the_run(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("experiment", "") is None:
            raise ValueError("name the run to continue: experiment=<its folder in output>")
        return value

    @field_validator("guard")
    @classmethod
    def _same_seed(cls, value: GuardConfig, info: ValidationInfo) -> GuardConfig:
        if "seed" in value.model_fields_set:
            return value
        return value.model_copy(update={"seed": info.data.get("seed", value.seed)})


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe in a YAML file, changed by `key=value` texts.

    A `ConfigError` has every offender: line or override, key, value and expectation.

    Args:
        path: The recipe.
        overrides: For example `epochs=3` or `guard.alpha=0.01`; values are read as YAML.

    Returns:
        The checked recipe with every default filled in.
    """
    data, lines = read_yaml(path)
    places: dict[Location, int | str] = {**lines}
    override_all(data, places, overrides)
    return validated(Recipe, data, places, str(path))
