"""Audit: what to audit, on which images, and where the result goes.

Nothing here knows how models and images are opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from concept_guard.config import GuardConfig
from concept_guard.strict import Location, StrictModel, read_yaml, validated
from concept_guard.training.overrides import override_all
from concept_guard.training.recipe import Device, FolderName, PathText


def _listed(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value  # a frozen model holds tuples


_Tuple = BeforeValidator(_listed)


class AuditSettings(StrictModel):
    """Everything that decides an audit; keys are those of a recipe where they mean the same.

    Attributes:
        source: A checkpoint (file, or the folder of a run), or the name of a timm model.
        data_dir: Image folder: `<class>/<image>`, or with one sub-folder per split; default: the
            images of the run that trained the model.
        split: Sub-folder to audit, default: validation, else test images, else the folder itself;
            without `data_dir` a split of the run, default: its probe.
        model: timm model name, for weights that do not say which model they belong to.
        checkpoint_path: Weights for a `source` that is a model name; default: timm's own.
        model_kwargs: Further arguments of `timm.create_model`.
        classes: Names of the classes in the order of the logits; default: those the checkpoint or
            ImageNet has, else the sub-folders in alphabetical order.
        img_size: Side of the images in pixels; default: what the model was made for.
        mean: Mean per channel for normalisation; default: the model's.
        std: Standard deviation per channel; default: the model's.
        crop_pct: Central share of the image that is evaluated; default: the model's.
        batch_size: Images per forward pass.
        workers: Processes that read images.
        device: `auto`, `cpu`, `cuda` or `cuda:1`.
        explained: Errors that the report shows with their picture and contributions.
        output: Folder that collects audits.
        experiment: Folder of this audit in `output`; default: time and model.
        guard: Tap, number of concepts, level and seed. Nothing is corrected.
    """

    source: PathText
    data_dir: PathText | None = None
    split: str | None = None
    model: str | None = None
    checkpoint_path: PathText | None = None
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    classes: Annotated[tuple[str, ...] | None, _Tuple] = None
    img_size: int | None = Field(default=None, ge=8)
    mean: Annotated[tuple[float, ...] | None, _Tuple] = None
    std: Annotated[tuple[float, ...] | None, _Tuple] = None
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    batch_size: int = Field(default=64, ge=1)
    workers: int = Field(default=0, ge=0)
    device: Device = "auto"
    explained: int = Field(default=24, ge=0)
    output: PathText = "output/audit"
    experiment: FolderName | None = None
    guard: GuardConfig = Field(default_factory=GuardConfig)

    @field_validator("data_dir")
    @classmethod
    def _folder_exists(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_dir():
            raise ValueError("no such folder; give it on the command line: --data FOLDER")
        return value

    @field_validator("checkpoint_path")
    @classmethod
    def _weights_exist(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_file():
            raise ValueError("no such file; expected weights as .safetensors, .pth or .pth.tar")
        return value


def load_settings(
    source: str, given: Mapping[str, object], overrides: Sequence[str] = ()
) -> AuditSettings:
    """Return the settings of an audit from what the command line says.

    A `ConfigError` has every offender: line or override, key, value and expectation.

    Args:
        source: A YAML file with settings, or what is to be audited.
        given: Settings by name that take the place of those in the file.
        overrides: For example `guard.alpha=0.01`; values are read as YAML.

    Returns:
        The checked settings.
    """
    data: dict[str, object] = {"source": source}
    places: dict[Location, int | str] = {("source",): "command line"}
    if source.endswith((".yaml", ".yml")):
        data, lines = read_yaml(source)
        places = {**lines}
    for key, value in given.items():
        data[key], places[key,] = value, "command line"
    override_all(data, places, overrides)
    return validated(AuditSettings, data, places, source)
