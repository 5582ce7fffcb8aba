"""Stage 1: settle where a model can be read and how the rows lie there.

Nothing here knows about hooks, probes or edits: it judges what one pass over a sample showed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from concept_guard.errors import TapError
from concept_guard.heads import linear_map, same
from concept_guard.layouts import SUFFIXES, Layout, layout_of, positions


@dataclass(frozen=True, eq=False)
class Site:
    """A place that can be tapped: the input of `module` for pre_logits, else its output."""

    path: str
    module: nn.Module
    layout: Layout
    channels: int
    grid: tuple[int, int]
    classifier: nn.Linear | None = None


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over a few images showed.

    Attributes:
        model: The model, unwrapped.
        images: `(N, ...)` the images.
        logits: `(N, M)` what it returned.
        outputs: For every module that ran, the shape of each tensor it returned, or the name of
            the type if that was no tensor.
        heads: Linear maps that ran on one row per image: module, its input, its output.
        works: Whether another tap would be accepted; asked only for a way out of a refusal.
    """

    model: nn.Module
    images: Tensor
    logits: Tensor
    outputs: dict[nn.Module, list[tuple[int, ...] | str]] = field(default_factory=dict)
    heads: list[tuple[nn.Module, Tensor, Tensor]] = field(default_factory=list)
    works: Callable[[str], bool] = lambda _: False


def locate(survey: Survey, where: str) -> Site:
    """Return the place that `where` names.

    Args:
        survey: Of the model to tap.
        where: `pre_logits`, `stage:K` or `module:PATH`, the last two with an optional layout.

    Returns:
        Module, layout and grid.

    Raises:
        TapError: If there is no such place, or it has no rows.
    """
    model, logits = survey.model, survey.logits
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else _type(logits)
        raise TapError(
            f"{_type(model)} returns {got} in eval mode, expected logits (N, M); wrap it in a "
            "module that returns the logits alone"
        )
    if where == "pre_logits":
        return _before_classifier(survey)
    names = dict(model.named_modules(remove_duplicate=False))
    place, _, suffix = where.partition("@")
    kind, _, rest = place.partition(":")
    if kind not in ("stage", "module") or not rest or suffix not in ("", *SUFFIXES):
        hint = f"; did you mean 'module:{place}'?" if place in names and place else ""
        raise TapError(
            f"tap {where!r}: expected 'pre_logits', 'stage:K' or 'module:PATH', the last two with "
            f"an optional '@NCHW', '@NHWC' or '@NLC'{hint}"
        )
    path, channels = _stage(survey, where, rest) if kind == "stage" else (rest, None)
    if path not in names:
        near = get_close_matches(path, names, n=4) or [name for name, _ in model.named_children()]
        raise TapError(f"tap {where!r}: no module {path!r} in {_type(model)}; nearest: {near}")
    refuse_fixed_around(model, path)
    shape = _single_output(survey, where, path, names[path])
    layout = layout_of(survey.model, survey.images, where, shape, suffix, names[path], channels)
    width = shape[1] if layout.name == "NCHW" else shape[-1]
    return Site(path, names[path], layout, width, positions(model, survey.images, layout, shape))


def refuse_fixed_around(model: nn.Module, path: str) -> None:
    """Raise a `TapError` if a module, or one that it is part of, is compiled.

    Args:
        model: The model.
        path: Name of the module in it.
    """
    for cut in range(path.count(".") + 1):
        ancestor = path.rsplit(".", cut)[0]
        refuse_fixed(model.get_submodule(ancestor), ancestor)


