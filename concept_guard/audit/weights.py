"""Audit: the model that the settings name, with its weights.

Nothing here knows about images.
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from concept_guard.audit.settings import AuditSettings
from concept_guard.errors import ConfigError
from concept_guard.training.building import REFUSALS, first_lines, with_weights
from concept_guard.training.checkpoints import CHECKPOINT


@dataclass(frozen=True)
class Weights:
    """A checkpoint: its file, and what it says about itself.

    Attributes:
        path: The file; None for timm's own weights.
        model: timm's name of the model.
        args: Settings of the training that wrote it, as far as it tells.
        classes: Names in the order of the logits, if it tells.
        from_run: Whether `args` is a recipe.
    """

    path: Path | None
    model: str
    args: Mapping[str, Any]
    classes: tuple[str, ...] | None
    from_run: bool = False


def find_weights(settings: AuditSettings) -> Weights:
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
        return Weights(None, settings.source, {}, None)
    return _checkpoint(Path(settings.checkpoint_path), settings.source)


def _checkpoint(path: Path, model: str | None) -> Weights:
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
    return Weights(path, str(name), args, tuple(classes) if classes else None, own is not None)


def load_model(saved: Weights, kwargs: Mapping[str, Any], size: int | None) -> nn.Module:
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
