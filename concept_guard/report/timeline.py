"""Stage 5: when concepts were flagged and corrected, and what was done, on one axis of updates.

Nothing here knows what a concept shows, or in which colours the timeline is drawn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from concept_guard.entries import ActEntry
from concept_guard.history import RunHistory
from concept_guard.report.charts import Domain, anchor, round_updates, share_of
from concept_guard.report.stories import Story, domain

COLUMNS = 400  # of a bar: what is shorter is drawn as long as one
BINS = 50  # of the counts of new estimates
SAME_PLACE = 0.03  # of the width, for one mark: those that are nearer stand side by side
MOST_BESIDE = 6  # marks side by side; more of them would be read as later ones

STATES = ("listed", "flagged", "erased")  # of a bar, each stronger than the one before
ACTS = {
    "flag": "flag",
    "erase": "erase",
    "restore": "restore",
    "veto": "veto",
    "approve": "approve",
    "withdraw": "withdraw",
    "bake": "bake",
    "not_done": "not done",
    "start": "start, or start again",
}
BAR_HEIGHTS = {"listed": 2, "flagged": 6, "erased": 12}  # told apart without colours as well


@dataclass(frozen=True)
class Mark:
    """An act on a row: `at` in percent of the width, moved right by `beside` places."""

    act: str
    at: float
    beside: int
    text: str


@dataclass(frozen=True)
class Row:
    """A row of the timeline.

    Attributes:
        concept: Its id; None for a row of the run itself.
        label: What stands in front of it.
        sentence: The same for those who cannot see it.
        bars: State to path, in a box of 1000 by 12.
        marks: What was done.
    """

    concept: int | None
    label: str
    sentence: str
    bars: dict[str, str]
    marks: tuple[Mark, ...] = ()


@dataclass(frozen=True)
class Timeline:
    """All rows, and what a legend must explain.

    Attributes:
        rows: The run, its concepts, and how often pairs were estimated anew.
        acts: Those that stand on a row, in the order of the legend.
        states: Likewise of bars.
        ticks: Updates on the axis: in percent, in words, and how they are aligned.
    """

    rows: tuple[Row, ...]
    acts: tuple[str, ...]
    states: tuple[str, ...]
    ticks: tuple[tuple[float, str, str], ...]


def timeline(run: RunHistory, told: Sequence[Story], axis: Domain) -> Timeline:
    """Lay out what happened.

    Args:
        run: What happened.
        told: What its rounds said of its concepts.
        axis: First and last update.

    Returns:
        The rows; concepts stand in the order in which they were first spoken of.
    """
    shown = sorted(told, key=lambda story: (story.told[0][0].step, story.id))
    acts = _by_concept(run.acts)
    places = _places(run, axis)
    rows = [_run_row(run, places, axis)]
    rows += [_concept_row(story, places, acts.get(story.id, []), axis) for story in shown]
    if any(act.act == "re_estimate" for act in run.acts):
        rows.append(_estimates(run.acts, axis))
    used = {mark.act for row in rows for mark in row.marks}
    seen = {state for row in rows for state in row.bars}
    return Timeline(
        rows=tuple(rows),
        acts=tuple(act for act in ACTS if act in used),
        states=tuple(state for state in STATES if state in seen),
        ticks=tuple(
            (round(100 * share, 2), f"{update:,}", anchor(share))
            for update in round_updates(axis)
            for share in [share_of(update, axis)]
        ),
    )


def _by_concept(acts: Iterable[ActEntry]) -> dict[int, list[ActEntry]]:
    of: dict[int, list[ActEntry]] = {}
    for act in acts:
        if act.act != "re_estimate":
            for concept in act.concepts:
                of.setdefault(concept, []).append(act)
    return of


def _places(run: RunHistory, axis: Domain) -> dict[int, tuple[int, int]]:
    """Return the columns of each round, by its update: up to the next round, but at least one."""
    steps = [entry.step for entry in run.rounds]
    starts = [min(COLUMNS - 1, int(share_of(step, axis) * COLUMNS)) for step in steps]
    end = int(share_of(domain([run])[1], axis) * COLUMNS)
    ends = (max(a + 1, b) for a, b in zip(starts, [*starts[1:], end], strict=False))
    return dict(zip(steps, zip(starts, ends, strict=True), strict=True))


def _run_row(run: RunHistory, places: Mapping[int, tuple[int, int]], axis: Domain) -> Row:
    marks = [(start.step, "start", f"concept_guard {start.version}") for start in run.starts]
    marks += [
        (act.step, act.act, act.text)
        for act in run.acts
        if not act.concepts and act.act != "re_estimate"
    ]
    marks.sort()
    said = _counted([entry.step for entry in run.rounds])
    return Row(
        None,
        "Rounds",
        f"{said[:1].upper()}{said[1:]}. {_spoken(marks)}",
        {"round": "".join(_box(c, c + 0.5, 12) for c in sorted({c for c, _ in places.values()}))},
        _marks(marks, axis),
    )


def _concept_row(
    story: Story,
    places: Mapping[int, tuple[int, int]],
    acts: Iterable[ActEntry],
    axis: Domain,
) -> Row:
    """Return the row of a concept: what a round took it for holds until the next round."""
    columns, spans = bytearray(COLUMNS), dict[str, list[int]]()
    for (at, _), (status, held) in zip(story.told, story.states, strict=True):
        state = 3 if status == "erased" else 2 if held else 1
        spans.setdefault(STATES[state - 1], []).append(at.step)
        for column in range(*places[at.step]):
            columns[column] = max(columns[column], state)
    marks = [(act.step, act.act, act.text) for act in acts]
    said = "; ".join(
        f"{'under correction' if state == 'erased' else state} in {_counted(steps)}"
        for state, steps in spans.items()
    )
    return Row(
        story.id,
        f"Concept {story.id}",
        f"Concept {story.id}: {said}. {_spoken(marks)}",
        {state: path for n, state in enumerate(STATES, start=1) if (path := _bar(columns, n))},
        _marks(marks, axis),
    )


def _estimates(acts: Iterable[ActEntry], axis: Domain) -> Row:
    """Return how often pairs were estimated anew, as bars as high as there were times."""
    counts = [0] * BINS
    for act in acts:
        if act.act == "re_estimate":
            counts[min(BINS - 1, int(share_of(act.step, axis) * BINS))] += 1
    wide = COLUMNS // BINS
    path = "".join(
        _box(n * wide, n * wide + wide - 1, 2 + 10 * count / max(counts), foot=True)
        for n, count in enumerate(counts)
        if count
    )
    times = sum(counts)
    return Row(None, "Estimated anew", f"Pairs were estimated anew {times} times.", {"again": path})


def _bar(columns: bytearray, state: int) -> str:
    """Return the stretches of columns in this state as one path."""
    path, start = [], None
    for column in range(COLUMNS + 1):
        inside = column < COLUMNS and columns[column] == state
        if inside and start is None:
            start = column
        elif not inside and start is not None:
            path.append(_box(start, column, BAR_HEIGHTS[STATES[state - 1]]))
            start = None
    return "".join(path)


def _box(start: float, end: float, height: float, *, foot: bool = False) -> str:
    left, right = 1000 * start / COLUMNS, 1000 * end / COLUMNS
    top = 12 - height if foot else 6 - height / 2
    return f"M{left:g} {top:g}H{right:g}v{height:g}H{left:g}z"


def _marks(acts: Iterable[tuple[int, str, str]], axis: Domain) -> tuple[Mark, ...]:
    # The same act at the same place is drawn once.
    made: list[Mark] = []
    near: list[Mark] = []
    for step, act, text in acts:
        at = 100 * share_of(step, axis)
        if near and at - near[0].at >= 100 * SAME_PLACE * len(near):
            near = []
        if len(near) < MOST_BESIDE and act not in {mark.act for mark in near}:
            words = f"update {step}: {ACTS[act]}{f'. {text}' if text else ''}"
            near.append(Mark(act, near[0].at if near else round(at, 2), len(near), words))
            made.append(near[-1])
    return tuple(made)


def _spoken(acts: Sequence[tuple[int, str, str]], most: int = 12) -> str:
    said = [f"{ACTS[act]} at update {step}" for step, act, _ in acts[:most]]
    more = f"; {len(acts) - most} more acts" if len(acts) > most else ""
    return f"{'; '.join(said)}{more}." if said else ""


def _counted(steps: Sequence[int]) -> str:
    if len(steps) < 2:
        return f"1 round at update {steps[0]}" if steps else "no round"
    return f"{len(steps)} rounds from update {steps[0]} to {steps[-1]}"
