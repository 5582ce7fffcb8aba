"""A guarded run that penalizes: at any tap, compiled or not, and with a strength that grows."""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from worlds import (
    CLASSES,
    PROBE,
    QUICK,
    UPDATES,
    correcting,
    erased_at,
    fallen,
    held_out,
    logits,
    stream,
    train,
    world,
)

from concept_guard import ConceptGuard
from concept_guard.correction import Projection
from concept_guard.penalty import EVERY, MEASURED

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
IMAGES, LABELS = next(stream(UPDATES + 1, first=UPDATES))
BEHIND = "stage:-2"  # no plain linear map follows
LONGER = 88


def penalizing(model: nn.Module, tap: str = "pre_logits", **config: object) -> ConceptGuard:
    """Return a guard that penalizes, with its first share measured: the next call adds a term."""
    if tap == "pre_logits":
        guard = correcting(model, action="penalize", start=1000, **config)
    else:
        guard = erased_at(model, tap, **{"action": "penalize", **config})
    assert guard.erased
    calls = EVERY * (MEASURED + 1) - 1 if tap == BEHIND else MEASURED + 1
    kept = copy.deepcopy(model.state_dict())
    model(IMAGES)
    for _ in range(calls):
        guard.loss(torch.tensor(1.0))
    model.load_state_dict(kept)
    return guard


