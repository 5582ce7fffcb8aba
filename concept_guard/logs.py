"""Stage 5: the record of a round becomes TensorBoard events; the table of their tags.

Nothing here knows how a concept was found, tested or corrected. `records` and `cards` make the
text and the pictures; their public names are offered here as well, so that a caller sees one door.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concept_guard.cards import Card, card_image, displayable
from concept_guard.records import RoundReport, evidence, markdown, table

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "SLOTS",
    "Card",
    "EventLog",
    "RoundReport",
    "assign_slots",
    "card_image",
    "displayable",
    "markdown",
    "table",
]

SLOTS = 8  # of the TensorBoard page: tags are named by slot, so that they never multiply

# The only place where a tag is spelled. Step = optimizer updates.
_TOP1 = "concept_guard/probe/top1"
_WORST_GROUP = "concept_guard/probe/worst_group"
_SLOT_RISK_DIFFERENCE = "concept_guard/slot_{}/risk_difference"
_SLOT_Q_VALUE = "concept_guard/slot_{}/q_value"
_SLOT_LEAK = "concept_guard/slot_{}/leak"
_SLOT_READABLE = "concept_guard/slot_{}/readable"
_CARD = "concept_guard/cards/slot_{}"
_REPORT = "concept_guard/report"
_SCALARS: tuple[tuple[str, Callable[[RoundReport], float | None]], ...] = (
    ("concept_guard/summary/n_concepts", lambda r: len(r.concepts)),
    ("concept_guard/summary/n_flagged", lambda r: len(r.flagged)),
    ("concept_guard/summary/n_erased", lambda r: len(r.erased)),
    ("concept_guard/summary/penalty", lambda r: r.penalty),
    (_TOP1, lambda r: r.accuracy),
    ("concept_guard/probe/top1_if_erased", lambda r: r.accuracy_if_erased),
    (_WORST_GROUP, lambda r: r.worst_group_accuracy),
    ("concept_guard/probe/worst_group_if_erased", lambda r: r.worst_group_accuracy_if_erased),
    ("concept_guard/probe/worst_class_recall", lambda r: r.worst_class_recall),
    ("concept_guard/probe/error_share_explained", lambda r: r.error_share_explained),
    ("concept_guard/stability/cosine_to_last", lambda r: r.cosine_to_last),
    ("concept_guard/cost/round_s", lambda r: r.seconds),
    ("concept_guard/cost/overhead_pct", lambda r: 100.0 * r.overhead),
)


def assign_slots(
    previous: Mapping[int, int], report: RoundReport, size: int = SLOTS
) -> dict[int, int]:
    """Give the concepts that matter now a slot of the TensorBoard page.

    A concept keeps its slot while it is flagged or erased. If there are more such concepts than
    slots, erased ones come first, then those that have a slot, then the strongest evidence.

    Args:
        previous: Concept id to slot after the last round.
        report: The new round.
        size: Number of slots.

    Returns:
        Concept id to slot, `0 .. size - 1`: plain data that belongs into a checkpoint.
    """
    flagged = sorted(report.flagged, key=lambda concept: concept not in previous)
    wanted = list(dict.fromkeys((*report.erased, *flagged)))[:size]
    kept = {c: previous[c] for c in wanted if previous.get(c, size) < size}
    free = (slot for slot in range(size) if slot not in kept.values())
    return {concept: kept[concept] if concept in kept else next(free) for concept in wanted}


class EventLog:
    """Writes rounds and human acts as TensorBoard events; the tags are those of the table above.

    TensorBoard is imported and the folder is made on the first write. A folder that cannot be
    written costs one warning, never the training run. A copied or unpickled log is inert: a
    second writer on the same folder (a copy made for EMA, say) would tear the curves.

    Args:
        log_dir: Folder of the run; None makes an inert log.
        hparams: Written once for the HParams page; what is no number or text is written as text.
        class_names: Shown in the report instead of class indices.
        file_names: Shown in the report instead of probe indices.
    """

    def __init__(
        self,
        log_dir: str | Path | None,
        *,
        hparams: Mapping[str, object] | None = None,
        class_names: Sequence[str] | None = None,
        file_names: Sequence[str] | None = None,
    ) -> None:
        self._folder = None if log_dir is None else str(log_dir) or "."
        self._hparams = dict(hparams or {})
        self._class_names = class_names
        self._file_names = file_names
        self._writer: SummaryWriter | None = None
        self._text: tuple[int, str] = (-1, "")  # of a step TensorBoard shows the last text only

    def __reduce__(self) -> tuple[type["EventLog"], tuple[None]]:
        return EventLog, (None,)  # copy, deepcopy and pickle all come here

    @property
    def active(self) -> bool:
        """Whether anything that is written would be kept."""
        return self._folder is not None

    def write(
        self, report: RoundReport, cards: Mapping[int, Card], slots: Mapping[int, int]
    ) -> None:
        """Write one round at its step; a value that is not finite leaves a gap in its curve.

        Args:
            report: The round.
            cards: Concept id to card; only concepts that have a slot are drawn.
            slots: Concept id to slot, from `assign_slots`.
        """
        text = markdown(report, self._class_names, self._file_names, slots)
        self._text = (report.step, text)

        def events(writer: "SummaryWriter") -> None:
            for tag, value in (*_round_values(report), *_slot_values(report, slots)):
                if value is not None and math.isfinite(value):
                    writer.add_scalar(tag, value, report.step)
            for concept in sorted(slots.keys() & cards.keys()):
                image = card_image(cards[concept])
                writer.add_image(_CARD.format(slots[concept]), image, report.step)
            writer.add_text(_REPORT, text, report.step)

        self._attempt(events, stale_from=report.step)

    def act(self, step: int, text: str) -> None:
        """Write what a person did (erase, restore, veto, approve) under the tag of the report.

        Args:
            step: Optimizer updates so far.
            text: One sentence, shown as it is, below what else is said of this step.
        """
        before, said = self._text
        whole = f"{said}\n\n{text}" if step == before else text
        self._text = (step, whole)
        # A round of this very step may be in an earlier file: it stays valid.
        self._attempt(lambda w: w.add_text(_REPORT, whole, step), stale_from=step + 1)

    def close(self) -> None:
        """Flush and close; the log is inert afterwards."""
        folder, self._folder = self._folder, None
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError as error:
            _warn(folder, error)

    def _attempt(self, events: "Callable[[SummaryWriter], None]", *, stale_from: int) -> None:
        if self._folder is None:
            return
        try:
            if self._writer is None:
                self._writer = _opened(self._folder, stale_from, self._hparams)
            events(self._writer)
            self._writer.flush()
        except OSError as error:
            folder, self._folder, self._writer = self._folder, None, None
            _warn(folder, error)


def _warn(folder: str | None, error: OSError) -> None:
    warnings.warn(
        f"log_dir={folder!r} cannot be written ({error}): training goes on without TensorBoard "
        "events. Pass a writable log_dir, or log_dir=None for no events.",
        UserWarning,
        stacklevel=2,
    )


def _round_values(report: RoundReport) -> list[tuple[str, float | None]]:
    return [(tag, read(report)) for tag, read in _SCALARS]


def _slot_values(report: RoundReport, slots: Mapping[int, int]) -> list[tuple[str, float | None]]:
    """Return the values of each slot; a concept flagged for two classes shows the stronger one."""
    values: list[tuple[str, float | None]] = []
    for concept, slot in slots.items():
        mine = sorted((flag for flag in report.flags if flag.concept == concept), key=evidence)
        for flag in mine[:1]:
            values.append((_SLOT_RISK_DIFFERENCE.format(slot), flag.risk_difference))
            values.append((_SLOT_Q_VALUE.format(slot), flag.q_value))
        values.append((_SLOT_LEAK.format(slot), report.leak.get(concept)))
        values.append((_SLOT_READABLE.format(slot), report.readable.get(concept)))
    return values


def _opened(folder: str, stale_from: int, hparams: Mapping[str, object]) -> "SummaryWriter":
    """Return a writer into the folder that has written the hyperparameters.

    Events of an interrupted run at step `stale_from` or later are hidden: a resumed run writes
    them again. The hyperparameters go into this same file: `SummaryWriter.add_hparams` opens a
    second, newer one, after which a running TensorBoard stops reading the first.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams as summaries

    writer = SummaryWriter(folder, purge_step=stale_from)
    if hparams:
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in hparams.items()}
        file_writer: Any = writer.file_writer
        for summary in summaries(plain, dict.fromkeys((_TOP1, _WORST_GROUP), 0.0)):
            file_writer.add_summary(summary)
    return writer
