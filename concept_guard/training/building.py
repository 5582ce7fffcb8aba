"""From a recipe to a timm model, optimizer and schedule.

Nothing here knows about data or the guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from concept_guard.errors import ConfigError
from concept_guard.training.checkpoints import seed_everything
from concept_guard.training.recipe import Recipe

REFUSALS = (TypeError, ValueError, RuntimeError, AssertionError, KeyError)


def build_model(recipe: Recipe, num_classes: int, size: int) -> nn.Module:
    """Return the timm model of a recipe with a head for the classes of the data.

    Args:
        recipe: Gives the name, the arguments, the weights and the seed for what is drawn.
        num_classes: Classes in the data.
        size: Side of the images.

    Returns:
        The model, on the CPU.

    Raises:
        ConfigError: If timm refuses the arguments, the weights do not fit, or the model cannot
            take images of this size.
    """
    import timm  # heavy

    seed_everything(recipe.seed)
    kwargs = dict(recipe.model_kwargs)
    known = timm.models.get_pretrained_cfg(recipe.model)
    if known is not None and known.fixed_input_size:
        kwargs.setdefault("img_size", size)
    try:
        if recipe.checkpoint_path is None:
            model: nn.Module = timm.create_model(recipe.model, num_classes=num_classes, **kwargs)
        else:
            model = with_weights(recipe.model, recipe.checkpoint_path, num_classes, kwargs)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except REFUSALS as error:
        weights = f", checkpoint_path {recipe.checkpoint_path}" if recipe.checkpoint_path else ""
        raise ConfigError(
            f"model {recipe.model} with {kwargs or 'no model_kwargs'}{weights}, {size} px images: "
            f"{first_lines(error)}. Expected arguments of timm.create_model(), and weights made "
            "with the same ones; change model_kwargs, img_size or checkpoint_path."
        ) from error
    return model


def with_weights(
    name: str, path: str, num_classes: int | None, kwargs: Mapping[str, Any]
) -> nn.Module:
    """Return a timm model with weights from a file.

    Args:
        name: timm's name of the model.
        path: Weights.
        num_classes: Classes that the head is replaced for, if the weights have others; None keeps
            the head of the weights.
        kwargs: Further arguments of `timm.create_model`.

    Returns:
        The model, on the CPU.
    """
    import timm

    known = timm.models.get_pretrained_cfg(name)
    head = known.classifier if known is not None else None
    head = head[0] if isinstance(head, tuple | list) else head
    weights = timm.models.load_state_dict(path)
    saved = weights.get(f"{head}.weight")
    if saved is not None:  # first the head that the weights have
        kwargs = {"num_classes": saved.shape[0], **kwargs}
    model: Any = timm.create_model(name, checkpoint_path=path, **kwargs)
    if num_classes is not None and model.num_classes != num_classes:
        model.reset_classifier(num_classes)
    made: nn.Module = model
    return made


def first_lines(error: BaseException) -> str:
    """Return the beginning of what an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return timm's optimizer with weight decay on everything but norms and biases.

    Args:
        recipe: Gives `opt`, `lr`, `momentum` and `weight_decay`.
        model: The model that it updates.

    Returns:
        The optimizer.
    """
    from timm.optim import create_optimizer_v2

    further: dict[str, Any] = {} if recipe.momentum is None else {"momentum": recipe.momentum}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay, **further
    )
    return optimizer


def build_scheduler(recipe: Recipe, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """Return timm's cosine schedule, one value per update, linear during the warm-up.

    Args:
        recipe: Gives `epochs` and `warmup_epochs`.
        optimizer: Its learning rate is set, now and by `step_update(number of updates)`.
        updates: Optimizer updates of the whole run.

    Returns:
        The schedule, which keeps no position of its own.
    """
    from timm.scheduler import CosineLRScheduler

    warm = round(recipe.warmup_epochs * updates / recipe.epochs)
    return CosineLRScheduler(
        optimizer,
        t_initial=updates,
        warmup_t=warm,
        warmup_lr_init=recipe.lr / (warm + 1) if warm else 0.0,
        t_in_epochs=False,
    )
