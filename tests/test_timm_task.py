"""A script that is built on timm.task trains with the guard by naming another task."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_loader
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import Dataset
from worlds import (
    CLASSES,
    NET,
    PROBE,
    QUICK,
    UPDATES,
    fallen,
    held_out,
    logits,
    sgd,
    stream,
    world,
)

from concept_guard import ProbeError, TapError
from concept_guard.integrations.criteria import per_sample
from concept_guard.integrations.timm_task import ConceptGuardTask

GUARD = {**QUICK, "start": 2, "every": 4}


def task_of(model: nn.Module, *, soft: bool = False, **config: object) -> ConceptGuardTask:
    criterion = SoftTargetCrossEntropy() if soft else nn.CrossEntropyLoss()
    probe = world(PROBE).loader()
    return ConceptGuardTask(
        model, criterion, verbose=False, probe=probe, config={**GUARD, **config}
    )


def train(
    task: ClassificationTask,
    optimizer: torch.optim.Optimizer,
    updates: int,
    *,
    first: int = 0,
    accumulate: int = 1,
    soft: bool = False,
) -> None:
    """Train as timm's script does."""
    task.get_trainable_module().train()
    for n, (images, labels) in enumerate(stream(first + updates, first=first)):
        targets = one_hot(labels, CLASSES).float() if soft else labels
        for part, target in zip(images.chunk(accumulate), targets.chunk(accumulate), strict=True):
            (task(part, target)["loss"] / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=first + n + 1)


def saved(task: ClassificationTask, optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    """Return the checkpoint that timm's saver writes."""
    folder.mkdir()
    saver = CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=str(folder), task=task
    )
    saver.save_checkpoint(0, metric=1.0)
    return folder / "last.pth.tar"


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    assert list(a) == list(b)
    return {n for n in a if not torch.equal(a[n], b[n])}


def test_while_nothing_is_flagged_training_is_that_of_timm_bit_for_bit() -> None:
    models = [fallen(planted=False), fallen(planted=False)]
    tasks = [ClassificationTask(models[0], verbose=False), task_of(models[1], action="observe")]
    for task, model in zip(tasks, models, strict=True):
        train(task, sgd(model), 8, first=UPDATES)
    assert not differing(models[0].state_dict(), models[1].state_dict())
    assert tasks[1].guard.report is not None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_mark_is_unlearnt_and_the_checkpoint_is_an_ordinary_one(
    tmp_path: Path, accumulate: int
) -> None:
    model = fallen()
    before = held_out(model)
    task, optimizer = task_of(model), sgd(model)
    train(task, optimizer, 10, first=UPDATES + 10, accumulate=accumulate)
    assert task.guard.steps == 10
    assert task.guard.erased
    raw = {n: t.clone() for n, t in model.state_dict().items()}
    path = saved(task, optimizer, tmp_path / "run")
    assert not differing(raw, model.state_dict())  # saving changes nothing
    loaded = timm.create_model("resnet10t", num_classes=CLASSES, checkpoint_path=str(path), **NET)
    after = held_out(loaded)
    assert after[1] > before[1] + 0.3
    assert after[0] > before[0] - 0.02
    assert differing(raw, loaded.state_dict()) == {"fc.weight", "fc.bias"}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, stopped, resumed = fallen(), fallen(), fallen()
    task, optimizer = task_of(whole), sgd(whole)
    train(task, optimizer, 16, first=UPDATES)
    task, optimizer = task_of(stopped), sgd(stopped)
    train(task, optimizer, 7, first=UPDATES)
    path = saved(task, optimizer, tmp_path / "run")
    task, optimizer = task_of(resumed), sgd(resumed)
    assert resume_task_checkpoint(task, path, optimizer, log_info=False) == 1
    assert not differing(resumed.state_dict(), stopped.state_dict())
    train(task, optimizer, 9, first=UPDATES + 7)
    assert not differing(resumed.state_dict(), whole.state_dict())
    plain = fallen()  # control: without the state of the guard it is another run
    task, optimizer = task_of(plain), sgd(plain)
    checkpoint = torch.load(path, weights_only=True)
    task.load_checkpoint_state(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    train(task, optimizer, 9, first=UPDATES + 7)
    assert differing(plain.state_dict(), whole.state_dict())


def test_an_average_of_the_weights_is_saved_corrected_and_resumed_as_it_was(tmp_path: Path) -> None:
    model = fallen()
    task, optimizer = task_of(model), sgd(model)
    task.setup_ema(decay=0.7)
    train(task, optimizer, 10, first=UPDATES)
    average = task.get_eval_model(ema=True).module
    raw = {n: t.clone() for n, t in average.state_dict().items()}
    path = saved(task, optimizer, tmp_path / "run")
    checkpoint = torch.load(path, weights_only=True)
    assert differing(raw, checkpoint["state_dict_ema"]) == {"fc.weight", "fc.bias"}
    loaded = timm.create_model("resnet10t", num_classes=CLASSES, **NET)
    loaded.load_state_dict(raw)
    uncorrected = held_out(loaded)
    loaded.load_state_dict(checkpoint["state_dict_ema"])
    assert held_out(loaded)[1] > uncorrected[1] + 0.1
    again = task_of(fallen())
    resume_task_checkpoint(again, path, log_info=False)
    again.setup_ema(decay=0.7)
    load_task_ema_checkpoint(again, path)
    assert not differing(again.get_eval_model(ema=True).module.state_dict(), raw)
    assert again.guard.erased == task.guard.erased


def test_a_checkpoint_of_a_plain_run_starts_the_guard_afresh(tmp_path: Path) -> None:
    model = fallen()
    plain = ClassificationTask(model, verbose=False)
    path = saved(plain, sgd(model), tmp_path / "run")
    task = task_of(fallen())
    resume_task_checkpoint(task, path, log_info=False)
    assert task.guard.steps == 0
    task.load_task_state(None)


def test_what_cannot_be_folded_in_is_said(tmp_path: Path) -> None:
    model = fallen()
    task, optimizer = task_of(model, gate=True), sgd(model)
    train(task, optimizer, 3, first=UPDATES)
    assert task.guard.erased
    with pytest.warns(UserWarning, match="the checkpoint has no correction in it: gate = true"):
        path = saved(task, optimizer, tmp_path / "run")
    assert not differing(torch.load(path, weights_only=True)["state_dict"], model.state_dict())


def test_soft_targets_train_and_say_what_cannot_act() -> None:
    model = fallen()
    task = task_of(model, soft=True)
    with pytest.warns(UserWarning, match="cannot act: targets are soft"):
        train(task, sgd(model), 6, first=UPDATES, soft=True)
    assert task.guard.steps == 6
    assert task.guard.erased


def test_a_compiled_task_is_corrected_too() -> None:
    models = [fallen(), fallen()]
    for model, compiled in zip(models, (False, True), strict=True):
        task = task_of(model)
        if compiled:
            task.compile(backend="aot_eager")
        train(task, sgd(model), 6, first=UPDATES)
        assert task.guard.erased
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=0, atol=1e-4)


