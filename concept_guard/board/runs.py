"""Stage 5: which runs TensorBoard has found, and the history of each, followed while it grows.

Nothing here knows what is asked over HTTP, or how a history is shown.
"""

import threading
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concept_guard.history import RunHistory

PLUGIN = "concept_guard"  # as in `entries`, whose import TensorBoard's start does not wait for
MOST_FOLLOWED = 16  # runs that are kept in memory


class UnknownRunError(LookupError):
    """TensorBoard has found no such run of a guard."""


class Runs:
    """The runs below one log folder; every method may be called by several threads at once.

    Args:
        logdir: Of TensorBoard, as it was told.
        provider: TensorBoard's own list of what was written, whichever way it reads the files.

    Attributes:
        logdir: As above; empty if there is none.
    """

    def __init__(self, logdir: str | None, provider: Any) -> None:
        self.logdir, self._provider = logdir or "", provider
        self._lock = threading.Lock()
        self._followed: dict[str, _Followed] = {}  # the one used last is last

    def problem(self) -> str:
        """Return why no history can be read, and the way out; empty if it can."""
        if self.logdir and "://" not in self.logdir and self._provider is not None:
            return ""
        asked = (
            f"TensorBoard reads {self.logdir!r}" if self.logdir else "TensorBoard has no --logdir"
        )
        return (
            f"{asked}, but this tab reads the event files of one local folder. "
            "Start `tensorboard --logdir FOLDER`, with a local folder or a local copy of it."
        )

    def listed(self, context: Any, experiment: str) -> dict[str, float]:
        """Return the runs in which a guard has written, as far as TensorBoard has read them.

        Args:
            context: Of the request, as TensorBoard wants it.
            experiment: Likewise.

        Returns:
            Name, which is the folder below the log folder, to the time of the last entry.
        """
        if self.problem():
            return {}
        found = self._provider.list_tensors(context, experiment_id=experiment, plugin_name=PLUGIN)
        return {
            name: max((float(series.max_wall_time or 0) for series in tags.values()), default=0)
            for name, tags in sorted(found.items())
            if self._folder(name) is not None
        }

    def history(self, name: str, context: Any, experiment: str) -> "RunHistory":
        """Return all that a run has written so far; the same object while that is nothing new.

        Args:
            name: Of the run.
            context: Of the request, as TensorBoard wants it.
            experiment: Likewise.

        Returns:
            The history.

        Raises:
            UnknownRunError: If TensorBoard has found no such run.
        """
        listed = self.listed(context, experiment)
        if name not in listed:
            raise UnknownRunError(
                f"no run {name[:200]!r} of concept_guard in {self.logdir!r}; "
                f"there are: {', '.join(listed) or 'none so far'}"
            )
        return self._follow(name).read()

    def card(self, name: str, step: int, slot: int) -> bytes | None:
        """Return the picture of a concept card in a run whose history was asked for before.

        Args:
            name: Of the run.
            step: Of the round.
            slot: Of the card.

        Returns:
            The file, or None if there is none.
        """
        with self._lock:
            followed = self._followed.get(name)
        return followed.history.cards.get((step, slot)) if followed else None

    def _folder(self, name: str) -> Path | None:
        """Return the folder of a run, or None if its name leads out of the log folder."""
        below = Path(name)
        if below.is_absolute() or ".." in below.parts or "\0" in name:
            return None
        return Path(self.logdir).expanduser() / below

    def _follow(self, name: str) -> "_Followed":
        with self._lock:
            followed = self._followed.pop(name, None)
            if followed is None:
                followed = _Followed(self._folder(name) or Path(), name)
            self._followed[name] = followed
            while len(self._followed) > MOST_FOLLOWED:
                self._followed.pop(next(iter(self._followed)))
            return followed


class _Followed:
    """One run, whose files are read on from where the last request has stopped."""

    def __init__(self, folder: Path, name: str) -> None:
        from concept_guard.history import HistoryReader, RunHistory

        self._folder, self._name = folder, name
        self._lock = threading.Lock()
        self._reader = HistoryReader(folder, name)
        self._files: dict[str, tuple[int, int]] = {}
        self.history = RunHistory(name)

    def read(self) -> "RunHistory":
        """Return the history; the same object while there is nothing new."""
        from concept_guard.history import HistoryReader

        with self._lock:
            files = _files(self._folder)
            if files == self._files:
                return self.history
            if any(_replaced(known, files.get(file)) for file, known in self._files.items()):
                self._reader = HistoryReader(self._folder, self._name)
            self._files = files
            new = self._reader.read()
            if not _alike(self.history, new):
                self.history = new
            return self.history


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the event files of a run by name: which file it is, and its size."""
    from concept_guard.history import EVENTS

    found = {}
    for path in folder.glob(EVENTS):
        try:
            status = path.stat()
        except OSError:  # deleted meanwhile
            continue
        found[path.name] = status.st_ino, status.st_size
    return found


def _replaced(known: tuple[int, int], now: tuple[int, int] | None) -> bool:
    """Return whether a file is gone, another, or shorter: what was read of it does not stand."""
    return now is None or now[0] != known[0] or now[1] < known[1]


def _alike(old: "RunHistory", new: "RunHistory") -> bool:
    return all(getattr(old, one.name) == getattr(new, one.name) for one in fields(old))
