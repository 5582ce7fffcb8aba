"""What is wrong is named with the way out; while training runs, nothing is lost."""

import copy
import random
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from worlds import (
    CLASSES,
    PROBE,
    UPDATES,
    correcting,
    fallen,
    flagging,
    net,
    stream,
    train,
    world,
)

from concept_guard import BakeError, ConceptGuard, ConfigError, ProbeError, TapError

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
IMAGES, LABELS = world(PROBE, 40).images, world(PROBE, 40).labels


def one_shot() -> Any:
    yield IMAGES, LABELS


def missing(label: int) -> list[tuple[Tensor, Tensor]]:
    return [(IMAGES[label != LABELS], LABELS[label != LABELS])]


BAD_PROBES = {
    "empty": ([], r"probe is empty: it yielded no image; pass a loader over held-out data"),
    "outside": (
        [(IMAGES, LABELS + 3)],
        r"labels outside \[0, 4\), of 30 of 40 images: image 1 has 4, .*the model has 4 logits",
    ),
    "missing": (missing(2), r"no image of 1 of 4 classes: 2; take a held-out split with every"),
    "one-shot": (one_shot(), r"one-shot iterator \(generator\).*pass the DataLoader itself"),
    "number": (7, r"probe is a int, expected an iterable of \(images, labels\) batches"),
    "no pair": ([IMAGES], r"starts at image 0: got a Tensor, expected a pair \(images, labels\)"),
    "soft": (
        [(IMAGES, torch.eye(CLASSES)[LABELS])],
        r"labels are torch.float32, expected integer class indices; soft labels",
    ),
}


@pytest.mark.parametrize("case", BAD_PROBES)
def test_a_bad_probe_is_named_and_nothing_is_attached(untouched: Untouched, case: str) -> None:
    probe, message = BAD_PROBES[case]
    model = net()
    with untouched(model), pytest.raises(ProbeError, match=f"(?s){message}"):
        ConceptGuard(model, probe=probe)


BAD_TAPS = {
    "module:layer5": r"no module 'layer5' in ResNet; nearest: \['layer",
    "module:layer4.0.conv9": r"no module 'layer4.0.conv9' in ResNet; nearest: \['layer4.0.conv",
    "stage:9": r"no stage '9'; feature_info of ResNet has 5; use 'stage:-1'",
}


@pytest.mark.parametrize("tap", BAD_TAPS)
def test_an_unknown_tap_is_named_with_the_nearest_ones(untouched: Untouched, tap: str) -> None:
    model = net()
    with untouched(model), pytest.raises(TapError, match=BAD_TAPS[tap]):
        ConceptGuard(model, probe=[(IMAGES, LABELS)], config={"tap": tap})


def test_a_tap_that_never_fires_is_named_with_the_reason(untouched: Untouched) -> None:
    model = net("test_vit", img_size=16, patch_size=4)
    config = {"tap": "module:blocks.1.attn.attn_drop"}
    message = r"'blocks.1.attn.attn_drop' never fires: fused attention.*set_fused_attn\(False\)"
    with untouched(model), pytest.raises(TapError, match=message):
        ConceptGuard(model, probe=[(IMAGES, LABELS)], config=config)


def test_a_step_without_a_forward_pass_of_the_model_is_an_error() -> None:
    model = net()
    guard = ConceptGuard(model, probe=[(IMAGES, LABELS)])
    with pytest.raises(TapError, match=r"'pre_logits' \(fc\) has not fired before the first"):
        guard.step()
    model.forward_features(IMAGES)  # a part of the model is not enough
    with pytest.raises(TapError, match="Build the guard before torch.compile and EMA copies"):
        guard.step()
    model(IMAGES)
    guard.step()
    with pytest.warns(UserWarning, match=r"tap 'pre_logits' \(fc\) has stopped firing: nothing is"):
        guard.step()
    guard.step()  # said once
    assert guard.steps == 3


def test_a_classifier_that_is_replaced_is_told_and_never_baked_into() -> None:
    model = fallen()
    guard = correcting(model, start=100)
    model(IMAGES[:4])
    guard.step()
    old = model.get_classifier()
    before = copy.deepcopy(old.state_dict())
    model.reset_classifier(CLASSES)
    model(IMAGES[:4])
    kept = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="has stopped firing: nothing is corrected"):
        guard.step()
    with pytest.raises(TapError, match="no longer part of the model.*build a new one"):
        guard.bake()
    assert guard.erased
    for now, then in ((old.state_dict(), before), (model.state_dict(), kept)):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@pytest.mark.parametrize("as_file", [False, True])
def test_an_unknown_key_is_named_with_the_nearest_one(
    untouched: Untouched, tmp_path: Path, as_file: bool
) -> None:
    path = tmp_path / "guard.yaml"
    path.write_text("start: 10\nevry: 20\n")
    model = net()
    where = r"guard\.yaml:2: " if as_file else ""
    with untouched(model), pytest.raises(ConfigError, match=f"{where}.*'evry'; nearest: 'every'"):
        ConceptGuard(
            model,
            probe=[(IMAGES, LABELS)],
            config=path if as_file else {"start": 10, "evry": 20},
        )


def test_a_schedule_in_epochs_needs_their_length(untouched: Untouched) -> None:
    model = net()
    with untouched(model), pytest.raises(ConfigError, match="Set steps_per_epoch=len"):
        ConceptGuard(model, probe=[(IMAGES, LABELS)], config={"every": "1ep"})


