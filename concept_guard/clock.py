"""When the guard works: at which updates something is due, and whether its budget allows it.

Nothing here knows what the time is spent on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timetable:
    """At which optimizer updates rounds are due, and re-estimations between them.

    Args:
        start: Updates before the first round.
        every: Updates between rounds.
        track_every: Updates between re-estimations.
    """

    def __init__(self, start: int, every: int, track_every: int) -> None:
        self._start, self._every, self._track_every = start, every, track_every

    def is_round(self, step: int) -> bool:
        """Return whether a round is due after so many updates."""
        return step >= self._start and (step - self._start) % self._every == 0

    def is_tracking(self, step: int) -> bool:
        """Return whether tracked pairs are due to be estimated again."""
        return step % self._track_every == 0

    def next_round(self, step: int) -> int:
        """Return after how many updates, more than `step`, the next round is due."""
        passed = max(0, step + 1 - self._start)
        return self._start + -(-passed // self._every) * self._every


class Clock:
    """How much of the wall time since the first update the guard has used."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._spent = 0.0

    def start(self) -> None:
        """Begin to count; later calls do nothing."""
        if self._began is None:
            self._began = time.perf_counter()

    @property
    def share(self) -> float:
        """Share of the wall time, between 0 and 1."""
        passed = 0.0 if self._began is None else time.perf_counter() - self._began
        return min(1.0, self._spent / passed) if passed > 0 else 0.0

    def affords(self, budget: float | None) -> bool:
        """Return whether the guard may work now.

        Args:
            budget: Share of the wall time it may use, or None for no limit.

        Returns:
            True while the share is within the budget.
        """
        return budget is None or self.share <= budget

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Count the time of the block.

        Yields:
            Nothing.
        """
        began = time.perf_counter()
        try:
            yield
        finally:
            self._spent += time.perf_counter() - began
