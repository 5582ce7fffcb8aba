"""Stage 5: an event file of TensorBoard that a failure never tears.

Events are appended in one piece and at once, by no thread of its own: what cannot be written waits
for the next time, and the file stays readable. Nothing here knows what the events say.
"""

import logging
import os
import socket
import time
import warnings
from collections import deque
from collections.abc import Sequence
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

MOST_WAITING = 32 * 2**20  # bytes of events that are kept while the folder cannot be written

_logger = logging.getLogger(__name__)
_number = count()
_last_in: "WeakValueDictionary[Path, EventFile]" = WeakValueDictionary()  # who wrote last


class EventFile:
    """One event file in a folder; both are made with the first event.

    Args:
        folder: Of the run. Where another guard of this process writes to it in turns, a warning
            says so once: their curves are torn.

    Attributes:
        folder: Where the file is.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._path: Path | None = None  # once something is written
        self._waiting: deque[bytes] = deque()
        self._failed = self._shared = False

    def append(self, step: int, summaries: "Sequence[Summary]", *, stale_from: int) -> None:
        """Write events at a step, after those that wait; a failure is one warning.

        Args:
            step: Optimizer updates.
            summaries: What happened then.
            stale_from: With the first event of the file: what other files of the folder say of
                this step and later ones is hidden, because a resumed run does it again.
        """
        events = [*(_opening(stale_from) if self._is_new() else ()), *_at(step, summaries)]
        self._waiting.append(_records(events))
        self._look_for_others()
        try:
            self._write()
        except OSError as error:
            self._wait_after(error)
        else:
            if self._failed:
                _logger.info("events are written to %s again", self.folder)
            self._failed = False

    def close(self) -> None:
        """Write what waits, if that is possible now."""
        try:
            self._write()
        except OSError as error:
            self._wait_after(error)
        self._waiting.clear()

    def _look_for_others(self) -> None:
        folder = self.folder.resolve()
        last = _last_in.get(folder)
        if not (self._shared or self._path is None or last in {None, self}):
            self._shared = True
            warnings.warn(
                f"another guard of this process writes to log_dir={str(self.folder)!r} as well, "
                "under the same tags: curves jump between them. Give each guard a log_dir of its "
                "own.",
                UserWarning,
                stacklevel=4,
            )
        _last_in[folder] = self

    def _is_new(self) -> bool:
        return self._path is None and not self._waiting

    def _write(self) -> None:
        """Append all that waits; what was written in part is taken back.

        Raises:
            OSError: If it cannot be written.
        """
        if not self._waiting:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path or self.folder / _name()
        with path.open("ab", buffering=0) as file:  # held open it would be left open by a guard
            self._path = path
            while self._waiting:
                end = file.tell()
                try:
                    _write_all(file, self._waiting[0])
                except OSError:
                    file.truncate(end)
                    raise
                self._waiting.popleft()

    def _wait_after(self, error: OSError) -> None:
        if not self._failed:
            warnings.warn(
                f"log_dir={str(self.folder)!r} cannot be written ({error}): training goes on, and "
                "TensorBoard events wait until it can. Make it writable, or pass log_dir=None for "
                "no events.",
                UserWarning,
                stacklevel=4,
            )
        self._failed = True
        while len(self._waiting) > 2 and sum(map(len, self._waiting)) > MOST_WAITING:
            del self._waiting[1]  # the first one opens the file


def _name() -> str:
    """Return a name that TensorBoard takes for an event file, in the order of time."""
    where = f"{socket.gethostname()}.{os.getpid()}.{next(_number)}"
    return f"events.out.tfevents.{int(time.time()):010d}.{where}.concept_guard"


def _opening(stale_from: int) -> "list[Event]":
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    now, start = time.time(), SessionLog(status=SessionLog.START)
    return [
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=stale_from, session_log=start),
    ]


def _at(step: int, summaries: "Sequence[Summary]") -> "list[Event]":
    from tensorboard.compat.proto.event_pb2 import Event

    now = time.time()
    return [Event(wall_time=now, step=step, summary=summary) for summary in summaries]


def _records(events: "Sequence[Event]") -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    whole = BytesIO()
    writer = RecordWriter(whole)
    for event in events:
        writer.write(event.SerializeToString())
    return whole.getvalue()


def _write_all(file: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, which may take less at a time than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
