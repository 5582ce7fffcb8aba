"""A Lightning module trains with the guard by one callback, with the library itself."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from worlds import PROBE, QUICK, TRAIN, UPDATES, fallen, held_out, net, sgd, stream, world

from concept_guard import ConceptGuard, ConfigError
from concept_guard.integrations.lightning import ConceptGuardCallback

pytestmark = [  # the library's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]
GUARD = {**QUICK, "start": 2}
MORE = 12


class Classifier(LightningModule):
    """An ordinary module; it returns losses per sample, their mean or a dict with it."""

    def __init__(self, returns: str = "losses") -> None:
        super().__init__()
        self.model, self.returns = fallen(), returns

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        """Return the loss of a batch in one of three ways."""
        images, labels = batch
        losses = cross_entropy(self.model(images), labels, reduction="none")
        return {"losses": losses, "mean": losses.mean(), "dict": {"loss": losses.mean()}}[
            self.returns
        ]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD."""
        return sgd(self.model)


def batches(updates: int = MORE, *, first: int = 0) -> DataLoader[Any]:
    """Return the same batches that `stream` yields, one of them per item."""
    items = [batch for batch in stream(UPDATES + updates, first=UPDATES + first)]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def trainer(folder: Path, *callbacks: Callback, updates: int = MORE, **options: Any) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    return Trainer(
        accelerator="cpu",
        max_steps=updates,
        callbacks=list(callbacks),
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def guarding(**config: object) -> ConceptGuardCallback:
    return ConceptGuardCallback(world(PROBE).loader(), {**GUARD, **config})


def network(checkpoint: Path) -> nn.Module:
    """Return an ordinary network with the weights of a checkpoint of Lightning."""
    model, state = net(), torch.load(checkpoint, weights_only=True)["state_dict"]
    model.load_state_dict({n.removeprefix("model."): t for n, t in state.items()})
    return model


def differing(a: nn.Module, b: nn.Module) -> set[str]:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    return {n for n in left if not torch.equal(left[n], right[n])}


@pytest.mark.parametrize("returns", ["losses", "mean", "dict"])
@pytest.mark.filterwarnings("ignore:rebalancing cannot act")
def test_the_mark_is_unlearnt_and_nothing_is_left_on_the_module(
    tmp_path: Path, returns: str
) -> None:
    module, callback = Classifier(returns), guarding()
    before = held_out(module.model)
    step = module.training_step
    trainer(tmp_path, callback, enable_checkpointing=False).fit(module, batches())
    after = held_out(module.model)
    assert after[1] > before[1] + 0.2
    assert after[0] > before[0] - 0.02
    assert callback.guard is not None
    assert callback.guard.steps == MORE
    assert callback.guard.closed
    assert module.training_step == step
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_observing_changes_no_bit_of_the_run(tmp_path: Path) -> None:
    plain, watched = Classifier("mean"), Classifier()
    trainer(tmp_path, enable_checkpointing=False).fit(plain, batches())
    callback = guarding(action="observe")
    trainer(tmp_path, callback, enable_checkpointing=False).fit(watched, batches())
    assert not differing(plain.model, watched.model)
    assert callback.guard is not None
    assert callback.guard.report is not None


@pytest.mark.thorough
def test_a_checkpoint_is_corrected_and_a_run_resumed_from_it_ends_as_the_whole_one(
    tmp_path: Path,
) -> None:
    whole = Classifier()
    often = {"every_n_train_steps": MORE // 2, "save_top_k": -1}
    saver = ModelCheckpoint(tmp_path, filename="{step}", **often)  # type: ignore[arg-type]
    trainer(tmp_path, guarding(), saver).fit(whole, batches())
    half = tmp_path / f"step={MORE // 2}.ckpt"
    fixed = network(half)
    assert held_out(fixed)[1] > held_out(fallen())[1] + 0.2
    resumed, callback = Classifier(), guarding()
    later = trainer(tmp_path, callback, enable_checkpointing=False)
    later.fit(resumed, batches(first=MORE // 2), ckpt_path=str(half), weights_only=True)
    assert callback.guard is not None
    assert callback.guard.steps == MORE
    assert not differing(resumed.model, whole.model)
    again = Classifier()  # control: what is stored beside the weights is needed
    checkpoint = torch.load(half, weights_only=True)
    del checkpoint["concept_guard_uncorrected"], checkpoint["callbacks"]
    torch.save(checkpoint, tmp_path / "bare.ckpt")
    bare = trainer(tmp_path, guarding(), enable_checkpointing=False)
    bare.fit(
        again, batches(first=MORE // 2), ckpt_path=str(tmp_path / "bare.ckpt"), weights_only=True
    )
    assert differing(again.model, whole.model)


def test_accumulated_batches_are_one_update(tmp_path: Path) -> None:
    module, callback = Classifier(), guarding()
    trainer(
        tmp_path, callback, updates=4, accumulate_grad_batches=3, enable_checkpointing=False
    ).fit(module, batches())
    assert callback.guard is not None
    assert callback.guard.steps == 4


def test_a_resumed_run_counts_no_update_before_it_has_made_one(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=2, save_top_k=-1)
    observing = {"action": "observe"}
    first = trainer(tmp_path, guarding(**observing), saver, updates=2, accumulate_grad_batches=3)
    first.fit(Classifier(), batches())
    callback = guarding(**observing)
    later = trainer(
        tmp_path, callback, updates=4, accumulate_grad_batches=3, enable_checkpointing=False
    )
    later.fit(Classifier(), batches(), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert callback.guard is not None
    assert callback.guard.steps == 4


class Failing(Classifier):
    """Fails in its third batch, once."""

    seen = 0

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Any:
        """Return the losses of a batch."""
        self.seen += 1
        if self.seen == 3:
            raise RuntimeError("out of paper")
        return super().training_step(batch)


def test_after_a_failure_the_next_run_has_one_guard_of_its_own(tmp_path: Path) -> None:
    module, callback = Failing(), guarding()
    with pytest.raises(RuntimeError, match="out of paper"):
        trainer(tmp_path, callback, enable_checkpointing=False).fit(module, batches())
    left = callback.guard
    assert left is not None
    assert not left.closed
    trainer(tmp_path, callback, enable_checkpointing=False).fit(module, batches())
    assert left.closed
    assert callback.guard is not None
    assert callback.guard.steps == MORE  # one per update: the step is not guarded twice
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_the_probe_may_come_from_the_trainer(tmp_path: Path) -> None:
    seen: list[Trainer] = []

    def probe(of: Trainer) -> DataLoader[tuple[Tensor, ...]]:
        seen.append(of)
        return world(PROBE).loader()

    fit = trainer(tmp_path, ConceptGuardCallback(probe, GUARD), enable_checkpointing=False)
    fit.fit(Classifier(), batches())
    assert seen == [fit]


class Manual(Classifier):
    """Steps its optimizer itself, and calls its network otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.backbone = self.model
        del self.model


def test_everything_that_would_train_unguarded_is_named_before_training(tmp_path: Path) -> None:
    fit = trainer(tmp_path, guarding(), enable_checkpointing=False)
    with pytest.raises(ConfigError) as said:
        fit.fit(Manual(), batches())
    message = str(said.value)
    assert "call its loss() and step()" in message
    assert "Manual has no network 'model', only ['backbone']" in message


def test_checkpoints_without_callbacks_are_warned_of(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, every_n_train_steps=MORE)
    with pytest.warns(UserWarning, match="these checkpoints will have no correction in them"):
        trainer(tmp_path, guarding(), saver).fit(Classifier(), batches(2))


def test_other_stages_are_left_alone(tmp_path: Path) -> None:
    class Tested(Classifier):
        def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
            self.model(batch[0])

    module, callback = Tested(), guarding()
    trainer(tmp_path, callback, enable_checkpointing=False).test(module, batches(2), verbose=False)
    assert callback.guard is None


def test_the_guard_is_one_of_its_own(tmp_path: Path) -> None:
    images = world(TRAIN, 64)
    callback = guarding()
    loader = DataLoader(TensorDataset(images.images, images.labels), batch_size=16)
    trainer(tmp_path, callback, updates=3, enable_checkpointing=False).fit(Classifier(), loader)
    assert isinstance(callback.guard, ConceptGuard)
