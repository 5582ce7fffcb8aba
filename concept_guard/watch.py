"""The order of the stages in a round: read, look, correct, record, show; one after another.

Nothing here knows when a round is due, or computes anything itself.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from concept_guard import picturing, reporting
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.health import Health
from concept_guard.last_round import LastRound
from concept_guard.leaks import Leaks, leaks
from concept_guard.logs import Act, Card, EventLog, RoundReport, assign_slots
from concept_guard.probe import Batches
from concept_guard.reading import Reading
from concept_guard.rounds import Findings, look
from concept_guard.styles import Styles
from concept_guard.tail import tail_of
from concept_guard.taps import Tap

MOST_DRAWING = 0.002  # share of the time that goes into cards before a concept gets a new one


class Watch:
    """Runs rounds, each of which starts from what the last one found.

    Args:
        tap: Where the model is read.
        probe: The probe.
        corrector: Acts on what is found.
        health: Says which readings can be worked with.
        log: Where rounds are shown.
        config: Settings of the guard.
        class_names: Told to people instead of class indices.
        styles: What is known of mean colours; None if nothing is.

    Attributes:
        last: The last round.
    """

    def __init__(
        self,
        tap: Tap,
        probe: Batches,
        corrector: Corrector,
        health: Health,
        log: EventLog,
        config: GuardConfig,
        class_names: Sequence[str] | None = None,
        styles: Styles | None = None,
    ) -> None:
        self._class_names, self._styles = class_names, styles
        self._tap, self._probe, self._corrector = tap, probe, corrector
        self._health, self._log, self._config = health, log, config
        self.last = LastRound()
        self._began, self._drawing = time.perf_counter(), 0.0  # of this process; seconds

    def read(self, step: int) -> Reading | None:
        """Read the probe.

        Args:
            step: Optimizer updates so far.

        Returns:
            The reading; None, with a warning, if something is not finite.
        """
        seed = self._config.seed
        reading = self._tap.read(self._probe, max_rows=self._config.max_rows, seed=seed)
        return reading if self._health.finite(reading, step) else None

    def round(self, step: int, overhead: float) -> RoundReport | None:
        """Run one round; what is known of the last one changes only once all is known.

        Args:
            step: Optimizer updates so far.
            overhead: Share of the wall time that the guard has used so far.

        Returns:
            Its record; None, with a warning, if something is not finite.
        """
        began, last = time.perf_counter(), self.last
        reading = self.read(step)
        if reading is None:
            return None
        under_way = [t.concept for t in self._corrector.tracked]
        uncorrected = self._corrector.uncorrected(reading)
        found = look(
            reading,
            self._corrector.tail(reading),
            config=self._config,
            seed=self._config.seed + step,
            last=last.pairs,
            last_ids=last.ids,
            next_id=last.next_id,
            tracked=self._corrector.tracked,
            styles=() if self._styles is None else self._styles.found(reading),
        )
        if_erased = self._corrector.act_on(found, reading)
        left = self._left(found, reading)
        withdrawn = self._corrector.withdraw(reading)
        report = reporting.report(
            reading,
            found,
            self._corrector,
            if_erased,
            left,
            uncorrected=uncorrected,
            withdrawn=withdrawn,
            class_names=self._class_names,
            step=step,
            alpha=self._config.alpha,
            seconds=time.perf_counter() - began,
            overhead=overhead,
        )
        slots = assign_slots(last.slots, report)
        self.last = LastRound(found.pairs, found.ids, found.next_id, report, slots)
        if self._log.active:
            done = reporting.acts(report, last.report, under_way, self._class_names)
            self._show(report, reading, found, done, last.cards)
        return report

    def estimated(self, step: int, misread: float) -> None:
        """Log that the tracked pairs were estimated again.

        Args:
            step: Optimizer updates so far.
            misread: Share of the reference rows that the pairs of before read otherwise.
        """
        self._log.estimated(step, [t.concept for t in self._corrector.tracked], misread)

    def _left(self, found: Findings, reading: Reading) -> Leaks:
        last = self.last.report
        return leaks(
            self._corrector.tracked,
            found.trial,
            self._corrector.erasure,
            tail_of(self._tap, self._probe, reading, on_top=False),
            pull=found.pull,
            before={} if last is None else last.leak,
            seed=self._config.seed,
        )

    def _show(
        self,
        report: RoundReport,
        reading: Reading,
        found: Findings,
        done: list[Act],
        before: Mapping[int, Card],
    ) -> None:
        began, slots = time.perf_counter(), self.last.slots
        driven = {flag.concept: flag.examples for flag in reversed(report.flags)}
        cards = picturing.cards(
            self._tap,
            self._probe,
            reading,
            found,
            list(slots),
            driven=driven,
            before=before,
            renew=self._drawing <= MOST_DRAWING * (began - self._began),
        )
        self._drawing += time.perf_counter() - began
        self.last = replace(self.last, cards=cards)
        self._log.write(report, cards, slots, done)
