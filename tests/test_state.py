"""What is saved is plain, loads without running code, comes back whole, or is refused by name."""

import io
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from planted import normal
from torch import Tensor

from concept_guard import state
from concept_guard.directions import Concept, DirectionPairs, WithinClassPair
from concept_guard.errors import StateError
from concept_guard.flags import Flag
from concept_guard.records import Group, RoundReport
from concept_guard.tracking import Tracked

CPU = torch.device("cpu")


def through_a_file(saved: Any) -> Any:  # noqa: ANN401 - that is what torch.load gives
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same(a: object, b: object) -> None:
    """Compare records field by field, tensors bit for bit, types included."""
    assert type(a) is type(b)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, tuple) and isinstance(b, tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif hasattr(a, "__dataclass_fields__"):
        for field in fields(a):  # type: ignore[arg-type]
            assert_same(getattr(a, field.name), getattr(b, field.name))
    else:
        assert a == b


def tracked(rng: torch.Generator) -> Tracked:
    pair = WithinClassPair(normal(rng, 5).float(), normal(rng, 5).float(), 0.25, 1.5, 0.125)
    carriers = torch.rand(6, 2, generator=rng) < 0.5
    return Tracked(4, 1, pair, carriers, 0.75, torch.tensor([1, 3]), carriers[[1, 3]])


def report(rng: torch.Generator) -> RoundReport:
    flags = tuple(
        Flag(i, 2, 0.5, (0.2, 0.7), 1e-4, 1e-3, 7, 1, 30, (3, 9), status, "because")
        for i, status in enumerate(("erased", "unconfirmed"))
    )
    concepts = tuple(
        Concept(i, normal(rng, 5), normal(rng, 5), -0.5, 0.25, (8, 2)) for i in range(2)
    )
    values: dict[str, Any] = {f.name: 0.5 for f in fields(RoundReport)}
    values |= {"step": 70, "errors_seen": 12, "images_seen": 100, "verdict": "flagged: something"}
    values |= {"concepts": concepts, "flags": flags, "erased": (0,), "leak": {0: 0.01}}
    values |= {"accuracy_if_erased": None, "drift": {1: 0.9}, "new": (1,), "vanished": (0, 2)}
    values |= {"notes": ("1 of 3 concepts is missing",), "withdrawn": (4,)}
    values |= {"groups": (Group(1, 0, True, 5, 0.8, None), Group(1, 0, False, 0, None))}
    return RoundReport(**values)


def test_pairs_come_back_bit_for_bit(rng: torch.Generator) -> None:
    pairs = DirectionPairs(normal(rng, 3, 5), normal(rng, 3, 5), normal(rng, 3))
    saved = state.from_pairs(pairs)
    assert_same(state.to_pairs(through_a_file(saved), CPU), pairs)
    assert saved is not None
    saved["filters"].zero_()
    assert pairs.filters.abs().max() > 0  # what is saved shares no memory


def test_a_tracked_concept_comes_back_bit_for_bit(rng: torch.Generator) -> None:
    concept = tracked(rng)
    saved = state.from_tracked(concept)
    back = state.to_tracked(through_a_file(saved), CPU)
    assert_same(back, concept)
    for tensor in (saved["pair"]["filter"], saved["pair"]["signal"], saved["images"]):
        tensor.zero_()
    assert_same(back, concept)


def test_a_report_comes_back_whole(rng: torch.Generator) -> None:
    before = report(rng)
    assert_same(state.to_report(through_a_file(state.from_report(before))), before)


def test_nothing_comes_back_as_nothing() -> None:
    assert state.from_pairs(None) is None
    assert state.from_report(None) is None
    assert state.to_pairs(None, CPU) is None
    assert state.to_report(None) is None


def test_the_comparison_used_here_can_fail(rng: torch.Generator) -> None:
    one, other = tracked(rng), tracked(rng)
    with pytest.raises(AssertionError):
        assert_same(one, other)


KNOWN = {"schema_version", "model", "steps", "pairs"}
MODEL = {"tap": "pre_logits", "channels": 512, "classes": 10}


def saved_state(**changes: object) -> dict[str, Any]:
    whole = {"schema_version": state.SCHEMA_VERSION, "model": MODEL, "steps": 7, "pairs": None}
    return {**whole, **changes}


def test_a_state_of_this_model_is_accepted_with_keys_to_spare() -> None:
    state.check(saved_state(), MODEL, KNOWN)
    state.check(saved_state(extra=1, model={**MODEL, "note": "x"}), MODEL, KNOWN)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (
            saved_state(schema_version=99),
            "guard state has schema_version 99, expected 9; load it with the concept_guard version",
        ),
        ({}, "guard state has schema_version None, expected 9"),
        ({"model": MODEL}, "guard state has schema_version None"),
        (
            {"schema_version": state.SCHEMA_VERSION, "model": MODEL},
            "guard state lacks pairs, steps; the checkpoint is incomplete",
        ),
        (
            saved_state(model={**MODEL, "channels": 64}),
            "belongs to another model: channels is 64 in the state, 512 here. Build the model and",
        ),
        (
            saved_state(model={"tap": "layer4", "classes": 10}),
            "tap is 'layer4' in the state, 'pre_logits' here; "
            "channels is None in the state, 512 here.",
        ),
    ],
)
def test_a_state_that_does_not_belong_here_is_refused_with_every_difference(
    saved: dict[str, Any], message: str
) -> None:
    with pytest.raises(StateError, match=re.escape(message)):
        state.check(saved, MODEL, KNOWN)
