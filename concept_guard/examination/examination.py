"""Doctor: examines a model, its tap, its settings and its loop, all that is wrong at once.

Nothing here knows how recipes and scripts are written.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from concept_guard.attached import refuse_second, stripped
from concept_guard.config import GuardConfig
from concept_guard.errors import TapError
from concept_guard.examination import opening, place
from concept_guard.examination.cost import Bench
from concept_guard.examination.firing import Firing
from concept_guard.examination.report import Cost, DoctorReport, Problem
from concept_guard.examination.settings import Loop, settled, timing
from concept_guard.examination.switches import switched
from concept_guard.probe import random_state_kept
from concept_guard.sites import refuse_fixed_around
from concept_guard.taps import Tap

SECONDS = 10.0


def doctor(
    model: nn.Module,
    sample: Tensor | tuple[Tensor, Tensor],
    config: GuardConfig | Mapping[str, object] | str | Path | None = None,
    *,
    loop: Loop | None = None,
    seconds: float = SECONDS,
) -> DoctorReport:
    """Examine a model before it is trained with a guard: everything that is wrong, at once.

    Copies of the model are passed through forward and backward with the loop's switches, so that
    memory for two copies is needed. The model itself, the random state and the switches of torch
    are left as they are. With `compile`, torch's compiled graphs are forgotten before and after,
    so that networks that were compiled before are compiled once more when they are called.

    Args:
        model: On its device, as a guard would get it.
        sample: `(N, ...)` images as a batch of training holds them, two or more; or these and
            their `(N,)` classes.
        config: `GuardConfig`, dict, YAML path, or None for the defaults.
        loop: The switches of the training loop, and its length if it is known.
        seconds: About how long the cost of an update is measured; 0 leaves the cost out.

    Returns:
        Problems with their mends, facts about what is fine, and the cost. No problem is raised.
    """
    with ExitStack() as stack:
        stack.enter_context(random_state_kept(0))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        return _Examination(config, loop or Loop()).of(model, sample, seconds)


class _Examination:
    """One examination: gathers problems and facts in the order in which they are met."""

    def __init__(
        self, config: GuardConfig | Mapping[str, object] | str | Path | None, loop: Loop
    ) -> None:
        self.loop = loop
        self.settings, self.problems = settled(config)
        self.problems += timing(self.settings, loop)
        self.facts: list[str] = []
        self.cost: Cost | None = None
        if not self.settings.action:
            self.facts.append(
                "action: observe; concepts are found and logged, nothing is corrected"
            )

    def of(self, model: nn.Module, sample: object, seconds: float) -> DoctorReport:
        """Return the report on a model."""
        network = opening.unwrapped(model, self.problems, self.facts)
        self._examine(network, sample, seconds)
        subject = f"{type(network).__name__}, tap {self.settings.tap!r}"
        ranked = sorted(self.problems, key=lambda problem: not problem.stops)
        return DoctorReport(subject, tuple(ranked), tuple(self.facts), self.cost)

    def _examine(self, network: nn.Module, sample: object, seconds: float) -> None:
        given = opening.images_of(sample, self.problems)
        if (problem := opening.scripted(network)) is not None:
            self.problems.append(problem)
            return
        self.problems += opening.guarded(network)
        self.problems += opening.weights(network)
        patient = opening.copied(network, self.problems)
        if given is None or patient is None or any(p.is_meta for p in patient.parameters()):
            return
        plain = copy.deepcopy(patient)
        self.problems += switched(patient, self.loop)
        images, labels = _placed(given[0], patient, self.loop), given[1].to(_device(patient))
        tap = self._tapped(patient, images)
        if tap is None:
            return
        try:
            usable = self._at_the_tap(network, tap, images, labels)
            labels = _classes(labels, tap, images)
            if usable:
                firing = Firing(patient, plain, self.settings.tap, images, labels, self.loop)
                self.problems += firing.test(tap, self.facts)
            if seconds > 0 and not any(problem.stops for problem in self.problems):
                self._reckon(tap, images, labels, seconds)
        finally:
            tap.close()

    def _tapped(self, patient: nn.Module, images: Tensor) -> Tap | None:
        try:
            return Tap(patient, self.settings.tap, images, training=True)
        except TapError as error:
            where = f"tap {self.settings.tap!r}"
            text = str(error).removeprefix(f"{where}: ")
            self.problems.append(Problem.of(where, text))
        except Exception as error:  # whatever a model raises at the sample
            text = " ".join(str(error).split())[:300]
            self.problems.append(
                Problem(
                    "sample",
                    f"{type(patient).__name__} fails on images {tuple(images.shape)}: "
                    f"{type(error).__name__}: {text}",
                    "images that the model takes",
                    "give the size that the model was made for (input_size, in_chans), as a tensor",
                    stops=True,
                )
            )
        return None

    def _at_the_tap(self, network: nn.Module, tap: Tap, images: Tensor, labels: Tensor) -> bool:
        """Return whether a pass in training can be made sense of."""
        module, before = network.get_submodule(tap.path), self.settings.tap == "pre_logits"
        for refuse in (
            partial(refuse_fixed_around, network, tap.path),
            partial(refuse_second, module, tap.path, before=before),
        ):
            try:
                refuse()
            except TapError as error:
                self.problems.append(Problem.of("model", error))
        self.problems += opening.fitting(labels, tap.num_classes)
        unusable = list(place.rows(tap, self.settings, images, self.facts))
        self.problems += unusable
        self.problems += place.folding(tap, self.settings, self.facts)
        self.problems += place.size(tap, self.settings, self.loop)
        trained = any(p.requires_grad for p in tap.model.parameters())
        return not unusable and trained and tap.num_classes > 1

    def _reckon(self, tap: Tap, images: Tensor, labels: Tensor, seconds: float) -> None:
        settings = self.settings.model_copy(update={"ramp": 0})
        plain = copy.deepcopy(tap.model)
        bench = Bench(
            tap,
            stripped(plain),
            images,
            labels,
            settings,
            replace(self.loop, compile=None),
        )
        try:
            self.cost = bench.measured(seconds)
        except Exception as error:  # a measurement is no reason to end without a report
            self.facts.append(f"the cost could not be measured: {type(error).__name__}: {error}")
            return
        self.problems += place.dear(self.cost, self.settings, self.loop)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _placed(images: Tensor, model: nn.Module, loop: Loop) -> Tensor:
    """Return images where the model is, in its precision and the loop's memory format."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if first is not None:
        dtype = first.dtype if images.is_floating_point() else images.dtype
        images = images.detach().to(first.device, dtype)
    if loop.channels_last and images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    return images


def _classes(labels: Tensor, tap: Tap, images: Tensor) -> Tensor:
    """Return classes that a loss can be taken of: those given, or made up ones."""
    right = len(labels) and bool(((labels >= 0) & (labels < tap.num_classes)).all())
    made_up = torch.arange(len(images), device=images.device) % max(1, tap.num_classes)
    return labels.long().to(images.device) if right else made_up