class Fragile(Dataset[tuple[Tensor, int]]):
    """The probe's images; one of them cannot be read any more once an error is set."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        random.random()
        np.random.rand()  # noqa: NPY002 - the global state must be restored after an error too
        torch.rand(1)
        if self.error is not None and index == 17:
            raise self.error
        return IMAGES[index], int(LABELS[index])


@pytest.mark.parametrize(
    "error",
    [
        OSError("cannot identify image file 'cat.jpg'"),
        ValueError("bad image 'cat.jpg'"),
        KeyError("cat.jpg"),
        AssertionError("cat.jpg is empty"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_image_that_becomes_unreadable_costs_a_warning(
    untouched: Untouched, error: Exception
) -> None:
    model, data = net(), Fragile()
    guard = ConceptGuard(model, probe=DataLoader(data, 16), config={"start": 1, "concepts": 2})
    data.error = error
    model(IMAGES[:4])
    with (
        untouched(model),
        pytest.warns(UserWarning, match=r"at step 1 is skipped: .*cat\.jpg.*training goes on"),
    ):
        assert guard.step() is None
    assert (guard.steps, guard.report) == (1, None)
    data.error = None
    model(IMAGES[:4])
    assert guard.round() is not None  # the next one works


def test_an_interruption_in_a_round_goes_through_and_leaves_the_state_valid(
    untouched: Untouched,
) -> None:
    model, data = net(), Fragile()
    guard = ConceptGuard(model, probe=DataLoader(data, 16), config={"start": 1, "concepts": 2})
    data.error = KeyboardInterrupt()
    model(IMAGES[:4])
    with untouched(model), pytest.raises(KeyboardInterrupt):
        guard.step()
    data.error = None
    guard.load_state_dict(guard.state_dict())
    assert guard.round() is not None


def test_a_person_sees_the_error_of_a_round_that_they_asked_for() -> None:
    data = Fragile()
    guard = ConceptGuard(net(), probe=DataLoader(data, 16), config={"concepts": 2})
    data.error = OSError("cannot identify image file 'cat.jpg'")
    with pytest.raises(OSError, match=r"cat\.jpg"):
        guard.round()


def diverge(model: nn.Module) -> dict[str, Tensor]:
    """Make the activations at the head NaN; return the weights from before."""
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.bn1.weight.fill_(float("nan"))
    return kept


def test_activations_that_are_not_finite_skip_the_round() -> None:
    model = fallen()
    guard = correcting(model)
    report, erased = guard.report, guard.erased
    kept = diverge(model)
    saved = guard.state_dict()
    with pytest.warns(UserWarning, match=r"activations at tap 'pre_logits' and logits hold NaN"):
        assert guard.round() is None
    images, labels = next(stream(UPDATES + 1, first=UPDATES))
    counts = guard.state_dict()["counts"]
    for step in range(1, 4):  # a round is due after step 1, tracking after step 3
        losses = cross_entropy(model(images), labels, reduction="none")
        told = pytest.warns(UserWarning, match="rebalancing cannot act: activations of the batch")
        with told if step == 1 else nullcontext():
            loss = guard.loss(losses, labels)
        assert loss.isnan()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert guard.step() is None
        assert bool(caught) == (step != 2)
        assert all("'pre_logits'" in str(w.message) for w in caught)
    assert (guard.report, guard.erased) == (report, erased)
    torch.testing.assert_close(counts, guard.state_dict()["counts"], rtol=0, atol=0)
    for kind in ("tracked", "pairs"):
        left, right = saved[kind], guard.state_dict()[kind]
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    model.load_state_dict(kept)
    guard.load_state_dict(guard.state_dict())
    train(model, stream(UPDATES + 1, first=UPDATES), guard)  # a finite loss again
    assert guard.round() is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_skips_the_round(value: float) -> None:
    model = fallen()
    guard = flagging(model, every=1)
    report = guard.report
    model(IMAGES[:4])
    loss = torch.tensor([1.0, value, 1.0, 1.0])
    assert not guard.loss(loss, LABELS[:4]).isfinite()
    with pytest.warns(UserWarning, match=r"at step 1 skipped: the training loss hold NaN or inf"):
        assert guard.step() is None
    assert guard.report is report
    model(IMAGES[:4])
    guard.loss(torch.ones(4), LABELS[:4])
    assert guard.step() is not None


@pytest.mark.parametrize("label", [-100, CLASSES])
def test_training_labels_that_are_no_class_do_not_stop_training(label: int) -> None:
    model = fallen()
    guard = correcting(model)
    model(IMAGES[:8])
    labels = LABELS[:8].clone()
    labels[2] = label  # as with ignore_index
    loss = torch.arange(8.0)
    with pytest.warns(UserWarning, match=f"rebalancing cannot act: .*{label}"):
        assert torch.equal(guard.loss(loss, labels), loss.mean())


def test_targets_without_an_axis_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(4,\) with targets \(\)"):
        flagging().loss(torch.ones(4), LABELS[0])


def test_erasing_under_observe_is_refused_instead_of_doing_nothing() -> None:
    guard = flagging(action="observe")
    with pytest.raises(ValueError, match="observe"):
        guard.erase(0)
    assert guard.erased == ()


def test_baking_after_closing_says_that_it_comes_too_late() -> None:
    guard = correcting()
    guard.close()
    with pytest.raises(BakeError, match="closed"):
        guard.bake()
