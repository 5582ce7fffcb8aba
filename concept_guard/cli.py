"""The command line: calls one function per command, and turns errors into messages.

Nothing here knows how training or the guard works.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from concept_guard.commands import FAILED, MISUSED, OK, STOPPED, parser
from concept_guard.deciding import decide, invitation, left_waiting
from concept_guard.decisions import ACTS
from concept_guard.errors import ConceptGuardError, ConfigError

_RESUMING = ("experiment", "resume")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; default: those of this process.

    Returns:
        The exit code, see `commands.EXIT_CODES`.
    """
    options = _parsed(arguments)
    try:
        with _progress_on_stderr(quiet=getattr(options, "quiet", False)):
            if options.command == "audit":
                return _audit(options.source, options.data, options.overrides)
            if options.command == "doctor":
                return _doctor(options)
            if options.command == "report":
                return _report(options.run, options.other, options.output)
            if options.command in ACTS:
                return _decide(options.run, options.command, options.ids)
            return _run(options.recipe, options.overrides)
    except ConceptGuardError as error:
        sys.stderr.write(f"concept-guard: {error}\n")
        return MISUSED if isinstance(error, ConfigError) else FAILED
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"concept-guard: {str(stop) or 'stopped before anything was done'}\n")
        return STOPPED


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options; argparse itself leaves key=value behind an option unread."""
    read = parser()
    options, rest = read.parse_known_args(arguments)
    takes_more = "overrides" in options
    wrong = [w for w in rest if w.startswith("-") or "=" not in w or not takes_more]
    if wrong:
        read.error(f"unrecognized arguments: {' '.join(wrong)}")
    if takes_more:
        options.overrides = [*options.overrides, *rest]
    if options.command == "doctor":
        _take_flags(options)
    return options


def _take_flags(options: argparse.Namespace) -> None:
    """Let options of the doctor stand behind a model; behind a script they are the script's own."""
    if not _is_script(options.source):
        for flag in ("env", "no_cost", "quiet"):
            word = f"--{flag.replace('_', '-')}"
            options.__dict__[flag] |= word in options.words
            options.words = [other for other in options.words if other != word]


def _is_script(source: str | None) -> bool:
    return source is not None and source.endswith(".py")


def _run(path: str, overrides: Sequence[str]) -> int:
    from concept_guard.training import Interrupted, load_recipe, run  # heavy: torch, the guard

    recipe = load_recipe(path, overrides)
    try:
        result = run(recipe)
    except Interrupted as stop:
        if stop.folder is None:
            raise
        kept = [text for text in overrides if text.partition("=")[0] not in _RESUMING]
        experiment = f"experiment={stop.folder.name}"
        command = shlex.join(["concept-guard", "run", path, *kept, experiment, "resume=true"])
        waits = invitation(stop.folder)
        more = f". {waits[0].upper()}{waits[1:]}\nTo" if waits else ". To"
        raise Interrupted(f"{stop}{more} continue:\n  {command}") from None
    look = shlex.join(["concept-guard", "report", str(result.folder)])
    board = shlex.join(["tensorboard", "--logdir", str(result.folder.parent)])
    sys.stdout.write(
        f"{result.table}\n\n{result.seconds:.0f} s, everything in {result.folder}\n"
        f"what the guard saw and did, round by round: {board}, or as a page: {look}\n"
    )
    if left := left_waiting(result.folder):
        sys.stdout.write(f"{left}\n")
    return OK


def _report(run: str, other: str | None, output: str | None) -> int:
    from concept_guard.showing import show  # heavy: TensorBoard

    runs = [run] if other is None else [run, other]
    words = ["concept-guard", "report", *runs, *(("--output", output) if output else ())]
    sys.stdout.write(f"{show(runs, output, command=shlex.join(words))}\n")
    return OK


def _decide(run: str, act: str, words: Sequence[str]) -> int:
    sys.stdout.write(f"{decide(run, act, words)}\n")
    return OK


def _audit(source: str, data: str | None, overrides: Sequence[str]) -> int:
    from concept_guard.audit import audit, load_settings  # heavy: torch, timm

    given = {} if data is None else {"data_dir": data}
    words = ["concept-guard", "audit", source, *(("--data", data) if data else ()), *overrides]
    result = audit(load_settings(source, given, overrides), command=shlex.join(words))
    page = result.folder / "report.html"
    sys.stdout.write(f"{result.table}\n\n{result.seconds:.0f} s, report: {page}\n")
    return OK


def _doctor(options: argparse.Namespace) -> int:
    source, words = options.source, options.words
    if not _is_script(source):
        wrong = [word for word in words if word.startswith("-") or "=" not in word]
        if wrong:
            raise ConfigError(
                f"doctor {source}: unrecognized {' '.join(wrong)}; expected key=value, or put "
                "train.py before the words of a training"
            )
    if source is None and not options.env:
        raise ConfigError("doctor: nothing to examine; name a timm model, a recipe or train.py")
    if options.env:
        from concept_guard.examination import environment  # heavy: torch

        sys.stdout.write(f"{environment()}\n")
    if source is None:
        return OK
    from concept_guard.checkup import checkup  # heavy: timm

    seconds = {"seconds": 0.0} if options.no_cost else {}
    report = checkup(source, words, **seconds)
    sys.stdout.write(f"{report}\n")
    return FAILED if report.stops else OK


@contextmanager
def _progress_on_stderr(*, quiet: bool) -> Iterator[None]:
    """Show the package's progress lines and warnings, plain; the root logger stays as it is."""
    logger = logging.getLogger("concept_guard")
    handler, level = _BesideTheBar(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _show_warning(message: Warning | str, *_where: object, **_more: object) -> None:
    logging.getLogger("concept_guard").warning("warning: %s", message)


class _BesideTheBar(logging.Handler):
    """Writes lines to stderr above a progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
