"""What a training says while it runs: aligned lines, and a bar where there is a terminal.

Nothing here knows how the training works, or who reads the lines.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from tqdm import tqdm

from concept_guard.decisions import call_to_decide, waiting

if TYPE_CHECKING:
    from pathlib import Path

    from concept_guard.records import RoundReport

WIDTH = 100  # of a line, in characters
_COLUMNS = (
    ("update", 6),
    ("accuracy", 8),
    ("worst group", 11),
    ("concepts", 8),
    ("flagged", 9),
    ("done", 14),
    ("cost", 6),
    ("next", 0),
)
_LEFT = ("flagged", "done", "next")  # columns of words
_MOST_LINES = 100  # about epochs, and about the loss alone, per training
_logger = logging.getLogger(__name__)


class Progress:
    """Writes one aligned line per round and per epoch, below a header that is written once.

    Args:
        name: Of the training.
        epochs: Passes over the training images.
        total: Optimizer updates in all.
        interval: Updates between lines about the loss where there is no bar; at least a
            hundredth of `total`.
        folder: Of the run, for the command that approves what waits.
        corrects: Whether the guard corrects anything.
        updates: Done so far, in a run that was stopped.
        erased: Ids of the concepts under correction so far.
    """

    def __init__(
        self,
        name: str,
        *,
        epochs: int,
        total: int,
        interval: int,
        folder: Path,
        corrects: bool,
        updates: int = 0,
        erased: Sequence[int] = (),
    ) -> None:
        self._epochs, self._total, self._folder, self._corrects = epochs, total, folder, corrects
        self._interval = max(interval, -(-total // _MOST_LINES))
        self._erased = tuple(erased)
        self._waiting: tuple[int, ...] = ()
        self._verdict, self._said = "", set[str]()
        self._width = max(_COLUMNS[0][1], len(str(total)))
        self.bar = tqdm(
            total=total,
            initial=updates,
            desc=name,
            unit="update",
            mininterval=0.5,
            dynamic_ncols=True,
            # No bar where nobody asked for lines, or where there is no terminal: lines tell then.
            disable=None if _logger.isEnabledFor(logging.INFO) else True,
        )
        _logger.info("%s: %d epochs, %d updates", name, epochs, total)
        self._line(*(title for title, _ in _COLUMNS))

    def update(self, update: int, loss: float | None) -> None:
        """Move the bar; without one, write a line now and then.

        Args:
            update: Optimizer updates so far.
            loss: Of the last batch, if `wants_loss`.
        """
        self.bar.update()
        if loss is None:
            return
        if self.bar.disable:
            self._line(str(update), done=f"loss {loss:.3f}")
        else:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def wants_loss(self, update: int) -> bool:
        """Return whether the loss is shown after this update; to look at it takes time."""
        return update % self._interval == 0

    def epoch(self, update: int, epoch: int, loss: float, accuracy: float) -> None:
        """Write the line of an epoch; of many epochs a hundred have one, the last included.

        Args:
            update: Optimizer updates so far.
            epoch: Epochs so far.
            loss: Mean of the epoch.
            accuracy: Share of right predictions of the probe.
        """
        if (self._epochs - epoch) % -(-self._epochs // _MOST_LINES) == 0:
            done = f"epoch {epoch} of {self._epochs}, loss {loss:.3f}"
            self._line(str(update), f"{accuracy:.3f}", done=done)

    def round(self, report: RoundReport) -> None:
        """Write the line of a round; what it concludes follows where that is new.

        Args:
            report: Of the round.
        """
        begun = [i for i in report.erased if i not in self._erased]
        ended = [i for i in self._erased if i not in report.erased]
        waits = waiting(report.flags)
        self._line(
            str(report.step),
            f"{report.accuracy:.3f}",
            f"{report.worst_group_accuracy:.3f}",
            str(len(report.concepts)),
            fitted("", report.flagged, 9) or "-",
            _done(begun, ended, report),
            f"{report.overhead:.1%}",
            self._next(report, waits, begun),
        )
        verdict = report.verdict if report.flagged else report.verdict.partition(":")[0]
        new = [note for note in report.notes if note not in self._said]
        self._below(*new, *([report.verdict] if verdict != self._verdict else []))
        if waits != self._waiting and waits:
            _logger.info("%s", call_to_decide(self._folder, waits))  # in one line, to be copied
        self._erased, self._waiting, self._verdict = report.erased, waits, verdict
        self._said |= set(new)

    def _next(
        self,
        report: RoundReport,
        waits: Sequence[int],
        begun: Sequence[int],
    ) -> str:
        """Return what a person might do now."""
        if waits:
            return fitted("approve or veto ", waits, 22)
        if report.withdrawn:
            return "read the note below"
        if begun:
            return fitted("look at concept ", begun, 22)
        if report.step >= self._total:
            return "read the report"
        if report.flagged and not self._corrects:
            return "look, set guard.action"
        left = [report.leak[i] for i in report.erased if i in report.leak]
        return f"train on, leak {max(left):.2f}" if left else "train on"

    def _below(self, *sentences: str) -> None:
        indent = " " * (self._width + 2)
        for sentence in sentences:
            for line in wrap(sentence, WIDTH - len(indent)):
                _logger.info("%s%s", indent, line)

    def _line(self, *cells: str, done: str = "") -> None:
        # With `done` alone behind it, a line may run on over the columns to its right.
        row = [*cells, *[""] * (len(_COLUMNS) - len(cells))]
        if done:
            row[5] = done
        widths = (self._width, *(width for _, width in _COLUMNS[1:]))
        _logger.info(
            "%s",
            "  ".join(
                cell.ljust(width) if title in _LEFT else cell.rjust(width)
                for (title, _), width, cell in zip(_COLUMNS, widths, row, strict=True)
            ).rstrip(),
        )


def _done(begun: Sequence[int], ended: Sequence[int], report: RoundReport) -> str:
    """Return what became of the concepts under correction; what was taken back comes first."""
    by_people = [i for i in ended if i not in report.withdrawn]
    said = (
        ("withdrew ", report.withdrawn),
        ("restored ", by_people),
        ("erased ", begun),
        ("keeps ", report.erased),
    )
    width = dict(_COLUMNS)["done"]
    return next((fitted(word, ids, width) for word, ids in said if ids), "-")


def fitted(word: str, ids: Sequence[int], width: int) -> str:
    """Return ids behind a word, and how many more there are than the width allows.

    Args:
        word: Stands before them; with a space at its end.
        ids: Concepts.
        width: Of all, in characters.

    Returns:
        `erased 3, 12 +4`; empty without ids.
    """
    if not ids:
        return ""
    for count in range(len(ids), 0, -1):
        rest = f" +{len(ids) - count}" if count < len(ids) else ""
        text = f"{word}{', '.join(map(str, ids[:count]))}{rest}"
        if len(text) <= width:
            return text
    return f"{word}{len(ids)} ids"