def refuse_fixed(module: nn.Module, path: str) -> None:
    """Raise if hooks added to this module from now on would be ignored.

    Raises:
        TapError: If the module is compiled, scripted or traced.
    """
    name = path or _type(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise TapError(
            f"{name} is scripted or traced (torch.jit), and such a graph runs no hooks; build the "
            "guard on the model that it was made from, and script that after guard.bake() and "
            "guard.close()"
        )
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    forward = hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    if hasattr(module, "_orig_mod") or in_place or forward:
        raise TapError(
            f"{name} is compiled already, and hooks added after torch.compile never fire; build "
            "the guard first, then compile: guard = ConceptGuard(model, ...); model = "
            "torch.compile(model)"
        )


# The module path and the number of channels of timm's stage number `text`.
def _stage(survey: Survey, where: str, text: str) -> tuple[str, int | None]:
    stages = _stages(survey.model)
    number = int(text) if text.removeprefix("-").isdecimal() else len(stages)
    stage = stages[number] if -len(stages) <= number < len(stages) else {}
    if stage.get("module") in dict(survey.model.named_modules()):
        return stage["module"], stage.get("num_chs")
    got = f"calls it {stage['module']!r}, which is no module" if stage else f"has {len(stages)}"
    raise TapError(
        f"tap {where!r}: no stage {text!r}; feature_info of {_type(survey.model)} {got}; use "
        f"{way_out(survey)}"
    )


# The shape of the one tensor that the module returns per pass.
def _single_output(survey: Survey, where: str, path: str, module: nn.Module) -> tuple[int, ...]:
    outputs, count = survey.outputs.get(module, []), len(survey.images)
    if not outputs:
        raise silence(survey, where, path)
    shape = outputs[-1]
    if len(outputs) > 1:
        fault = f"runs {len(outputs)} times in a forward pass, expected once"
    elif isinstance(shape, str):
        fault = f"returns a {shape}, expected one tensor"
    elif len(shape) not in (2, 3, 4) or shape[0] != count:
        fault = f"returns shape {shape} for {count} images, expected 2 to 4 axes, images first"
    else:
        return shape
    raise TapError(f"tap {where!r}: {path!r} {fault}; use {way_out(survey, path)}")


def silence(survey: Survey, where: str, path: str) -> TapError:
    """Return the error for a module that no forward pass calls, with the reason if known."""
    names = dict(survey.model.named_modules(remove_duplicate=False))
    parent = names[path.rpartition(".")[0]]
    advice = ""
    if path.endswith("attn_drop") and getattr(parent, "fused_attn", False):
        reason = "fused attention drops inside its kernel"
        advice = ", or call timm.layers.set_fused_attn(False) before the model is created"
    elif not [*names[path].children()]:
        reason = "the forward pass of an eval-mode model does not use it"
    elif any(getattr(module, "grad_checkpointing", False) for module in names.values()):
        reason = "gradient checkpointing calls the children of a container, not the container"
    else:
        reason = "the model calls its children, not the container"
    return TapError(
        f"tap {where!r}: {path!r} never fires: {reason}; use {way_out(survey, path)}{advice}"
    )


def way_out(survey: Survey, path: str = "") -> str:
    """Return a tap that works: near a module, if one is given, else the last stage that does."""
    found = next(filter(survey.works, _candidates(survey, path)), None)
    return "'module:PATH' with a module of your choice" if found is None else repr(found)


def _candidates(survey: Survey, path: str) -> Iterator[str]:
    """Yield taps: what is in a module or around it, stages and what is in them, maps, the head."""
    usable = _single_outputs(survey)
    yield from _inside(usable, path)
    yield from (f"module:{name}" for name in reversed(usable) if path.startswith(f"{name}."))
    stages = _stages(survey.model)
    yield from (f"stage:{-1 - back}" for back in range(len(stages)))
    for stage in reversed(stages):
        yield from _inside(usable, stage.get("module", ""))
    maps = [name for name in _single_outputs(survey, axes=3) if "." not in name]
    yield from (f"module:{name}" for name in reversed(maps))
    yield "pre_logits"


def _inside(usable: list[str], path: str) -> Iterator[str]:
    below = [name for name in usable if path and name.startswith(f"{path}.")]
    top = min((name.count(".") for name in below), default=0)
    yield from (f"module:{name}" for name in reversed(below) if name.count(".") == top)


def _stages(model: nn.Module) -> list[dict[str, Any]]:
    """Return what timm says about the stages of a model, if anything."""
    info = getattr(model, "feature_info", None) or []
    return [dict(entry) for entry in getattr(info, "info", info)]


def _single_outputs(survey: Survey, axes: int = 1) -> list[str]:
    """Return the names of the modules that returned one tensor of so many axes, images first."""
    return [
        name
        for name, module in survey.model.named_modules()
        if name and len(outputs := survey.outputs.get(module, [])) == 1
        if not isinstance(outputs[0], str) and outputs[0][:1] == (len(survey.images),)
        if len(outputs[0]) >= axes
    ]


# The input of the last linear map whose output is the logits.
def _before_classifier(survey: Survey) -> Site:
    model, logits = survey.model, survey.logits
    for module, row, output in reversed(survey.heads):
        if same(output.flatten(1), logits) and len(survey.outputs[module]) == 1:
            path = next(name for name, other in model.named_modules() if other is module)
            refuse_fixed_around(model, path)
            head = linear_map(module, row, logits)
            return Site(path, module, Layout("NC"), row[0].numel(), (1, 1), head)
    getter: Any = getattr(model, "get_classifier", None)
    found: Any = getter() if getter is not None else ()
    parts = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    heads = " and ".join(map(_type, parts)) or "unknown"
    one = "a variant of the model with one head, if there is any, or " if len(parts) > 1 else ""
    raise TapError(
        f"tap 'pre_logits': no Linear or 1x1 Conv2d of {_type(model)} computes the logits alone; "
        f"its classifier is {heads}. Use {one}{way_out(survey)}; a correction there cannot be "
        "baked exactly"
    )


def _type(value: object) -> str:
    return type(value).__name__
