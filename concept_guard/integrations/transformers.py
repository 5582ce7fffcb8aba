"""The guard as a callback of the Trainer of Transformers, and the loss that goes with it."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from concept_guard.config import GuardConfig
from concept_guard.errors import BakeError, ConfigError
from concept_guard.guard import ConceptGuard
from concept_guard.integrations.criteria import Criterion, per_sample
from concept_guard.integrations.held_out import warn_if_trained_on

STATE, CORRECTED = "concept_guard.pt", "concept_guard.safetensors"


class ConceptGuardCallback(TrainerCallback):
    """Guards the network of a model that `Trainer` trains.

    It takes two places: `Trainer(callbacks=[callback], compute_loss_func=callback.compute_loss)`.
    An update is counted after every step of the optimizer. Every checkpoint gets the network's
    weights with the correction folded in, as `concept_guard.safetensors`, and the state of the
    guard, from where `resume_from_checkpoint` goes on (from another folder than the Trainer's own,
    see `resume_from`); at the end of training the correction is folded into the network itself,
    so that `save_model` saves it.

    Args:
        network: Maps images to logits: the model, or what is inside it, such as the `timm_model`
            of a `TimmWrapperForImageClassification`.
        probe: Held-out `(images, labels)` batches.
        config: `GuardConfig`, dict, YAML path, or None for the defaults.
        criterion: Of `(B, M)` logits and `(B,)` classes; a mean over samples.
        log_dir: Folder for TensorBoard events; None logs nothing.
        class_names: Shown in the log instead of class indices.

    Attributes:
        guard: The guard.

    Raises:
        ConfigError: If the criterion is no mean over samples.
        ConceptGuardError: If the guard cannot be attached; nothing stays on the network.
    """

    def __init__(
        self,
        network: nn.Module,
        probe: Iterable[Any],
        config: GuardConfig | Mapping[str, object] | str | Path | None = None,
        *,
        criterion: Criterion = cross_entropy,
        log_dir: str | Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.guard = ConceptGuard(
            network, probe=probe, config=config, log_dir=log_dir, class_names=class_names
        )
        losses = per_sample(criterion, self.guard.tap.num_classes)
        if losses is None:
            self.guard.close()
            raise ConfigError(
                f"criterion: {criterion} is no mean over samples of (logits, classes), expected "
                "one such as cross_entropy; weigh classes in the sampler instead"
            )
        self._losses, self._heard, self._resumed = losses, False, False
        self._probe = probe

    def resume_from(self, checkpoint: str | Path) -> None:
        """Take the state of the guard from a checkpoint, wherever it is.

        Args:
            checkpoint: Folder; what is trained is resumed by the Trainer.
        """
        self.guard.load_state_dict(torch.load(Path(checkpoint, STATE), weights_only=True))
        self._resumed = True

    def compute_loss(
        self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of a batch, for `Trainer(compute_loss_func=...)`.

        Args:
            outputs: Of the model, with `logits` of shape `(B, M)`.
            labels: `(B,)` classes.
            num_items_in_batch: Samples of all batches that one update accumulates.

        Returns:
            A scalar; those of the batches of one update add up to the mean.

        Raises:
            ValueError: If there are no labels.
        """
        if labels is None:
            raise ValueError("compute_loss got no labels; give the Trainer batches with `labels`")
        self._heard = True
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
        loss = self.guard.loss(self._losses(logits, labels), labels)
        return loss if num_items_in_batch is None else loss * (len(labels) / num_items_in_batch)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on from the checkpoint that the Trainer has resumed from, if there is one.

        Raises:
            ConfigError: If the guard is closed, or was built before the processes knew each other.
        """
        del control
        warn_if_trained_on(self._probe, kwargs.get("train_dataloader"))
        if self.guard.closed:
            raise ConfigError(
                "ConceptGuardCallback: its guard was closed at the end of training; build another "
                "callback and Trainer to train on"
            )
        if args.world_size != self.guard.processes:
            raise ConfigError(
                f"ConceptGuardCallback: {args.world_size} processes train, and the guard knows of "
                f"{self.guard.processes}: each would correct something else; build "
                "TrainingArguments first, then the callback"
            )
        if not state.global_step or self._resumed:
            return
        folder = _folder(args, state)
        if (folder / STATE).is_file():
            self.resume_from(folder)
        else:
            warnings.warn(
                f"no {STATE} in {folder}, the guard starts afresh; if the run is resumed from "
                "another folder, call callback.resume_from(folder) before train()",
                stacklevel=2,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count an update and run what is due.

        Raises:
            ConfigError: If the loss does not go through the guard.
        """
        del args, state, control, kwargs
        if not self._heard:
            raise ConfigError(
                "the loss does not go through the guard; build the Trainer with "
                "compute_loss_func=callback.compute_loss"
            )
        self.guard.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the state of the guard and the corrected weights into a checkpoint."""
        del control, kwargs
        folder = _folder(args, state)
        if self.guard.closed or not state.is_world_process_zero or not folder.is_dir():
            return
        torch.save(self.guard.state_dict(), folder / STATE)
        try:
            weights = self.guard.baked_copy().state_dict()
        except (BakeError, ValueError) as error:
            warnings.warn(f"no corrected weights in {folder}: {error}", stacklevel=2)
            return
        save_file({n: t.contiguous().clone() for n, t in weights.items()}, folder / CORRECTED)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fold the correction into the network and take everything off it."""
        del args, state, control, kwargs
        try:
            self.guard.bake()
        except (BakeError, ValueError) as error:
            warnings.warn(f"the network has no correction in it: {error}", stacklevel=2)
        self.guard.close()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
