"""Two guards on one model watch and correct it at two places, and leave no trace."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from worlds import PROBE, QUICK, UPDATES, fallen, held_out, logits, sgd, stream, world

from concept_guard import BakeError, ConceptGuard

Untouched = Callable[[nn.Module], AbstractContextManager[None]]


def guards(model: nn.Module) -> tuple[ConceptGuard, ConceptGuard]:
    """Return one with the default actions at the head and one that projects at a feature map."""
    at_head = ConceptGuard(model, probe=world(PROBE).loader(), config=QUICK)
    settings = {**QUICK, "tap": "stage:-1", "action": ["project"]}
    return at_head, ConceptGuard(model, probe=world(PROBE).loader(), config=settings)


def test_each_acts_at_its_own_tap_and_sees_what_the_other_does() -> None:
    model = fallen()
    bare = logits(model)
    head, maps = guards(model)
    first = maps.round()
    assert first is not None
    maps.erase(first.concepts[0].id)
    with_maps = logits(model)
    assert (with_maps - bare).abs().max() > 0.01
    read = head.tap.read(world(PROBE).loader(), max_rows=10**6, seed=0)
    maps.restore(maps.erased)
    again = head.tap.read(world(PROBE).loader(), max_rows=10**6, seed=0)
    assert (read.rows - again.rows).abs().max() > 1e-3  # what reaches the head was edited before
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=0)
    head.close()
    maps.close()


def test_a_loop_with_two_guards_corrects_and_leaves_a_plain_checkpoint(
    untouched: Untouched,
) -> None:
    model = fallen()
    keys, before = list(model.state_dict()), held_out(model)
    head, maps = guards(model)
    optimizer = sgd(model)
    model.train()
    for images, labels in stream(UPDATES + 20, first=UPDATES):
        losses = cross_entropy(model(images), labels, reduction="none")
        maps.loss(head.loss(losses, labels), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        head.step()
        maps.step()
    assert head.erased
    report = maps.round()
    assert report is not None
    maps.erase(i for i in [report.concepts[0].id] if not maps.erased)
    with untouched(model), pytest.raises(BakeError, match="stage:-1"):
        maps.bake()  # a feature map is followed by more than a linear map
    maps.close()
    head.bake()
    head.close()
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    clean, marked = held_out(model)
    assert marked > before[1] + 0.3
    assert clean > before[0] - 0.05
    assert bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())
