"""Doctor: what an examination found, as data and as text.

Nothing here knows how it is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import fill

WIDTH = 96
_MIB = 2**20
_VERBS = "build|call|close|collate|give|guard|lower|pass|put|set|take|tap|use|wrap|write"
_WAY_OUT = re.compile(rf"[;.,] (?:so )?(?=(?:{_VERBS})\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """Something that keeps the guard from working, or limits what it can do.

    Attributes:
        where: A setting, a switch, the model, the tap or the sample.
        found: What is there.
        expected: What the guard needs; empty where `found` says it.
        mend: The way out, where possible the line to change.
        stops: Whether the guard cannot work, or would do nothing without saying so.
    """

    where: str
    found: str
    expected: str
    mend: str
    stops: bool

    @classmethod
    def of(cls, where: str, error: object, *, stops: bool = True, mend: str = "") -> Problem:
        """Return the problem that an error of this library tells of.

        Args:
            where: Place of the problem.
            error: Its text names what was found, what was expected and, last, the way out.
            stops: Whether the guard cannot work.
            mend: The way out, for an error that does not name it.

        Returns:
            The same in parts.
        """
        found = " ".join(str(error).split()).rstrip(".")
        if not mend:
            parts = _WAY_OUT.split(found, maxsplit=1)
            found, mend = parts if len(parts) == 2 else (found, "")
        for word in (", expected ", ": expected "):
            if word in found:
                found, _, expected = found.partition(word)
                return cls(where, found, expected, mend or f"give {expected}", stops)
        return cls(where, found, "", mend or "change this", stops)

    def lines(self) -> Iterator[str]:
        """Yield the problem as text."""
        yield f"{'STOPS ' if self.stops else 'LIMITS'}  {self.where}"
        for name in ("found", "expected", "mend"):
            if text := getattr(self, name):
                yield _wrapped(f"        {name:10}", text, " " * 18)


@dataclass(frozen=True)
class Ratio:
    """Quotients of times that were measured in turns.

    Attributes:
        middle: Their median.
        low: Their lower quartile.
        high: Their upper quartile.
        pairs: How many there are.
    """

    middle: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Cost:
    """What the guard costs here, measured in eager mode on the sample and on made-up rows.

    Attributes:
        batch: Shape of the sample.
        batch_size: Images per update of the training.
        device: Where it was measured.
        threads: Of torch, on the CPU.
        observing: An update, forward and backward, while nothing is corrected over one without.
        correcting: The same while a concept is under correction; None if none could be.
        probe_images: Of which a round is reckoned.
        pass_seconds: Of a forward pass over them.
        round_ratio: A round over that pass.
        rows: Kept of one reading.
        channels: Length of each, C.
        observing_share: Of training time at the configured schedule, rounds included.
        correcting_share: The same with tracking, as often as it can be due.
        schedule: The intervals, in words.
    """

    batch: tuple[int, ...]
    batch_size: int
    device: str
    threads: int
    observing: Ratio
    correcting: Ratio | None
    probe_images: int
    pass_seconds: float
    round_ratio: Ratio
    rows: int
    channels: int
    observing_share: float
    correcting_share: float | None
    schedule: str

    @property
    def reading_bytes(self) -> int:
        """Memory of the rows of a reading, in float32."""
        return 4 * self.rows * self.channels

    def lines(self) -> Iterator[str]:
        """Yield the cost as text."""
        batch = "x".join(map(str, self.batch))
        threads = (
            f" ({self.threads} thread{'s' * (self.threads > 1)})" if self.device == "cpu" else ""
        )
        yield f"cost on {self.device}{threads}, sample {batch}, {self.observing.pairs} turns:"
        yield f"  an update that observes       {self.observing} of a plain one"
        if self.correcting is not None:
            yield f"  an update that corrects       {self.correcting} of a plain one"
        whole = self.round_ratio.middle * self.pass_seconds
        yield (
            f"  a round on {self.probe_images} images".ljust(32)
            + f"{self.round_ratio.middle:.1f} of a forward pass over them, about {_time(whole)}"
        )
        yield (
            f"  a reading of the probe        {self.reading_bytes / _MIB:.1f} MiB: {self.rows} "
            f"rows of {self.channels}"
        )
        shares = [f"{self.observing_share:.1%} observing"]
        if self.correcting_share is not None:
            shares.append(f"up to {self.correcting_share:.1%} correcting")
        text = f"about {', '.join(shares)}: batches of {self.batch_size}, {self.schedule}"
        yield _wrapped("  share of the training time    ", text, " " * 32)


@dataclass(frozen=True)
class DoctorReport:
    """All that an examination found.

    Attributes:
        subject: The model and the tap, in words.
        problems: Everything that is wrong, what stops the guard first.
        facts: What is as it should be, one fact each.
        cost: What the guard costs; None if that was not measured.
    """

    subject: str
    problems: tuple[Problem, ...]
    facts: tuple[str, ...]
    cost: Cost | None = None

    @property
    def stops(self) -> bool:
        """Whether a problem keeps the guard from working, or disables it without a word."""
        return any(problem.stops for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count, stopping = len(self.problems), sum(p.stops for p in self.problems)
        verdict = "no problem" if not count else f"{count} problem{'s' * (count > 1)}"
        if count:
            verdict += f", {stopping or 'none'} of which stop{'s' * (stopping < 2)} the guard"
        yield f"{self.subject}: {verdict}"
        for problem in self.problems:
            yield ""
            yield from problem.lines()
        if self.facts:
            yield ""
            yield "facts:"
            yield from (_wrapped("  ", fact, "    ") for fact in self.facts)
        if self.cost is not None:
            yield ""
            yield from self.cost.lines()


def _wrapped(first: str, text: str, indent: str) -> str:
    return fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _time(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.0f} min"
