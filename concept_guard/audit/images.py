"""Audit: the images that the settings name, and the classes that they and the model share.

Nothing here knows what is looked for in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concept_guard.audit.settings import AuditSettings
from concept_guard.audit.weights import Weights
from concept_guard.errors import ConfigError
from concept_guard.training.images import Images, split_folder
from concept_guard.training.recipe import Recipe
from concept_guard.training.splits import (
    Samples,
    class_folders,
    model_data_config,
    naming,
    open_splits,
)

AUDITED = ("val", "test")  # splits in the order in which they are looked for
# Keys of a recipe that do not say where images are, and may not hold here or now.
_ELSEWHERE = ("device", "checkpoint_path", "resume", "output", "experiment", "guard")


@dataclass(frozen=True, eq=False)
class Examined:
    """The images of an audit.

    Attributes:
        samples: Images and labels, in a fixed order.
        classes: Names in the order of the logits.
        source: Where they come from, in words.
        file: Position of an image to its name.
    """

    samples: Samples
    classes: tuple[str, ...]
    source: str
    file: Callable[[int], str]


def images_of_folder(
    settings: AuditSettings, saved: Weights, model: nn.Module, asked: Mapping[str, Any]
) -> Examined:
    """Return the images of a folder.

    Args:
        settings: Name it.
        saved: May name the classes.
        model: The model; every class folder must be one of its classes.
        asked: `img_size`, `mean`, `std` and `crop_pct`, None for the model's own.

    Returns:
        The images.
    """
    folder = _folder(settings)
    index, classes = _classes(settings, saved, model, folder)
    samples = _images(folder, index, model_data_config(saved.model, asked))
    return Examined(samples, classes, str(folder), naming(samples, folder.name, folder))


def images_of_run(
    settings: AuditSettings, saved: Weights, model: nn.Module, asked: Mapping[str, Any]
) -> Examined:
    """Return the held-out images of the run that trained the model.

    Args:
        settings: May name another split than the probe.
        saved: Knows the recipe of the run.
        model: The model.
        asked: `img_size`, `mean`, `std` and `crop_pct`, None for the model's own.

    Returns:
        The images.

    Raises:
        ConfigError: If nothing tells where images are, they are no longer what they were, or the
            split does not exist.
    """
    if not saved.from_run:
        raise ConfigError(
            f"data_dir is missing: {settings.source} does not say where its images are, only a run "
            "of this program does. Give a folder of <class>/<image>: --data FOLDER"
        )
    told = {k: v for k, v in saved.args.items() if k not in _ELSEWHERE}
    told |= {key: value for key, value in asked.items() if value is not None}
    try:
        recipe = Recipe(**told)
        splits = open_splits(recipe)
    except ConfigError as error:
        raise ConfigError(
            f"{settings.source}: the images of this run cannot be opened any more. {error}. Name "
            "a folder of images: --data FOLDER"
        ) from error
    there = {"probe": splits.probe, **splits.tests}
    name = settings.split or "probe"
    if name not in there:
        raise ConfigError(
            f"split={name}: no split of this run; expected one of: {', '.join(there)}"
        )
    size = int(getattr(model, "num_classes", 0))
    if splits.classes != (saved.classes or splits.classes) or len(splits.classes) != size:
        raise ConfigError(
            f"{recipe.data_dir}: holds the classes {', '.join(splits.classes)} now, expected those "
            f"that the model was trained on: {', '.join(saved.classes or ())} ({size} logits)"
        )
    source = f"{name} split of the run in {Path(str(saved.path)).parent}"
    return Examined(
        there[name],
        splits.classes,
        f"{source}, {recipe.data_dir or recipe.dataset}",
        naming(there[name], name, recipe.data_dir),
    )


def _folder(settings: AuditSettings) -> Path:
    """Return the folder with the class folders.

    Raises:
        ConfigError: If the split that was asked for does not exist.
    """
    root = str(settings.data_dir)
    if settings.split is not None:
        found = split_folder(root, settings.split)
        if found is None:
            there = sorted(p.name for p in Path(root).iterdir() if p.is_dir())
            raise ConfigError(
                f"split={settings.split}: no such folder in {root}; expected one of: "
                f"{', '.join(there) or '(there are none)'}"
            )
        return found
    splits = (split_folder(root, name) for name in AUDITED)
    return next((split for split in splits if split is not None), Path(root))


def _classes(
    settings: AuditSettings, saved: Weights, model: nn.Module, folder: Path
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return class folder to index, and all names in the order of the logits.

    Raises:
        ConfigError: If folders and head do not belong together.
    """
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not there:
        raise ConfigError(f"{folder}: holds no class folders; expected {folder}/<class>/<image>")
    size = int(getattr(model, "num_classes", 0))
    names = settings.classes or saved.classes
    if names is not None:
        if len(names) != size:
            raise ConfigError(
                f"classes: {len(names)} names, but the head of {saved.model} has {size} logits; "
                "expected one name per logit, in their order"
            )
        return _placed({name: k for k, name in enumerate(names)}, there, folder), tuple(names)
    if size < 1:
        raise ConfigError(
            f"{saved.model}: has no classification head, expected one with a logit per class; give "
            "weights with a head, and model_kwargs={num_classes: N} if that is what N says"
        )
    known = _imagenet(model)
    if known is not None:
        index, labels = known
        found = {name: index.get(name, index.get(_plain(name))) for name in there}
        unknown = [name for name, k in found.items() if k is None]
        if not unknown:
            return {name: k for name, k in found.items() if k is not None}, labels
    if len(there) != size:
        also = (
            ""
            if known is None
            else (
                f" The head is one of ImageNet, of which these are no classes: "
                f"{', '.join(unknown[:10])}; folders may be named n01440764 or tench."
            )
        )
        raise ConfigError(
            f"{folder}: {len(there)} class folders, but the head of {saved.model} has {size} "
            "logits. Expected one folder per logit in alphabetical order; if some classes have no "
            f"images, name all of them in the order of the logits: classes=[cat, dog, ...].{also}"
        )
    return {name: k for k, name in enumerate(there)}, tuple(there)


