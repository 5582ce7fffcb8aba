"""Stage 5: the history of a run, read back from its TensorBoard events.

TensorBoard itself keeps ten pictures per tag and samples the rest; the event files hold them all.
Nothing here knows how the history is drawn, or imports torch: TensorBoard shows it too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from concept_guard.entries import (
    CARD_TAG,
    TAG,
    ActEntry,
    AnyEntry,
    RoundEntry,
    StartEntry,
    parsed,
)

EVENTS = "events.out.tfevents.*"
_CARD_PREFIX = CARD_TAG.format("")


@dataclass(frozen=True, eq=False)
class RunHistory:
    """What a run left behind, in the order of its steps.

    Attributes:
        name: Of the run, as TensorBoard shows it.
        starts: When guards began to write or went on.
        rounds: One per step; of a step that was run twice after resuming, the later one.
        acts: What the guard and people did.
        cards: Step and slot to the JPEG or PNG file of a concept card.
        problems: What could not be read, in words.
    """

    name: str
    starts: tuple[StartEntry, ...] = ()
    rounds: tuple[RoundEntry, ...] = ()
    acts: tuple[ActEntry, ...] = ()
    cards: dict[tuple[int, int], bytes] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether no guard has written anything."""
        return not (self.starts or self.rounds or self.acts)


class HistoryReader:
    """Follows the events of one run; what is still being written is read the next time.

    Args:
        folder: Of the run: the guard's log_dir. Only event files right in it are read.
        name: Of the run.
    """

    def __init__(self, folder: str | Path, name: str = "") -> None:
        self._folder, self._name = Path(folder), name or Path(folder).name
        self._loaders: dict[Path, Any] = {}
        self._entries: list[AnyEntry] = []
        self._cards: dict[tuple[int, int], bytes] = {}
        self._problems: dict[str, int] = {}
        self._damaged: dict[Path, str] = {}

    def read(self) -> RunHistory:
        """Read what was written since the last call.

        Returns:
            The whole history so far.
        """
        for path in sorted(self._folder.glob(EVENTS)):
            for event in self._new_events(path):
                self._take(event)
        return self._history()

    def _new_events(self, path: Path) -> Iterator[Any]:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        try:
            if path not in self._loaders:
                self._loaders[path] = EventFileLoader(str(path))
            yield from self._loaders[path].Load()
        except Exception as error:  # a torn or foreign file must not hide the others
            self._damaged[path] = f"{path.name} is not readable to its end ({error!r})"

    def _take(self, event: Any) -> None:
        """Keep what an event says; one that a resumed run began with hides what it runs again."""
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            if event.step:  # of a run that begins at 0 nothing is there before
                self._forget_from(event.step)
            return
        for value in event.summary.value:
            if value.tag == TAG:
                self._take_entry(value)
            elif value.tag.startswith(_CARD_PREFIX):
                self._take_card(event.step, value)

    def _forget_from(self, step: int) -> None:
        self._entries = [entry for entry in self._entries if entry.step < step]
        self._cards = {at: picture for at, picture in self._cards.items() if at[0] < step}

    def _take_entry(self, value: Any) -> None:
        try:
            self._entries.append(parsed(value.tensor.string_val[0]))
        except (ValueError, IndexError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._note(f"entries left out: {said}")

    def _take_card(self, step: int, value: Any) -> None:
        slot = value.tag.removeprefix(_CARD_PREFIX)
        picture = value.image.encoded_image_string
        if not picture and len(value.tensor.string_val) >= 3:  # width, height, then pictures
            picture = value.tensor.string_val[2]
        if slot.isdecimal() and picture:
            self._cards[step, int(slot)] = picture

    def _note(self, problem: str) -> None:
        self._problems[problem] = self._problems.get(problem, 0) + 1

    def _history(self) -> RunHistory:
        ordered = sorted(self._entries, key=lambda entry: entry.step)  # stable
        rounds = {e.step: e for e in ordered if isinstance(e, RoundEntry)}
        return RunHistory(
            name=self._name,
            starts=tuple(e for e in ordered if isinstance(e, StartEntry)),
            rounds=tuple(rounds.values()),
            acts=tuple(e for e in ordered if isinstance(e, ActEntry)),
            cards=dict(self._cards),
            problems=(
                *self._damaged.values(),
                *(f"{said} ({n} times)" if n > 1 else said for said, n in self._problems.items()),
            ),
        )


def read_history(folder: str | Path, name: str = "") -> RunHistory:
    """Read the history of a run once.

    Args:
        folder: Of the run: the guard's log_dir.
        name: Of the run; the folder's if empty.

    Returns:
        The history; an empty one if no guard wrote there.
    """
    return HistoryReader(folder, name).read()
