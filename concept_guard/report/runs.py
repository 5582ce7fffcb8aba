"""Stage 5: what the guard saw and did in a run, round by round, or in two runs side by side.

The page without a server and the tab of TensorBoard both show what `fragment` returns. Nothing
here knows how the history was read, or where its pictures are kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import zip_longest

from jinja2 import Environment
from markupsafe import Markup

from concept_guard.entries import RoundEntry
from concept_guard.history import RunHistory
from concept_guard.report import charts
from concept_guard.report.charts import Domain
from concept_guard.report.contents import HELD
from concept_guard.report.curves import of_runs
from concept_guard.report.drawing import data_uri, environment, picture_kind, style
from concept_guard.report.exhibits import SMALL_GROUP, Exhibit, counts, exhibits
from concept_guard.report.overview import ActRow, Short, act_rows, commands, facts, round_rows
from concept_guard.report.stories import Story, by_importance, divided, domain, status
from concept_guard.report.timeline import ACTS, BAR_HEIGHTS, Timeline, timeline
from concept_guard.report.words import number, sentence, signed

__all__ = ["embedded", "fragment", "run_page", "style"]

PICTURE_BYTES = 3_000_000  # of all pictures in a page, as text

PictureAddress = Callable[[str, int, int], str]


@dataclass(frozen=True, eq=False)
class _View:
    """All that is shown of one run."""

    run: RunHistory
    prefix: str  # of the anchors of its concepts
    facts: dict[str, str]
    verdict: str
    notes: tuple[str, ...]
    commands: list[str]
    start: str
    timeline: Timeline
    acts: Short[ActRow]
    rounds: Short[RoundEntry]
    unchanged: int
    told: dict[int, Story]
    exhibits: list[Exhibit]
    others: list[Story]

    @property
    def count(self) -> int:
        """How many concepts mattered."""
        return len(self.exhibits) + len(self.others)


def fragment(runs: Sequence[RunHistory], picture: PictureAddress, *, level: int = 2) -> str:
    """Return the view of one run, or of several that are compared, as HTML to be put into a page.

    Args:
        runs: One or two; none gives the empty state.
        picture: Name of a run, step and slot to the address of a card. It is asked for cards
            that the run has, and for no others.
        level: Of its highest headings.

    Returns:
        HTML without scripts and without a frame of its own; `style` is how it looks.
    """
    runs = list(runs) or [RunHistory(name="")]
    axis = domain(runs)
    views = [_view(run, n, axis) for n, run in enumerate(runs, start=1)]
    return (
        _templates()
        .get_template("history.html.j2")
        .render(
            title=" and ".join(run.name for run in runs) or "No run",
            views=views,
            picture=picture,
            level=level,
            told_anything=not all(run.empty for run in runs),
            curves=of_runs(runs, axis),
            grouped=any(of.groups for view in views for of in view.exhibits),
            small_group=SMALL_GROUP,
            held_states=HELD,
        )
    )


def embedded(runs: Sequence[RunHistory], *, level: int = 2) -> str:
    """Return the view with its pictures inside, as many as a page can carry.

    Args:
        runs: One or two.
        level: Of its highest headings.

    Returns:
        HTML as from `fragment` that needs no other file.
    """
    told_apart = [
        run if run.name not in {other.name for other in runs[:n]} else _renamed(run, n)
        for n, run in enumerate(runs)
    ]
    kept = [_carried(run, PICTURE_BYTES // len(runs)) for run in told_apart]
    cards = {run.name: run.cards for run in kept}
    return fragment(kept, lambda name, step, slot: data_uri(cards[name][step, slot]), level=level)


def run_page(runs: Sequence[RunHistory], *, command: str = "") -> str:
    """Return the view of one run or of two as one document that needs no other file.

    Args:
        runs: One or two.
        command: That wrote the page.

    Returns:
        An HTML document.
    """
    return (
        _templates()
        .get_template("run_page.html.j2")
        .render(
            title=f"{' and '.join(run.name for run in runs)}: what the guard saw and did",
            style=Markup(style()),  # noqa: S704, a file of this package
            view=Markup(embedded(runs)),  # noqa: S704, escaped by its own template
            command=command,
        )
    )


@cache
def _templates() -> Environment:
    words = {"number": number, "signed": signed}
    made = environment({**words, "counts": counts, "sentence": sentence, "status": status})
    made.globals |= {
        **{"width": charts.WIDTH, "height": charts.HEIGHT, "left": charts.LEFT},
        **{"right": charts.RIGHT, "top": charts.TOP, "bottom": charts.BOTTOM},
        **{"act_words": ACTS, "bar_heights": BAR_HEIGHTS},
    }
    return made


def _view(run: RunHistory, n: int, axis: Domain) -> _View:
    shown, others = divided(run)
    rounds, unchanged = round_rows(run)
    last = run.rounds[-1] if run.rounds else None
    return _View(
        run=run,
        prefix=f"run-{n}",
        facts=facts(run),
        verdict=sentence(last.verdict) if last else "",
        notes=last.notes if last else (),
        commands=commands(run),
        start=run.starts[-1].settings.get("start", "100") if run.starts else "100",
        timeline=timeline(run, shown, axis),
        acts=act_rows(run),
        rounds=rounds,
        unchanged=unchanged,
        told={story.id: story for story in shown},
        exhibits=exhibits(run, shown, axis),
        others=others,
    )


def _renamed(run: RunHistory, n: int) -> RunHistory:
    return replace(run, name=f"{run.name} ({n + 1})")


def _carried(run: RunHistory, most: int) -> RunHistory:
    """Return the run with those of its cards that fit: of each concept the most telling first."""
    shown, _ = divided(run)
    queues = [[(step, story.cards[step]) for step in by_importance(story)] for story in shown]
    kept: dict[tuple[int, int], bytes] = {}
    broken = 0
    for key in (key for turn in zip_longest(*queues) for key in turn if key is not None):
        card = run.cards[key]
        if picture_kind(card) is None:
            broken += 1
        elif len(card) * 4 // 3 <= most:
            most -= len(card) * 4 // 3
            kept[key] = card
    said = f"{broken} card{'' if broken == 1 else 's'} left out: neither PNG nor JPEG"
    problems = (said,) if broken else ()
    return replace(run, cards=kept, problems=(*run.problems, *problems))
