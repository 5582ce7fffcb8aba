"""Stage 5: curves as drawings that a template can write as SVG.

Nothing here knows what the numbers mean, or in which colours they are drawn.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 340, 150  # of a chart, in units of its viewBox
LEFT, RIGHT, TOP, BOTTOM = 38, 8, 8, 20  # around the curves
MOST_POINTS = 300  # of a curve; a longer one keeps the extremes of as many stretches
LARGEST = 1e12  # what is beyond it is left out: no chart of shares or counts has room for it

Points = Sequence[tuple[int, float | None]]
Domain = tuple[int, int]  # first and last update on the axis


@dataclass(frozen=True)
class Series:
    """One curve before it is drawn.

    Attributes:
        name: What sets it apart from the others of its chart.
        points: Update and value, in order; None is a gap.
    """

    name: str
    points: Points


@dataclass(frozen=True)
class Scale:
    """How the values of a chart are read.

    Attributes:
        form: Of a value in words, as `format` takes it.
        least: Smallest range of the axis, so that noise does not look like news.
        low: What no value is below, if there is such a bound.
        high: What no value is above, if there is such a bound.
    """

    form: str = ".3f"
    least: float = 0.1
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis; `at` is in units of the viewBox."""

    at: float
    text: str
    anchor: str = "middle"


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn.

    Attributes:
        name: What sets it apart.
        path: Of SVG; empty if there is no value.
        last: Its last value in words; empty if there is none.
        end: Where it ends, in units of the viewBox.
    """

    name: str
    path: str
    last: str
    end: tuple[float, float] | None


@dataclass(frozen=True)
class Chart:
    """A drawing of curves over updates.

    Attributes:
        title: What is shown.
        sentence: The same for those who cannot see it, with the values.
        lines: The curves.
        across: Ticks of the updates.
        up: Ticks of the values.
        marks: Places of updates that stand out, in units of the viewBox.
    """

    title: str
    sentence: str
    lines: tuple[Line, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    marks: tuple[float, ...] = ()


def chart(
    title: str,
    series: Sequence[Series],
    domain: Domain,
    scale: Scale,
    *,
    marks: Sequence[int] = (),
    most: int = MOST_POINTS,
) -> Chart | None:
    """Draw curves over the same updates.

    Args:
        title: What is shown.
        series: The curves; values that are not finite are gaps.
        domain: First and last update on the axis.
        scale: How the values are read.
        marks: Updates that stand out.
        most: Points of a curve; of more, the extremes are kept.

    Returns:
        The chart; None if there is no value at all.
    """
    clean = [Series(one.name, thinned(_finite(one.points), most)) for one in series]
    values = [value for one in clean for _, value in one.points if value is not None]
    if not values:
        return None
    low, high, step = _axis(min(values), max(values), scale)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    up = (low + n * step for n in range(round((high - low) / step) + 1))
    return Chart(
        title=title,
        sentence=f"{title}. {' '.join(_said(one, scale) for one in clean)}",
        lines=tuple(_line(one, domain, scale, y) for one in clean),
        across=tuple(
            Tick(_x(update, domain), f"{update:,}", anchor(share_of(update, domain)))
            for update in round_updates(domain)
        ),
        up=tuple(Tick(round(y(value), 1), _brief(value, decimals)) for value in up),
        marks=tuple(sorted({_x(step, domain) for step in marks})),
    )


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """Keep the lowest and the highest value of each stretch of a long curve.

    Args:
        points: Update and value, in order; None is a gap.
        most: Points to keep, an even number.

    Returns:
        At most so many of the points; the first and the last update among them.
    """
    if len(points) <= most:
        return points
    kept: list[tuple[int, float | None]] = [points[0]]
    inner, stretches = points[1:-1], (most - 2) // 2
    for n in range(stretches):
        stretch = inner[len(inner) * n // stretches : len(inner) * (n + 1) // stretches]
        valued = [(value, at) for at, (_, value) in enumerate(stretch) if value is not None]
        ends = {min(valued)[1], max(valued)[1]} if valued else {0}
        kept += [stretch[at] for at in sorted(ends)]
    return [*kept, points[-1]]


def share_of(step: int, domain: Domain) -> float:
    """Return where an update stands between the first (0) and the last (1).

    Args:
        step: The update; what lies outside is moved to the end.
        domain: First and last update on the axis.

    Returns:
        A number between 0 and 1.
    """
    first, last = domain
    return (min(max(step, first), last) - first) / max(last - first, 1)


def round_updates(domain: Domain, most: int = 4) -> list[int]:
    """Return round numbers of updates for the ticks of an axis.

    Args:
        domain: First and last update on the axis.
        most: How many, about.

    Returns:
        Updates in order.
    """
    first, last = domain
    step = max(1, round(_nice(max(last - first, 1) / most)))
    return list(range(-(-first // step) * step, last + 1, step))


def anchor(share: float) -> str:
    """Return how a label is aligned so that it stays inside.

    Args:
        share: Where on the axis it stands, between 0 and 1.

    Returns:
        A value of `text-anchor`.
    """
    return "end" if share > 0.965 else "middle"  # on the left there is room


def _finite(points: Points) -> Points:
    return [
        (step, value if value is not None and abs(value) < LARGEST else None)  # NaN is not below
        for step, value in points
    ]


def _axis(lowest: float, highest: float, scale: Scale) -> tuple[float, float, float]:
    """Return the ends of the axis and its step, all of them round numbers."""
    missing = max(0.0, scale.least - (highest - lowest)) / 2
    low, high = lowest - missing, highest + missing
    if scale.low is not None and low < scale.low <= lowest:
        low, high = scale.low, max(high, scale.low + scale.least)
    if scale.high is not None and high > scale.high >= highest:
        low, high = min(low, scale.high - scale.least), scale.high
    step = _nice((high - low) / 3)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def _brief(value: float, decimals: int) -> str:
    return f"{value:.0e}" if abs(value) >= 1e5 else f"{round(value, decimals) + 0.0:.{decimals}f}"


def _nice(size: float) -> float:
    """Return the next of 1, 2, 5, 10, ... that is not smaller, for any power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return float(next(n * power for n in (1, 2, 5, 10) if n * power >= size * (1 - 1e-9)))


def _x(step: int, domain: Domain) -> float:
    return round(LEFT + share_of(step, domain) * (WIDTH - LEFT - RIGHT), 1)


def _line(one: Series, domain: Domain, scale: Scale, y: Callable[[float], float]) -> Line:
    path, end, text, open_ = [], None, "", False
    for step, value in one.points:
        if value is None:
            open_ = False
            continue
        end = (_x(step, domain), round(y(value), 1))
        # A point between gaps is a line of no length: its round cap is a dot.
        path.append(f"{'L' if open_ else 'M'}{end[0]:g} {end[1]:g}{'' if open_ else 'h0'}")
        open_, text = True, format(value, scale.form)
        if step != one.points[-1][0]:
            text += f" (update {step})"  # it has no later value: this is not how things stand
    return Line(one.name, "".join(path), text, end)


def _said(one: Series, scale: Scale) -> str:
    valued = [(step, value) for step, value in one.points if value is not None]
    if not valued:
        return f"{one.name}: no value."
    (first, began), (last, ended) = valued[0], valued[-1]
    if len(valued) == 1:
        return f"{one.name}: {began:{scale.form}} at update {first}."
    lowest, highest = min(value for _, value in valued), max(value for _, value in valued)
    return (
        f"{one.name}: {began:{scale.form}} at update {first}, {ended:{scale.form}} at update "
        f"{last}; lowest {lowest:{scale.form}}, highest {highest:{scale.form}}."
    )
