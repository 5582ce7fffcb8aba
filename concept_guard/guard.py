"""ConceptGuard: the one object a training loop holds. It orders the stages and computes nothing."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from concept_guard import measures, reporting, state
from concept_guard.changes import Levels
from concept_guard.clock import Clock
from concept_guard.config import GuardConfig
from concept_guard.correction import obstacle
from concept_guard.corrector import Corrector
from concept_guard.directions import DirectionPairs
from concept_guard.errors import BakeError, TapError
from concept_guard.explanation import Explanation, explain_images
from concept_guard.ids import known, listed
from concept_guard.logs import EventLog, RoundReport, assign_slots
from concept_guard.probe import (
    Reading,
    check_counts,
    check_labels,
    checked_pair,
    probe_batches,
)
from concept_guard.rounds import Findings, look
from concept_guard.taps import Tap

T = TypeVar("T")


class ConceptGuard:
    """Finds concepts that drive errors while a model trains, and unlearns them.

    Attach it before `torch.compile`, EMA copies and `DistributedDataParallel`. Nothing is
    registered on the model; `close` takes off exactly what was added.

    Args:
        model: Image classifier; a module of it is hooked, nothing is wrapped or changed.
        probe: Held-out `(images, labels)` batches without augmentation, read many times.
        config: `GuardConfig`, dict, YAML path, or None for the defaults.
        log_dir: Folder for TensorBoard events; None logs nothing.
        class_names: Shown in the log instead of class indices.

    Attributes:
        config: The settings.
        tap: Where activations are read and corrected.
        steps: Optimizer updates so far.
        report: Record of the last round, None before the first.

    Raises:
        ConfigError: If the configuration is wrong.
        TapError: If the tap does not exist or never fires. Nothing stays attached.
        ProbeError: If the probe is empty, mislabelled or lacks a class. Nothing stays attached.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        probe: Iterable[Any],
        config: GuardConfig | Mapping[str, object] | str | Path | None = None,
        log_dir: str | Path | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.config = GuardConfig.load(config)
        self._due = {n: self.config.updates(n) for n in ("start", "every", "track_every")}
        self._probe = probe_batches(probe, self.config.seed)
        sample = next(iter(self._probe), None)
        if sample is None:
            check_labels([], 0)
        self.tap = Tap(model, self.config.tap, checked_pair(sample, 0)[0][:2])
        try:
            self._images = check_labels(self._probe, self.tap.num_classes)
        except BaseException:
            self.tap.close()
            raise
        self._model_name = type(model).__name__
        self._corrector = Corrector(self.tap, self._probe, self.config)
        self._log = EventLog(
            log_dir, hparams=self.config.model_dump(mode="json"), class_names=class_names
        )
        self.steps = 0
        self.report: RoundReport | None = None
        self._pairs: DirectionPairs | None = None
        self._ids: tuple[int, ...] = ()
        self._next_id = 0
        self._slots: dict[int, int] = {}
        self._levels: tuple[DirectionPairs, Levels] | None = None
        self._last_loss: Tensor | None = None
        self._round_is_due = False
        self._clock = Clock()
        self._warned: set[str] = set()
        self._fired = self._closed = False

    def loss(self, loss: Tensor, targets: Tensor | None = None) -> Tensor:
        """Turn the criterion's result into the loss to descend.

        Args:
            loss: A scalar, returned as it is; or `(B,)` losses per sample (a criterion with
                `reduction="none"`), which rebalancing can weigh.
            targets: `(B,)` classes of the batch, needed to weigh.

        Returns:
            A scalar. While nothing is corrected it is, bit for bit, the scalar given or the
            plain mean.

        Raises:
            ValueError: If the shapes of loss and targets do not belong together.
        """
        fits = targets is None or not loss.ndim or targets.shape[:1] == loss.shape
        if loss.ndim > 1 or not fits:
            got = "no targets" if targets is None else f"targets {tuple(targets.shape)}"
            raise ValueError(
                f"loss has shape {tuple(loss.shape)} with {got}; expected a scalar, or one loss "
                "per sample and as many targets (criterion with reduction='none')"
            )
        self._last_loss = loss.detach()
        if not self._corrector.rebalancing:
            return loss if loss.ndim == 0 else loss.mean()
        weights = self._weights(loss, targets)
        return loss.mean() if weights is None else (loss * weights.to(loss.dtype)).mean()

    def _weights(self, loss: Tensor, targets: Tensor | None) -> Tensor | None:
        """Return the weights of the batch; None, with one warning, where they cannot be had."""
        rows = self.tap.captured
        problem = obstacle(loss, targets, rows, self.tap.num_classes)
        if problem or rows is None or targets is None:
            self._warn_once(f"rebalancing cannot act: {problem}.")
            return None
        with torch.no_grad():
            return self._corrector.weights(rows, targets)

    def step(self) -> RoundReport | None:
        """Count one optimizer update; run a round or re-estimate tracked pairs when due.

        A round that fails is skipped with a warning and training goes on; a tap that has not
        fired by the first update is a `TapError`.

        Returns:
            The record of a round that ran, else None.
        """
        self._check_fired()
        self.steps += 1
        self._clock.start()
        since = self.steps - self._due["start"]
        self._round_is_due |= since >= 0 and since % self._due["every"] == 0
        if not self._clock.affords(self.config.budget):
            return None
        if self._round_is_due:
            self._round_is_due = False
            return self._guarded(self._round)
        if self._corrector.tracked and self.steps % self._due["track_every"] == 0:
            self._guarded(self._corrector.track)
        return None

    def round(self) -> RoundReport | None:
        """Run one round now.

        Returns:
            Its record; None if it was skipped because activations or loss are not finite.
        """
        return self._timed(self._round)

    def erase(self, ids: int | Iterable[int]) -> None:
        """Correct concepts of the last round, whatever the statistics say.

        A `ValueError` also names ids that are no concepts of that round, or cannot be erased.

        Args:
            ids: Concepts of the last report.

        Raises:
            ValueError: If the action is `observe`.
        """
        if not self.config.action:
            raise ValueError(
                "nothing is erased under action: observe; set action to project or rebalance"
            )
        self._timed(lambda: self._erase(self._known(ids)))
        self._say("erase", ids)

    def restore(self, ids: int | Iterable[int]) -> None:
        """Stop correcting concepts; they stay vetoed until they are erased or approved again.

        Args:
            ids: Concepts under correction; a `ValueError` names others.
        """
        wanted = known(ids, self.erased, "among those under correction")
        self._corrector.drop(wanted)
        self._corrector.vetoed |= set(wanted)
        self._say("restore", ids)

    def veto(self, ids: int | Iterable[int]) -> None:
        """Never correct these concepts; one under correction is restored.

        A `ValueError` names ids that are no concepts of the last round.

        Args:
            ids: Concepts of the last report.
        """
        wanted = self._known(ids)
        self._corrector.drop(wanted)
        self._corrector.vetoed |= set(wanted)
        self._corrector.approved -= set(wanted)
        self._say("veto", ids)

    def approve(self, ids: int | Iterable[int]) -> None:
        """Allow concepts to be corrected: those that wait at once, others when they are flagged.

        A `ValueError` names ids that are no concepts of the last round.

        Args:
            ids: Concepts of the last report.
        """
        wanted = self._known(ids)
        self._corrector.vetoed -= set(wanted)
        self._corrector.approved |= set(wanted)
        waiting = () if self.report is None else self.report.flags
        now = [f.concept for f in waiting if f.concept in wanted and f.status == "waiting"]
        if now and self.config.action:
            self._timed(lambda: self._erase(now))
        self._say("approve", ids)

    def explain(
        self, images: Tensor, labels: Tensor | None = None, *, maps: bool = True
    ) -> list[Explanation]:
        """Say for every image which concepts its prediction is due to, and what would change it.

        The concepts are those of the last round; the model is explained as it is, with its
        current correction, and left untouched. A `ProbeError` names labels that are no class.

        Args:
            images: `(N, ...)` images as the model takes them.
            labels: `(N,)` true classes, if they are known.
            maps: Whether to find where in the image the concept is that speaks most for the
                prediction. At a pooled tap that takes 64 more passes of the image.

        Returns:
            One explanation per image.

        Raises:
            ValueError: If no round has run yet, or labels and images do not belong together.
        """
        if self._pairs is None:
            raise ValueError("explain: no round has found concepts yet; call guard.round() first")
        if labels is not None:
            if labels.shape != images.shape[:1]:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}, images {tuple(images.shape)}; "
                    "expected one class per image"
                )
            check_counts([labels], self.tap.num_classes)
        if self._levels is None or self._levels[0] is not self._pairs:
            rows = self.tap.read(self._probe, max_rows=self.config.max_rows, seed=0).rows
            self._levels = (self._pairs, Levels.of(self._pairs.factors(rows), self._pairs))
        pairs, levels = self._levels
        return explain_images(self.tap, images, labels, pairs, self._ids, levels, maps=maps)

    @property
    def erased(self) -> tuple[int, ...]:
        """Ids of the concepts under correction."""
        return tuple(t.concept for t in self._corrector.tracked)

    def bake(self) -> None:
        """Fold the projection into the model's own weights; nothing is corrected afterwards.

        The logits stay the same to rounding in eval mode. Without a projection nothing changes.
        Where no plain linear map follows the tap, a `BakeError` leaves the model as it is.

        Raises:
            BakeError: If the guard is closed.
        """
        if self._closed:
            raise BakeError("the guard is closed, its correction is gone; call bake before close")
        self._corrector.bake()
        self._log.act(self.steps, "bake")

    def close(self) -> None:
        """Take everything off the model; calling it again does nothing."""
        self._closed = True
        self.tap.close()
        self._corrector.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as tensors and plain data.

        Returns:
            A dict that `torch.load(..., weights_only=True)` reads back.
        """
        return {
            "schema_version": state.SCHEMA_VERSION,
            "model": self._identity(),
            "steps": self.steps,
            "pairs": state.from_pairs(self._pairs),
            "ids": list(self._ids),
            "next_id": self._next_id,
            "slots": dict(self._slots),
            "round_is_due": self._round_is_due,
            "report": state.from_report(self.report),
            **self._corrector.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Continue from a saved state; the model's own weights are loaded separately.

        A `StateError` names every way in which the state has another schema, model or tap.

        Args:
            saved: Result of `state_dict`; None is accepted and changes nothing.
        """
        if saved is None:
            return
        state.check(saved, self._identity(), set(self.state_dict()))
        device = self.tap.device
        self._corrector.load_state_dict(saved)
        self.steps, self._next_id = saved["steps"], saved["next_id"]
        self._ids, self._slots = tuple(saved["ids"]), dict(saved["slots"])
        self._pairs = state.to_pairs(saved["pairs"], device)
        self.report = state.to_report(saved["report"])
        self._round_is_due = saved["round_is_due"]

    def _identity(self) -> dict[str, Any]:
        shape = {"channels": self.tap.channels, "num_classes": self.tap.num_classes}
        shape["probe_images"] = self._images
        return {"class": self._model_name, "tap": self.config.tap, **shape}

    def _round(self) -> RoundReport | None:
        """Return the record of one round; the guard's state changes only once all is known."""
        began = time.perf_counter()
        reading = self._read()
        if reading is None:
            return None
        found = look(
            reading,
            self._corrector.tail(reading),
            config=self.config,
            seed=self.config.seed + self.steps,
            last=self._pairs,
            last_ids=self._ids,
            next_id=self._next_id,
            tracked=self._corrector.tracked,
        )
        if_erased = self._corrector.act_on(found, reading)
        self._pairs, self._ids, self._next_id = found.pairs, found.ids, found.next_id
        self.report = reporting.report(
            reading,
            found,
            self._corrector,
            if_erased,
            step=self.steps,
            alpha=self.config.alpha,
            seconds=time.perf_counter() - began,
            overhead=self._clock.share,
        )
        self._write(self.report, reading, found)
        return self.report

    def _read(self) -> Reading | None:
        """Return a reading of the probe; None, with a warning, if something is not finite."""
        reading = self.tap.read(self._probe, max_rows=self.config.max_rows, seed=self.config.seed)
        wrong = measures.not_finite(reading, self._last_loss, self.config.tap)
        if not wrong:
            return reading
        warnings.warn(
            f"round at step {self.steps} skipped: {' and '.join(wrong)} hold NaN or infinite "
            "values, expected finite ones; lower the learning rate or check the data. The guard "
            "keeps its last state and training goes on.",
            stacklevel=4,
        )
        return None

    def _write(self, report: RoundReport, reading: Reading, found: Findings) -> None:
        self._slots = assign_slots(self._slots, report)
        if self._log.active:
            cards = reporting.cards(self.tap, self._probe, reading, found, list(self._slots))
            self._log.write(report, cards, self._slots)

    def _erase(self, ids: list[int]) -> None:
        reading = self._read()
        if reading is None or self._pairs is None:
            return
        self._corrector.erase(ids, self._ids, self._pairs, reading)

    def _known(self, ids: int | Iterable[int]) -> list[int]:
        there = {*self._ids, *self.erased}
        return known(ids, there, "among those of the last round (guard.report.concepts)")

    def _say(self, act: str, ids: int | Iterable[int]) -> None:
        self._log.act(self.steps, f"{act} {', '.join(map(str, listed(ids)))}")

    def _check_fired(self) -> None:
        if self._fired and not self.tap.fired:
            self._warn_once(
                f"tap {self.config.tap!r} ({self.tap.path}) has stopped firing: nothing is "
                "corrected. Was a part of the model replaced, or another model trained? Close the "
                "guard and build a new one."
            )
        if not self._fired and not self.tap.fired:
            raise TapError(
                f"tap {self.config.tap!r} ({self.tap.path}) has not fired before the first "
                "guard.step(); expected the guarded model itself to be called in training. Build "
                "the guard before torch.compile and EMA copies, and call the model, not parts of it"
            )
        self._fired = True
        self.tap.reset_fired()
        self.tap.forget()

    def _guarded(self, stage: Callable[[], T]) -> T | None:
        """Return what a stage returns; a failure costs a warning, not the training run."""
        try:
            return self._timed(stage)
        except Exception as error:  # whatever it is, it must not end the user's training
            warnings.warn(
                f"the guard's work at step {self.steps} is skipped: {type(error).__name__}: "
                f"{error}. The guard keeps its last state and training goes on.",
                stacklevel=3,
            )
            return None

    def _timed(self, stage: Callable[[], T]) -> T:
        with self._clock.spending():
            return stage()

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)
