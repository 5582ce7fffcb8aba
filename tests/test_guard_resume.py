"""Stopping and going on changes no bit; a state that does not belong here is refused."""

import copy
import io
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import (
    CLASSES,
    PROBE,
    QUICK,
    UPDATES,
    accuracy,
    fallen,
    flagging,
    net,
    sgd,
    stream,
    train,
    world,
)

from concept_guard import ConceptGuard, StateError

STEPS = 14  # rounds after 1 and 9, tracking after 3, 6 and 12; the mark is corrected from 1 on
ERASED_BY_HAND = 4  # after so many steps a second concept is erased
CONFIG = {**QUICK, "reference_images": 150, "ramp": 6}
CONFIG["action"] = ["project", "penalize", "rebalance"]
State = dict[str, Any]


def guard_on(model: nn.Module) -> ConceptGuard:
    return ConceptGuard(model, probe=world(PROBE).loader(), config=CONFIG)


def written(state: State) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def read(raw: bytes) -> State:
    state: State = torch.load(io.BytesIO(raw), weights_only=True)
    return state


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, guard: ConceptGuard) -> bytes:
    states = {"model": model, "optimizer": optimizer, "guard": guard}
    return written({name: part.state_dict() for name, part in states.items()})


def go_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, guard: ConceptGuard, done: int
) -> Iterator[bytes]:
    """Train to the end; yield a checkpoint after every step."""
    for step, batch in enumerate(stream(UPDATES + STEPS, first=UPDATES + done), start=done):
        if step == ERASED_BY_HAND:
            guard.erase(max(set(range(QUICK["concepts"])) - set(guard.erased)))
        train(model, [batch], guard, optimizer)
        yield checkpoint(model, optimizer, guard)


@cache
def uninterrupted() -> tuple[bytes, ...]:
    """Return the checkpoints before the first and after every step of one run."""
    model = fallen()
    optimizer, guard = sgd(model), guard_on(model)
    first = checkpoint(model, optimizer, guard)
    saved = (first, *go_on(model, optimizer, guard, 0))
    assert len(guard.erased) > 1  # otherwise nothing would have been at stake
    return saved


def resumed(raw: bytes, done: int) -> State:
    """Go on in new objects, as a new process would; return the final checkpoint."""
    torch.manual_seed(99)  # the guard must not depend on the global state
    model = net()
    return rolled_back(model, sgd(model), guard_on(model), raw, done)


def rolled_back(
    model: nn.Module, optimizer: torch.optim.Optimizer, guard: ConceptGuard, raw: bytes, done: int
) -> State:
    """Go on in these objects, whatever they have been through."""
    saved = read(raw)
    for name, part in (("model", model), ("optimizer", optimizer), ("guard", guard)):
        part.load_state_dict(saved[name])
    *_, last = go_on(model, optimizer, guard, done)
    return read(last)


