"""Stage 1: which hooks of guards a model has already, and how to be rid of them.

Nothing here knows what a hook does.
"""

from torch import nn

from concept_guard.errors import TapError
from concept_guard.hooks import Hook, OfGuard


def stripped(model: nn.Module) -> nn.Module:
    """Take the hooks of guards off a model, say a copy that brought them along.

    Args:
        model: Changed in place.

    Returns:
        The model.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, OfGuard)]:
                del hooks[key]
    return model


def refuse_copies(model: nn.Module) -> None:
    """Raise if a model has brought along a hook of a guard from the model that it is a copy of.

    Args:
        model: Any model.

    Raises:
        TapError: If there is such a hook.
    """
    for path, module in model.named_modules():
        if any(hook.is_copy for hook in _hooks_of(module)):
            raise TapError(
                f"{type(model).__name__} is a copy of a guarded model (of an EMA, by deepcopy, or "
                f"saved as a whole): {path!r} carries the hook of that guard and follows it. Guard "
                "the model that is trained: ConceptGuard(model, ...) before ModelEmaV3(model); for "
                "a corrected average call guard.baked_copy(ema.module). For a second run copy the "
                "model before it is guarded, or after guard.close()"
            )


def refuse_second(module: nn.Module, path: str, *, before: bool) -> None:
    """Raise if a module is guarded already.

    Args:
        module: That is to carry a hook.
        path: Its name.
        before: Whether at its input; a guard at its output is another one.

    Raises:
        TapError: If a guard that is not closed has its hook there.
    """
    hooks = module._forward_pre_hooks if before else module._forward_hooks
    if any(isinstance(hook, Hook) and not hook.is_copy for hook in hooks.values()):
        raise TapError(
            f"{path!r} is guarded already: both guards would correct the same rows. Call close() "
            "on the first guard before the second is built (with ConceptGuard(...) as guard: does "
            "it by itself), or give the second another tap, such as 'stage:-2'"
        )


def _hooks_of(module: nn.Module) -> list[Hook]:
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Hook)]
