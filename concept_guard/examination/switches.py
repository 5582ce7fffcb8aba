"""Doctor: the switches of a training loop, set on a copy of a model.

Nothing here knows what a tap is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from concept_guard.examination.report import Problem
from concept_guard.examination.settings import Loop

_DROPS = ("p", "prob", "drop_prob", "drop_rate", "dropout")  # attributes with a share to drop


def switched(model: nn.Module, loop: Loop) -> Iterator[Problem]:
    """Switch on what changes a model itself.

    Args:
        model: A copy; changed in place.
        loop: Says what.

    Yields:
        A problem for every switch that the model refuses.
    """
    if loop.grad_checkpointing:
        switch: Any = getattr(model, "set_grad_checkpointing", None)
        try:
            switch(enable=True)
        except (AssertionError, NotImplementedError, TypeError, ValueError) as error:
            yield Problem(
                "gradient checkpointing",
                f"{type(model).__name__} has none" + (f": {error}" if switch is not None else ""),
                "",
                "leave it out (train.py: --grad-checkpointing)",
                stops=True,
            )
    if loop.channels_last:
        model.to(memory_format=torch.channels_last)


def steady(model: nn.Module) -> None:
    """Have nothing dropped at random, so that two passes can be compared; changes a copy."""
    for module in model.modules():
        for name in _DROPS:
            share = getattr(module, name, None)
            if isinstance(share, float) and 0 < share <= 1:
                setattr(module, name, 0.0)


@contextmanager
def fresh_graphs(loop: Loop) -> Iterator[None]:
    """Let no graph of another network be taken for one of the copy's, nor the reverse."""
    if not loop.compile:
        yield
        return
    import torch._dynamo  # slow, and only here

    torch._dynamo.reset()
    try:
        yield
    finally:
        sys.modules["torch._dynamo"].reset()


def autocast(loop: Loop, images: Tensor) -> AbstractContextManager[object]:
    """Return the mixed precision of a loop as a context."""
    if loop.autocast is None:
        return nullcontext()
    return torch.autocast(images.device.type, getattr(torch, loop.autocast))