def flat(state: object, path: str = "") -> dict[str, object]:
    """Return every leaf of a nested state by its path."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {path: state}


def differences(left: State, right: State) -> list[str]:
    """Return the paths of all leaves that differ, or that only one of the states has."""
    a, b = flat(left), flat(right)
    timed = ("/seconds", "/overhead")
    return [
        path
        for path in sorted(a.keys() | b.keys())
        if not path.endswith(timed) and not same(a.get(path), b.get(path))
    ]


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


# Before the first step; after a round; between rounds; before and after tracking; before a round.
@pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 5, 8, 9, 11])
def test_a_resumed_run_is_bit_identical(done: int) -> None:
    saved = uninterrupted()
    assert differences(read(saved[-1]), resumed(saved[done], done)) == []


@pytest.mark.parametrize("done", [1, 5])
def test_another_checkpoint_can_be_loaded_in_place(done: int) -> None:
    saved = uninterrupted()
    model = fallen()
    optimizer, guard = sgd(model), guard_on(model)
    guard.load_state_dict(read(saved[2])["guard"])
    train(model, stream(UPDATES + 3, first=UPDATES + 2), guard, optimizer)  # tracks one concept
    last = rolled_back(model, optimizer, guard, saved[done], done)
    assert differences(read(saved[-1]), last) == []


@pytest.mark.parametrize("lost", ["counts", "tracked", "steps"])
def test_the_comparison_notices_what_is_not_restored(lost: str) -> None:
    saved = uninterrupted()
    state = read(saved[5])
    before = read(saved[0])["guard"][lost]
    state["guard"][lost] = (
        before
        if lost != "counts"
        else {
            concept: torch.ones_like(counts) for concept, counts in state["guard"]["counts"].items()
        }
    )
    assert differences(read(saved[-1]), resumed(written(state), 5))


def test_a_loaded_state_shows_the_same_report_and_corrects_at_once() -> None:
    saved = read(uninterrupted()[5])
    model = fallen()
    model.load_state_dict(saved["model"])
    images, labels = world(PROBE).images, world(PROBE).labels
    plain = accuracy(model, images, labels)
    guard = guard_on(model)
    guard.load_state_dict(saved["guard"])
    other = guard_on(fallen())
    other.load_state_dict(guard.state_dict())
    assert guard.report is not None
    assert other.report is not None
    assert (guard.steps, guard.report.step) == (5, 1)
    for name in (f.name for f in fields(guard.report) if f.name != "concepts"):
        assert getattr(other.report, name) == getattr(guard.report, name)
    assert [c.id for c in other.report.concepts] == [c.id for c in guard.report.concepts]
    assert guard.erased == other.erased
    assert len(guard.erased) == 2
    assert accuracy(model, images, labels) != plain


def test_the_state_does_not_change_while_training_goes_on() -> None:
    model = fallen()
    guard = flagging(model)
    guard.erase(guard.report.flagged)
    taken = guard.state_dict()
    kept = copy.deepcopy(taken)
    train(model, stream(UPDATES + 4, first=UPDATES), guard)
    assert differences(taken, kept) == []
    assert differences(guard.state_dict(), kept)


def test_no_state_is_accepted_and_changes_nothing() -> None:
    guard = flagging()
    before = guard.state_dict()
    guard.load_state_dict(None)  # timm's resume calls a second time without a state
    assert differences(guard.state_dict(), before) == []


def other_schema(state: State) -> None:
    state["schema_version"] = 99


def without_a_schema(state: State) -> None:
    del state["schema_version"]


def incomplete(state: State) -> None:
    del state["tracked"], state["vetoed"]


REFUSED: dict[Callable[[State], None], str] = {
    other_schema: r"schema_version 99, expected 9.*start the guard afresh",
    without_a_schema: r"schema_version None, expected 9",
    incomplete: r"lacks tracked, vetoed; the checkpoint is incomplete",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_broken_state_is_refused(change: Callable[[State], None]) -> None:
    guard = flagging()
    before, state = guard.state_dict(), guard.state_dict()
    change(state)
    with pytest.raises(StateError, match=REFUSED[change]):
        guard.load_state_dict(state)
    assert differences(guard.state_dict(), before) == []


def wider() -> nn.Module:
    return net(channels=[8, 8, 16, 64])


def vit() -> nn.Module:
    return net("test_vit", img_size=16, patch_size=4)


@pytest.mark.parametrize(
    ("build", "tap", "message"),
    [
        (wider, "pre_logits", "channels is 32 in the state, 64 here"),
        (vit, "pre_logits", "class is 'ResNet' in the state, 'VisionTransformer' here; channels"),
        (net, "stage:-1", "tap is 'pre_logits' in the state, 'stage:-1' here"),
    ],
)
def test_the_state_of_another_model_or_tap_is_refused_by_name(
    build: Callable[[], nn.Module], tap: str, message: str
) -> None:
    state = flagging().state_dict()
    guard = ConceptGuard(build(), probe=world(PROBE, 80).loader(), config={"tap": tap})
    with pytest.raises(StateError, match=f"{message}.*Build the model and the guard as in the run"):
        guard.load_state_dict(state)
    assert (guard.report, guard.steps) == (None, 0)


def test_a_model_with_other_classes_is_refused_by_name() -> None:
    state = flagging().state_dict()
    model = net()
    model.reset_classifier(CLASSES - 1)
    three = world(PROBE, 80)
    probe = [(three.images[three.labels < 3], three.labels[three.labels < 3])]
    with pytest.raises(StateError, match="num_classes is 4 in the state, 3 here"):
        ConceptGuard(model, probe=probe).load_state_dict(state)


def test_the_state_of_another_probe_is_refused() -> None:
    state = flagging().state_dict()
    guard = ConceptGuard(fallen(), probe=world(PROBE, 80).loader())
    with pytest.raises(StateError, match="400 .* 80 here"):
        guard.load_state_dict(state)
