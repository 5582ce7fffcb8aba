"""When the stages run: what an update of the model sets going, in all processes or in none.

Nothing here computes anything, or knows how a round is run.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch

from concept_guard.acts import Acts
from concept_guard.clock import Clock, Pace, Timetable, spacing
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.decisions import Channel, Stage
from concept_guard.logs import RoundReport
from concept_guard.ranks import Holder
from concept_guard.taps import Tap
from concept_guard.watch import Watch

T = TypeVar("T")


class Schedule:
    """Counts updates, runs what is due after one, and says where the run stands.

    Args:
        config: Settings of the guard.
        holder: Of the whole state, which a stage leaves alike in all processes.
        tap: Where the model is read.
        corrector: What is under correction.
        watch: Runs rounds.
        acts: Carries out what people decide.
        channel: From where they decide it.

    Attributes:
        steps: Optimizer updates so far.
        stage: Of the run.
        clock: How much time the guard uses.
    """

    def __init__(
        self,
        config: GuardConfig,
        holder: Holder,
        *,
        tap: Tap,
        corrector: Corrector,
        watch: Watch,
        acts: Acts,
        channel: Channel,
    ) -> None:
        self._config, self._holder, self._tap = config, holder, tap
        self._corrector, self._watch, self._acts = corrector, watch, acts
        self._channel, self._ranks = channel, corrector.ranks
        self._timetable = Timetable(config.updates("start"), config.updates("every"))
        self._pace = Pace(config.updates("track_every"))
        self.clock = Clock()
        self.steps = 0
        self.stage: Stage = "training"
        self._round_is_due = self._resumed = False

    def update(self) -> RoundReport | None:
        """Count an optimizer update and run what is due; what fails is a warning.

        Returns:
            The record of a round that ran, else None.
        """
        self.steps += 1
        self._corrector.updated()
        self.clock.start()
        if self._resumed:
            self._resumed = False
            self._tried(self.go_on)
        self._round_is_due |= self._timetable.is_round(self.steps)
        track_is_due = bool(self._corrector.tracked) and self._pace.is_due(self.steps)
        if not (self._round_is_due or track_is_due) or not self._affords():
            return None
        if self._round_is_due:
            self._round_is_due = False
            return self._tried(self._round)
        self._tried(self._track)
        return None

    def round(self) -> RoundReport | None:
        """Run one round now.

        Returns:
            Its record; None if it was skipped.
        """
        return self._alike(self._round)

    def act(self, act: str, ids: int | Iterable[int]) -> None:
        """Carry out an act of a person now.

        Args:
            act: See `Acts.perform`.
            ids: Concepts.
        """
        self._alike(lambda: self._acts.perform(act, ids, self.steps))

    def bake(self) -> str:
        """Fold the correction into the model, after what was decided since the last round.

        Returns:
            What was done about the classifier, as a clause.
        """
        return self._alike(self._bake)

    def go_on(self) -> None:
        """Carry out what was decided while the run was stopped, and say that it goes on."""
        self._acts.heed(self.steps)
        self._tell("training")

    def stop(self) -> None:
        """Say that the run has stopped, unless it is finished."""
        if self.stage == "training":
            self._tell("stopped")

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the guard's state that is kept here.

        Returns:
            Plain data.
        """
        return {
            "steps": self.steps,
            "round_is_due": self._round_is_due,
            "decisions_read": self._channel.read,
            "pace": self._pace.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any], *, resumed: bool) -> None:
        """Continue from a saved state.

        Args:
            saved: Holds the keys of `state_dict`, and possibly more.
            resumed: Whether the run was stopped in between.
        """
        self.steps, self._round_is_due = saved["steps"], saved["round_is_due"]
        self._channel.read = saved["decisions_read"]
        self._pace.load_state_dict(saved["pace"])
        self._resumed |= resumed

    def _round(self) -> RoundReport | None:
        self._acts.heed(self.steps)
        report = self._watch.round(self.steps, self.clock.share)
        if report is not None:
            self._pace.estimated(self.steps, spaced=self._spacing())
        self._tell("training")
        return report

    def _track(self) -> None:
        spaced = self._spacing()
        self._pace.estimated(self.steps, spaced=spaced)  # also if what follows fails
        misread = self._corrector.track()
        self._pace.estimated(self.steps, misread, spaced=spaced)
        self._watch.estimated(self.steps, misread)

    def _spacing(self) -> int:
        """Return the fewest updates between estimates, by the batches of the first process."""
        if self._config.track_every != "auto":
            return 1
        references = sum(len(t.images) for t in self._corrector.tracked)
        return spacing(references, self._ranks.of_first(self._tap.batch))

    def _bake(self) -> str:
        self._acts.heed(self.steps)
        reading = self._corrector.erasure.settle(self._corrector.tracked)
        classifier = self._tap.classifier
        self._tell("finished")
        with self._ranks.one_result([] if classifier is None else classifier.parameters()):
            return self._corrector.bake(reading)

    def _affords(self) -> bool:
        """Return whether there is time for what is due, by the clock of the first process."""
        budget = self._config.budget
        return budget is None or self._ranks.of_first(self.clock.affords(budget))

    def _tell(self, stage: Stage) -> None:
        self.stage = stage
        self._acts.tell(stage, self._timetable.next_round(self.steps))

    def _tried(self, stage: Callable[[], T]) -> T | None:
        """Return what a stage returns; a failure costs a warning, not the training run."""
        try:
            return self._alike(stage)
        except Exception as error:  # whatever it is, it must not end the user's training
            warnings.warn(
                f"the guard's work at step {self.steps} is skipped: {type(error).__name__}: "
                f"{error}. The guard keeps its last state and training goes on.",
                stacklevel=4,
            )
            return None

    def _alike(self, stage: Callable[[], T]) -> T:
        with self.clock.spending(), torch.inference_mode(mode=False):
            return self._ranks.all_or_none(stage, self._holder, self._tap.model)
