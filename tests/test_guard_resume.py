"""Stopping and going on changes no bit; a state that does not belong here is refused."""

import copy
import io
import itertools
import time
from collections.abc import Callable
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
State = dict[str, Any]


def guard_on(model: nn.Module) -> ConceptGuard:
    return ConceptGuard(model, probe=world(PROBE).loader(), config=QUICK)


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


@cache
def uninterrupted() -> tuple[bytes, ...]:
    """Return the checkpoints before the first and after every step of one run."""
    model = fallen()
    optimizer, guard = sgd(model), guard_on(model)
    saved = [checkpoint(model, optimizer, guard)]
    for batch in stream(UPDATES + STEPS, first=UPDATES):
        train(model, [batch], guard, optimizer)
        saved.append(checkpoint(model, optimizer, guard))
    assert guard.erased  # otherwise nothing would have been at stake
    return tuple(saved)


def resumed(raw: bytes, done: int) -> State:
    """Go on in new objects, as a new process would; return the final checkpoint."""
    saved = read(raw)
    torch.manual_seed(99)  # the guard must not depend on the global state
    model = net()
    model.load_state_dict(saved["model"])
    optimizer, guard = sgd(model), guard_on(model)
    optimizer.load_state_dict(saved["optimizer"])
    guard.load_state_dict(saved["guard"])
    train(model, stream(UPDATES + STEPS, first=UPDATES + done), guard, optimizer)
    return read(checkpoint(model, optimizer, guard))


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
@pytest.mark.parametrize("done", [0, 1, 2, 3, 5, 8, 9, 11])
def test_a_resumed_run_is_bit_identical(done: int) -> None:
    saved = uninterrupted()
    assert differences(read(saved[-1]), resumed(saved[done], done)) == []


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
    assert guard.erased == other.erased == guard.report.erased
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
    other_schema: r"schema_version 99, expected 1.*start the guard afresh",
    without_a_schema: r"schema_version None, expected 1",
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


def rounds(guard: ConceptGuard, model: nn.Module, updates: int) -> list[int]:
    """Return the updates after which a round ran."""
    ran = []
    for update in range(1, updates + 1):
        model(world(PROBE).images[:2])
        if guard.step() is not None:
            ran.append(update)
    return ran


SCHEDULED = {"concepts": 2, "action": "observe"}


def test_rounds_follow_a_schedule_in_epochs() -> None:
    model = net()
    config = {**SCHEDULED, "start": "1ep", "every": "0.5ep", "steps_per_epoch": 4}
    guard = ConceptGuard(model, probe=world(PROBE, 60).loader(), config=config)
    assert rounds(guard, model, 7) == [4, 6]
    assert guard.report is not None
    assert (guard.steps, guard.report.step) == (7, 6)


def test_a_budget_postpones_rounds_until_it_allows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # a look costs a second
    model = net()
    config = {**SCHEDULED, "start": 1, "every": 2, "budget": "20%"}
    guard = ConceptGuard(model, probe=world(PROBE, 60).loader(), config=config)
    ran = rounds(guard, model, 60)
    assert ran[0] == 1  # nothing has been spent yet
    assert len(ran) > 2  # a round that is put off is not lost
    assert min(b - a for a, b in zip(ran, ran[1:], strict=False)) > 2  # but comes later
    assert guard.report is not None
    assert 0 < guard.report.overhead < 0.3
