"""Stage 1: what the hooks on a model do when a pass comes by: note it, and edit it.

Nothing here puts a hook on a model, or knows what a row or an image means.
"""

import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from concept_guard.layouts import Layout
from concept_guard.reading import mean_colours

Edit = Callable[[Tensor], Tensor]
FIRST = "call guard.bake() and guard.close() before"
PIXELS = "pixel_values"  # what models of transformers call their images


class Shared:
    """What a tap, its hook, and the hooks of deep copies of the model have in common.

    Attributes:
        edit: Function of rows that acts on passes in eval mode, or None.
        augment: Function of images that acts on passes in train mode, or None.
        listening: Whether passes in train mode leave their rows and images behind.
        keeping: Whether images are among what they leave behind.
        captured: `(B, Q, C)` rows of the last such pass.
        images: Images of it.
        colours: `(B, C)` mean colours of the images of the last pass in train mode.
        predicted: `(B,)` the classes that they were taken for.
        fired: Passes so far.
        reading: Whether a pass of the tap's own is under way.
        rows: `(N, Q, C)` rows that it read.
        shape: Of the activation they were read from.
    """

    def __init__(self, edit: Edit | None = None) -> None:
        self.edit = edit
        self.augment: Edit | None = None
        self.listening = False
        self.keeping = True
        self.captured: Tensor | None = None
        self.images: Tensor | None = None
        self.colours: Tensor | None = None
        self.predicted: Tensor | None = None
        self.fired = 0
        self.reading = False
        self.rows: Tensor | None = None
        self.shape: tuple[int, ...] = ()


class OfGuard:
    """A hook of a guard, which TorchScript cannot take."""

    def __getattr__(self, name: str) -> NoReturn:
        advice = f": torch.jit.script cannot take a guarded model; {FIRST}"
        raise AttributeError(
            f"{type(self).__name__} has no {name}{advice if name == '__name__' else ''}"
        )


class Hook(OfGuard):
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

    def __deepcopy__(self, memo: dict[int, Any]) -> "Hook":
        return Hook(self._layout, self.shared, is_copy=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self._layout, self.shared.edit)


class ImagesHook(OfGuard):
    """The pre-hook on the model itself: edits images of training passes, and remembers them."""

    def __init__(self, shared: Shared | None) -> None:
        self.shared = shared  # copies of the model have none: they edit and remember nothing

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Edit the images that a model in train mode is called with, and keep them if wanted.

        Args:
            module: The model.
            args: What it was called with; images are the first, or the one named `PIXELS`.
            kwargs: Likewise.

        Returns:
            The same with edited images; None leaves all as it is.
        """
        shared = self.shared
        if shared is None or not module.training or shared.reading:
            return None
        images = args[0] if args else kwargs.get(PIXELS)
        new = images
        if isinstance(images, Tensor) and shared.augment is not None:
            new = shared.augment(images)
        if shared.listening and shared.keeping:
            shared.images = new.detach() if isinstance(new, Tensor) else None
        if new is images:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, PIXELS: new})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImagesHook":
        return ImagesHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImagesHook, (None,)


class OutcomeHook(OfGuard):
    """The hook on the model itself that notes what training images look like and are taken for."""

    def __init__(self, shared: Shared | None) -> None:
        self.shared = shared  # copies of the model have none and note nothing

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Note mean colours and predicted classes of a pass in train mode.

        Args:
            module: The model.
            args: What it was called with, edited.
            kwargs: Likewise.
            output: `(B, M)` logits, or what has such `logits`.
        """
        shared = self.shared
        if shared is None or not module.training or shared.reading:
            return
        images = args[0] if args else kwargs.get(PIXELS)
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(images, Tensor) and isinstance(logits, Tensor) and logits.ndim == 2:
            shared.colours = mean_colours(images)
            shared.predicted = logits.detach().argmax(dim=1)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OutcomeHook":
        return OutcomeHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutcomeHook, (None,)


def _unpickled(layout: Layout, edit: Edit | None) -> Hook:
    return Hook(layout, Shared(edit), is_copy=True)
