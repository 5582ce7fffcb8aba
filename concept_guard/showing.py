"""From the folder of a run to a page that shows its history, without a server.

Nothing here knows how the history was written, or how commands are parsed.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from concept_guard.decisions import FOLDER
from concept_guard.errors import ConfigError, StateError
from concept_guard.history import EVENTS, RunHistory, read_history
from concept_guard.report.runs import run_page

PAGE = "history.html"
_MARK = "<!-- written by concept-guard report -->\n"  # tells an earlier page from other files
_MOST_NAMES = 8  # of runs near one that is not there


def show(runs: Sequence[str | Path], output: str | Path | None = None, *, command: str = "") -> str:
    """Write the page of a run's history, or of two runs side by side.

    A `ConfigError` says what there is to show instead, or which file would be overwritten; a
    `StateError` what cannot be written.

    Args:
        runs: Folders of one run or of two: the guard's log_dir.
        output: The page; None for `concept_guard/history.html` in the folder of the first run.
        command: That is shown on the page.

    Returns:
        What to print.
    """
    folders = [Path(run) for run in runs]
    page = folders[0] / FOLDER / PAGE if output is None else Path(output)
    histories = [_history(folder, name) for folder, name in _named(folders)]
    _refuse_foreign(page)
    _write(page, run_page(histories, command=command) + _MARK)
    said = [f"{folder}: {_counted(h)}" for folder, h in zip(folders, histories, strict=True)]
    return "\n".join([*said, f"page: {page}"])


def _named(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Return the folders with names that tell them apart.

    Raises:
        ConfigError: If they are one and the same.
    """
    whole = [folder.resolve() for folder in folders]
    names = [folder.name for folder in whole]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(whole)) < len(whole):
        raise ConfigError(f"report: {folders[0]} is named twice; name another run to compare with")
    return list(zip(folders, names, strict=True))


def _history(folder: Path, name: str) -> RunHistory:
    """Return the history of a run.

    Raises:
        ConfigError: If there is no run, or none that a guard has written.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; expected the folder of a run, the guard's log_dir; "
            f"{_runs_in(folder.parent)}"
        )
    history = read_history(folder, name)
    for problem in history.problems:
        warnings.warn(f"{folder}: {problem}", stacklevel=2)
    if not history.empty:
        return history
    if not any(folder.glob(EVENTS)):
        raise ConfigError(
            f"{folder}: no TensorBoard events here; expected the guard's log_dir. Give your guard "
            f"one, ConceptGuard(..., log_dir='{folder}'), and train; or name a run: "
            f"{_runs_in(folder)}"
        )
    raise ConfigError(
        f"{folder}: there are TensorBoard events, but none in which a guard says what it found. "
        "Wait for its first round (see the setting `start`), or train with this version of "
        f"concept_guard; {_runs_in(folder.parent)}"
    )


def _runs_in(folder: Path) -> str:
    names = sorted({path.parent.name for path in folder.glob(f"*/{EVENTS}")})
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"runs in {folder}: {', '.join(names[:_MOST_NAMES]) or 'none'}{more}"


def _refuse_foreign(page: Path) -> None:
    """Let nothing be overwritten but an earlier page.

    Raises:
        ConfigError: If something else is there.
        StateError: If it cannot be read.
    """
    if page.is_dir():
        raise ConfigError(f"{page} is a folder; expected the name of a page, such as {page / PAGE}")
    try:
        theirs = page.exists() and not page.read_bytes().endswith(_MARK.encode())
    except OSError as error:
        raise StateError(f"{page} cannot be read ({error.strerror}); name another page") from error
    if theirs:
        raise ConfigError(
            f"{page} is no page of concept-guard report and is kept; name another: --output FILE"
        )


def _write(page: Path, text: str) -> None:
    """Write the page so that an interruption leaves the old or the new one.

    Raises:
        StateError: If that is not possible.
    """
    part = page.with_name(page.name + ".part")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf8")
        os.replace(part, page)
    except OSError as error:
        raise StateError(
            f"{page} cannot be written ({error.strerror}); name another place: --output FILE"
        ) from error


def _counted(history: RunHistory) -> str:
    parts = (
        (len(history.rounds), "round"),
        (len(history.acts), "act"),
        (len(history.cards), "card"),
    )
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in parts)
