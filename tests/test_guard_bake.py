"""Baking ends in an ordinary checkpoint; copies and saved models keep the correction."""

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from worlds import (
    CLASSES,
    NET,
    PROBE,
    UPDATES,
    correcting,
    fallen,
    flagging,
    logits,
    net,
    stream,
    the_flagged,
    train,
    world,
)

from concept_guard import BakeError, ConceptGuard

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_baked_checkpoint_is_an_ordinary_one_with_the_logits_of_the_hooked_model(
    tmp_path: Path, strength: float
) -> None:
    model = fallen()
    plain = logits(model)
    guard = flagging(model, strength=strength)
    guard.erase([the_flagged(guard), 0, 1])  # several at once
    train(model, stream(UPDATES + 2, first=UPDATES), guard)
    guard.round()  # the projection is that of the network as it is now
    hooked = logits(model)
    assert (hooked - plain).abs().max() > 1
    guard.bake()
    assert guard.erased == ()
    torch.testing.assert_close(logits(model), hooked, rtol=0, atol=1e-4)
    guard.close()
    torch.testing.assert_close(logits(model), hooked, rtol=0, atol=1e-4)
    path = tmp_path / "baked.pth.tar"
    torch.save({"state_dict": model.state_dict()}, path)
    loaded = timm.create_model("resnet10t", num_classes=CLASSES, checkpoint_path=str(path), **NET)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def test_baking_without_a_correction_changes_no_bit(untouched: Untouched) -> None:
    model = fallen()
    guard = flagging(model)
    with untouched(model):
        guard.bake()
    rebalanced = correcting(model, action="rebalance")
    with untouched(model):
        rebalanced.bake()
    assert rebalanced.erased == ()


def erased_at(model: nn.Module, tap: str) -> ConceptGuard:
    """Return a guard that has erased a concept there."""
    config = {"tap": tap, "concepts": 4, "action": "project", "max_erased": 1}
    guard = ConceptGuard(model, probe=world(PROBE, 120).loader(), config=config)
    report = guard.round()
    assert report is not None
    for concept in report.concepts:
        if not guard.erased and concept.presence_rate < 1:
            guard.erase(concept.id)
    assert guard.erased
    return guard


def without_bias() -> nn.Module:
    """Return a network whose head has no bias to hold the reference level."""
    model = fallen()
    model.fc = nn.Linear(model.num_features, CLASSES, bias=False)
    return model


@pytest.mark.parametrize(
    ("build", "tap", "found"),
    [
        (net, "stage:-1", "no plain linear map"),
        (without_bias, "pre_logits", "a classifier without bias"),
    ],
)
def test_what_cannot_be_baked_is_refused_with_the_way_out(
    untouched: Untouched, build: Callable[[], nn.Module], tap: str, found: str
) -> None:
    model = build()
    guard = erased_at(model, tap)
    before, erased = logits(model), guard.erased
    message = f"tap '{tap}' is followed by {found}.*Use tap: pre_logits.*keep the guard attached"
    with untouched(model), pytest.raises(BakeError, match=message):
        guard.bake()
    assert guard.erased == erased  # the correction goes on
    assert torch.equal(logits(model), before)


def test_a_copy_keeps_the_correction_and_never_writes_into_the_guard() -> None:
    model = fallen()
    guard = correcting(model)
    corrected = logits(model)
    ema = ModelEmaV3(model, decay=0.5)
    assert torch.equal(logits(ema.module), corrected)
    model.train()
    model(world(PROBE).images[:3])
    rows = guard.tap.captured
    assert rows is not None
    state, fired = guard.state_dict(), guard.tap.fired
    ema.module.train()(world(PROBE).images[:9])
    assert guard.tap.captured is rows
    assert guard.tap.fired == fired
    assert guard.state_dict()["steps"] == state["steps"]
    train(model, stream(UPDATES + 3, first=UPDATES), guard)  # re-estimates the pair
    ema.update(model)
    assert list(ema.module.state_dict()) == list(model.state_dict())
    ema.set(model)
    assert torch.equal(logits(ema.module), logits(model))  # the copy follows the pair


def test_baking_leaves_the_correction_to_copies_whose_head_it_does_not_touch() -> None:
    model = fallen()
    guard = correcting(model)
    ema = ModelEmaV3(model, decay=0.5)
    corrected = logits(model)
    guard.bake()
    guard.close()
    assert torch.equal(logits(ema.module), corrected)
    torch.testing.assert_close(logits(model), corrected, rtol=0, atol=1e-4)
    # At full strength a baked head after the projection is the baked head: both may be averaged.
    ema.update(model)
    torch.testing.assert_close(logits(ema.module), corrected, rtol=0, atol=1e-4)
    unpickled = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(logits(unpickled), logits(model), rtol=0, atol=0)


def test_a_saved_model_keeps_the_correction_without_the_guard() -> None:
    model = fallen()
    guard = correcting(model)
    corrected = logits(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = pickle.dumps(copy.deepcopy(model))
    guard.close()
    assert not torch.equal(logits(model), corrected)  # control
    for loaded in (torch.load(file, weights_only=False), pickle.loads(pickled)):
        assert torch.equal(logits(loaded), corrected)
