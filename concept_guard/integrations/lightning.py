"""The guard as a callback of Lightning."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from concept_guard.config import GuardConfig
from concept_guard.errors import BakeError, ConfigError
from concept_guard.guard import ConceptGuard
from concept_guard.integrations.held_out import warn_if_trained_on

UNCORRECTED = "concept_guard_uncorrected"


class ConceptGuardCallback(Callback):
    """Guards the network of a `LightningModule` while `Trainer.fit` trains it.

    What `training_step` returns goes through the guard; batches are `(images, labels)`. Losses per
    sample may be returned (`reduction="none"`), so that they can be weighed. An update is counted
    whenever `global_step` has risen. What is validated is the corrected network. In a checkpoint
    the correction is folded into the weights, and the run resumes from what stands beside them; at
    the end of `fit` it is folded into the network itself. After an exception the guard stays on the
    network, for `guard.bake()`, `guard.close()` or the next `fit`, which starts with another.

    Args:
        probe: Held-out `(images, labels)` batches, or a function from the trainer to them, such as
            `lambda trainer: trainer.datamodule.val_dataloader()`.
        config: `GuardConfig`, dict, YAML path, or None for the defaults.
        network: Name of the attribute of the `LightningModule` that maps images to logits.
        log_dir: Folder for TensorBoard events; None logs nothing.
        class_names: Shown in the log instead of class indices.

    Attributes:
        guard: The guard during and after `fit`, None before.
    """

    def __init__(
        self,
        probe: Iterable[Any] | Callable[[Trainer], Iterable[Any]],
        config: GuardConfig | Mapping[str, object] | str | Path | None = None,
        *,
        network: str = "model",
        log_dir: str | Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._probe, self._config, self._network = probe, config, network
        self._log_dir, self._class_names = log_dir, class_names
        self.guard: ConceptGuard | None = None
        self._updates = 0
        self._read: Iterable[Any] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the guard, before the network is resumed, wrapped or trained."""
        if stage != "fit":
            return
        self._release(pl_module)
        self._refuse(trainer, pl_module)
        self._read = self._probe(trainer) if callable(self._probe) else self._probe
        self.guard = ConceptGuard(
            self._model(pl_module),
            probe=self._read,
            config=self._config,
            log_dir=self._log_dir,
            class_names=self._class_names,
        )
        pl_module.training_step = self._guarded(pl_module.training_step)  # type: ignore[method-assign]

    def _refuse(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name everything that would train without the guard.

        Raises:
            ConfigError: If there is anything.
        """
        wrong = []
        if not pl_module.automatic_optimization:
            wrong.append(
                "with manual optimization the loss is not the callback's to change; hold a "
                "ConceptGuard in the module and call its loss() and step()"
            )
        if not isinstance(getattr(pl_module, self._network, None), nn.Module):
            names = [name for name, _ in pl_module.named_children()]
            wrong.append(
                f"{type(pl_module).__name__} has no network {self._network!r}, only {names}; say "
                "which one maps images to logits: network=..."
            )
        if wrong:
            raise ConfigError("\n".join(f"ConceptGuardCallback: {fault}" for fault in wrong))
        for saver in trainer.checkpoint_callbacks:
            if isinstance(saver, ModelCheckpoint) and saver.save_weights_only:
                warnings.warn(
                    "ModelCheckpoint(save_weights_only=True) asks no callback: these checkpoints "
                    "will have no correction in them; use save_weights_only=False",
                    stacklevel=2,
                )

    def _model(self, pl_module: LightningModule) -> nn.Module:
        model: nn.Module = getattr(pl_module, self._network)
        return model

    def _guarded(self, training_step: Callable[..., Any]) -> Callable[..., Any]:
        """Return a training step whose loss has gone through the guard."""

        @wraps(training_step)  # the trainer looks at which arguments it takes
        def guarded(batch: Any, *args: Any, **kwargs: Any) -> Any:
            output = training_step(batch, *args, **kwargs)
            if self.guard is None or output is None:
                return output
            labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
            labels = labels if isinstance(labels, Tensor) else None
            if isinstance(output, Tensor):
                return self.guard.loss(output, labels)
            return {**output, "loss": self.guard.loss(output["loss"], labels)}

        return guarded

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count updates from where the trainer stands, after resuming too."""
        del pl_module
        self._updates = trainer.global_step
        warn_if_trained_on(self._read, trainer.train_dataloader)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Count an update, if this batch ended one, and run what is due."""
        if self.guard is not None and trainer.global_step > self._updates:
            self._updates = trainer.global_step
            self.guard.step()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Fold the correction into the weights of a checkpoint; the others go beside them."""
        del pl_module
        if self.guard is None or self.guard.closed or not trainer.is_global_zero:
            return  # the first process writes the checkpoint
        try:
            folded = self.guard.baked_copy().state_dict()
        except (BakeError, ValueError) as error:
            warnings.warn(f"the checkpoint has no correction in it: {error}", stacklevel=2)
            return
        state, uncorrected = checkpoint["state_dict"], {}
        for name, value in folded.items():
            full = f"{self._network}.{name}"
            if full in state and not value.equal(state[full]):
                uncorrected[name], state[full] = state[full].detach().clone(), value
        checkpoint[UNCORRECTED] = uncorrected

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the weights as they were trained; the others of the checkpoint are loaded by now."""
        uncorrected = checkpoint.get(UNCORRECTED)
        if uncorrected and trainer.state.fn == "fit":
            self._model(pl_module).load_state_dict(uncorrected, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the guard."""
        return {} if self.guard is None else {"guard": self.guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of the guard."""
        if self.guard is not None:
            self.guard.load_state_dict(state_dict.get("guard"))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fold the correction into the network."""
        del trainer, pl_module
        if self.guard is not None:
            try:
                self.guard.bake()
            except (BakeError, ValueError) as error:
                warnings.warn(f"the network has no correction in it: {error}", stacklevel=2)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off the network."""
        del trainer
        if stage == "fit":
            self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        if self.guard is not None:
            self.guard.close()
            pl_module.__dict__.pop("training_step", None)
