"""Stage 1: read rows at one place of the model, and edit them there on passes in eval mode.

Nothing here knows what a row means: no concepts, no schedule. The only file that leaves hooks on
a model.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from concept_guard.attached import refuse_copies, refuse_second
from concept_guard.errors import TapError
from concept_guard.hooks import Edit, Hook, ImagesHook, OutcomeHook, Shared
from concept_guard.layouts import positions
from concept_guard.probe import counted, isolated, probe_batches
from concept_guard.reading import Reading, Reservoir, check_labels, checked_pair
from concept_guard.sites import silence
from concept_guard.surveying import placed, settled, surveyed, unwrapped

__all__ = ["Edit", "Reading", "Tap", "check_labels", "isolated", "probe_batches"]

SAME_MEAN = 1e-3  # of the largest value: what rounding may leave between rows and means


class Tap:
    """Reads the rows of one place of a model, and can edit them on passes in eval mode.

    Args:
        model: The classifier on its device, before `torch.compile`; a DDP wrapper is seen
            through. It gains one hook, or three, and nothing else.
        where: `pre_logits`, `stage:K` of timm's `feature_info`, or `module:PATH`; the last two
            may end in `@NCHW`, `@NHWC` or `@NLC`.
        sample: `(N, ...)` a few images, for one isolated pass that settles the layout.
        training: Whether images of training passes may be edited, and what they are taken for is
            noted; that takes two more hooks, on the model itself.

    Attributes:
        path: Name of the module that carries the hook.
        layout: "NC", "NCHW", "NHWC" or "NLC".
        channels: Length of a row, C.
        grid: Rows and columns of the positions in `sample`; nothing relies on other images
            having the same.
        num_prefix: Tokens in front of the spatial ones; never read, never edited.
        num_classes: Number of logits, M.
        batch: Images in the last train-mode pass that was noted and forgotten; 0 before.

    Raises:
        TapError: If the place does not exist, never fires, has no rows, is guarded already, or
            nothing of it reaches the logits. Nothing is attached.
    """

    def __init__(
        self, model: nn.Module, where: str, sample: Tensor, *, training: bool = False
    ) -> None:
        self._model: nn.Module | None = unwrapped(model)
        refuse_copies(self._model)
        survey = surveyed(self._model, where, sample)
        site = settled(survey, where)
        refuse_second(site.module, site.path, before=where == "pre_logits")
        self.path, self.channels, self._classifier = site.path, site.channels, site.classifier
        self._module: nn.Module | None = site.module
        self.layout, self.num_prefix = site.layout.name, site.layout.prefix
        self.grid, self.num_classes, self.batch = site.grid, survey.logits.shape[1], 0
        self._where, self._layout, self._shared = where, site.layout, Shared()
        self._shared.keeping = site.classifier is None
        self._hook = Hook(self._layout, self._shared)
        self._images_hook, self._outcome_hook = ImagesHook(self._shared), OutcomeHook(self._shared)
        with ExitStack() as stack:
            if training:
                before = self._model.register_forward_pre_hook(self._images_hook, with_kwargs=True)
                stack.callback(before.remove)
                after = self._model.register_forward_hook(self._outcome_hook, with_kwargs=True)
                stack.callback(after.remove)
            if where == "pre_logits":
                stack.callback(site.module.register_forward_pre_hook(self._hook).remove)
            else:
                stack.callback(site.module.register_forward_hook(self._hook).remove)
            self._attached = stack.pop_all()

    @property
    def model(self) -> nn.Module:
        """The model inside distributed wrappers.

        Raises:
            TapError: If the tap is closed.
        """
        if self._model is None:
            raise TapError(f"tap {self._where!r} is closed; build a new one on the model")
        return self._model

    @property
    def classifier(self) -> nn.Linear | None:
        """The linear map with `classifier(row) == logits`, if one follows the tap.

        Raises:
            TapError: If the model has another one by now.
        """
        head = self._classifier
        model = self._model
        if head is None or model is None or _is_part(self._module, self.path, model):
            return head
        raise TapError(
            f"the classifier behind tap {self._where!r} is no longer part of the model, expected "
            "the one that was there when the guard was built; close the guard and build a new one"
        )

    @property
    def edit(self) -> Edit | None:
        """Function of `(N, Q, C)` rows applied on passes in eval mode; None changes no bit.

        Passes in train mode are never edited: what a network learns while a concept is projected
        out is to find it again.

        It gets the dtype of the activation. Deep copies of the model follow it. Under
        `torch.compile`, changing tensors inside it is free; a new function recompiles.
        """
        return self._shared.edit

    @edit.setter
    def edit(self, edit: Edit | None) -> None:
        self._shared.edit = edit

    @property
    def augment(self) -> Edit | None:
        """Function of images applied on passes in train mode; None changes no bit."""
        return self._shared.augment

    @augment.setter
    def augment(self, augment: Edit | None) -> None:
        self._shared.augment = augment

    def leave_edit_to_copies(self) -> None:
        """Drop the edit here; deep copies of the model keep it and no longer follow."""
        self._shared, left = Shared(), self._shared
        self._shared.listening, self._shared.fired = left.listening, left.fired
        self._shared.augment, self._shared.keeping = left.augment, left.keeping
        for hook in (self._hook, self._images_hook, self._outcome_hook):
            hook.shared = self._shared

    @property
    def listening(self) -> bool:
        """Whether train-mode forward passes leave their rows in `captured`."""
        return self._shared.listening

    @listening.setter
    def listening(self, listening: bool) -> None:
        self._shared.listening = listening

    @property
    def captured(self) -> Tensor | None:
        """`(B, Q, C)` float32 rows, before the edit, of the last train-mode pass listened to."""
        return self._shared.captured

    @property
    def images(self) -> Tensor | None:
        """Images of that pass, as they were edited, if the tap was built to see them."""
        return self._shared.images

    @property
    def outcome(self) -> tuple[Tensor | None, Tensor | None]:
        """`(B, C)` mean colours and `(B,)` predictions of the last train-mode pass, if noted."""
        return self._shared.colours, self._shared.predicted

    def forget(self) -> None:
        """Drop what the last train-mode pass left behind, but for the number of its images."""
        if self._shared.predicted is not None:
            self.batch = len(self._shared.predicted)
        self._shared.captured = self._shared.images = None
        self._shared.colours = self._shared.predicted = None

    @property
    def fired(self) -> int:
        """Passes through the tap since `reset_fired`, own ones excepted; 1 if they are compiled."""
        return self._shared.fired

    def reset_fired(self) -> None:
        """Start counting passes again."""
        self._shared.fired = 0

    @property
    def device(self) -> torch.device:
        """Device of the model's first parameter; the CPU for a model without any."""
        first = next(self._model.parameters(), None) if self._model is not None else None
        return torch.device("cpu") if first is None else first.device

    def read(
        self,
        batches: Iterable[Any],
        *,
        max_rows: int,
        seed: int,
        max_images: int | None = None,
    ) -> Reading:
        """Pass over the probe once, isolated, and keep a uniform sample of its images.

        Where its batches are dealt out to several processes, all come here and get the whole.
        A `ProbeError` names all labels that are no class, once the pass is over.

        Args:
            batches: `(images, labels)` pairs; a loader is read in the order of its dataset.
            max_rows: Rows to keep. At least one image is kept, and always all of its rows.
            seed: Chooses the images if there are too many.
            max_images: Images to keep at most, if given.

        Returns:
            Rows before the current edit and logits after it, on the device of the model.
        """
        source = None if isinstance(batches, Iterator) else probe_batches(batches, seed)
        reservoir, grid = Reservoir(max_rows, max_images, seed), self.grid
        with self._own_pass(self.edit) as model:
            for start, batch in counted(batches) if source is None else source.dealt():
                images, labels = checked_pair(batch, start)
                logits, rows = self._forward(model, images)
                if not reservoir.seen:
                    grid = positions(model, images, self._layout, self._shared.shape)
                reservoir.add(rows, logits, labels, start)
        if source is not None and source.ranks.size > 1:
            heard = source.ranks.gathered((reservoir.parts(), grid))
            reservoir.join([parts for parts, _ in heard], self.device)
            grid = heard[0][1]
        return reservoir.reading(self.num_classes, grid)

    def logits(self, images: Tensor, edit: Edit | None) -> Tensor:
        """Return the `(N, M)` float32 logits of an isolated pass with another edit.

        Args:
            images: `(N, ...)` images.
            edit: Takes the place of the current edit for this pass; None for no edit.

        Returns:
            Logits on the device of the model.
        """
        with self._own_pass(edit) as model:
            return self._forward(model, images)[0]

    def through(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the `(N, M)` float32 logits of an isolated pass with other rows at the tap.

        Args:
            images: `(N, ...)` images, for what passes the tap by.
            rows: `(N, Q, C)` rows in place of theirs, before the current edit; the logits can be
                differentiated by them if they require it.

        Returns:
            Logits on the device of the model.
        """
        edit = self.edit
        given = rows if edit is None else edit(rows)
        with self._own_pass(lambda _: given) as model, torch.set_grad_enabled(rows.requires_grad):
            return self._forward(model, images)[0]

    def behind(self, images: Tensor, rows: Tensor) -> Tensor:
        """Return the `(N, M)` float32 logits of an isolated pass with other rows at the tap.

        What comes before the tap runs without gradients, so that none reaches its parameters,
        not even past the tap.

        Args:
            images: `(N, ...)` images, for what passes the tap by.
            rows: `(N, Q, C)` rows in place of theirs; the current edit is left out.

        Returns:
            Logits on the device of the model, with a gradient for the parameters behind the tap.
        """

        def given(_: Tensor) -> Tensor:
            torch.set_grad_enabled(True)  # until the pass ends
            return rows

        with self._own_pass(given) as model:
            return self._forward(model, images)[0]

    def pooled_from(self, images: Tensor) -> Tensor | None:
        """Return the feature map of an isolated pass whose plain mean is the row of each image.

        Args:
            images: `(N, ...)` images.

        Returns:
            `(N, h, w, C)` float32 on the device of the model; None at a tap with positions, for a
            model without `forward_features`, and where its mean is not the row.
        """
        if self.layout != "NC" or not hasattr(self._model, "forward_features"):
            return None
        with self._own_pass(self.edit) as model:
            rows = self._forward(model, images)[1][:, 0]
            maps = model.forward_features(placed(model, images))  # type: ignore[operator]
        if not isinstance(maps, Tensor) or maps.ndim != 4:
            return None
        for found in (maps.float().movedim(1, -1), maps.float()):
            if found.shape[-1] == rows.shape[-1]:
                tolerance = SAME_MEAN * float(rows.abs().max())
                if torch.allclose(found.mean(dim=(1, 2)), rows, rtol=0, atol=tolerance):
                    return found
        return None

    def close(self) -> None:
        """Take the hook off the model and let go of both; calling it again does nothing."""
        self._attached.close()
        self._model = self._classifier = self._module = None
        self.listening, self.augment = False, None
        self.forget()

    @contextmanager
    def _own_pass(self, edit: Edit | None) -> Iterator[nn.Module]:
        model, shared, kept = self.model, self._shared, self._shared.edit
        with isolated(model):
            shared.edit, shared.reading = edit, True
            try:
                yield model
            finally:
                shared.edit, shared.reading, shared.rows = kept, False, None

    def _forward(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        self._shared.rows = None
        logits: Tensor = model(placed(model, images))
        rows = self._shared.rows
        if rows is None:
            raise silence(surveyed(model, self._where, images[:2]), self._where, self.path)
        return logits.float(), rows


def _is_part(module: nn.Module | None, path: str, model: nn.Module) -> bool:
    """Return whether a module is part of a model, most likely at its old place."""
    try:
        if model.get_submodule(path) is module:
            return True
    except AttributeError:  # its old place is gone
        pass
    return any(m is module for m in model.modules())
