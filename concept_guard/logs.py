"""Stage 5: rounds and acts become TensorBoard events, and the history of the run.

Nothing here knows how a concept was found, tested or corrected. `tags` names what is written,
`keeping` says what is kept for the history, `events` writes it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from concept_guard import __version__, summaries, tags
from concept_guard.cards import Card, card_image, displayable, encoded
from concept_guard.events import EventFile
from concept_guard.keeping import Act, Names, act_entry, round_entry, start_entry
from concept_guard.records import RoundReport, escaped, evidence, markdown, table

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = [
    "SLOTS",
    "Act",
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
METRICS = {tags.TOP1: 0.0, tags.WORST_GROUP: 0.0}  # whose last values are the result of a run
MOST_CARD_BYTES = 140_000  # of all cards of a round, so that 100 rounds of 8 slots take 20 MB


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
    """Writes rounds and acts as TensorBoard events; the tags are those of `tags`.

    TensorBoard is imported and the folder is made on the first write. While the folder cannot be
    written events wait, at the cost of one warning, never of the training run. A copied or
    unpickled log is inert: a second writer on the same folder (a copy made for EMA, say) would
    tear the curves.

    Args:
        log_dir: Folder of the run; None makes an inert log.
        model: Class of the network, for the history.
        hparams: Written once for the HParams page; what is no number or text is written as text.
        class_names: Shown instead of class indices.
        file_names: Shown instead of probe indices.
    """

    def __init__(
        self,
        log_dir: str | Path | None,
        *,
        model: str = "",
        hparams: Mapping[str, object] | None = None,
        class_names: Sequence[str] | None = None,
        file_names: Sequence[str] | None = None,
    ) -> None:
        self._file = None if log_dir is None else EventFile(str(log_dir) or ".")
        self._model, self._hparams = model, dict(hparams or {})
        self._names = Names(class_names, file_names)
        self._begun, self._last = False, 0
        self._shown: dict[int, tuple[Card, str]] = {}  # slot to what it shows
        self._text: tuple[int, str] = (-1, "")  # of a step TensorBoard shows the last text only

    def __reduce__(self) -> tuple[type["EventLog"], tuple[None]]:
        return EventLog, (None,)  # copy, deepcopy and pickle all come here

    @property
    def active(self) -> bool:
        """Whether anything that is written would be kept."""
        return self._file is not None

    def write(
        self,
        report: RoundReport,
        cards: Mapping[int, Card],
        slots: Mapping[int, int],
        acts: Iterable[Act] = (),
    ) -> None:
        """Write one round at its step; a value that is not finite leaves a gap in its curve.

        Args:
            report: The round.
            cards: Concept id to card; only those of concepts that have a slot are written, and
                only if its slot did not show the same before.
            slots: Concept id to slot, from `assign_slots`.
            acts: What the guard did in this round.
        """
        if self._file is None:
            return
        text = markdown(report, self._names.classes, self._names.files, slots)
        values = {**tags.round_values(report), **dict(tags.slot_values(report, slots))}
        entry = round_entry(report, slots, self._names)
        self._append(
            report.step,
            [
                *summaries.scalars(values),
                *self._drawn(report, cards, slots),
                *self._of_acts(report.step, acts),
                self._said(report.step, text, afresh=True),
                summaries.kept(tags.HISTORY, entry),
            ],
            stale_from=report.step,
        )

    def act(self, step: int, act: Act) -> None:
        """Write what was done between rounds; it is shown below what else is said of this step.

        Args:
            step: Optimizer updates so far.
            act: What was done.
        """
        if self._file is not None:
            said = self._said(step, escaped(act.text or act.name))
            # A round of this very step may be in an earlier file: it stays valid.
            self._append(step, [*self._of_acts(step, [act]), said], stale_from=step + 1)

    def estimated(self, step: int, concepts: Sequence[int], misread: float) -> None:
        """Write that the pairs of the concepts under correction were estimated again.

        Args:
            step: Optimizer updates so far.
            concepts: Their ids.
            misread: Share of the reference rows that the pairs of before read otherwise.
        """
        if self._file is not None and concepts:
            act = Act("re_estimate", tuple(concepts), f"read otherwise before: {misread:.1%}")
            moved = summaries.scalars({tags.MISREAD: misread})
            self._append(step, [*moved, *self._of_acts(step, [act])], stale_from=step + 1)

    def close(self) -> None:
        """Write that the run ended here, and close; the log is inert afterwards."""
        if self._file is not None and self._begun and self._hparams:
            _, end = summaries.hyperparameters(self._hparams, METRICS)
            self._append(self._last, [end], stale_from=self._last + 1)
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _append(self, step: int, said: "list[Summary]", *, stale_from: int) -> None:
        if self._file is None:
            return
        opening: list[Summary] = []
        if not self._begun:
            self._begun = True
            given = self._hparams
            begin, _ = summaries.hyperparameters(given, METRICS)
            entry = start_entry(step, __version__, self._model, given, self._names)
            opening = [*(begin if given else ()), summaries.kept(tags.HISTORY, entry)]
        self._last = step
        self._file.append(step, [*opening, *said], stale_from=stale_from)

    def _said(self, step: int, text: str, *, afresh: bool = False) -> "Summary":
        """Return the text of a step, below what was said of it before."""
        before, said = self._text
        whole = f"{said}\n\n{text}" if step == before and not afresh else text
        self._text = (step, whole)
        return summaries.text(tags.REPORT, whole)

    def _of_acts(self, step: int, acts: Iterable[Act]) -> "list[Summary]":
        """Return the curves and the entries of acts; a curve counts the concepts acted upon."""
        made: list[Summary] = []
        for act in acts:
            if act.name in tags.ACTS:
                made += summaries.scalars({tags.ACTS[act.name]: float(len(act.concepts))})
            made.append(summaries.kept(tags.HISTORY, act_entry(step, act)))
        return made

    def _drawn(
        self, report: RoundReport, cards: Mapping[int, Card], slots: Mapping[int, int]
    ) -> "list[Summary]":
        new = {}
        for concept in sorted(slots.keys() & cards.keys()):
            shows = (cards[concept], self._caption(report, concept))
            if self._shown.get(slots[concept]) != shows:
                new[slots[concept]] = shows
        self._shown |= new
        drawn = []
        for slot, (card, caption) in new.items():
            sheet = card_image(card, caption)
            file = encoded(sheet, MOST_CARD_BYTES // len(new))
            size = (sheet.shape[1], sheet.shape[2])
            drawn.append(summaries.picture(tags.CARD.format(slot), file, size))
        return drawn

    def _caption(self, report: RoundReport, concept: int) -> str:
        mine = sorted((flag for flag in report.flags if flag.concept == concept), key=evidence)
        if not mine:
            return f"concept {concept}, no flag in this round"
        flag = mine[0]
        return (
            f"concept {concept} towards {self._names.of_class(flag.class_index)}, {flag.status}: "
            f"risk difference {flag.risk_difference:+.2f}, q = {flag.q_value:.1e}"
        )
