"""A copy is baked in the middle of training; the model, the guard and the training go on."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from worlds import (
    KEPT,
    UPDATES,
    Untouched,
    correcting,
    erased_at,
    fallen,
    flagging,
    held_out,
    logits,
    net,
    stream,
    train,
    without_bias,
)

from concept_guard import BakeError

ALL = (*KEPT, "refit")


def same(a: nn.Module, b: nn.Module) -> bool:
    """Return whether two models have the same entries, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return list(left) == list(right) and all(torch.equal(left[k], right[k]) for k in left)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("action", [KEPT, ALL], ids=["project", "refit"])
def test_the_copy_is_the_model_as_bake_would_leave_it(
    untouched: Untouched, action: tuple[str, ...]
) -> None:
    model = fallen()
    guard = correcting(model, action=action)
    train(model, stream(UPDATES + 2, first=UPDATES), guard)
    erased, state = guard.erased, copy.deepcopy(guard.state_dict())
    with untouched(model):
        baked = guard.baked_copy()
    assert guard.erased == erased
    assert torch.equal(guard.state_dict()["subspace"]["filters"], state["subspace"]["filters"])
    assert hooks(baked) == 0
    assert not same(baked, model)  # control
    guard.bake()
    assert same(baked, model)


def test_training_goes_on_as_if_no_copy_had_been_made() -> None:
    models = [fallen(), fallen()]
    for model, copies in zip(models, (False, True), strict=True):
        guard = correcting(model)
        for first in (UPDATES, UPDATES + 4):
            train(model, stream(first + 4, first=first), guard)
            if copies:
                guard.baked_copy()
    assert same(*models)


def test_an_average_of_the_weights_is_baked_from_its_own_rows(untouched: Untouched) -> None:
    model = fallen()
    guard = correcting(model, action=KEPT)
    ema = ModelEmaV3(model, decay=0.7)
    for first in range(UPDATES, UPDATES + 6, 2):
        train(model, stream(first + 2, first=first), guard)
        ema.update(model)
    with untouched(ema.module):
        baked = guard.baked_copy(ema.module)
    assert hooks(baked) == 0
    changed = {
        n for n, v in baked.state_dict().items() if not torch.equal(v, ema.module.state_dict()[n])
    }
    assert changed == {"fc.weight", "fc.bias"}
    assert not torch.allclose(logits(baked), logits(guard.baked_copy()), atol=1e-2)  # it is another
    uncorrected = ema.module
    (head,) = [m for m in uncorrected.modules() if m._forward_pre_hooks and m is not uncorrected]
    head._forward_pre_hooks.clear()
    before, after = held_out(uncorrected), held_out(baked)
    assert after[1] > before[1] + 0.1
    assert after[0] > before[0] - 0.05


def test_without_a_correction_the_copy_is_the_model() -> None:
    model = fallen()
    for action in ("observe", KEPT):
        guard = flagging(model, action=action)
        assert same(guard.baked_copy(), model)
        guard.close()


@pytest.mark.parametrize(
    ("build", "tap", "message"),
    [
        (net, "stage:-1", "no plain linear map.*Use tap: pre_logits"),
        (without_bias, "pre_logits", "a classifier without bias"),
    ],
)
def test_what_cannot_be_folded_is_refused(
    untouched: Untouched, build: Callable[[], nn.Module], tap: str, message: str
) -> None:
    model = build()
    guard = erased_at(model, tap)
    with untouched(model), pytest.raises(BakeError, match=message):
        guard.baked_copy()


def test_a_correction_that_is_gone_is_not_passed_over() -> None:
    for end in ("bake", "close"):
        guard = correcting()
        getattr(guard, end)()
        with pytest.raises(BakeError, match="call baked_copy before that"):
            guard.baked_copy()


def test_a_network_that_is_not_finite_is_said(untouched: Untouched) -> None:
    model = fallen()
    guard = correcting(model)
    train(model, stream(UPDATES + 1, first=UPDATES), guard)
    broken: Tensor = model.get_parameter("layer4.0.bn1.weight")
    with torch.no_grad():
        broken.fill_(float("inf"))
    with untouched(model), pytest.raises(ValueError, match="hold NaN or infinite values"):
        guard.baked_copy()
