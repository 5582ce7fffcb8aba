"""The training loop: plain, resumable after every update, a user of the guard like any other.

Nothing here knows how recipes are written or how results are shown.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from concept_guard import ConceptGuard
from concept_guard.errors import BakeError
from concept_guard.training.building import build_model, build_optimizer, build_scheduler
from concept_guard.training.checkpoints import (
    SCHEMA_VERSION,
    load_checkpoint,
    plain_recipe,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
    write_summary,
)
from concept_guard.training.images import check_all
from concept_guard.training.interrupts import Interrupted, Interrupts
from concept_guard.training.outcomes import Answers, Round, answer
from concept_guard.training.progress import Progress
from concept_guard.training.recipe import Recipe
from concept_guard.training.splits import Splits, epoch_batches, ordered, updates_per_epoch

if TYPE_CHECKING:
    from concept_guard.diagnosis import Cards
    from concept_guard.flags import Flag


class Leg:
    """One of the two trainings of a run: the model and its optimizer, with the guard or without.

    Args:
        recipe: What to train, and how.
        splits: The images.
        folder: Where checkpoints, the summary and the guard's events go.
        guarded: Whether the guard takes part; nothing else differs.
        size: Side of the images.
        device: Where the model trains.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        folder: Path,
        *,
        guarded: bool,
        size: int,
        device: torch.device,
    ) -> None:
        self.recipe, self.splits, self.folder, self.device = recipe, splits, folder, device
        self.name = "with guard" if guarded else "without guard"
        self.updates_per_epoch = updates_per_epoch(splits.sizes["train"], recipe.batch_size)
        self.total = self.updates_per_epoch * recipe.epochs
        self.updates, self.finished = 0, False
        self.baked = self.not_baked = ""
        self.history: list[dict[str, float]] = []
        self.rounds: list[Round] = []
        self.cards: Cards = {}
        self._losses = torch.zeros((), dtype=torch.float64, device=device)
        self._guard_state: dict[str, Any] | None = None
        self.model = build_model(recipe, len(splits.classes), size).to(device)
        self.guard = self._attach() if guarded else None
        self.optimizer = build_optimizer(recipe, self.model)
        self._scheduler = build_scheduler(recipe, self.optimizer, self.total)

    def _attach(self) -> ConceptGuard:
        probe = ordered(self.splits.probe, self.recipe)
        config = self.recipe.guard
        if config.steps_per_epoch is None:
            config = config.model_copy(update={"steps_per_epoch": self.updates_per_epoch})
        return ConceptGuard(
            self.model,
            probe=probe,
            config=config,
            log_dir=self.folder,
            class_names=self.splits.classes,
        )

    def close(self) -> None:
        """Detach the guard, whatever happened."""
        if self.guard is not None:
            self.guard.close()

    def load(self) -> None:
        """Continue from the folder's checkpoint, or from the start if there is none."""
        state = load_checkpoint(self.folder, self.recipe)
        if state is None:
            return
        own = state["concept_guard"]
        self.model.load_state_dict(state["state_dict"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.guard is not None and not own["finished"]:
            self.guard.load_state_dict(own["guard"])
        self.updates, self.finished = own["updates"], own["finished"]
        self.baked = own.get("baked", "")
        self.history = list(own["history"])
        self.rounds = [Round(**row) for row in own.get("rounds", ())]
        self._losses.fill_(own["losses"])
        set_random_state(own["random"], self.device)

    def save(self) -> None:
        """Write the checkpoint from which `load` continues as if nothing had happened."""
        own = {
            "schema_version": SCHEMA_VERSION,
            "updates": self.updates,
            "finished": self.finished,
            "baked": self.baked,
            "history": self.history,
            "rounds": [asdict(row) for row in self.rounds],
            "losses": float(self._losses),
            "random": random_state(self.device),
            "classes": list(self.splits.classes),
            "guard": self._guard_state or (self.guard.state_dict() if self.guard else None),
        }
        state = {
            "epoch": len(self.history),
            "arch": self.recipe.model,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "args": plain_recipe(self.recipe),
            "version": 2,
            "concept_guard": own,
        }
        save_checkpoint(self.folder, state)

    def train(self, interrupts: Interrupts) -> None:
        """Train until the last epoch is done, saving after each epoch and on Ctrl-C.

        Args:
            interrupts: Says whether to stop after the current update.

        Raises:
            Interrupted: After saving, if so.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.updates == 0:
            seed_everything(self.recipe.seed)
        progress = self._progress()
        with progress.bar:
            while len(self.history) < self.recipe.epochs:
                epoch = len(self.history)
                skip = self.updates - epoch * self.updates_per_epoch
                self.model.train()
                for images, labels in epoch_batches(self.splits, self.recipe, epoch, skip):
                    self._update(images.to(self.device), labels.to(self.device), progress)
                    if interrupts.requested:
                        self.save()
                        at = f"update {self.updates} of {self.total} ({self.name})"
                        raise Interrupted(f"stopped after {at}, which is saved")
                self._end_epoch(progress)
                self.save()

    def _progress(self) -> Progress:
        return Progress(
            self.name,
            epochs=self.recipe.epochs,
            total=self.total,
            interval=self.recipe.log_interval,
            folder=self.folder,
            corrects=bool(self.recipe.guard.action),
            updates=self.updates,
            erased=() if self.guard is None else self.guard.erased,
        )

    def _update(self, images: Tensor, labels: Tensor, progress: Progress) -> None:
        losses = F.cross_entropy(self.model(images), labels, reduction="none")
        loss = losses.mean() if self.guard is None else self.guard.loss(losses, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        self._scheduler.step_update(self.updates)
        report = None if self.guard is None else self.guard.step()
        self._losses += loss.detach()
        check_all(self.splits.files())
        shown = progress.wants_loss(self.updates)
        progress.update(self.updates, float(loss.detach()) if shown else None)
        if report is not None:
            self.rounds.append(Round.of(report))
            progress.round(report)

    def _end_epoch(self, progress: Progress) -> None:
        heard = self.answer("probe")
        row = {
            "epoch": len(self.history),
            "train_loss": float(self._losses) / self.updates_per_epoch,
            "eval_loss": heard.loss,
            "eval_top1": 100 * heard.accuracy,
            "lr": self.optimizer.param_groups[0]["lr"],
        }
        self._losses.zero_()
        self.history.append(row)
        write_summary(self.folder, self.history)
        progress.epoch(self.updates, len(self.history), row["train_loss"], heard.accuracy)

    def finish(self) -> None:
        """Fold the guard's correction into the weights and take the guard off the model.

        Where folding is impossible the guard stays on, `not_baked` says why, and the caller
        closes it after the last use of the model.
        """
        if self.guard is not None:
            try:
                self.guard.bake()
                self.baked = self.guard.baked
            except BakeError as error:
                self.not_baked = str(error)
            self._guard_state = self.guard.state_dict()
            self.cards = self.guard.cards
            if not self.not_baked:
                self.guard.close()
        self.finished = True

    def verdict(self) -> tuple[str, tuple[Flag, ...]]:
        """Return the guard's sentence about its last round, and the flags of that round."""
        report = None if self.guard is None else self.guard.report
        if report is None:
            start = self.recipe.guard.start
            return f"no round ran in {self.total} updates; the first is due after {start}", ()
        return report.verdict, report.flags

    @property
    def next_id(self) -> int:
        """First id that no concept of the guard has had."""
        return int((self._guard_state or {}).get("next_id", 0))

    def answer(self, split: str) -> Answers:
        """Return what the model says about a split, in evaluation mode.

        Args:
            split: `probe`, or the name of a test split.

        Returns:
            Predictions and labels without the images that could not be read.
        """
        samples = self.splits.probe if split == "probe" else self.splits.tests[split]
        return answer(self.model, ordered(samples, self.recipe), self.device)
