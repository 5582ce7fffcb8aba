"""The guard as a task of timm: one line in a training script that is built on `timm.task`."""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from concept_guard.config import GuardConfig
from concept_guard.errors import BakeError
from concept_guard.guard import ConceptGuard
from concept_guard.integrations.criteria import Criterion, per_sample

_logger = logging.getLogger(__name__)


class ConceptGuardTask(ClassificationTask):
    """timm's classification task with a guard.

    The guard is attached when the task is built: before resuming, EMA, compilation and DDP. The
    loss of a batch goes through it, and it counts an update whenever the script calls
    `update_ema`, as timm's does after every one. What the script validates is the corrected
    model. In a checkpoint the correction is folded into the weights, so that it is an ordinary
    one of timm; the weights as they are trained, and the state of the guard, are in `task_state`
    beside it, from where a run resumes.

    Several processes build one task each, on the whole probe; `prepare_distributed` wraps the model
    as it does without a guard.

    While nothing is corrected the loss is that of the criterion, bit for bit. With soft targets
    (Mixup, CutMix) nothing can be weighed by class, and the guard says so once it would.

    Args:
        model: The model to train.
        criterion: See `timm.task.ClassificationTask`, as are `criterion_kwargs`, `device`, `dtype`
            and `verbose`.
        probe: Held-out `(images, labels)` batches, such as the validation loader.
        config: `GuardConfig`, dict, YAML path, or None for the defaults.
        log_dir: Folder for TensorBoard events; None logs nothing.
        class_names: Shown in the log instead of class indices.

    Attributes:
        guard: The guard.

    Raises:
        ConceptGuardError: If the guard cannot be attached; nothing stays on the model.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        criterion_kwargs: dict[str, Any] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,  # noqa: FBT001, FBT002 - the signature of timm
        *,
        probe: Iterable[Any],
        config: GuardConfig | Mapping[str, object] | str | Path | None = None,
        log_dir: str | Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(model, criterion, criterion_kwargs, device, dtype, verbose)
        self.guard = ConceptGuard(
            model, probe=probe, config=config, log_dir=log_dir, class_names=class_names
        )
        self._losses: Criterion | None = per_sample(self.criterion, self.guard.tap.num_classes)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002
        """Return the loss that unlearns and the logits of a batch.

        Args:
            input: `(B, ...)` images.
            target: `(B,)` classes, or `(B, M)` soft ones.

        Returns:
            `loss`, a scalar, and `output`, the `(B, M)` logits.
        """
        output = self.trainable_module(input)
        criterion = self.criterion
        if self.guard.erased and self._losses is not None and target.ndim == 1:
            criterion = self._losses
        loss = criterion(output, target)
        return {"loss": self.guard.loss(loss, target), "output": output}

    def update_ema(self, step: int | None = None) -> None:
        """Count an update of the weights, run what is due, and update an average of them."""
        report = self.guard.step()
        if report is not None and self.verbose:
            _logger.info("update %d, guard: %s", report.step, report.verdict)
        super().update_ema(step)

    def get_checkpoint_state(
        self, ema: bool = False, unwrap_fn: Callable[[nn.Module], nn.Module] = unwrap_model
    ) -> dict[str, Any]:
        """Return the entries of a checkpoint: weights with the correction folded in, and the rest.

        Where it cannot be folded in, the weights are those of the model, with a warning.
        """
        state: dict[str, Any] = super().get_checkpoint_state(ema=ema, unwrap_fn=unwrap_fn)
        weights, rest = (
            ("state_dict_ema", "task_state_ema") if ema else ("state_dict", "task_state")
        )
        if weights not in state:
            return state
        trained = state[weights]
        try:
            model = unwrap_model(self.get_eval_model(ema=True)) if ema else None
            folded = self.guard.baked_copy(model).state_dict()
        except (BakeError, ValueError) as error:
            warnings.warn(f"the checkpoint has no correction in it: {error}", stacklevel=2)
            return state
        changed = {n: t for n, t in trained.items() if not torch.equal(folded[n].to(t), t)}
        state[weights] = {**trained, **{n: folded[n] for n in changed}}
        if changed:
            uncorrected = {n: t.detach().clone() for n, t in changed.items()}
            state.setdefault(rest, {})["concept_guard_uncorrected"] = uncorrected
        return state

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the state of the guard, once: not with an average of the weights."""
        state = dict(super().get_task_state(module, ema=ema))
        return state if ema else {**state, "concept_guard": self.guard.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Take the weights as they were trained, and the state of the guard, from a checkpoint.

        One without them, from a run without a guard, starts the guard afresh.
        """
        super().load_task_state(state, strict=strict, module=module, ema=ema)
        if state is None:
            return
        uncorrected = state.get("concept_guard_uncorrected")
        if uncorrected:
            model = unwrap_model(self.get_eval_model(ema=ema))
            model.load_state_dict(uncorrected, strict=False)
        if not ema:
            self.guard.load_state_dict(state.get("concept_guard"))
