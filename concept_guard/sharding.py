"""Parameters that fully_shard has divided among processes, made whole for a while.

Nothing here knows what is done with them meanwhile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this process holds just a part of a parameter now."""
    return hasattr(parameter, "full_tensor")


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Have all of a model in this process for the block, so that its passes wait for no other one.

    What the block changes in place is written into the parts. All processes come here together; it
    takes the memory of the whole model. A model that is not divided is left alone.

    Args:
        model: Any module.

    Yields:
        Nothing.
    """
    groups = [group for module in model.modules() for group in _groups(module)]
    kept = [group.post_forward_mesh_info for group in groups]
    for group in groups:
        group.post_forward_mesh_info = None  # a forward pass leaves it whole
        group.lazy_init()
        group.unshard()
        group.wait_for_unshard()
    before = [(owner, name, p, p._version) for owner, name, p in _parameters(model)]
    try:
        yield
    finally:
        changed = [
            (owner, name, p.detach().clone()) for owner, name, p, v in before if p._version != v
        ]
        for group, mesh in zip(groups, kept, strict=True):
            group.reshard()
            group.post_forward_mesh_info = mesh
        for owner, name, value in changed if groups else ():
            _write(getattr(owner, name), value)


def _groups(module: nn.Module) -> list[Any]:
    """Return what torch keeps for the parameters that it divides together."""
    state: Any = getattr(module, "_get_fsdp_state", None)
    return [] if state is None else list(state()._fsdp_param_groups)


def _parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            yield module, name, parameter


def _write(part: Any, value: Tensor) -> None:
    with torch.no_grad():
        if is_sharded(part):
            full = value.to(part.dtype)
            value = distributed.tensor.distribute_tensor(full, part.device_mesh, part.placements)
        part.copy_(value)
