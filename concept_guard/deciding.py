"""What a person at the command line sees of a run and may decide about it.

Nothing here knows how a decision is carried out, or how commands are parsed.
"""

from collections.abc import Sequence
from pathlib import Path

from concept_guard.decisions import (
    DECISIONS,
    FOLDER,
    STANDING,
    Decision,
    Standing,
    append,
    call_to_decide,
    lines,
    now,
)
from concept_guard.errors import ConfigError, StateError

MEANING = {
    "approve": "allow concepts to be corrected: those that wait at once, others once flagged",
    "veto": "never correct concepts; one under correction is restored",
    "erase": "correct concepts whatever the statistics say",
    "restore": "stop correcting concepts; they stay vetoed until erased or approved again",
}


def decide(run: str | Path, act: str, words: Sequence[str]) -> str:
    """Leave a decision for a run, or, without ids, show what there is to decide.

    Args:
        run: Folder of the run, the guard's log_dir.
        act: One of `ACTS`.
        words: Ids of concepts.

    Returns:
        What to print.

    Raises:
        ConfigError: If this cannot be decided about this run; it names every reason.
        StateError: If the folder cannot be written.
    """
    folder = Path(run, FOLDER)
    standing = _standing(Path(run), folder)
    if not words:
        return _shown(standing, folder)
    problems = _refusals(standing, act, words)
    if problems:
        said = problems[0] if len(problems) == 1 else "".join(f"\n  {p}" for p in problems)
        count = "" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{act}, {run}: {count}{said}")
    decision = Decision(act, tuple(dict.fromkeys(map(int, words))), standing.step, now())
    try:
        append(folder, decision)
    except OSError as error:
        raise StateError(
            f"{folder / DECISIONS} cannot be written ({error.strerror}); make the folder writable, "
            "or decide as the user who trains"
        ) from error
    return (
        f"{_shown(standing, folder)}\n\n{decision}: {_when(standing)}{_reserve(standing, decision)}"
    )


def invitation(run: str | Path) -> str:
    """Return one line with the command that approves what waits in a run that can go on.

    Args:
        run: Folder of the run.

    Returns:
        The line; empty if nothing waits or the run has had no round.
    """
    return call_to_decide(run, _waiting(Path(run)))


def left_waiting(run: str | Path) -> str:
    """Return what can be done about flags that nobody approved before a run was finished.

    Args:
        run: Folder of the run.

    Returns:
        A sentence; empty if nothing waits or the run has had no round.
    """
    ids = _waiting(Path(run))
    if not ids:
        return ""
    return (
        f"not corrected, because nobody approved: concepts {_listed(ids)}. This run is finished. "
        "Train again (another experiment=NAME) and approve while it trains, or with "
        "guard.approve=auto"
    )


def _waiting(run: Path) -> tuple[int, ...]:
    try:
        return Standing.read(run / FOLDER).waiting
    except (OSError, ValueError, TypeError, KeyError):
        return ()


def _standing(run: Path, folder: Path) -> Standing:
    """Return where the run stands.

    Raises:
        ConfigError: If there is no run, or none with a round.
    """
    if not run.is_dir():
        known = sorted(
            path.parent.parent.name for path in run.parent.glob(f"*/{FOLDER}/{STANDING}")
        )
        there = f"runs in {run.parent}: {', '.join(known) or 'none'}"
        raise ConfigError(f"{run}: no such folder; expected the output folder of a run; {there}")
    try:
        return Standing.read(folder)
    except FileNotFoundError:
        raise ConfigError(
            f"{run}: no round has ended here ({FOLDER}/{STANDING} is missing), so there is nothing "
            "to decide; expected the output folder of a run, or the guard's log_dir, after its "
            "first round. Wait for the first round, or see guard.start"
        ) from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{folder / STANDING} is not readable ({error}); expected what this version of "
            "concept_guard writes after every round. Wait for the next round"
        ) from error


def _refusals(standing: Standing, act: str, words: Sequence[str]) -> list[str]:
    """Return every reason why this cannot be decided."""
    problems = []
    if standing.stage == "finished":
        problems.append(
            "the run is finished and its correction is folded into the weights, nothing reads a "
            "decision any more; train again, and decide while it trains"
        )
    if not standing.corrects and act in {"approve", "erase"}:
        problems.append(
            f"the run only observes (guard.action: observe), so {act} has no effect; train with "
            "guard.action=[project,rebalance]"
        )
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        problems.append(f"{', '.join(map(repr, wrong))}: expected ids of concepts such as 3")
    there = standing.erased if act == "restore" else standing.concepts
    unknown = sorted({int(w) for w in words if w.isdecimal()} - set(there))
    if unknown:
        kind = "under correction" if act == "restore" else f"of the round of update {standing.step}"
        known = _listed(there) or "there are none"
        problems.append(f"concepts {_listed(unknown)} are not among those {kind}: {known}")
    return problems


def _shown(standing: Standing, folder: Path) -> str:
    """Return the flags of the last round and what was decided, as text."""
    shown = [
        f"{folder.parent}: {standing.stage}, last round after update {standing.step} "
        f"(as of {standing.written})",
        "",
        *_table(standing),
        f"guard: {standing.verdict}",
        f"under correction: {_listed(standing.erased) or 'none'}",
    ]
    unread = lines(folder)[0][standing.decisions_read :]
    pending = [str(decision) for decision in map(Decision.parsed, unread) if decision]
    if pending and standing.stage != "finished":
        shown.append(f"decided, not yet carried out: {'; '.join(pending)}")
    return "\n".join(shown)


def _table(standing: Standing) -> list[str]:
    header = ("concept", "class", "risk difference", "q", "status")
    rows = [
        (str(f.concept), f.class_name, f"{f.risk_difference:+.2f}", f"{f.q_value:.2g}", f.status)
        for f in standing.flags
    ]
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    reasons = ["", *(f"    {f.reason}" if f.reason else "" for f in standing.flags)]
    shown = []
    for cells, reason in zip((header, *rows), reasons, strict=True):
        padded = (
            cell.ljust(width) if column in {1, 4} else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        shown += [line for line in ("  ".join(padded).rstrip(), reason) if line]
    return shown


def _when(standing: Standing) -> str:
    if standing.stage == "stopped":
        return "carried out when the run is resumed"
    return (
        f"carried out at the next round, due after update {standing.due}, or at the end of the "
        "training, or when the run is resumed, whichever comes first"
    )


def _reserve(standing: Standing, decision: Decision) -> str:
    """Return what an approval does not do at once."""
    later = [i for i in decision.ids if i not in {*standing.waiting, *standing.erased}]
    if decision.act != "approve" or not later:
        return ""
    return f"; not waiting now, and corrected only once flagged: {_listed(later)}"


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids))
