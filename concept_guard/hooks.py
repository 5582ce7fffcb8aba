"""Stage 1: what the hooks on a model do when a pass comes by: keep rows, write edited ones.

Nothing here puts a hook on a model, or knows what a row means.
"""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from concept_guard.errors import TapError
from concept_guard.layouts import Layout

Edit = Callable[[Tensor], Tensor]
FIRST = "call guard.bake() and guard.close() before"


class Shared:
    """What a tap, its hook, and the hooks of deep copies of the model have in common.

    Attributes:
        edit: Function of rows that acts on passes in eval mode, or None.
        listening: Whether passes in train mode leave their rows and images behind.
        captured: `(B, Q, C)` rows of the last such pass.
        images: Images of it.
        fired: Passes so far.
        reading: Whether a pass of the tap's own is under way.
        rows: `(N, Q, C)` rows that it read.
        shape: Of the activation they were read from.
    """

    def __init__(self, edit: Edit | None = None) -> None:
        self.edit = edit
        self.listening = False
        self.captured: Tensor | None = None
        self.images: Tensor | None = None
        self.fired = 0
        self.reading = False
        self.rows: Tensor | None = None
        self.shape: tuple[int, ...] = ()


class Hook:
    """The one hook left on the model: a pre-hook for pre_logits, else a forward hook.

    Hooks of copies of the model, such as an EMA, apply the edit but never capture or count. In a
    deep copy they follow later changes of the edit, until it is left to them; unpickled, they
    keep the one they had.
    """

    def __init__(self, layout: Layout, shared: Shared, *, is_copy: bool = False) -> None:
        self._layout = layout
        self.shared = shared
        self.is_copy = is_copy

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *output: Tensor) -> Tensor | None:
        """Note the rows that come by, and edit those of passes in eval mode.

        Args:
            module: That carries the hook.
            args: What it was called with.
            *output: What it returned, if the hook is a forward hook.

        Returns:
            The activation with edited rows; None leaves it as it is.
        """
        x: Tensor = output[0] if output else args[0]
        if not self.is_copy:
            self._note(x, training=module.training)
        edit = self.shared.edit
        if edit is None or module.training:
            return None
        is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if is_traced or getattr(torch.compiler, "is_exporting", bool)():
            warnings.warn(
                "the model is exported with the guard on it: the graph holds the correction of "
                f"this moment as steps of its own; for an ordinary one {FIRST}",
                stacklevel=2,
            )
        return self._layout.written(x, edit(self._layout.rows(x)))

    def _note(self, x: Tensor, *, training: bool) -> None:
        # Rows are copied: the next module may overwrite its input in place.
        shared = self.shared
        if shared.reading:
            shared.rows = self._layout.rows(x).detach().to(torch.float32, copy=True)
            shared.shape = tuple(x.shape)
            return
        # A compiled graph sets a flag: a counter would recompile it at every call.
        shared.fired = 1 if torch.compiler.is_compiling() else shared.fired + 1
        if shared.listening and training:
            shared.captured = self._layout.rows(x).detach().to(torch.float32, copy=True)

    def __getattr__(self, name: str) -> NoReturn:
        advice = f": torch.jit.script cannot take a guarded model; {FIRST}"
        raise AttributeError(
            f"{type(self).__name__} has no {name}{advice if name == '__name__' else ''}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(self._layout, self.shared, is_copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._layout, self.shared.edit)


class ImagesHook:
    """The pre-hook on the model itself that remembers what a training pass was called with."""

    def __init__(self, shared: Shared | None) -> None:
        self.shared = shared  # copies of the model have none and remember nothing

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember the images of a pass that is listened to."""
        shared = self.shared
        if shared is not None and shared.listening and module.training and not shared.reading:
            first = args[0] if args else None
            shared.images = first.detach() if isinstance(first, Tensor) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImagesHook":
        return ImagesHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImagesHook, (None,)


def stripped(model: nn.Module) -> nn.Module:
    """Take the hooks of guards off a model, say a copy that brought them along.

    Args:
        model: Changed in place.

    Returns:
        The model.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(hook, Hook | ImagesHook)]:
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


def _unpickled(layout: Layout, edit: Edit | None) -> Hook:
    return Hook(layout, Shared(edit), is_copy=True)
