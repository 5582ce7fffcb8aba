"""One run of a recipe from data to report: the training without the guard, then the one with it.

Nothing here knows how the command line is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concept_guard.errors import StateError
from concept_guard.training.checkpoints import (
    claim_folder,
    load_checkpoint,
    replace_text,
    write_args,
)
from concept_guard.training.interrupts import Interrupted, Interrupts
from concept_guard.training.loop import Leg
from concept_guard.training.outcomes import Measure, measures
from concept_guard.training.recipe import Recipe
from concept_guard.training.reports import report_text, unreadable, write_page
from concept_guard.training.splits import Splits, data_config, open_splits

if TYPE_CHECKING:
    from concept_guard.flags import Flag


@dataclass(frozen=True, eq=False)
class RunResult:
    """What a run found.

    Attributes:
        folder: The output folder.
        guarded: Measures of the model trained with the guard: `clean`, `marked`, `unmarked` and
            `worst` where a shortcut was planted, else `accuracy` and `worst_class`.
        plain: The same without the guard, or None if only one model was trained.
        flags: The flags of the guard's last round.
        verdict: The guard's sentence about that round.
        identical: Whether both models ended with equal weights, bit for bit.
        baked: Whether the correction was folded into the saved weights.
        unreadable: Image files that were left out.
        table: Everything above as text, as in `concept_guard/report.txt`.
        seconds: Duration.
    """

    folder: Path
    guarded: Mapping[str, Measure]
    plain: Mapping[str, Measure] | None
    flags: tuple[Flag, ...]
    verdict: str
    identical: bool | None
    baked: bool
    unreadable: tuple[str, ...]
    table: str
    seconds: float


def run(recipe: Recipe) -> RunResult:
    """Train what a recipe describes and measure it on the test images.

    The result, but for its duration, depends on the recipe alone, also if the run was stopped
    and resumed in between (bit for bit on the CPU).

    Args:
        recipe: What to train.

    Returns:
        Measures, flags and the table.

    Raises:
        Interrupted: On Ctrl-C, with the folder that `resume` continues.
    """
    began = perf_counter()
    size = int(data_config(recipe)["input_size"][-1])
    folder = claim_folder(recipe, size)
    with Interrupts() as interrupts:
        try:
            return _run(_Setting(recipe, open_splits(recipe), size, interrupts), folder, began)
        except KeyboardInterrupt as stop:
            if not (folder / "args.yaml").exists():
                raise Interrupted("stopped before training began") from None
            said = str(stop) or "stopped at once; updates since the last checkpoint are lost"
            raise Interrupted(said, folder) from None


@dataclass(frozen=True, eq=False)
class _Setting:
    """What both trainings of a run share."""

    recipe: Recipe
    splits: Splits
    size: int
    interrupts: Interrupts

    def leg(self, folder: Path, *, guarded: bool) -> Leg:
        recipe = self.recipe
        name = recipe.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        return Leg(
            recipe,
            self.splits,
            folder,
            guarded=guarded,
            size=self.size,
            device=torch.device(name),
        )

    def train(self, leg: Leg) -> dict[str, Measure]:
        # To the end, from the last checkpoint if the run is resumed; then on the test images.
        if self.recipe.resume:
            leg.load()
        if not leg.finished:
            leg.train(self.interrupts)
            leg.finish()
        answers = {name: leg.answer(name) for name in self.splits.tests}
        return measures(answers, self.splits.classes, self.recipe.planted)


def _run(setting: _Setting, folder: Path, began: float) -> RunResult:
    recipe, splits = setting.recipe, setting.splits
    if recipe.resume:
        _refuse_finished(folder, recipe)
    plain: dict[str, Measure] | None = None
    weights: dict[str, Tensor] = {}
    with closing(setting.leg(folder, guarded=True)) as leg:  # first: it may refuse its settings
        write_args(folder, recipe)
        if recipe.compare:
            other = setting.leg(folder / "plain", guarded=False)
            plain = setting.train(other)
            other.save()
            weights = {key: value.cpu() for key, value in other.model.state_dict().items()}
        guarded = setting.train(leg)
        verdict, flags = leg.verdict()
        identical = _equal(weights, leg.model.state_dict()) if plain is not None else None
        text = report_text(leg, setting.size, (plain, guarded), identical)
        (folder / "concept_guard").mkdir(exist_ok=True)
        replace_text(folder / "concept_guard" / "report.txt", f"{text}\n")
        write_page(leg, (plain, guarded))
        leg.save()
    return RunResult(
        folder=folder,
        guarded=guarded,
        plain=plain,
        flags=flags,
        verdict=verdict,
        identical=identical,
        baked=not leg.not_baked,
        unreadable=unreadable(splits),
        table=text,
        seconds=perf_counter() - began,
    )


def _refuse_finished(folder: Path, recipe: Recipe) -> None:
    state = load_checkpoint(folder, recipe)
    if state is not None and state["concept_guard"]["finished"]:
        raise StateError(
            f"{folder} holds a finished run; its table is in concept_guard/report.txt. "
            "To train again, choose another experiment=NAME."
        )


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, other[key].cpu()) for key, value in one.items())
