"""Audit: open the model and the images that the settings name.

Nothing here knows what is looked for in them.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from concept_guard.audit.settings import AuditSettings
from concept_guard.errors import ConfigError
from concept_guard.training.building import REFUSALS, first_lines, with_weights
from concept_guard.training.checkpoints import CHECKPOINT
from concept_guard.training.images import Images, split_folder
from concept_guard.training.splits import class_folders, model_data_config

AUDITED = ("val", "test")  # splits in the order in which they are looked for
_DATA_KEYS = ("img_size", "mean", "std", "crop_pct")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model and the images to audit it on.

    Attributes:
        model: On its device, in eval mode.
        name: timm's name of it.
        weights: Where its weights come from, in words.
        classes: Names in the order of the logits.
        images: The images, in a fixed order.
        loader: Batches of these.
        folder: Where they come from.
    """

    model: nn.Module
    name: str
    weights: str
    classes: tuple[str, ...]
    images: Images
    loader: DataLoader[Any]
    folder: Path


@dataclass(frozen=True)
class _Weights:
    """A checkpoint: its file, and what it says about itself."""

    path: Path | None
    model: str
    args: Mapping[str, Any]
    classes: tuple[str, ...] | None


def open_audit(settings: AuditSettings) -> Opened:
    """Open model and images.

    Args:
        settings: Name them.

    Returns:
        Both, matched: every class folder is one of the model's classes.
    """
    saved = _weights(settings)
    args = {key: saved.args.get(key) for key in _DATA_KEYS}
    args |= {k: v for k in _DATA_KEYS if (v := getattr(settings, k)) is not None}
    kwargs = settings.model_kwargs or dict(saved.args.get("model_kwargs") or {})
    model = _model(saved, kwargs, args["img_size"])
    folder = _folder(settings)
    index, classes = _classes(settings, saved, model, folder)
    config = model_data_config(saved.model, args)
    images = _images(folder, index, config)
    loader: DataLoader[Any] = DataLoader(images, settings.batch_size, num_workers=settings.workers)
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    weights = "timm's own weights" if saved.path is None else str(saved.path)
    model = model.to(name).eval()
    return Opened(model, saved.model, weights, classes, images, loader, folder)


def _weights(settings: AuditSettings) -> _Weights:
    """Return what the source is: a run, a checkpoint, or a model with or without weights.

    Raises:
        ConfigError: If it is none of these.
    """
    import timm  # heavy

    source = Path(settings.source)
    if source.is_dir():
        source = source / CHECKPOINT
        if not source.is_file():
            raise ConfigError(
                f"{source.parent}: holds no {CHECKPOINT}; expected the folder of a run"
            )
    if source.is_file():
        return _checkpoint(source, settings.model)
    if not timm.is_model(settings.source):
        near = get_close_matches(settings.source, timm.list_models(), n=3)
        raise ConfigError(
            f"{settings.source}: no such file, no folder of a run, and no timm model; expected one "
            f"of these. Nearest models: {', '.join(near) or '(none)'}."
        )
    if settings.checkpoint_path is None:
        return _Weights(None, settings.source, {}, None)
    return _checkpoint(Path(settings.checkpoint_path), settings.source)


def _checkpoint(path: Path, model: str | None) -> _Weights:
    """Return what a file of weights says about itself.

    Raises:
        ConfigError: If it cannot be read, or does not say which model it belongs to.
    """
    state: Any = {}
    if path.suffix != ".safetensors":
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise ConfigError(
                f"{path}: no checkpoint that can be read ({first_lines(error)}). Expected weights "
                "as .safetensors, .pth or .pth.tar, without pickled objects."
            ) from error
    state = state if isinstance(state, dict) else {}
    args = state.get("args") or {}
    args = dict(args if isinstance(args, Mapping) else vars(args))
    name = model or state.get("arch") or args.get("model")
    if name is None:
        raise ConfigError(f"{path}: does not say which model it belongs to; add model=NAME")
    own = state.get("concept_guard")
    classes = own.get("classes") if isinstance(own, dict) else None
    return _Weights(path, str(name), args, tuple(classes) if classes else None)


def _model(saved: _Weights, kwargs: Mapping[str, Any], size: int | None) -> nn.Module:
    """Return the model with its weights.

    Raises:
        ConfigError: If timm refuses the arguments, or the weights do not fit or cannot be had.
    """
    import timm

    known = timm.models.get_pretrained_cfg(saved.model)
    if size is not None and known is not None and known.fixed_input_size:
        kwargs = {"img_size": size, **kwargs}
    try:
        if saved.path is not None:
            return with_weights(saved.model, str(saved.path), None, kwargs)
        made: nn.Module = timm.create_model(saved.model, pretrained=True, **kwargs)
    except (*REFUSALS, OSError) as error:
        way = "model=NAME, model_kwargs or the file" if saved.path else "checkpoint_path=FILE"
        raise ConfigError(
            f"model {saved.model} with {dict(kwargs) or 'no model_kwargs'} and weights "
            f"{saved.path or 'of timm'}: {first_lines(error)}. Change {way}."
        ) from error
    return made


def _folder(settings: AuditSettings) -> Path:
    """Return the folder with the class folders.

    Raises:
        ConfigError: If the split that was asked for does not exist.
    """
    if settings.split is not None:
        found = split_folder(settings.data_dir, settings.split)
        if found is None:
            there = sorted(p.name for p in Path(settings.data_dir).iterdir() if p.is_dir())
            raise ConfigError(
                f"split={settings.split}: no such folder in {settings.data_dir}; expected one of: "
                f"{', '.join(there) or '(there are none)'}"
            )
        return found
    splits = (split_folder(settings.data_dir, name) for name in AUDITED)
    return next((split for split in splits if split is not None), Path(settings.data_dir))


def _classes(
    settings: AuditSettings, saved: _Weights, model: nn.Module, folder: Path
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return class folder to index, and all names in the order of the logits.

    Raises:
        ConfigError: If folders and head do not belong together.
    """
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    size = int(getattr(model, "num_classes", 0))
    names = settings.classes or saved.classes
    if names is not None:
        if len(names) != size:
            raise ConfigError(
                f"classes: {len(names)} names, but the head of {saved.model} has {size} logits; "
                "expected one name per logit, in their order"
            )
        return _placed({name: k for k, name in enumerate(names)}, there, folder), tuple(names)
    from_imagenet = _imagenet(model, there)
    if from_imagenet is not None:
        return from_imagenet
    if len(there) != size:
        raise ConfigError(
            f"{folder}: {len(there)} class folders, but the head of {saved.model} has {size} "
            "logits. Expected one folder per logit in alphabetical order; if some classes have no "
            "images, name all of them in the order of the logits: classes=[cat, dog, ...]"
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


def _imagenet(
    model: nn.Module, there: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...]] | None:
    """Return the classes of an ImageNet head, if the folders have names of its classes."""
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
            index.setdefault(name.replace(" ", "_").lower(), k)
    found = {name: index.get(name, index.get(name.replace(" ", "_").lower())) for name in there}
    if any(k is None for k in found.values()) or not found:
        return None
    names = tuple(words.split(", ")[0] for words in described)
    return {name: k for name, k in found.items() if k is not None}, names


def _images(folder: Path, index: Mapping[str, int], config: Mapping[str, Any]) -> Images:
    from timm.data import create_transform

    reader = class_folders(str(folder), index)
    everything = torch.arange(len(reader))
    transform = create_transform(**config)
    return Images(reader, everything, transform, seed=0, on_unreadable="skip")
