"""A gated projection leaves images without a concept alone, follows its pairs and is not baked."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from worlds import TEST, UPDATES, correcting, fallen, held_out, logits, mark, stream, train, world

from concept_guard import BakeError, ConfigError, GuardConfig

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
GATED = {"gate": True, "action": ["project", "rebalance"]}


def change(gated: bool, images: Tensor) -> Tensor:
    """Return the largest change of each image's logits by the first round's projection."""
    model = fallen()
    bare = logits(model, images)
    guard = correcting(model, **{**GATED, "gate": gated})
    guard.round()
    assert guard.erased
    changed = (logits(model, images) - bare).abs().amax(dim=1)
    guard.close()
    return changed


def test_images_without_the_mark_keep_their_logits_and_marked_ones_are_corrected() -> None:
    test = world(TEST)
    others = test.images[test.labels != 0]
    gated, ungated = change(True, others), change(False, others)
    assert float(gated.median()) < 0.02 * float(ungated.median())
    marked = mark(others)
    assert float(change(True, marked).median()) > 0.5 * float(change(False, marked).median()) > 1
    model = fallen()
    before = held_out(model)
    guard = correcting(model, **GATED)
    guard.round()
    after = held_out(model)
    guard.close()
    assert after[1] > before[1] + 0.2
    assert after[0] > before[0] - 0.02


def test_a_gated_projection_is_not_baked(untouched: Untouched) -> None:
    model = fallen()
    guard = correcting(model, **GATED)
    guard.round()
    with untouched(model), pytest.raises(BakeError, match=r"gate = true.*Set gate: false"):
        guard.bake()
    assert guard.erased
    guard.close()


def test_the_gate_reads_by_the_pairs_as_they_are_now_and_survives_the_state() -> None:
    model = fallen()
    guard = correcting(model, **GATED, start=1000)
    guard.round()
    edit = guard.tap.edit
    assert edit is not None
    before = edit.gate.filters.clone()
    train(model, stream(UPDATES + 8, first=UPDATES), guard)  # tracks
    assert guard.tap.edit is edit  # nothing to recompile
    assert not torch.equal(edit.gate.filters, before)
    pairs = torch.stack([t.pair.filter for t in guard._corrector.tracked])
    assert torch.equal(edit.gate.filters, pairs)
    copied = copy.deepcopy(model)  # with the hook, whose edit is looked at below
    again = correcting(fallen(), **GATED, start=1000)
    again.load_state_dict(guard.state_dict())
    assert again.tap.edit is not None
    for name in ("filters", "thresholds", "widths"):
        assert torch.equal(getattr(again.tap.edit.gate, name), getattr(edit.gate, name))
    torch.testing.assert_close(logits(copied), logits(model), rtol=0, atol=0)
    guard.close()
    again.close()


def test_the_gate_is_on_or_off() -> None:
    assert GuardConfig().gate is False
    with pytest.raises(ConfigError, match="gate = 'soft': expected"):
        GuardConfig.load({"gate": "soft"})
