"""Stage 4d: carry out what people decide, and tell them where the run stands.

Nothing here decides which concepts drive errors, or knows how one is corrected.
"""

import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import cast

from concept_guard import reporting
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.decisions import Channel, Decision, Stage
from concept_guard.entries import ActName
from concept_guard.ids import known, listed
from concept_guard.logs import Act, EventLog
from concept_guard.watch import Watch

_logger = logging.getLogger(__name__)
_NOT_FINITE = "nothing is erased, because activations, logits or loss are not finite"


class Acts:
    """Carries out acts of people on the concepts of the last round, and logs every one.

    Args:
        corrector: Holds what is under correction, vetoed and approved.
        watch: Knows the last round, and reads the probe.
        log: Where acts are logged.
        channel: Where acts from the command line come from.
        config: Settings of the guard.
        class_names: Told to people instead of class indices.
    """

    def __init__(
        self,
        corrector: Corrector,
        watch: Watch,
        log: EventLog,
        channel: Channel,
        config: GuardConfig,
        class_names: Sequence[str] | None,
    ) -> None:
        self._corrector, self._watch, self._log = corrector, watch, log
        self._channel, self._config, self._class_names = channel, config, class_names
        self._acts = {
            "erase": self._erase,
            "restore": self._restore,
            "veto": self._veto,
            "approve": self._approve,
        }

    def perform(self, act: str, ids: int | Iterable[int], step: int) -> None:
        """Carry out one act.

        A `ValueError` names ids that it cannot be done to, and why.

        Args:
            act: `erase`, `restore`, `veto` or `approve`.
            ids: Concepts.
            step: Optimizer updates so far.
        """
        wanted = listed(ids)
        done = self._acts[act](wanted, step)
        said = f"{act} {', '.join(map(str, wanted))}"
        self._log.act(step, _of_person(act, wanted, said, "" if done else _NOT_FINITE))

    def heed(self, step: int) -> None:
        """Carry out what was decided on the command line; what cannot be done is a warning.

        Args:
            step: Optimizer updates so far.
        """
        for decision in self._taken():
            said = f"{decision} (from the command line)"
            try:
                done = self._acts[decision.act](list(decision.ids), step)
                problem = "" if done else _NOT_FINITE
            except Exception as error:  # whatever it is, it must not end the user's training
                problem = str(error)
            self._log.act(step, _of_person(decision.act, decision.ids, said, problem))
            if not problem:
                _logger.info("update %d, guard: %s", step, said)
            else:
                warnings.warn(f"{said} is not done: {problem}. Training goes on.", stacklevel=4)

    def _taken(self) -> list[Decision]:
        """Return the new decisions; the first process has the command line's ear for all."""
        taken = [*self._channel.take(self._watch.last.step)]
        told: tuple[list[Decision], int] = self._corrector.ranks.of_first(
            (taken, self._channel.read)
        )
        decisions, self._channel.read = told
        return decisions

    def tell(self, stage: Stage, due: int) -> None:
        """Tell the command line where the run stands, once there was a round.

        Args:
            stage: Of the run.
            due: Optimizer updates after which the next round is due.
        """
        last = self._watch.last
        if last.report is None:
            return
        self._channel.tell(
            reporting.standing(
                last.report,
                last.ids,
                self._corrector,
                self._config,
                self._class_names,
                stage=stage,
                due=due,
                decisions_read=self._channel.read,
            )
        )

    def _erase(self, ids: list[int], step: int) -> bool:
        if not self._config.action:
            raise ValueError(
                "nothing is erased under action: observe; set action to project, penalize, "
                "rebalance or augment"
            )
        return self._correct(self._known(ids), step)

    def _restore(self, ids: list[int], _step: int) -> bool:
        wanted = known(ids, self._under_correction(), "among those under correction")
        self._corrector.drop(wanted)
        self._corrector.vetoed |= set(wanted)
        return True

    def _veto(self, ids: list[int], _step: int) -> bool:
        wanted = self._known(ids)
        self._corrector.drop(wanted)
        self._corrector.vetoed |= set(wanted)
        self._corrector.approved -= set(wanted)
        return True

    def _approve(self, ids: list[int], step: int) -> bool:
        wanted = self._known(ids)
        self._corrector.vetoed -= set(wanted)
        self._corrector.approved |= set(wanted)
        report = self._watch.last.report
        flags = () if report is None else report.flags
        now = [f.concept for f in flags if f.concept in wanted and f.status == "waiting"]
        return self._correct(listed(now), step) if now and self._config.action else True

    def _correct(self, ids: list[int], step: int) -> bool:
        """Return whether it could be done: False where the numbers are not finite."""
        last = self._watch.last
        if last.pairs is None:
            return True  # and there are no ids
        reading = self._watch.read(step)
        if reading is not None:
            self._corrector.erase(ids, last.ids, last.pairs, reading)
        return reading is not None

    def _under_correction(self) -> list[int]:
        return [tracked.concept for tracked in self._corrector.tracked]

    def _known(self, ids: list[int]) -> list[int]:
        there = {*self._watch.last.ids, *self._under_correction()}
        return known(ids, there, "among those of the last round (guard.report.concepts)")


def _of_person(name: str, ids: Iterable[int], said: str, problem: str) -> Act:
    """Return what a person did, or what could not be done for which reason."""
    if problem:
        return Act("not_done", tuple(ids), f"{said}: not done: {problem}", "person")
    return Act(cast("ActName", name), tuple(ids), said, "person")
