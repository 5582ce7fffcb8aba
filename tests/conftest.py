"""Fixtures that every test file may use."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)  # the models are tiny: more threads cost time and change the last bit

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@pytest.fixture
def rng() -> torch.Generator:
    """An own generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def _content(value: Tensor) -> tuple[torch.dtype, tuple[int, ...], str]:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return value.dtype, tuple(value.shape), hashlib.sha256(raw).hexdigest()


def _footprint(model: nn.Module) -> dict[str, object]:
    """Everything about a model, and the random state, that a plugin could leave changed."""
    marks: dict[str, object] = {
        "rng/torch": _content(torch.get_rng_state()),
        "rng/python": hash(random.getstate()),
        "rng/numpy": str(np.random.get_state()),  # noqa: NPY002 - the global state is the point
        "grad_enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }
    for key, value in model.state_dict().items():
        marks[f"state/{key}"] = _content(value)
    for path, module in model.named_modules():
        marks[f"names/{path}"] = sorted(module.__dict__)
        marks[f"mode/{path}"] = module.training
        for kind in HOOKS:
            marks[f"{kind}/{path}"] = len(getattr(module, kind))
    for name, param in model.named_parameters():
        marks[f"grad/{name}"] = (param.requires_grad, param.grad is None)
        marks[f"attrs/{name}"] = sorted(vars(param))
    return marks


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    before = _footprint(model)
    try:
        yield
    finally:
        after = _footprint(model)
        changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
        assert not changed, f"left behind on the model: {sorted(changed)}"


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """Return a context in which nothing about a model, or the random state, may change."""
    return _untouched
