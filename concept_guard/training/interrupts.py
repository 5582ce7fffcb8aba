"""Ctrl-C: remembered until the loop reaches a point where its state is whole.

Nothing here knows what the loop does or saves.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_NOTE = b"\nCtrl-C: saving after this update; press it again to stop at once, unsaved\n"


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; `resume` continues it from its last checkpoint.

    Attributes:
        folder: The output folder of the run, once it is known.
    """

    def __init__(self, message: str, folder: Path | None = None) -> None:
        super().__init__(message)
        self.folder = folder


class Interrupts:
    """While entered, the first Ctrl-C only sets `requested`; a second one acts as usual.

    Outside the main thread python delivers no signals, and nothing is changed.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        """Return itself; from now on Ctrl-C is remembered."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the previous handler back."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _remember(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        os.write(2, _NOTE)  # not through sys.stderr: a handler may not enter its buffer twice
