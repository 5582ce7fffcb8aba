"""The command line: reads arguments, calls one function, and turns errors into messages.

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
from importlib.metadata import PackageNotFoundError, version

from concept_guard.deciding import MEANING, decide, invitation, left_waiting
from concept_guard.decisions import ACTS
from concept_guard.errors import ConceptGuardError, ConfigError

OK, FAILED, MISUSED, STOPPED = 0, 1, 2, 130
_RESUMING = ("experiment", "resume")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Words after the program's name; default: those of this process.

    Returns:
        The exit code: 0, 1 where the run failed or the doctor found what stops the guard, 2 where
        the recipe or the command is wrong, 130 after Ctrl-C.
    """
    options = _parsed(arguments)
    try:
        with _progress_on_stderr():
            if options.command == "audit":
                return _audit(options.source, options.data, options.overrides)
            if options.command == "doctor":
                return _doctor(options)
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
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    takes_more = "overrides" in options
    wrong = [w for w in rest if w.startswith("-") or "=" not in w or not takes_more]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if takes_more:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="concept-guard",
        description="Train timm classifiers with a guard against shortcuts in the data, debug what "
        "trained ones get wrong, and find beforehand what would keep the guard from working.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    run = commands.add_parser(
        "run",
        help="train what a recipe describes",
        description="Train what a recipe describes; write checkpoint, events and report.",
        epilog="example: concept-guard run recipes/quickstart.yaml seed=1 guard.alpha=0.01",
    )
    run.add_argument("recipe", metavar="RECIPE.yaml", help="what to train, see recipes/README.md")
    run.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the recipe")
    audit = commands.add_parser(
        "audit",
        help="debug the misclassifications of a trained model",
        description="List the images that a trained model misclassifies, by the concept that "
        "drives each; write errors.csv, report.html, report.json and concepts.safetensors. Nothing "
        "is trained.",
        epilog="example: concept-guard audit output/train/a --data photos guard.concepts=24",
    )
    audit.add_argument(
        "source",
        metavar="CHECKPOINT_OR_MODEL",
        help="a checkpoint, the folder of a run, a timm model, or a YAML file with settings",
    )
    audit.add_argument(
        "--data",
        metavar="FOLDER",
        help="images: <class>/<image>, or split folders; default: the held-out images of the run",
    )
    audit.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the audit")
    _add_doctor(
        commands.add_parser(
            "doctor",
            help="find what would keep the guard from working, before training",
            description="Examine a model, the guard's settings and the switches of the training "
            "loop: list everything that is wrong, each with its mend, and what the guard will "
            "cost. Exits with 1 if something stops the guard, or disables it without a word.",
            epilog="example: concept-guard doctor resnet18 num_classes=10 amp=true, or the words "
            "of a training: concept-guard doctor train.py DATA -c config.yaml --amp",
        )
    )
    for act in ACTS:
        _add_act(commands.add_parser(act, help=MEANING[act], description=_described(act)), act)
    return parser


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env", action="store_true", help="versions and devices, to report a fault"
    )
    parser.add_argument(
        "--no-cost", action="store_true", help="do not measure what the guard costs"
    )
    parser.add_argument(
        "source",
        nargs="?",
        metavar="MODEL_OR_FILE",
        help="a timm model, a recipe, a YAML of timm's train.py, or train.py itself",
    )
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="key=value",
        help="settings; behind train.py its own arguments",
    )


def _described(act: str) -> str:
    return (
        f"Decide about concepts of a run: {MEANING[act]}. The run carries it out at its next "
        "round, or when it is resumed. Without ids: show the flags of the last round."
    )


def _add_act(parser: argparse.ArgumentParser, act: str) -> None:
    parser.epilog = f"example: concept-guard {act} output/train/a 3"
    parser.add_argument("run", metavar="RUN", help="output folder of the run; the guard's log_dir")
    parser.add_argument("ids", metavar="ID", nargs="*", help="concepts, as the table shows them")


def _version() -> str:
    try:
        return version("concept-guard")
    except PackageNotFoundError:
        return "(not installed)"


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
    sys.stdout.write(f"{result.table}\n\n{result.seconds:.0f} s, everything in {result.folder}\n")
    if left := left_waiting(result.folder):
        sys.stdout.write(f"{left}\n")
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
    source, words, flags = options.source, options.words, {"--env": "env", "--no-cost": "no_cost"}
    if source is not None and not source.endswith(".py"):  # behind a script they are its own
        for word in flags.keys() & set(words):
            setattr(options, flags[word], True)
        words = [word for word in words if word not in flags]
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
def _progress_on_stderr() -> Iterator[None]:
    """Show the package's progress lines and warnings, plain; the root logger stays as it is."""
    logger = logging.getLogger("concept_guard")
    handler, level = _BesideTheBar(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
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