def gradients(
    model: nn.Module,
    guard: ConceptGuard | None = None,
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    autocast: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of a batch and its gradients, always from the same weights."""
    kept = copy.deepcopy(model.state_dict())
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = cross_entropy((model if call is None else call)(IMAGES), LABELS, reduction="none")
        loss = losses.mean() if guard is None else guard.loss(losses, LABELS)
    loss.backward()
    model.load_state_dict(kept)
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("tap", "behind"), [("pre_logits", {"fc.weight"}), (BEHIND, {"layer4", "fc"})]
)
def test_only_what_is_behind_the_tap_learns_and_the_loss_keeps_its_value(
    tap: str, behind: set[str]
) -> None:
    model = fallen()
    guard = penalizing(model, tap)
    plain_loss, plain = gradients(model)
    loss, penalized = gradients(model, guard)
    assert loss == plain_loss
    moved = {name for name in plain if not torch.equal(plain[name], penalized[name])}
    assert {name if name in behind else name.split(".")[0] for name in moved} == behind
    assert all(bool(g.isfinite().all()) for g in penalized.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tap", ["pre_logits", BEHIND])
def test_a_compiled_model_gets_the_same_gradients(tap: str, autocast: bool) -> None:
    model = fallen()
    guard = penalizing(model, tap)
    saved = guard.state_dict()
    loss, expected = gradients(model, guard, autocast=autocast)
    guard.load_state_dict(saved)
    plain = gradients(model, autocast=autocast)[1]
    graphs: list[object] = []
    known = 0

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        guard.load_state_dict(saved)
        again, found = gradients(model, guard, call=compiled.__call__, autocast=autocast)
        torch.testing.assert_close(again, loss, rtol=1e-4, atol=0)
        for name in found:
            # In bfloat16 the CPU's convolutions of maps of one pixel have gradients with
            # uninitialised values, with and without a guard.
            if not autocast or name.startswith("fc."):
                torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)
        known = known or len(graphs)
    assert len(graphs) == known  # nothing is compiled anew
    added = (expected["fc.weight"] - plain["fc.weight"]).abs().max()
    assert added > 1e-3  # control: there was something to agree on


@pytest.mark.parametrize("tap", ["pre_logits", BEHIND])
def test_penalizing_leaves_modes_statistics_and_random_state(
    untouched: Untouched, tap: str
) -> None:
    model = fallen()
    guard = penalizing(model, tap)
    model.layer1.eval()
    model(IMAGES)
    with untouched(model):
        loss = guard.loss(torch.tensor(1.0, requires_grad=True))
    assert loss.grad_fn is not None  # it was this update
    loss.backward()
    assert model.fc.weight.grad is not None
    guard.close()
    assert guard.tap.images is None


def test_the_hooks_of_a_tap_with_positions_leave_with_the_guard(untouched: Untouched) -> None:
    model = fallen()
    with untouched(model):
        config = {"tap": BEHIND, "action": "penalize"}
        with ConceptGuard(model, probe=world(PROBE, 80).loader(), config=config) as guard:
            hooks = len(model._forward_pre_hooks)
            copied = copy.deepcopy(model)
            guard.tap.listening = True
            copied(IMAGES)
            assert guard.tap.images is None  # the copy, as for an EMA, says nothing
    assert hooks == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ConceptGuard, Path]:
    model, folder = fallen(), tmp_path_factory.mktemp("run")
    config = {**QUICK, "action": "penalize"}
    guard = ConceptGuard(model, probe=world(PROBE).loader(), config=config, log_dir=folder)
    train(model, stream(UPDATES + LONGER + 1, first=UPDATES), guard)
    guard.close()
    return model, guard, folder


def test_a_run_holds_the_share_down_and_shows_it(
    run: tuple[nn.Module, ConceptGuard, Path],
) -> None:
    model, guard, folder = run
    assert guard.report is not None
    events = EventAccumulator(str(folder)).Reload().Scalars("concept_guard/summary/penalty")
    shares = [event.value for event in events]
    assert shares[0] == 0.0  # the first round found the mark, and no batch was seen since
    assert guard.report.penalty == pytest.approx(shares[-1])
    assert 0 < shares[-1] < 0.3 * max(shares)
    clean, marked = held_out(model)
    plain = fallen()
    train(plain, stream(UPDATES + LONGER + 1, first=UPDATES))
    clean_plain, marked_plain = held_out(plain)
    assert marked > marked_plain + 0.1
    assert clean > clean_plain - 0.02


@pytest.mark.parametrize("tap", ["pre_logits", BEHIND])
def test_without_a_projection_baking_has_nothing_to_fold(untouched: Untouched, tap: str) -> None:
    model = fallen()
    guard = penalizing(model, tap)
    before = logits(model)
    with untouched(model):
        guard.bake()
    assert guard.erased == ()
    assert torch.equal(logits(model), before)
    assert guard.report is not None


def test_a_classifier_that_is_replaced_stops_nothing_but_the_correction() -> None:
    for action in (["penalize"], ["project", "penalize", "rebalance"]):
        model = fallen()
        guard = correcting(model, start=100, action=action)
        model.reset_classifier(CLASSES)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = cross_entropy(model(IMAGES), LABELS, reduction="none")
        with pytest.warns(UserWarning, match="nothing is corrected: the classifier behind tap"):
            loss = guard.loss(losses, LABELS)
        assert torch.equal(loss, losses.mean())
        loss.backward()
        optimizer.step()
        assert torch.equal(guard.loss(losses, LABELS), losses.mean())  # said once


CANNOT: dict[str, tuple[Tensor, str]] = {
    "one sample": (IMAGES[:1], "penalizing cannot act: the batch has one sample"),
    "not finite": (IMAGES[:4] * torch.nan, "penalizing cannot act: the logits of the batch do not"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_where_penalizing_cannot_act_it_says_so_once(case: str) -> None:
    images, message = CANNOT[case]
    model = fallen()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    guard = penalizing(model)
    model(images)
    with pytest.warns(UserWarning, match=message):
        assert guard.loss(torch.tensor(1.5)) == 1.5
    state = guard.state_dict()["penalty"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.loss(torch.tensor(1.5)) == 1.5
    assert state["share"] == guard.state_dict()["penalty"]["share"]


def test_the_strength_grows_from_nothing_for_all_actions_together() -> None:
    model = fallen()
    kinds = ["project", "penalize", "rebalance"]
    guard = correcting(model, start=1000, track_every=1000, action=kinds, ramp=4, strength=0.8)
    plain = logits(fallen())
    edit = guard.tap.edit
    assert isinstance(edit, Projection)
    torch.testing.assert_close(logits(model), plain)
    subspace = guard._corrector.erasure.subspace
    assert subspace is not None
    for update in range(6):
        strength = 0.8 * min(1.0, update / 4)
        assert guard._corrector.strength == pytest.approx(strength)
        torch.testing.assert_close(edit.moves, strength * subspace.signals)
        model(IMAGES)
        rows = guard.tap.captured
        assert rows is not None
        counts = copy.deepcopy(guard._corrector._counts)
        expected = counts.weights(guard._corrector.tracked, rows, LABELS, strength)
        found = guard.loss(torch.arange(32.0), LABELS).detach()
        assert found.item() == pytest.approx(float((expected * torch.arange(32.0)).mean()))
        assert (abs(float(expected.mean()) - 1) > 1e-3) == (update > 0)  # commoner groups
        guard.step()
    assert guard.tap.edit is edit  # nothing recompiles
    model(IMAGES)
    guard.restore(guard.erased)
    assert guard._corrector.strength == pytest.approx(0.8)  # what is left of the ramp
    guard.step()
    assert guard._corrector.strength == 0.0  # nothing is corrected: it begins anew
