"""How people reach a run from the command line: two small files in its log_dir.

`concept_guard/standing.json` says where the run stands: the run writes it, people read it. To
`concept_guard/decisions.jsonl` people append what they decide, one line each; the run reads it.
Nothing here knows how a decision is carried out, or how commands are written.
"""

import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from shlex import quote
from typing import Any, Literal, Self

FOLDER, STANDING, DECISIONS = "concept_guard", "standing.json", "decisions.jsonl"
ACTS = ("approve", "veto", "erase", "restore")
Stage = Literal["training", "stopped", "finished"]


@dataclass(frozen=True)
class FlagLine:
    """One flag as people see it.

    Attributes:
        concept: Id of the concept.
        class_name: The class it pulls towards.
        status: As in `Flag`, and as it is now: what was decided since the round is in it.
        risk_difference: As in `Flag`.
        q_value: As in `Flag`.
        reason: As in `Flag`.
    """

    concept: int
    class_name: str
    status: str
    risk_difference: float
    q_value: float
    reason: str


@dataclass(frozen=True)
class Standing:
    """Where a run stands: its last round, and what may be decided.

    Attributes:
        stage: `training`, `stopped` (the guard was closed) or `finished` (it was baked).
        step: Optimizer updates when the last round ran.
        due: After how many the next one is due.
        written: Date and time of this.
        verdict: The round's sentence.
        corrects: Whether anything is corrected; False under `action: observe`.
        concepts: Ids that may be approved, vetoed or erased.
        erased: Ids under correction, which may be restored.
        flags: The flags of the round.
        decisions_read: How many decisions the run has taken up.
    """

    stage: Stage
    step: int
    due: int
    written: str
    verdict: str
    corrects: bool
    concepts: tuple[int, ...]
    erased: tuple[int, ...]
    flags: tuple[FlagLine, ...]
    decisions_read: int

    @property
    def waiting(self) -> tuple[int, ...]:
        """Ids of the concepts that wait for approval."""
        return waiting(self.flags)

    def write(self, folder: Path) -> None:
        """Write this so that a reader finds the old or the new one, never half of it.

        Args:
            folder: `concept_guard` in the log_dir of the run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{STANDING}.part"
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf8")
        os.replace(part, folder / STANDING)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return what `write` wrote; where there is nothing, the `OSError` is the caller's.

        Args:
            folder: `concept_guard` in the log_dir of the run.

        Returns:
            Where the run stands.

        Raises:
            ValueError: If the file is something else.
        """
        data = json.loads((folder / STANDING).read_text(encoding="utf8"))
        names = {f.name for f in fields(cls)}
        if not isinstance(data, dict) or data.keys() != names:
            raise ValueError(f"{folder / STANDING} does not say where a run stands")
        flags = tuple(FlagLine(**flag) for flag in data["flags"])
        plain = {name: tuple(data[name]) for name in ("concepts", "erased")}
        return cls(**{**data, **plain, "flags": flags})


def waiting(flags: Iterable[Any]) -> tuple[int, ...]:
    """Return which concepts wait for approval.

    Args:
        flags: Flags of a round, or lines about them.

    Returns:
        Their ids, each once.
    """
    return tuple(dict.fromkeys(flag.concept for flag in flags if flag.status == "waiting"))


def call_to_decide(folder: Path | str, ids: Iterable[int]) -> str:
    """Return one line that says what waits, with the command that approves it.

    Args:
        folder: log_dir of the run.
        ids: Concepts that wait.

    Returns:
        Empty if nothing waits.
    """
    words = [str(i) for i in ids]
    if not words:
        return ""
    count = "1 concept waits" if len(words) == 1 else f"{len(words)} concepts wait"
    return f"{count} for approval: concept-guard approve {quote(str(folder))} {' '.join(words)}"