def _placed(index: Mapping[str, int], there: Sequence[str], folder: Path) -> dict[str, int]:
    """Return the indices of the folders that are there.

    Raises:
        ConfigError: If one is no class of the model.
    """
    unknown = [name for name in there if name not in index]
    if unknown:
        told = [
            f"{name} (nearest: {', '.join(get_close_matches(name, list(index), n=2)) or 'none'})"
            for name in unknown[:10]
        ]
        raise ConfigError(
            f"{folder}: {len(unknown)} of {len(there)} folders are no class of the model: "
            f"{', '.join(told)}. Rename them, or give the names in the order of the logits: "
            "classes=[...]"
        )
    return {name: index[name] for name in there}


def _plain(name: str) -> str:
    return name.replace(" ", "_").lower()


def _imagenet(model: nn.Module) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """Return names to index, and the classes in order, of a head that is one of ImageNet."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if not subset:
        return None
    info = ImageNetInfo(subset)
    labels = [str(info.index_to_label_name(k)) for k in range(info.num_classes())]
    described = [str(info.index_to_description(k)) for k in range(info.num_classes())]
    index: dict[str, int] = {}
    for k, (label, words) in enumerate(zip(labels, described, strict=True)):
        index[label] = k
        for name in (words, *words.split(", ")):
            index.setdefault(_plain(name), k)
    return index, tuple(words.split(", ")[0] for words in described)


def _images(folder: Path, index: Mapping[str, int], config: Mapping[str, Any]) -> Images:
    from timm.data import create_transform

    reader = class_folders(str(folder), index)
    everything = torch.arange(len(reader))
    transform = create_transform(**config)
    return Images(reader, everything, transform, seed=0, on_unreadable="skip")
