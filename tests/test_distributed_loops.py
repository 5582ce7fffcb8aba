"""Two processes in the loops of others: timm's task, Lightning, Transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from processes import together
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer as HFTrainer
from transformers import TrainerControl, TrainerState, TrainingArguments
from worlds import PROBE, QUICK, TRAIN, fallen, held_out, sgd, stream, world

from concept_guard import ConceptGuard, ConfigError
from concept_guard.integrations.lightning import ConceptGuardCallback
from concept_guard.integrations.timm_task import ConceptGuardTask
from concept_guard.integrations.transformers import ConceptGuardCallback as HFCallback
from concept_guard.ranks import digest

pytestmark = pytest.mark.slow
GUARD = {**QUICK, "start": 2}
BATCH, UPDATES = 16, 12  # of one process


def told(guard: ConceptGuard, model: nn.Module, rank: int, folder: Path) -> None:
    """Write what this process ends with."""
    state = {"guard": digest(guard.state_dict()), "model": model.state_dict()}
    torch.save({**state, "held out": held_out(model)}, folder / f"{rank}.pt")


def timm_task(rank: int, folder: Path) -> None:
    model = fallen()
    task = ConceptGuardTask(
        model, nn.CrossEntropyLoss(), probe=world(PROBE).loader(), config=GUARD, verbose=False
    )
    task.prepare_distributed()
    optimizer = sgd(model)
    model.train()
    for images, labels in stream(UPDATES):
        task(images[rank::2], labels[rank::2])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema()
    checkpoint = task.get_checkpoint_state() if rank == 0 else None
    task.guard.bake()
    if checkpoint is not None:
        torch.testing.assert_close(checkpoint["state_dict"]["fc.weight"], model.fc.weight.detach())
    told(task.guard, model, rank, folder)


class Module(LightningModule):
    """An ordinary module."""

    def __init__(self) -> None:
        super().__init__()
        self.model = fallen()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the losses of a batch."""
        return cross_entropy(self.model(batch[0]), batch[1], reduction="none")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return sgd(self.model)


def lightning(rank: int, folder: Path) -> None:
    data, module = world(TRAIN, 2 * BATCH * UPDATES), Module()
    callback = ConceptGuardCallback(world(PROBE).loader(), GUARD)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(data.images, data.labels), BATCH))
    assert callback.guard is not None
    assert callback.guard.steps == UPDATES
    told(callback.guard, module.model, rank, folder)


class Answering(nn.Module):
    """A model in the manner of Transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = fallen()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits."""
        del labels
        return {"logits": self.timm_model(pixel_values)}


def transformers(rank: int, folder: Path) -> None:
    data, model = world(TRAIN, 2 * BATCH * UPDATES), Answering()
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=BATCH,
        max_steps=UPDATES,
        learning_rate=5e-3,
        optim="sgd",
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_steps=UPDATES // 2,
    )
    callback = HFCallback(model.timm_model, world(PROBE).loader(), GUARD)
    pairs = zip(data.images, data.labels, strict=True)
    HFTrainer(
        model,
        arguments,
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in pairs],
        callbacks=[callback],
        compute_loss_func=callback.compute_loss,
    ).train()
    assert callback.guard.steps == UPDATES
    assert (folder / "out" / f"checkpoint-{UPDATES // 2}" / "concept_guard.safetensors").is_file()
    told(callback.guard, model.timm_model, rank, folder)


@pytest.mark.parametrize("loop", [timm_task, lightning, transformers])
def test_all_processes_end_with_one_corrected_model(
    tmp_path: Path, loop: Callable[[int, Path], None]
) -> None:
    together(loop, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first["guard"] == second["guard"]
    names = [name for name, _ in fallen().named_parameters()]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in names)
    assert first["held out"][1] > held_out(fallen())[1] + 0.2


class Two:
    """Arguments of two processes."""

    world_size = 2


def test_a_callback_built_before_the_processes_know_each_other_is_refused() -> None:
    callback = HFCallback(Answering().timm_model, world(PROBE).loader(), GUARD)
    with pytest.raises(ConfigError, match="2 processes train.*build TrainingArguments first"):
        callback.on_train_begin(Two(), TrainerState(), TrainerControl())  # type: ignore[arg-type]
    callback.guard.close()