@dataclass(frozen=True)
class Decision:
    """What a person decided.

    Attributes:
        act: One of `ACTS`.
        ids: Concepts.
        step: Of the round that the person saw.
        time: Date and time.
    """

    act: str
    ids: tuple[int, ...]
    step: int
    time: str

    def __str__(self) -> str:
        return f"{self.act} {', '.join(map(str, self.ids))}"

    @classmethod
    def parsed(cls, line: bytes) -> Self | None:
        """Return the decision that a line of the file holds; None if it holds none."""
        try:
            data: Any = json.loads(line)
            found = cls(data["act"], tuple(data["ids"]), data["step"], str(data["time"]))
        except (ValueError, KeyError, TypeError):
            return None
        whole = all(type(number) is int for number in (*found.ids, found.step))
        return found if whole and found.ids and found.act in ACTS else None


def now() -> str:
    """Return date and time, to the second, as they are written in both files."""
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def append(folder: Path, decision: Decision) -> None:
    """Add a decision in one write, so that lines of two people never mix.

    Args:
        folder: `concept_guard` in the log_dir of the run.
        decision: What was decided.
    """
    line = json.dumps(asdict(decision)) + "\n"
    torn = lines(folder)[1]
    with (folder / DECISIONS).open("ab") as file:
        file.write((f"\n{line}" if torn else line).encode())


def lines(folder: Path) -> tuple[list[bytes], bytes]:
    """Return the complete lines of the decisions, and what is left of a torn one.

    Args:
        folder: `concept_guard` in the log_dir of the run.

    Returns:
        Lines without their ends, and the rest after the last end of line.
    """
    try:
        *whole, rest = (folder / DECISIONS).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], b""
    return whole, rest


class Channel:
    """The run's end: tells where the run stands and takes what was decided.

    Without a folder it does nothing. A folder that cannot be read or written costs a warning, never
    the training run. A copied or unpickled channel is inert: two runs must not answer to one file.

    Args:
        log_dir: Folder of the run, or None.
    """

    def __init__(self, log_dir: str | Path | None) -> None:
        self._folder = None if log_dir is None else Path(log_dir, FOLDER)
        self._read: int | None = None  # lines; None until a round of this run has been told of
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[type["Channel"], tuple[None]]:
        return Channel, (None,)  # copy, deepcopy and pickle all come here

    @property
    def read(self) -> int:
        """How many decisions were taken; a run without rounds counts all as those of others."""
        return len(self._lines()) if self._read is None else self._read

    @read.setter
    def read(self, count: int) -> None:
        self._read = count

    def take(self, step: int) -> Iterator[Decision]:
        """Take the new decisions up to the first that is on a round still to come.

        Such a decision was made before the run went back to an earlier checkpoint: it is taken
        when its round has run again, as it was the first time.

        Args:
            step: Of the last round; -1 before the first. What was decided before a run had any
                round concerns another run and is passed over with a warning.

        Yields:
            Each counts as taken from then on.
        """
        there = self._lines()
        if self._read is None:
            self._read = len(there)
            if there:
                self._warn(f"{len(there)} decisions on an earlier run are passed over")
        self._read = min(self._read, len(there)) if self._folder is not None else self._read
        while self._read < len(there):
            decision = Decision.parsed(there[self._read])
            if decision is not None and decision.step > step:
                return
            self._read += 1
            if decision is None:
                self._warn(f"line {self._read} is no decision and is passed over")
            else:
                yield decision

    def tell(self, standing: Standing) -> None:
        """Write where the run stands.

        Args:
            standing: What the command line is to know.
        """
        if self._folder is None:
            return
        try:
            standing.write(self._folder)
        except OSError as error:
            self._warn(f"{STANDING} cannot be written ({error}), so nothing can be decided there")

    def _lines(self) -> list[bytes]:
        if self._folder is None:
            return []
        try:
            there, torn = lines(self._folder)
        except OSError as error:
            self._warn(f"{DECISIONS} cannot be read ({error})")
            return [b""] * (self._read or 0)
        if torn:
            self._warn(f"the last line of {DECISIONS} is torn and is not read: {torn[:80]!r}")
        return there

    def _warn(self, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"decisions from the command line, {self._folder}: {what}. Training goes on.",
                stacklevel=5,
            )
