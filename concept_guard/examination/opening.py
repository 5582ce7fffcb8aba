"""Doctor: the model and the sample as they are given, and the copy that is examined.

Nothing here knows where a model is tapped, and nothing here runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from concept_guard.attached import refuse_copies, stripped
from concept_guard.errors import ProbeError, TapError
from concept_guard.examination.report import Problem
from concept_guard.reading import check_counts, checked_pair

_NAMED = 3  # offenders spelled out
_BUILD_FIRST = "build the guard on the plain model, then compile it"


def unwrapped(model: nn.Module, problems: list[Problem], facts: list[str]) -> nn.Module:
    """Return the network inside wrappers.

    Args:
        model: As it is given.
        problems: Those of the wrappers are added.
        facts: Wrappers that do no harm are added.

    Returns:
        The network.
    """
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            problems.append(
                Problem(
                    "model",
                    "it is compiled already, and hooks added after torch.compile never fire",
                    "a model that is not compiled yet",
                    _BUILD_FIRST,
                    stops=True,
                )
            )
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            facts.append(f"inside {type(model).__name__}, which is seen through")
            inner = model.module
        if inner is None:
            return model
        model = inner


def scripted(model: nn.Module) -> Problem | None:
    """Return the problem with TorchScript, if the model or a part of it is scripted."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if not names:
        return None
    return Problem(
        "model" if not names[0] else f"model.{names[0]}",
        "it is a ScriptModule, which takes no hooks of Python",
        "an nn.Module",
        "build the guard on the model before torch.jit.script, or train without it "
        "(train.py: leave out --torchscript)",
        stops=True,
    )


def guarded(model: nn.Module) -> Iterator[Problem]:
    """Yield whether a model brings along hooks of a guard from the model that it is a copy of.

    Args:
        model: Not changed.

    Yields:
        A problem.
    """
    try:
        refuse_copies(model)
    except TapError as error:
        yield Problem.of("model", error)


def weights(model: nn.Module) -> Iterator[Problem]:
    """Yield what is wrong with the parameters and buffers.

    Args:
        model: Not changed.

    Yields:
        Problems.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    if empty := [name for name, t in named if t.is_meta]:
        yield Problem(
            "model",
            f"{_listed(empty)} are on the meta device and hold no values",
            "weights in memory",
            "call model.to_empty(device=...) and load the weights first",
            stops=True,
        )
    broken = [
        name
        for name, t in named
        if t.is_floating_point() and not t.is_meta and not bool(torch.isfinite(t.detach()).all())
    ]
    if broken:
        yield Problem(
            "model",
            f"{_listed(broken)} hold NaN or infinite values",
            "finite weights",
            "load a checkpoint from before they came up, and lower the learning rate",
            stops=True,
        )
    if not any(p.requires_grad for p in model.parameters()):
        yield Problem(
            "model",
            "no parameter requires a gradient, so that nothing is trained or unlearnt",
            "a model in training",
            "model.requires_grad_(True), at least for the classifier",
            stops=True,
        )


def images_of(sample: object, problems: list[Problem]) -> tuple[Tensor, Tensor] | None:
    """Return images and labels of a sample.

    Args:
        sample: `(N, ...)` images, or a pair of images and `(N,)` labels.
        problems: Those of the sample are added.

    Returns:
        Images, and labels or an empty tensor if there are none; None if there are no images.
    """
    labels = torch.empty(0, dtype=torch.long)
    if isinstance(sample, tuple | list):
        try:
            sample, labels = checked_pair(sample, 0)
        except ProbeError as error:
            problems.append(Problem.of("sample", error))
            found = [x for x in sample[:1] if isinstance(x, Tensor)]
            sample = found[0] if found else sample
    if not isinstance(sample, Tensor) or sample.ndim < 2:
        got = f"shape {tuple(sample.shape)}" if isinstance(sample, Tensor) else _kind(sample)
        if not problems or problems[-1].where != "sample":
            problems.append(
                Problem(
                    "sample",
                    f"it is {got}",
                    "images (N, ...), or a pair (images, labels), as the guard reads its probe",
                    "wrap the loader so that it yields these; NaFlex models take plain images too",
                    stops=True,
                )
            )
        return None
    if len(sample) < 2:
        problems.append(
            Problem(
                "sample",
                f"it has {len(sample)} images, too few for BatchNorm in training mode",
                "2 or more, as in a batch",
                "pass a batch of the loader",
                stops=True,
            )
        )
        return None
    if sample.is_floating_point() and not bool(torch.isfinite(sample).all()):
        problems.append(
            Problem(
                "sample",
                "the images hold NaN or infinite values",
                "finite ones",
                "check mean, std and the transforms",
                stops=True,
            )
        )
    return sample, labels


def fitting(labels: Tensor, num_classes: int) -> Iterator[Problem]:
    """Yield what is wrong with the number of classes.

    Args:
        labels: `(N,)` of the sample, or none.
        num_classes: Logits of the model, M.

    Yields:
        Problems.
    """
    if num_classes < 2:
        yield Problem(
            "model",
            f"it has {num_classes} logit, so that no prediction is ever wrong",
            "2 logits or more, one per class",
            "num_classes=2 with a cross entropy over both",
            stops=True,
        )
    elif len(labels):
        try:
            check_counts([labels.cpu()], num_classes)
        except ProbeError as error:
            yield Problem.of("sample", str(error).removeprefix("probe: "))


def copied(model: nn.Module, problems: list[Problem]) -> nn.Module | None:
    """Return a copy of a model without hooks of guards; None, with a problem, if it has none.

    Args:
        model: Not changed.
        problems: Where it is added.

    Returns:
        The copy, in training mode.
    """
    try:
        return stripped(copy.deepcopy(model)).train()
    except Exception as error:  # whatever a model does when it is copied
        problems.append(
            Problem(
                "model",
                f"it cannot be copied ({_first_line(error)}), and is not examined further",
                "a model that copy.deepcopy takes, as averages of the weights and "
                "guard.baked_copy() do as well",
                "hold no results of a pass, open files or loaders in its attributes",
                stops=False,
            )
        )
        return None


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _kind(value: object) -> str:
    return f"a {type(value).__name__}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
