"""How much of the wall time the guard uses, and whether its budget allows more.

Nothing here knows what the time is spent on.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
