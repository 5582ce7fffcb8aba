"""What can be said on the command line, and its help.

Nothing here knows what the commands do.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version

from concept_guard.deciding import MEANING
from concept_guard.decisions import ACTS

OK, FAILED, MISUSED, STOPPED = 0, 1, 2, 130
EXIT_CODES = f"""\
exit codes:
  {OK:<4} done
  {FAILED:<4} it failed: a folder is taken or cannot be written, a checkpoint does not fit;
       from doctor: something stops the guard, or disables it without a word
  {MISUSED:<4} the command, the recipe or its settings are wrong; nothing was done
  {STOPPED:<4} stopped with Ctrl-C; run has saved, and says how to go on

Results are on stdout; progress, warnings and errors are on stderr."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    made = argparse.ArgumentParser(
        prog="concept-guard",
        description="Train timm classifiers with a guard against shortcuts in the data, look at "
        "what it did, debug what trained ones get wrong, and find beforehand what would keep the "
        "guard from working.",
        epilog=EXIT_CODES,
        formatter_class=_Plain,
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = made.add_subparsers(required=True, metavar="command", dest="command")
    _add_run(commands)
    _add_report(commands)
    _add_audit(commands)
    _add_doctor(commands)
    for act in ACTS:
        _add_act(commands, act)
    return made


class _Plain(argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of the epilog as they are; a description is one line and is wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


_Commands = argparse._SubParsersAction  # argparse has no public name for it


def _add_run(commands: _Commands[argparse.ArgumentParser]) -> None:
    run = commands.add_parser(
        "run",
        help="train what a recipe describes",
        description="Train what a recipe describes; write checkpoint, events and report.",
        epilog="example: concept-guard run recipes/quickstart.yaml seed=1 guard.alpha=0.01",
    )
    run.add_argument("recipe", metavar="RECIPE.yaml", help="what to train, see recipes/README.md")
    run.add_argument("overrides", metavar="key=value", nargs="*", help="changes to the recipe")
    _add_quiet(run)


def _add_report(commands: _Commands[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="write the history of a run as a page, or two side by side",
        description="Write what a guard found and did in a run, round by round, as one HTML file "
        "that needs neither server nor network; from the TensorBoard events, also of a run that "
        "is still going on.",
        epilog="example: concept-guard report output/train/a output/train/b --output both.html",
    )
    report.add_argument("run", metavar="RUN", help="folder of a run; the guard's log_dir")
    report.add_argument("other", metavar="OTHER", nargs="?", help="another one, to compare")
    report.add_argument(
        "--output",
        metavar="FILE.html",
        help="the page; default: RUN/concept_guard/history.html. Only an earlier page of this "
        "command is overwritten",
    )


def _add_audit(commands: _Commands[argparse.ArgumentParser]) -> None:
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
    _add_quiet(audit)


def _add_doctor(commands: _Commands[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="find what would keep the guard from working, before training",
        description="Examine a model, the guard's settings and the switches of the training "
        "loop: list everything that is wrong, each with its mend, and what the guard will "
        "cost. Exits with 1 if something stops the guard, or disables it without a word.",
        epilog="example: concept-guard doctor resnet18 num_classes=10 amp=true, or the words "
        "of a training: concept-guard doctor train.py DATA -c config.yaml --amp",
    )
    doctor.add_argument(
        "--env", action="store_true", help="versions and devices, to report a fault"
    )
    doctor.add_argument(
        "--no-cost", action="store_true", help="do not measure what the guard costs"
    )
    _add_quiet(doctor)
    doctor.add_argument(
        "source",
        nargs="?",
        metavar="MODEL_OR_FILE",
        help="a timm model, a recipe, a YAML of timm's train.py, or train.py itself",
    )
    doctor.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="key=value",
        help="settings; behind train.py its own arguments",
    )


def _add_quiet(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quiet", action="store_true", help="no progress: the result, warnings and errors alone"
    )


def _add_act(commands: _Commands[argparse.ArgumentParser], act: str) -> None:
    made = commands.add_parser(
        act,
        help=MEANING[act],
        description=f"Decide about concepts of a run: {MEANING[act]}. The run carries it out at "
        "its next round, or when it is resumed. Without ids: show the flags of the last round.",
        epilog=f"example: concept-guard {act} output/train/a 3",
    )
    made.add_argument("run", metavar="RUN", help="output folder of the run; the guard's log_dir")
    made.add_argument("ids", metavar="ID", nargs="*", help="concepts, as the table shows them")


def _version() -> str:
    try:
        return version("concept-guard")
    except PackageNotFoundError:
        return "(not installed)"
