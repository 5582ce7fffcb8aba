"""ConceptGuard: the one object a training loop holds. It says when, and computes nothing."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn
from torch.utils.data import Sampler

from concept_guard import state
from concept_guard.acts import Acts
from concept_guard.cards import Card
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.decisions import Channel
from concept_guard.errors import BakeError
from concept_guard.explanation import Explainer, Explanation
from concept_guard.health import Health
from concept_guard.last_round import LastRound
from concept_guard.logs import Act, EventLog, RoundReport
from concept_guard.names import file_names
from concept_guard.probe import probe_batches
from concept_guard.ranks import Ranks
from concept_guard.reading import check_labels
from concept_guard.rebalancing import checked, descended
from concept_guard.sampling import Samples
from concept_guard.schedule import Schedule
from concept_guard.steadiness import steady_sample
from concept_guard.styles import Styles
from concept_guard.taps import Tap
from concept_guard.watch import Watch

_outside_inference_mode = torch.inference_mode(mode=False)  # whose tensors can learn nothing later


class ConceptGuard:
    """Finds concepts that drive errors while a model trains, and unlearns them.

    Attach it before `torch.compile`, EMA copies and `DistributedDataParallel`. Nothing is
    registered on the model; `close` takes off exactly what was added. What is projected out is
    missing in eval mode and, after `bake`, in the weights; rows of passes in train mode are not
    edited, their images are, with `augment` among the actions and a concept under correction.

    Where several processes train, every one builds a guard, after `init_process_group`, on the
    whole probe, and makes the same calls: the guards share out its forward passes and hold the
    same. The first one writes logs. `explain` and `baked_copy` are the business of one process.

    Args:
        model: Image classifier; it is hooked, and a module of it, nothing is wrapped or changed.
        probe: Held-out `(images, labels)` batches without augmentation, read many times.
        config: `GuardConfig`, dict, YAML path, or None for the defaults.
        log_dir: Folder for TensorBoard events, and for `concept-guard approve` and its like to
            reach this run; None logs nothing.
        class_names: Shown in the log instead of class indices.

    Attributes:
        config: The settings.
        tap: Where activations are read and corrected.
        baked: What `bake` did about the classifier, in words; empty without `refit`.

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
        self.config.check_schedules()
        self._ranks = Ranks()
        try:
            self._attach(model, probe)
        except Exception as error:
            self._ranks.fail(error)
            self._ranks.close()
            raise
        log_dir = log_dir if self._ranks.first else None
        self._model_name = type(model).__name__
        self._log = EventLog(
            log_dir,
            model=self._model_name,
            hparams=self.config.model_dump(mode="json"),
            class_names=class_names,
            file_names=file_names(self._probe, self._images),
        )
        self._channel = Channel(log_dir)
        self._health = Health(self.tap, self.config.tap, self._ranks)
        self._corrector = Corrector(self.tap, self._probe, self.config, self.config.updates("ramp"))
        self._watch = Watch(
            self.tap,
            self._probe,
            self._corrector,
            self._health,
            self._log,
            self.config,
            class_names,
            styles=self._styles,
        )
        self._acts = Acts(
            self._corrector, self._watch, self._log, self._channel, self.config, class_names
        )
        self._explainer = Explainer(self.tap, self._probe.alone, self.config.max_rows)
        self._samples = Samples(self._corrector, self.config.seed)
        self._schedule = Schedule(
            self.config,
            self,
            tap=self.tap,
            corrector=self._corrector,
            watch=self._watch,
            acts=self._acts,
            channel=self._channel,
        )
        self.baked, self._closed = "", False

    def _attach(self, model: nn.Module, probe: Iterable[Any]) -> None:
        """Tap the model, if the probe can be worked with."""
        self._probe = probe_batches(probe, self.config.seed, self._ranks)
        self._sample = steady_sample(self._probe)
        self.tap = Tap(model, self.config.tap, self._sample, training=True)
        self._styles = Styles(self._ranks)
        try:
            labels = check_labels(
                self._styles.noting(self._probe), self.tap.num_classes, self._ranks
            )
        except BaseException:
            self.tap.close()
            raise
        self._images = len(labels)

    @property
    def steps(self) -> int:
        """Optimizer updates so far."""
        return self._schedule.steps

    @property
    def report(self) -> RoundReport | None:
        """Record of the last round, None before the first."""
        return self._watch.last.report

    @property
    def cards(self) -> dict[int, Card]:
        """Concept id to its card, as the last round drew it; empty without a log_dir."""
        return dict(self._watch.last.cards)

    @property
    def erased(self) -> tuple[int, ...]:
        """Ids of the concepts under correction."""
        return tuple(t.concept for t in self._corrector.tracked)

    @property
    def processes(self) -> int:
        """How many processes train together, as far as the guard knows."""
        return self._ranks.size

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def sampler(self, size: int, *, generator: Generator | None = None) -> Sampler[int]:
        """Return a sampler for the training loader that rebalances in place of weighed losses.

        While nothing is rebalanced it shuffles as `RandomSampler` does. Then an epoch is drawn
        with replacement: within a class, samples of the rarer group (concept present or absent) up
        to five times as often. What samples carry is learnt from `loss(..., indices=...)`, which
        does not weigh them any more. A `ValueError` says what is wrong with a size.

        Args:
            size: Length of the training set.
            generator: Draws; None for one of the guard's own, which is part of its state.

        Returns:
            The sampler, for `DataLoader(..., sampler=...)`.
        """
        return self._samples.sampler(size, generator)

    def loss(
        self, loss: Tensor, targets: Tensor | None = None, *, indices: Tensor | None = None
    ) -> Tensor:
        """Turn the criterion's result into the loss to descend.

        A `ValueError` says which shapes of loss, targets and indices do not belong together.

        Args:
            loss: A scalar; or `(B,)` losses per sample (a criterion with `reduction="none"`),
                which rebalancing can weigh.
            targets: `(B,)` classes of the batch, needed while something is corrected.
            indices: `(B,)` positions of its samples in the training set, for the `sampler`.

        Returns:
            A scalar: the one given or the mean, weighed where something is rebalanced. Its value
            stays that of the criterion, so that curves compare; its gradient is that of the loss
            with the penalty added and, while something is projected out, also teaches the
            classifier to do without. While nothing is corrected it is the plain one, bit for bit.
        """
        self._health.heard(checked(loss, targets))
        self._styles.see(*self.tap.outcome, targets)
        return descended(
            loss,
            targets,
            indices,
            tap=self.tap,
            corrector=self._corrector,
            samples=self._samples,
            health=self._health,
        )

    def step(self) -> RoundReport | None:
        """Count one optimizer update; run a round or re-estimate tracked pairs when due.

        A round that fails is skipped with a warning and training goes on; a tap that has not
        fired by the first update is a `TapError`.

        Returns:
            The record of a round that ran, else None.
        """
        self._health.check_step()
        self._ranks.check()
        return self._schedule.update()

    def round(self) -> RoundReport | None:
        """Run one round now.

        Returns:
            Its record; None if it was skipped because activations or loss are not finite.
        """
        return self._schedule.round()

    def erase(self, ids: int | Iterable[int]) -> None:
        """Correct concepts of the last round, whatever the statistics say.

        A `ValueError` names ids that are no concepts of that round, or cannot be erased; under
        `action: observe` nothing can.

        Args:
            ids: Concepts of the last report.
        """
        self._act("erase", ids)

    def restore(self, ids: int | Iterable[int]) -> None:
        """Stop correcting concepts; they stay vetoed until they are erased or approved again.

        Args:
            ids: Concepts under correction; a `ValueError` names others.
        """
        self._act("restore", ids)

    def veto(self, ids: int | Iterable[int]) -> None:
        """Never correct these concepts; one under correction is restored.

        A `ValueError` names ids that are no concepts of the last round.

        Args:
            ids: Concepts of the last report.
        """
        self._act("veto", ids)

    def approve(self, ids: int | Iterable[int]) -> None:
        """Allow concepts to be corrected: those that wait at once, others when they are flagged.

        A `ValueError` names ids that are no concepts of the last round.

        Args:
            ids: Concepts of the last report.
        """
        self._act("approve", ids)

    def _act(self, act: str, ids: int | Iterable[int]) -> None:
        self._schedule.act(act, ids)

    @_outside_inference_mode
    def explain(
        self, images: Tensor, labels: Tensor | None = None, *, maps: bool = True
    ) -> list[Explanation]:
        """Say for every image which concepts its prediction is due to, and what would change it.

        The concepts are those of the last round; the model is explained as it is, with its
        current correction, and left untouched. A `ProbeError` names labels that are no class,
        a `ValueError` labels that are not one per image.

        Args:
            images: `(N, ...)` images as the model takes them.
            labels: `(N,)` true classes, if they are known.
            maps: Whether to find where in the image the concept is that speaks most for the
                prediction. At a pooled tap that takes 64 more passes of the image.

        Returns:
            One explanation per image.

        Raises:
            ValueError: If no round has run yet.
        """
        pairs, ids = self._watch.last.pairs, self._watch.last.ids
        if pairs is None:
            raise ValueError("explain: no round has found concepts yet; call guard.round() first")
        return self._explainer.explain(images, labels, pairs, ids, maps=maps)

    @_outside_inference_mode
    def bake(self) -> None:
        """Fold the correction into the model's own weights; nothing is corrected afterwards.

        What was decided on the command line since the last round is carried out first, and what
        is projected out is estimated once more if the network was trained since. With `refit`
        among the actions the classifier is then fitted again to the probe, as far as images of it
        that were left out support that: score the model on other images. Without, the logits stay
        the same to rounding in eval mode. Where no plain linear map follows the tap, nothing is
        refitted, and a `BakeError` leaves a model as it is whose projection cannot be folded in.

        Raises:
            BakeError: If the guard is closed.
        """
        if self._closed:
            raise BakeError("the guard is closed, its correction is gone; call bake before close")
        corrected = self.erased
        self.baked = self._schedule.bake()
        said = f"bake: {self.baked}" if self.baked else "bake"
        self._log.act(self.steps, Act("bake", corrected, said))

    @_outside_inference_mode
    def baked_copy(self, model: nn.Module | None = None) -> nn.Module:
        """Return a copy of the model with the correction folded in, as `bake` would leave it.

        For a checkpoint in the middle of training, or for an average of the weights: neither the
        model nor what the guard does changes. What is projected out of an average is estimated
        from its own activations. A `BakeError` says where folding cannot be exact.

        Args:
            model: A copy of the model, such as `ema.module`; None for the model itself.

        Returns:
            An ordinary model with the same names of parameters, in the same modes, without hooks
            of a guard.

        Raises:
            BakeError: If the correction is gone: the guard is closed, or baked into the model.
        """
        if self._closed or self._schedule.stage == "finished":
            raise BakeError(
                "the correction is gone, the guard is closed or baked; call baked_copy before that"
            )
        return self._corrector.baked_copy(model, self._sample)

    def close(self) -> None:
        """Take everything off the model; calling it again does nothing."""
        if not self._closed:
            self._schedule.stop()
        self._closed = True
        self.tap.close()
        self._corrector.close()
        self._health.close()
        self._log.close()
        self._ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @_outside_inference_mode
    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, as tensors and plain data.

        Returns:
            A dict that `torch.load(..., weights_only=True)` reads back.
        """
        return {
            "schema_version": state.SCHEMA_VERSION,
            "model": self._identity(),
            "processes": self._ranks.size,
            **self._schedule.state_dict(),
            **self._watch.last.state_dict(),
            **self._corrector.state_dict(),
            "samples": self._samples.state_dict(),
            "styles": self._styles.state_dict(),
        }

    @_outside_inference_mode
    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Continue from a saved state; the model's own weights are loaded separately.

        A `StateError` names every way in which the state has another schema, model or tap.

        Args:
            saved: Result of `state_dict`; None is accepted and changes nothing.
        """
        if saved is None:
            return
        state.check(saved, self._identity(), set(self.state_dict()))
        if saved["processes"] != self._ranks.size:
            warnings.warn(
                f"guard state was saved by {saved['processes']} processes, {self._ranks.size} go "
                "on: what was found and corrected is taken over, but an epoch has another number "
                "of updates; set steps_per_epoch, start and every to match",
                stacklevel=2,
            )
        self.put_back(saved, resumed=True)

    def put_back(self, saved: Mapping[str, Any], *, resumed: bool = False) -> None:
        """Take a state of this guard, or of its like in another process, as it is.

        Args:
            saved: Result of `state_dict`.
            resumed: Whether the run was stopped in between.
        """
        self._samples.load_state_dict(saved["samples"])
        self._styles.load_state_dict(saved["styles"])
        self._schedule.load_state_dict(saved, resumed=resumed)
        self._corrector.load_state_dict(saved)
        self._watch.last = LastRound.from_state(saved, self.tap.device)

    def _identity(self) -> dict[str, Any]:
        shape = {"channels": self.tap.channels, "num_classes": self.tap.num_classes}
        shape["probe_images"] = self._images
        return {"class": self._model_name, "tap": self.config.tap, **shape}
