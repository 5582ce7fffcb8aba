"""The report of a run: its text, and the page on what the trained model still gets wrong.

Nothing here knows how a run goes, or how the page is drawn.
"""

from __future__ import annotations

import logging
import shlex
import warnings
from collections.abc import Mapping
from time import perf_counter

from concept_guard.diagnosis import (
    BeforeAfter,
    Comparison,
    History,
    Subject,
    analyse,
    write_report,
)
from concept_guard.history import read_history
from concept_guard.training.images import Images
from concept_guard.training.loop import Leg
from concept_guard.training.outcomes import Measure, Round, causes, describe, table
from concept_guard.training.splits import Splits, naming, ordered

EXPLAINED = 12  # errors that the page of a run shows with their pictures
SHOWN = ("found", "erased", "waiting", "vetoed")  # states of the flags that the page shows

_logger = logging.getLogger(__name__)
Rows = tuple[Mapping[str, Measure] | None, Mapping[str, Measure]]


def unreadable(splits: Splits) -> tuple[str, ...]:
    """Return the image files of a run that could not be read."""
    return tuple(sorted({name for split in splits.files() for name in split.unreadable()}))


def report_text(leg: Leg, size: int, rows: Rows, identical: bool | None) -> str:
    """Return the text of a run: what was trained, the table, the causes, and what to know.

    Args:
        leg: The training with the guard, finished.
        size: Side of the images.
        rows: Measures without the guard, if there are any, and with it.
        identical: Whether both ended with the same weights.

    Returns:
        Lines without a final newline.
    """
    recipe, splits = leg.recipe, leg.splits
    verdict, flags = leg.verdict()
    sizes = ", ".join(f"{count} {name}" for name, count in splits.sizes.items())
    lines = [
        f"{recipe.model}, {size} px, seed {recipe.seed}, {recipe.epochs} epochs = "
        f"{leg.total} updates per run; images: {sizes}"
    ]
    if recipe.planted is not None:
        lines.append(describe(recipe.planted))
    lines += ["", table(*rows), "", causes(flags, splits.classes, splits.sizes["probe"], verdict)]
    if identical is not None:
        lines.append(f"both runs end with {'identical' if identical else 'different'} weights")
    if leg.baked:
        lines.append(f"at the end, {leg.baked}")
    if leg.not_baked:
        lines.append(f"not baked, the saved weights need the guard: {leg.not_baked}")
    missing = unreadable(splits)
    if missing:
        lines.append(f"unreadable images left out: {len(missing)}, such as {missing[0]}")
    return "\n".join(lines)


def write_page(leg: Leg, rows: Rows) -> None:
    """Write `report.html` and `report.json` beside the text of the run.

    What goes wrong here costs a warning and the page, never the trained model.

    Args:
        leg: The training with the guard, finished; its model is examined on the probe.
        rows: Measures without the guard, if there are any, and with it.
    """
    began = perf_counter()
    recipe, folder = leg.recipe, leg.folder / "concept_guard"
    again = ["concept-guard", "run", str(leg.folder / "args.yaml"), "experiment=NAME"]
    try:
        subject = _subject(leg)
        found = analyse(subject, recipe.guard, explained=EXPLAINED, next_id=leg.next_id)
        write_report(
            folder,
            subject,
            found,
            title=f"{recipe.model} after training with the guard",
            command=shlex.join(again),
            history=_history(leg, rows),
        )
    except Exception as error:  # whatever it is, hours of training must not be lost for a page
        warnings.warn(
            f"{folder}: no report.html ({type(error).__name__}: {error}); everything else is "
            "written. Try concept-guard audit on the folder of the run.",
            stacklevel=2,
        )
    else:
        _logger.info("page: %s, %.1f s", folder / "report.html", perf_counter() - began)


def _subject(leg: Leg) -> Subject:
    recipe, probe = leg.recipe, leg.splits.probe
    where = recipe.data_dir or recipe.dataset
    weights = leg.folder / "last.pth.tar"
    return Subject(
        model=leg.model,
        images=ordered(probe, recipe),
        name=recipe.model,
        weights=f"{weights}{', with the guard attached' if leg.not_baked else ''}",
        classes=leg.splits.classes,
        source=f"held-out probe of {where}",
        file=naming(probe, "probe", recipe.data_dir),
        broken=probe.broken if isinstance(probe, Images) else None,
    )


def _history(leg: Leg, rows: Rows) -> History:
    _, flags = leg.verdict()
    last = None if leg.guard is None else leg.guard.report
    plain, guarded = rows
    made = [] if plain is None else [_without_and_with(plain, guarded)]
    made += _first_and_last(leg.rounds)
    return History(
        flags=tuple(flag for flag in flags if flag.status in SHOWN),
        cards=leg.cards,
        comparisons=tuple(made),
        next_id=leg.next_id,
        leak={} if last is None else last.leak,
        readable={} if last is None else last.readable,
        rounds=read_history(leg.folder, str(leg.folder)),
    )


def _without_and_with(plain: Mapping[str, Measure], guarded: Mapping[str, Measure]) -> Comparison:
    return Comparison(
        title="Trained without the guard, and with it",
        note="Two models on the test images, which took no part in training: same first weights, "
        "same order of images, same number of updates. The number of images is in brackets.",
        before="without guard",
        after="with guard",
        rows=tuple(
            BeforeAfter(
                row.name if row.note else f"{row.name} ({row.count})",
                plain[key].value,
                row.value,
                (plain[key].note, row.note),
            )
            for key, row in guarded.items()
        ),
    )


def _first_and_last(rounds: list[Round]) -> list[Comparison]:
    """Return what the first round that flagged something saw beside what the last one saw."""
    first = next((row for row in rounds if row.flagged), rounds[0] if rounds else None)
    if first is None or first.step == rounds[-1].step:
        return []
    last = rounds[-1]
    rows = [
        BeforeAfter("accuracy", first.accuracy, last.accuracy),
        BeforeAfter("recall of the worst class", first.worst_class, last.worst_class),
    ]
    if first.flagged and first.flagged == last.flagged:  # else the groups are not the same
        name = "worst group: a class, with or without a flagged concept"
        rows.append(BeforeAfter(name, first.worst_group, last.worst_group))
    began = "first flag" if first.flagged else "first round"
    return [
        Comparison(
            title=f"From the guard's {began} to its last round",
            note=f"One model on the {last.images} probe images, at two times of its training. That "
            "it went on learning shows here as well: this is not the effect of the guard alone.",
            before=f"update {first.step}",
            after=f"update {last.step}",
            rows=tuple(rows),
        )
    ]
