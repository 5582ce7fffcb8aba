"""When the guard works: at which updates something is due, and whether its budget allows it.

Nothing here knows what the time is spent on.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

STILL = 0.01  # share of misread presence from which tracked pairs count as moving
LONGEST = 4  # times the shortest interval
REREAD = 7  # training images for every reference image that is read again


class Timetable:
    """At which optimizer updates rounds are due.

    Args:
        start: Updates before the first round.
        every: Updates between rounds.
    """

    def __init__(self, start: int, every: int) -> None:
        self._start, self._every = start, every

    def is_round(self, step: int) -> bool:
        """Return whether a round is due after so many updates."""
        return step >= self._start and (step - self._start) % self._every == 0

    def next_round(self, step: int) -> int:
        """Return after how many updates, more than `step`, the next round is due."""
        passed = max(0, step + 1 - self._start)
        return self._start + -(-passed // self._every) * self._every


class Pace:
    """At which updates tracked pairs are estimated again: the later, the less they move.

    While the last estimate still reads nearly all reference images as the new one does, the next
    one is put off twice as long, up to four times the shortest interval.

    Departure: the literature fixes a pair once. On a CIFAR-10 patch the pair of 25 updates before
    misread .15 to .18 of the reference images while the learning rate was high, none before and
    .01 at most after that (one seed).

    Args:
        shortest: Updates between two estimates while the pairs move.
    """

    def __init__(self, shortest: int) -> None:
        self._shortest = self._interval = shortest
        self._due = 0

    def is_due(self, step: int) -> bool:
        """Return whether tracked pairs are to be estimated again after so many updates."""
        return step >= self._due

    def estimated(self, step: int, misread: float | None = None, *, spaced: int = 1) -> None:
        """Take note that the pairs were estimated, or that this failed.

        Args:
            step: Updates so far.
            misread: Share of the reference images that the pairs of before read otherwise; None
                if that is not known, which leaves the interval as it is.
            spaced: Updates to the next estimate at least, however the pairs move.
        """
        if misread is not None:
            longer = min(2 * self._interval, LONGEST * self._shortest)
            self._interval = longer if misread <= STILL else self._shortest
        self._due = step + max(self._interval, spaced)

    def state_dict(self) -> dict[str, int]:
        """Return the interval and the update at which the next estimate is due."""
        return {"interval": self._interval, "due": self._due}

    def load_state_dict(self, saved: Mapping[str, int]) -> None:
        """Continue from a saved state, within the bounds that are set now."""
        longest = LONGEST * self._shortest
        self._interval = min(max(saved["interval"], self._shortest), longest)
        self._due = saved["due"]


def spacing(references: int, batch: int) -> int:
    """Return how many updates hold seven training images for every reference image.

    The pass over these is then 3 to 5 % of the time of the updates, whatever the size of batches:
    in eval mode an image takes a third of the time that it takes in an update, or less.

    Args:
        references: Reference images.
        batch: Images per update; 0 if that is not known.

    Returns:
        At least 1.
    """
    return max(1, -(-REREAD * references // batch)) if batch else 1


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
