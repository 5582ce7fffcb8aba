"""Doctor: whether a tap fires in training and in eval mode, under the switches of a loop.

Nothing here knows about settings or schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from concept_guard.correction import Projection
from concept_guard.errors import TapError
from concept_guard.examination.report import Problem
from concept_guard.examination.settings import Loop
from concept_guard.examination.switches import autocast, fresh_graphs, steady
from concept_guard.taps import Tap

CLOSE = {None: 0.05, "bfloat16": 0.5, "float16": 0.5}  # difference that precisions may leave
COMPILED_PASSES = 3  # with CUDA graphs the third is the first that is replayed


@dataclass(frozen=True, eq=False)
class Firing:
    """A model with its tap, to be passed through as its training loop does.

    Attributes:
        model: A copy with the switches on.
        plain: A copy without them.
        where: The tap, as in the settings.
        images: `(N, ...)` the sample.
        labels: `(N,)` its classes.
        loop: The switches.
    """

    model: nn.Module
    plain: nn.Module
    where: str
    images: Tensor
    labels: Tensor
    loop: Loop

    def test(self, tap: Tap, facts: list[str]) -> Iterator[Problem]:
        """Pass through the model in training mode, backward as well, and in eval mode.

        Args:
            tap: Of the model.
            facts: What is as it should be is added.

        Yields:
            Problems.
        """
        for model in (self.model, self.plain):
            steady(model)
        with fresh_graphs(self.loop):
            call: Callable[[Tensor], Any] = self.model
            if self.loop.compile:
                call = torch.compile(
                    self.model, backend=self.loop.compile, mode=self.loop.compile_mode
                )
            try:
                problems = list(self._training(tap, call, facts))
                yield from problems
                if not any(problem.stops for problem in problems):
                    yield from self._evaluation(tap, call, facts)
            except Exception as error:  # whatever a model and a compiler may raise
                yield self._refusal(error)

    def _refusal(self, error: Exception) -> Problem:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        mend = "call the model on such a batch without the guard; what is wrong is in the model"
        if self.loop.switches != "no switch":
            mend = f"leave out the switches one by one ({self.loop.switches})"
        found = f"the pass fails: {type(error).__name__}: {' '.join(lines[:3])[:300]}"
        return Problem("training pass", found, "", mend, stops=True)

    def _training(
        self, tap: Tap, call: Callable[[Tensor], Any], facts: list[str]
    ) -> Iterator[Problem]:
        images = self.images
        tap.listening = True
        self.model.train()
        for _ in range(COMPILED_PASSES if self.loop.compile else 1):
            images = images.flip(0)  # a reading that is left over from the last pass shows
            labels = self.labels if torch.equal(images, self.images) else self.labels.flip(0)
            tap.forget()
            tap.reset_fired()
            with autocast(self.loop, images):
                logits = call(images)
            found = _logits(logits)
            if found is None:
                yield self._no_logits(logits, stops=True)
                return
            if found is not logits:
                yield self._no_logits(logits, stops=False)
            loss = cross_entropy(found.float(), labels)
            loss.backward()
        rows, fired = tap.captured, tap.fired
        tap.listening = False
        self.model.zero_grad(set_to_none=True)
        if not fired or rows is None:
            yield self._silent(tap, fired)
            return
        if not bool(torch.isfinite(rows).all()) or not bool(torch.isfinite(loss)):
            yield Problem(
                "training pass",
                f"rows or loss hold NaN or infinite values under {self.loop.switches}",
                "finite ones",
                "autocast to bfloat16 in place of float16, or a smaller learning rate",
                stops=True,
            )
            return
        yield from self._same_rows(tap, rows, images, facts)

    def _no_logits(self, got: object, *, stops: bool) -> Problem:
        kind = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
        return Problem(
            "model",
            f"{type(self.model).__name__} returns a {kind} in training mode",
            "logits (N, M)",
            "give the criterion the first of them, or have the model return the logits alone "
            "(timm: model.set_distilled_training(False))",
            stops=stops,
        )

    def _silent(self, tap: Tap, fired: int) -> Problem:
        if fired and not self.model.get_submodule(tap.path).training:
            return Problem(
                f"tap {self.where!r}",
                f"{tap.path} stays in eval mode when model.train() is called, so that its rows are "
                "not kept, and are corrected in training",
                "a tapped module that is trained",
                "tap a module that is not frozen, or 'pre_logits'",
                stops=True,
            )
        return Problem(
            f"tap {self.where!r}",
            f"{tap.path} does not fire in training mode under {self.loop.switches}",
            "one firing per pass",
            "tap: pre_logits, or train without that switch",
            stops=True,
        )

    def _same_rows(
        self, tap: Tap, rows: Tensor, images: Tensor, facts: list[str]
    ) -> Iterator[Problem]:
        """Compare what was captured with what the plain model shows to the same images.

        Yields:
            A problem if it is something else.
        """
        facts.append(f"the tap fires in training, forward and backward: {self.loop.switches}")
        try:
            plain, again = (_captured(self.plain, self.where, images) for _ in range(2))
        except TapError:
            return  # there is no such tap without the switches
        if plain is None or again is None or not torch.equal(plain, again):
            facts.append("rows in training are random: not compared with those of a plain pass")
            return
        if plain.shape != rows.shape:
            yield self._other_rows(tap, f"have shape {tuple(rows.shape)}", tuple(plain.shape))
            return
        off = float((rows - plain).norm() / plain.norm().clamp_min(1e-12))
        if off > CLOSE[self.loop.autocast]:
            yield self._other_rows(tap, f"differ by {off:.0%}", "those of a plain pass")
            return
        facts.append(f"rows captured in training are those of a plain pass (off by {off:.1g})")

    def _other_rows(self, tap: Tap, found: str, expected: object) -> Problem:
        return Problem(
            f"tap {self.where!r}",
            f"rows that {tap.path} leaves behind in training {found} under {self.loop.switches}",
            f"{expected}",
            "train without one of these switches, or with another backend or precision",
            stops=True,
        )

    def _evaluation(
        self, tap: Tap, call: Callable[[Tensor], Any], facts: list[str]
    ) -> Iterator[Problem]:
        """Correct rows in eval mode and see whether the logits come out as in a plain pass.

        Yields:
            A problem if they do not.
        """
        images = self.images
        before = tap.logits(images, None)
        tap.edit = edit = _taking_the_mean_out(tap, images)
        try:
            wanted = tap.logits(images, edit)
            self.model.eval()
            tap.reset_fired()
            with torch.no_grad(), autocast(self.loop, images):
                found = _logits(call(images))
        finally:
            tap.edit = None
            self.model.train()
        if not tap.fired or found is None:
            yield Problem(
                f"tap {self.where!r}",
                f"{tap.path} does not fire in eval mode under {self.loop.switches}",
                "one firing per pass",
                "tap: pre_logits, or evaluate without that switch",
                stops=True,
            )
            return
        effect = float((wanted - before).norm())
        if not effect:
            facts.append("the tap fires in eval mode; the logits do not depend on its rows yet")
            return
        off = float((found.float() - wanted).norm()) / effect
        if off > CLOSE[self.loop.autocast]:
            yield Problem(
                f"tap {self.where!r}",
                f"logits of corrected rows are off by {off:.0%} of the correction in eval mode "
                f"under {self.loop.switches}",
                "those of a plain pass",
                "evaluate without one of these switches, or in float32",
                stops=True,
            )
            return
        facts.append(f"rows corrected in eval mode reach the logits (off by {off:.1g})")


def _captured(model: nn.Module, where: str, images: Tensor) -> Tensor | None:
    tap = Tap(model, where, images)
    try:
        tap.listening = True
        with torch.no_grad():
            model.train()(images)
        return tap.captured
    finally:
        tap.close()


def _logits(output: object) -> Tensor | None:
    """Return the `(N, M)` logits among what a model returned, if there are some."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) and first.ndim == 2 else None


def _taking_the_mean_out(tap: Tap, images: Tensor) -> Projection:
    """Return a projection that takes out of the rows of the images what they have in common."""
    labels = torch.zeros(len(images), dtype=torch.long)
    rows = tap.read([(images, labels)], max_rows=2**31, seed=0).rows.flatten(0, 1)
    mean = rows.mean(dim=0, keepdim=True)
    unit = mean / mean.norm().clamp_min(1e-12)
    return Projection(unit, unit, unit.new_zeros(1))
