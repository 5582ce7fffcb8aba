"""Stage 5: which numbers of a run become which curves.

Nothing here knows how a curve is drawn.
"""

from collections.abc import Callable, Sequence

from concept_guard.entries import ConceptEntry
from concept_guard.history import RunHistory
from concept_guard.report.charts import Chart, Domain, Scale, Series, chart
from concept_guard.report.stories import Story

MOST_POINTS = 120  # of the small curves of a concept
MOST_ROUNDS = 1000  # of these curves; of twice as many every other one is drawn
MOST_MARKS = 12  # corrections that are marked in the curves of a run

_SHARE = Scale(".3f", least=0.1, low=0.0, high=1.0)
_COSINE = Scale(".3f", least=0.1, low=-1.0, high=1.0)
_COUNT = Scale(".0f", least=3.0, low=0.0)
_PERCENT = Scale(".1f", least=3.0, low=0.0)
_DIFFERENCE = Scale("+.2f", least=0.2, low=-1.0, high=1.0)

# Title, scale, and the numbers in it with what sets them apart, as `logs` names them.
_OF_RUN: tuple[tuple[str, Scale, tuple[tuple[str, str], ...]], ...] = (
    (
        "Probe accuracy",
        _SHARE,
        (
            ("probe/top1", "as it is"),
            ("probe/top1_uncorrected", "uncorrected"),
            ("probe/top1_if_erased", "if flagged is erased"),
        ),
    ),
    (
        "Worst group",
        _SHARE,
        (
            ("probe/worst_group", "as it is"),
            ("probe/worst_group_uncorrected", "uncorrected"),
            ("probe/worst_group_if_erased", "if flagged is erased"),
        ),
    ),
    (
        "Concepts",
        _COUNT,
        (("summary/n_flagged", "flagged"), ("summary/n_erased", "under correction")),
    ),
    ("Share of errors under a flag", _SHARE, (("probe/error_share_explained", "share"),)),
    (
        "Filters, mean cosine to the last round",
        _COSINE,
        (("stability/cosine_to_last", "cosine"),),
    ),
    ("Share of the wall time, %", _PERCENT, (("cost/overhead_pct", "share"),)),
)


def of_runs(runs: Sequence[RunHistory], axis: Domain) -> list[Chart]:
    """Return the curves of a run, or those of several laid over each other.

    Args:
        runs: Whose numbers are drawn.
        axis: First and last update.

    Returns:
        Charts that have at least one value. Each has one curve per run; that of a single run has
        the numbers that belong together in one chart.
    """
    drawn = []
    for title, scale, numbers in _OF_RUN:
        if len(runs) == 1:
            series = [_numbers(runs[0], number, name) for number, name in numbers]
            drawn.append(chart(title, series, axis, scale, marks=_corrections(runs[0])))
            continue
        for number, name in numbers:
            series = [_numbers(run, number, run.name) for run in runs]
            full = f"{title}, {name}" if len(numbers) > 1 else title
            drawn.append(chart(full, series, axis, scale))
    return [one for one in drawn if one is not None]


def of_concept(story: Story, steps: Sequence[int], axis: Domain) -> list[Chart]:
    """Return the small curves of a concept.

    Args:
        story: Of the concept.
        steps: Updates of all rounds; where a round did not speak of it there is a gap.
        axis: First and last update.

    Returns:
        Charts that have at least one value.
    """
    told = {at.step: entry for at, entry in story.told}
    first, last = story.told[0][0].step, story.told[-1][0].step
    between = [(step, told.get(step)) for step in steps if first <= step <= last]
    between = between[:: max(1, len(between) // MOST_ROUNDS)]

    def series(name: str, read: Callable[[ConceptEntry], float | None]) -> Series:
        return Series(name, [(step, read(entry) if entry else None) for step, entry in between])

    def small(title: str, scale: Scale, *curves: Series) -> Chart | None:
        return chart(title, curves, axis, scale, most=MOST_POINTS)

    drawn = (
        small(
            "Risk difference",
            _DIFFERENCE,
            series("found", lambda entry: entry.flags[0].risk_difference if entry.flags else None),
            series("left under correction", lambda entry: entry.leak),
        ),
        small("Readable by a fresh probe (.5: not at all)", _SHARE, series("AUC", _readable)),
        small("Filter, cosine to the last round's", _COSINE, series("cosine", _drift)),
    )
    return [one for one in drawn if one is not None]


def _readable(entry: ConceptEntry) -> float | None:
    return entry.readable


def _drift(entry: ConceptEntry) -> float | None:
    return entry.drift


def _numbers(run: RunHistory, number: str, name: str) -> Series:
    return Series(name, [(entry.step, entry.numbers.get(number)) for entry in run.rounds])


def _corrections(run: RunHistory) -> list[int]:
    return [act.step for act in run.acts if act.act == "erase"][:MOST_MARKS]
