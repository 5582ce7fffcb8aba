"""Baking ends in an ordinary checkpoint; copies and saved models keep the correction."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from worlds import (
    CLASSES,
    KEPT,
    NET,
    PROBE,
    UPDATES,
    Untouched,
    correcting,
    erased_at,
    fallen,
    flagging,
    held_out,
    logits,
    mark,
    net,
    stream,
    the_flagged,
    train,
    without_bias,
    world,
)

from concept_guard import BakeError, ConceptGuard, baking
from concept_guard.refit import Refit, refit


def infinite() -> nn.Module:
    """Return a network whose activations are not finite."""
    model = fallen()
    with torch.no_grad():
        model.layer4[0].bn1.weight.fill_(float("inf"))
    return model


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_baked_checkpoint_is_an_ordinary_one_with_the_logits_of_the_hooked_model(
    tmp_path: Path, strength: float
) -> None:
    model = fallen()
    plain = logits(model)
    guard = flagging(model, strength=strength, action=KEPT)
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


@pytest.mark.parametrize("refits", [False, True])
def test_a_convolution_as_the_classifier_is_trained_and_baked(refits: bool) -> None:
    model, other = fallen(), fallen()
    head = nn.Conv2d(model.fc.in_features, CLASSES, 1)
    head.load_state_dict(
        {n: v.view_as(head.get_parameter(n)) for n, v in model.fc.state_dict().items()}
    )
    model.fc = nn.Sequential(nn.Unflatten(1, (-1, 1, 1)), head, nn.Flatten())
    corrected = []
    for each in (model, other):
        guard = correcting(each, action=[*KEPT, "refit"] if refits else KEPT)
        train(each, stream(UPDATES + 2, first=UPDATES), guard)
        guard.round()
        before = logits(each)
        guard.bake()
        guard.close()
        corrected += [before, logits(each)]
    (hooked, baked), (expected, _) = corrected[:2], corrected[2:]
    # The same network as with a Linear, but for sums in another order; training spreads these.
    torch.testing.assert_close(hooked, expected, rtol=0, atol=1e-2)
    if refits:
        assert (baked - hooked).abs().max() > 0.1
    else:
        torch.testing.assert_close(baked, hooked, rtol=0, atol=1e-4)


def test_baking_without_a_correction_changes_no_bit(untouched: Untouched) -> None:
    model = fallen()
    for action in (KEPT, "observe"):
        guard = flagging(model, action=action)
        with untouched(model):
            guard.bake()
        assert guard.baked == ""
        guard.close()
    rebalanced = correcting(model, action="rebalance")
    with untouched(model):
        rebalanced.bake()
    assert rebalanced.erased == ()


def test_baking_fits_the_classifier_to_the_probe_and_nothing_else(untouched: Untouched) -> None:
    model = fallen()
    clean, marked = held_out(model)
    guard = flagging(model, action="refit")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    head = model.get_classifier()
    weight = head.weight
    guard.bake()
    assert guard.baked.startswith("classifier refitted to the probe: +")
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"fc.weight", "fc.bias"}
    assert head.weight is weight
    now_clean, now_marked = held_out(model)
    assert now_marked > marked + 0.1  # a tenth of the other classes' probe images are marked
    assert now_clean > clean - 0.02
    with untouched(model):
        guard.bake()
    assert guard.baked.startswith("classifier not refitted: ")  # it is now as the probe wants it


@pytest.mark.parametrize("breaks", [False, True])
def test_where_nothing_is_flagged_errors_count_more_unless_that_breaks_more_than_it_mends(
    monkeypatch: pytest.MonkeyPatch, breaks: bool
) -> None:
    weighed: list[Tensor] = []

    def listening(
        rows: Tensor, labels: Tensor, weights: Tensor, classifier: nn.Linear, *, seed: int
    ) -> Refit:
        wrong = classifier(rows).argmax(dim=1) != labels
        weighed.append(weights)
        if len(weighed) == 1:
            for k in range(CLASSES):
                of_right, of_wrong = (weights[(labels == k) & (wrong == w)] for w in (False, True))
                ratio = min(5.0, len(of_right) / len(of_wrong))
                assert of_wrong / of_right[0] == pytest.approx(ratio)
        found = refit(rows, labels, weights, classifier, seed=seed)
        return replace(found, mended=3, broken=4 if breaks and len(weighed) == 1 else 3)

    monkeypatch.setattr(baking, "refit", listening)
    guard = ConceptGuard(fallen(), probe=world(PROBE).loader(), config={"action": ["refit"]})
    guard.bake()  # without a round
    assert weighed[0].unique().numel() > 1  # control: some are wrong
    assert all(float(weights.mean()) == pytest.approx(1.0) for weights in weighed)
    if breaks:
        assert torch.equal(weighed[1], torch.ones_like(weighed[1]))
    else:
        assert len(weighed) == 1


def test_a_refit_goes_on_top_of_the_projection() -> None:
    models = [fallen(), fallen()]
    for model, action in zip(models, (KEPT, [*KEPT, "refit"]), strict=True):
        guard = correcting(model, action=action)
        guard.bake()
        guard.close()
    projected, refitted = map(held_out, models)
    assert refitted[0] + refitted[1] > projected[0] + projected[1]


@pytest.mark.parametrize(
    ("build", "tap", "reason"),
    [
        (fallen, "stage:-1", "no plain linear map with a bias follows the tap"),
        (without_bias, "pre_logits", "no plain linear map with a bias follows the tap"),
        (infinite, "pre_logits", "activations at tap 'pre_logits' hold NaN or infinite values"),
    ],
)
def test_what_cannot_be_refitted_is_said_and_left_alone(
    untouched: Untouched, build: Callable[[], nn.Module], tap: str, reason: str
) -> None:
    model = build()
    guard = ConceptGuard(model, probe=world(PROBE, 120).loader(), config={"tap": tap})
    with untouched(model):
        guard.bake()
    assert guard.baked.startswith(f"classifier not refitted: {reason}")


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
    guard = correcting(model, action=KEPT)
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


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_a_model_that_is_exported_with_the_guard_on_it_is_told() -> None:
    model, images = fallen(), mark(world(PROBE).images[:4])
    message = r"exported with the guard on it.*call guard\.bake\(\) and guard\.close\(\) before"
    with correcting(model) as guard:
        model.eval()
        for way in (torch.export.export, torch.jit.trace):
            arguments = (images,) if way is torch.jit.trace else ((images,),)
            with pytest.warns(UserWarning, match=message):
                way(model, *arguments)
        with pytest.raises(
            AttributeError, match=r"jit\.script cannot take a guarded model; call g"
        ):
            torch.jit.script(model)
        guard.bake()
        guard.close()
        torch.jit.trace(model, images)  # the way out; a warning would be an error


def test_a_baked_model_is_exported_as_it_predicts() -> None:
    model = fallen()
    guard = correcting(model, action=KEPT)
    corrected = logits(model)
    guard.bake()
    guard.close()
    images = mark(world(PROBE).images[:64])
    exported = torch.export.export(model.eval(), (images,)).module()
    torch.testing.assert_close(exported(images), corrected, rtol=0, atol=1e-4)
