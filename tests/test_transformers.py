"""The Trainer of Transformers trains with the guard by a callback and its loss; and Accelerate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainingArguments
from worlds import CLASSES, PROBE, QUICK, TRAIN, UPDATES, fallen, held_out, net, sgd, stream, world

from concept_guard import ConceptGuard, ConfigError
from concept_guard.integrations.transformers import ConceptGuardCallback

GUARD = {**QUICK, "start": 2}
BATCH, MORE = 32, 12


class Images(Dataset[dict[str, Tensor]]):
    """The training images of the world, as the Trainer takes them."""

    def __init__(self) -> None:
        self.world = world(TRAIN, BATCH * MORE)

    def __len__(self) -> int:
        return len(self.world.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.world.images[index], "labels": self.world.labels[index]}


class Wrapped(nn.Module):
    """A model in the manner of Transformers around a network of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.timm_model = fallen()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the logits, and the mean loss where there are classes."""
        logits = self.timm_model(pixel_values)
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def guarding(model: Wrapped, **options: Any) -> ConceptGuardCallback:
    return ConceptGuardCallback(
        model.timm_model, world(PROBE).loader(), {**GUARD, **options.pop("config", {})}, **options
    )


def trainer(
    model: Wrapped, folder: Path, callback: ConceptGuardCallback | None, **options: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        max_steps=options.pop("updates", MORE),
        learning_rate=5e-3,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps",
        **{"save_steps": MORE // 2, **options},
    )
    extra = {} if callback is None else {"compute_loss_func": callback.compute_loss}
    callbacks = [] if callback is None else [callback]
    return Trainer(model, arguments, train_dataset=Images(), callbacks=callbacks, **extra)


def differing(a: nn.Module, b: nn.Module) -> set[str]:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    return {n for n in left if not torch.equal(left[n], right[n])}


@pytest.mark.thorough
def test_the_mark_is_unlearnt_and_a_run_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    model = Wrapped()
    before = held_out(model.timm_model)
    callback = guarding(model)
    trainer(model, tmp_path, callback).train()
    after = held_out(model.timm_model)
    assert after[1] > before[1] + 0.2
    assert after[0] > before[0] - 0.02
    assert callback.guard.steps == MORE
    assert callback.guard.closed
    with pytest.raises(ConfigError, match="build another callback and Trainer"):
        trainer(Wrapped(), tmp_path / "twice", callback).train()
    half = tmp_path / f"checkpoint-{MORE // 2}"
    corrected = net()
    corrected.load_state_dict(load_file(half / "concept_guard.safetensors"))
    assert held_out(corrected)[1] > before[1] + 0.1
    resumed = Wrapped()
    again = guarding(resumed)
    trainer(resumed, tmp_path, again).train(resume_from_checkpoint=str(half))
    assert again.guard.steps == MORE
    assert not differing(resumed, model)
    moved = Wrapped()
    elsewhere = guarding(moved)
    elsewhere.resume_from(half)
    trainer(moved, tmp_path / "moved", elsewhere).train(resume_from_checkpoint=str(half))
    assert not differing(moved, model)
    control = Wrapped()
    fresh = guarding(control)
    fit = trainer(control, tmp_path / "none", fresh)
    with pytest.warns(UserWarning, match=r"call callback\.resume_from\(folder\) before train"):
        fit.train(resume_from_checkpoint=str(half))
    assert fresh.guard.steps == MORE // 2


def test_observing_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    plain, watched = Wrapped(), Wrapped()
    trainer(plain, tmp_path / "plain", None).train()
    callback = guarding(watched, config={"action": "observe"})
    trainer(watched, tmp_path / "watched", callback).train()
    assert not differing(plain, watched)
    assert callback.guard.report is not None


def test_accumulated_batches_are_one_update_of_their_mean(tmp_path: Path) -> None:
    models = [Wrapped(), Wrapped()]
    steps = []
    for n, model in enumerate(models):
        callback = None if n else guarding(model, config={"action": "observe"})
        trainer(
            model, tmp_path / str(n), callback, updates=4, gradient_accumulation_steps=3
        ).train()
        steps.append(0 if callback is None else callback.guard.steps)
    assert steps == [4, 0]
    for name, value in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_a_trainer_whose_loss_passes_the_guard_by_is_stopped(tmp_path: Path) -> None:
    model = Wrapped()
    fit = trainer(model, tmp_path, None)
    fit.add_callback(guarding(model))
    with pytest.raises(ConfigError, match=r"compute_loss_func=callback\.compute_loss"):
        fit.train()


def test_a_criterion_that_is_no_mean_over_samples_is_refused() -> None:
    model = Wrapped()
    weighed = nn.CrossEntropyLoss(weight=torch.arange(1.0, CLASSES + 1))
    with pytest.raises(ConfigError, match="is no mean over samples"):
        guarding(model, criterion=weighed)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_batches_without_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="compute_loss got no labels"):
        guarding(Wrapped()).compute_loss({"logits": torch.zeros(2, CLASSES)}, None)


def test_accelerate_saves_and_restores_the_guard_with_the_rest(tmp_path: Path) -> None:
    ends = []
    for stop in (None, 5):
        model = fallen()
        for part in range(2 if stop else 1):
            accelerator = Accelerator(cpu=True)
            model = fallen() if part else model
            guard = ConceptGuard(model, probe=world(PROBE).loader(), config=GUARD)
            optimizer = sgd(model)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            accelerator.register_for_checkpointing(guard)
            if part:
                accelerator.load_state(str(tmp_path / "state"))
            first = UPDATES + (stop or 0) * part
            until = UPDATES + (stop if stop and not part else MORE)
            prepared.train()
            for images, labels in stream(until, first=first):
                losses = cross_entropy(prepared(images), labels, reduction="none")
                accelerator.backward(guard.loss(losses, labels))
                optimizer.step()
                optimizer.zero_grad()
                guard.step()
            if stop and not part:
                accelerator.save_state(str(tmp_path / "state"))
        assert guard.erased
        guard.bake()
        ends.append(model)
    assert not differing(*ends)
    assert held_out(ends[0])[1] > held_out(fallen())[1] + 0.2


def test_a_loader_of_accelerate_is_a_probe() -> None:
    model = fallen()
    loader: DataLoader[Any] = Accelerator(cpu=True).prepare(world(PROBE).loader())
    report = ConceptGuard(model, probe=loader, config=GUARD).round()
    other = ConceptGuard(fallen(), probe=world(PROBE).loader(), config=GUARD).round()
    assert report is not None
    assert other is not None
    assert report.flagged == other.flagged != ()