def test_a_guard_that_cannot_be_attached_leaves_the_model_alone() -> None:
    model = fallen()
    with pytest.raises(TapError):
        task_of(model, tap="module:nowhere")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Pictures(Dataset[tuple[Any, int]]):
    """Noise, read through the transform that timm's loader sets."""

    transform: Callable[[Image.Image], Any]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Any, int]:
        noise = torch.randint(0, 256, (16, 16, 3), generator=torch.Generator().manual_seed(index))
        return self.transform(Image.fromarray(noise.to(torch.uint8).numpy())), index % CLASSES


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("prefetched", [False, True])
def test_a_training_loader_as_probe_is_told(is_training: bool, prefetched: bool) -> None:
    device = torch.device("cpu")
    how = {"num_workers": 0, "persistent_workers": False, "use_prefetcher": prefetched}
    loader = create_loader(
        Pictures(), (3, 16, 16), 20, is_training=is_training, device=device, **how
    )
    model = fallen()
    told = pytest.warns(UserWarning, match="probe: its images depend on random numbers")
    with told if is_training else nullcontext():
        task = ConceptGuardTask(model, probe=loader, config=GUARD, verbose=False)
    if not is_training:  # an index of the probe is one of the data set
        labels = task.guard.tap.read(loader, max_rows=100, seed=0).labels
        assert labels.tolist() == [index % CLASSES for index in range(40)]
    task.guard.close()
    mixed = create_loader(
        Pictures(),
        (3, 16, 16),
        20,
        is_training=True,
        device=device,
        collate_fn=FastCollateMixup(mixup_alpha=0.8, num_classes=CLASSES),
        **how,
    )
    with pytest.raises(ProbeError, match=r"torch.float32.*soft labels \(Mixup"):
        ConceptGuardTask(model, probe=mixed, config=GUARD, verbose=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


CRITERIA: dict[str, tuple[Any, bool]] = {
    "cross entropy": (nn.CrossEntropyLoss(), True),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), True),
    "timm's smoothed": (LabelSmoothingCrossEntropy(0.1), True),
    "timm's binary": (BinaryCrossEntropy(0.1), True),
    "timm's binary, summed": (BinaryCrossEntropy(0.1, sum_classes=True), True),
    "a function": (cross_entropy, True),
    "margins": (nn.MultiMarginLoss(), True),
    "weighed classes": (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4])), False),
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), False),
    "soft targets": (SoftTargetCrossEntropy(), False),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_losses_per_sample_are_those_whose_mean_a_criterion_is(
    rng: torch.Generator, name: str
) -> None:
    criterion, is_mean = CRITERIA[name]
    before = copy.deepcopy(getattr(criterion, "reduction", None))
    losses = per_sample(criterion, CLASSES)
    assert (losses is not None) is is_mean
    assert getattr(criterion, "reduction", None) == before
    if losses is None:
        return
    labels = torch.randint(0, CLASSES, (9,), generator=rng)
    outputs = torch.randn(9, CLASSES, generator=rng, requires_grad=True)
    found = losses(outputs, labels)
    for n in range(9):
        alone = criterion(outputs[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(found[n], alone, rtol=1e-5, atol=1e-6)
    found.mean().backward()
    gradient = outputs.grad
    outputs.grad = None
    criterion(outputs, labels).backward()
    torch.testing.assert_close(outputs.grad, gradient, rtol=1e-4, atol=1e-6)
