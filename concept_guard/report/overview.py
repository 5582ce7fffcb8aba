"""Stage 5: a run at a glance, and its acts and rounds as tables that stay short.

Nothing here knows how tables are drawn.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, TypeVar

from concept_guard.entries import ActEntry, RoundEntry
from concept_guard.history import RunHistory
from concept_guard.report.stories import status, updates

T = TypeVar("T")

MOST_ROWS = 120  # of a table; of more, the first and the last are shown


@dataclass(frozen=True)
class ActRow:
    """A row of the table of acts.

    Attributes:
        update: When, or from when to when.
        time: Of the last of them.
        act: What was done.
        concepts: Ids of the concepts it was done to.
        by: Who did it.
        text: The same in words.
    """

    update: str
    time: str
    act: str
    concepts: tuple[int, ...]
    by: str
    text: str


@dataclass(frozen=True)
class Short(Generic[T]):
    """The rows of a table that are shown.

    Attributes:
        first: Those at the top.
        left_out: How many follow that are not shown.
        last: Those at the bottom.
    """

    first: Sequence[T]
    left_out: int
    last: Sequence[T]


def facts(run: RunHistory) -> dict[str, str]:
    """Return what the run is and where it stands, by name.

    Args:
        run: Which run.

    Returns:
        Names and values in words; a value that is not known is a dash.
    """
    start = run.starts[-1] if run.starts else None
    last = run.rounds[-1] if run.rounds else None
    steps = updates(run)
    again = len(run.starts) - 1
    went_on = f", went on {'once' if again == 1 else f'{again} times'}" if again > 0 else ""
    return {
        "Model": start.model if start else "–",
        "Began": f"{run.starts[0].time}{went_on}" if start else "–",
        "Last update": f"{max(steps):,}" if steps else "–",
        "Rounds": f"{len(run.rounds):,}",
        "Concepts found": str(last.found) if last else "–",
        "Flagged": _value(last, "summary/n_flagged", ".0f"),
        "Under correction": _value(last, "summary/n_erased", ".0f"),
        "Probe accuracy": _value(last, "probe/top1", ".3f"),
        "Worst group": _value(last, "probe/worst_group", ".3f"),
        "Probe images": f"{last.images:,}, {last.errors:,} of them wrong" if last else "–",
        "Share of the wall time": _value(last, "cost/overhead_pct", ".1f", " %"),
    }


def _value(entry: RoundEntry | None, name: str, form: str, unit: str = "") -> str:
    value = entry.numbers.get(name) if entry else None
    return "–" if value is None or not math.isfinite(value) else f"{value:{form}}{unit}"


def commands(run: RunHistory) -> list[str]:
    """Return what a person may type to approve what waits; nothing once the model is baked.

    Args:
        run: Which run.

    Returns:
        One command per concept that waits.
    """
    if not run.rounds:
        return []
    last = run.rounds[-1]
    if any(act.act == "bake" and act.step >= last.step for act in run.acts):
        return []
    since = [act for act in run.acts if act.step >= last.step and act.by == "person"]
    done = {concept for act in since for concept in act.concepts}
    return [
        f"concept-guard approve {shlex.quote(run.name)} {concept.id}"
        for concept in last.concepts
        if concept.id not in done and any(flag.status == "waiting" for flag in concept.flags)
    ]


def act_rows(run: RunHistory) -> Short[ActRow]:
    """Return what was done; new estimates that follow each other share a row.

    Args:
        run: Which run.

    Returns:
        Rows in the order of the updates.
    """
    rows: list[ActRow] = []
    for again, some in groupby(run.acts, key=lambda act: act.act == "re_estimate"):
        acts = list(some)
        rows += [_estimates(acts)] if again else [_act(act) for act in acts]
    return shortened(rows)


def _act(act: ActEntry) -> ActRow:
    return ActRow(
        str(act.step), act.time, act.act.replace("_", " "), act.concepts, act.by, act.text
    )


def _estimates(acts: Sequence[ActEntry]) -> ActRow:
    first, last = acts[0], acts[-1]
    concepts = tuple(sorted({concept for act in acts for concept in act.concepts}))
    span = f"{first.step} to {last.step}" if last.step > first.step else str(first.step)
    times = f"{len(acts)} times" if len(acts) > 1 else last.text
    return ActRow(span, last.time, "estimate anew", concepts, last.by, times)


def round_rows(run: RunHistory) -> tuple[Short[RoundEntry], int]:
    """Return the rounds that say something new: the first, the last, and those with a change.

    Args:
        run: Which run.

    Returns:
        The rounds in their order, and how many are not among them since nothing changed.
    """
    kept: list[RoundEntry] = []
    before: object = None
    for entry in run.rounds:
        now = {(concept.id, status(concept)) for concept in entry.concepts}
        if now != before or entry is run.rounds[-1]:
            kept.append(entry)
        before = now
    return shortened(kept), len(run.rounds) - len(kept)


def shortened(rows: Sequence[T], most: int = MOST_ROWS) -> Short[T]:
    """Return the first and the last rows of a table that is too long.

    Args:
        rows: All of them.
        most: How many to keep.

    Returns:
        The same rows if they are not more than that.
    """
    if len(rows) <= most:
        return Short(rows, 0, ())
    half = most // 2
    return Short(rows[:half], len(rows) - 2 * half, rows[-half:])
