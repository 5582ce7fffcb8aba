"""Stage 1: look at a model in one pass over a few images, and settle a tap by what it shows.

Nothing here stays on the model.
"""

from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from concept_guard.errors import TapError
from concept_guard.heads import is_head
from concept_guard.hooks import Hook, Shared
from concept_guard.probe import isolated
from concept_guard.sites import Site, Survey, locate, refuse_fixed, way_out


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside distributed wrappers; a `TapError` refuses one with a fixed graph.

    Args:
        model: As the guard got it.

    Returns:
        The model itself.
    """
    refuse_fixed(model, "")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    return model


def placed(model: nn.Module, images: Tensor) -> Tensor:
    """Return images as a model takes them.

    Args:
        model: With parameters or buffers, or nothing is changed.
        images: `(N, ...)` images.

    Returns:
        The images on its device and, if they are floating, in its precision.
    """
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.is_floating_point():
            dtype = tensor.dtype if images.is_floating_point() else images.dtype
            return images.to(tensor.device, dtype)
    return images


def settled(survey: Survey, where: str) -> Site:
    """Return the place that a tap names; refuse one whose rows the logits do not depend on.

    Such as tokens that are left unread.

    Args:
        survey: Of the model.
        where: Name of the tap.

    Returns:
        The place.

    Raises:
        TapError: If there is no such place, or changing the images changes the logits and
            changing the rows does not.
    """
    site = locate(survey, where)
    if where != "pre_logits" and not _has_effect(survey, site):
        raise TapError(
            f"tap {where!r} ({site.path}): changing its rows changes no logit, expected a place "
            "that the logits depend on (a classifier that reads the class token alone leaves the "
            f"last block's other tokens unread); use {way_out(survey)}"
        )
    return site


def _has_effect(survey: Survey, site: Site) -> bool:
    push = torch.randn(site.channels, generator=torch.Generator().manual_seed(0))

    def pushed(rows: Tensor) -> Tensor:
        return rows + push.to(rows) * (1.0 + rows.abs().amax())

    model, images, plain = survey.model, placed(survey.model, survey.images), survey.logits
    with isolated(model):
        hook = site.module.register_forward_hook(Hook(site.layout, Shared(pushed), is_copy=True))
        try:
            if not torch.equal(plain, model(images)):
                return True
        finally:
            hook.remove()
        return torch.equal(plain, model(images.flip(-1)))  # no logit depends on anything yet


def surveyed(model: nn.Module, where: str, images: Tensor) -> Survey:
    """Return what one isolated pass shows: what modules return, and which ones may be the head.

    Args:
        model: The model, unwrapped.
        where: Name of the tap, for the message.
        images: `(N, ...)` a few images.

    Returns:
        The survey.

    Raises:
        TapError: If there are no images.
    """
    if images.ndim < 2 or not len(images):
        raise TapError(f"tap {where!r}: sample has shape {tuple(images.shape)}, expected images")
    outputs: dict[nn.Module, list[tuple[int, ...] | str]] = {}
    heads: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        seen = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        outputs.setdefault(module, []).append(seen)
        if isinstance(output, Tensor) and args and is_head(module, args[0]):
            heads.append((module, args[0].clone(), output.clone()))

    with isolated(model), ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(note).remove)
        logits = model(placed(model, images))
    survey = Survey(model, images, logits, outputs, heads)

    def works(other: str) -> bool:
        try:
            return bool(settled(survey, other))
        except TapError:
            return False

    return replace(survey, works=works)
