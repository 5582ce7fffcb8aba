"""What people do: erase, restore, veto, approve, bake; each is visible and undoable."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from worlds import (
    PROBE,
    QUICK,
    UPDATES,
    correcting,
    fallen,
    flagging,
    logits,
    stream,
    the_flagged,
    train,
    world,
)

from concept_guard import ConceptGuard
from concept_guard.benefit import Probation


def statuses(guard: ConceptGuard) -> dict[int, str]:
    assert guard.report is not None
    return {flag.concept: flag.status for flag in guard.report.flags}


def test_erasing_corrects_at_once_and_restoring_undoes_it() -> None:
    model = fallen()
    guard = flagging(model)
    plain, concept = logits(model), the_flagged(guard)
    guard.erase(concept)
    assert guard.erased == (concept,)
    assert logits(model)[:, 0].mean() < plain[:, 0].mean() - 1  # it pulled towards class 0
    guard.erase([concept])  # again: nothing more
    assert guard.erased == (concept,)
    guard.restore([concept])
    assert guard.erased == ()
    assert torch.equal(logits(model), plain)


def test_an_unflagged_concept_can_be_erased_too() -> None:
    model = fallen()
    guard = flagging(model)
    plain = logits(model)
    assert guard.report is not None
    other = next(c.id for c in guard.report.concepts if c.id not in guard.report.flagged)
    guard.erase(other)
    assert guard.erased == (other,)
    assert not torch.equal(logits(model), plain)


def test_strength_takes_a_share_of_the_way() -> None:
    changes = []
    for strength in (0.25, 0.5, 1.0):
        model = fallen()
        guard = flagging(model, strength=strength)
        plain = logits(model)
        guard.erase(the_flagged(guard))
        changes.append(logits(model) - plain)
    torch.testing.assert_close(changes[0], changes[2] / 4, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(changes[1], changes[2] / 2, rtol=1e-3, atol=1e-3)


def test_a_restored_concept_stays_vetoed_until_it_is_approved() -> None:
    model = fallen()
    guard = correcting(model)
    (concept,) = guard.erased
    guard.restore(concept)
    guard.round()
    assert statuses(guard)[concept] == "vetoed"
    assert guard.report is not None
    assert concept not in {*guard.erased, *guard.report.flagged}
    guard.approve(concept)
    guard.round()
    assert statuses(guard)[concept] == "erased"
    assert concept in guard.erased


def harm(self: Probation, groups: dict[int, tuple[Tensor, Tensor]], now: Tensor) -> dict[int, str]:
    """Say of every correction on probation that it harms."""
    assert all(own.shape == carried.shape == now.shape for own, carried in groups.values())
    return {i: f"concept {i} does harm" for i in groups if i in self.right}


def test_a_correction_that_harms_is_withdrawn_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fallen()
    plain, guard = logits(model), correcting(model)
    (concept,) = guard.erased
    assert guard.round() is not None
    assert guard.erased == (concept,)  # control: it helps
    monkeypatch.setattr(Probation, "verdicts", harm)
    report = guard.round()
    assert report is not None
    assert guard.erased == report.erased == ()
    assert f"concept {concept} does harm" in report.notes
    assert torch.equal(logits(model), plain)
    guard.round()
    assert guard.erased == ()  # not taken up again
    assert statuses(guard)[concept] == "vetoed"


def test_what_a_person_erased_is_not_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = flagging()
    concept = the_flagged(guard)
    guard.erase(concept)
    monkeypatch.setattr(Probation, "verdicts", harm)
    guard.round()
    assert concept in guard.erased


def test_a_veto_restores_and_lasts_over_a_checkpoint() -> None:
    model = fallen()
    plain = logits(model)
    guard = correcting(model)
    (concept,) = guard.erased
    guard.veto(concept)
    assert guard.erased == ()
    assert torch.equal(logits(model), plain)
    guard.close()
    again = flagging(model)
    again.load_state_dict(guard.state_dict())
    again.round()
    assert statuses(again)[concept] == "vetoed"
    again.erase(concept)  # the last word counts
    assert again.erased == (concept,)


def test_manual_approval_waits_and_changes_no_weight_until_then() -> None:
    plain, model = fallen(), fallen()
    guard = flagging(model, approve="manual")
    train(model, stream(UPDATES + 4, first=UPDATES), guard)  # with a round after update 1
    train(plain, stream(UPDATES + 4, first=UPDATES))
    concept = the_flagged(guard)
    assert (statuses(guard)[concept], guard.erased) == ("waiting", ())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    guard.approve(concept)
    assert guard.erased == (concept,)
    assert not torch.equal(logits(model), logits(plain))
    guard.round()
    assert statuses(guard)[concept] == "erased"


def test_approval_in_advance_needs_no_waiting() -> None:
    guard = flagging(approve="manual")
    concept = the_flagged(guard)
    assert statuses(guard)[concept] == "found"  # as the guard that only observed left it
    guard.approve(concept)
    assert guard.erased == ()
    guard.round()
    assert guard.erased == (concept,)


@pytest.mark.parametrize("act", ["erase", "veto", "approve"])
def test_unknown_ids_are_named_with_the_known_ones(act: str) -> None:
    guard = flagging()
    known = ", ".join(map(str, range(QUICK["concepts"])))
    message = (
        r"concepts \[77, 78\] are not among those of the last round \(guard.report.concepts\), "
        rf"which are \[{known}\]"
    )
    with pytest.raises(ValueError, match=message):
        getattr(guard, act)([0, 78, 77])
    assert guard.erased == ()


@pytest.mark.parametrize("act", ["erase", "restore", "veto", "approve"])
@pytest.mark.parametrize("ids", [True, 1.0, "7", [0, None]], ids=str)
def test_ids_that_are_no_whole_numbers_are_refused(act: str, ids: Any) -> None:
    guard = correcting()
    kept = guard.erased
    with pytest.raises(TypeError, match="concept ids: got .*expected whole numbers, as in guard"):
        getattr(guard, act)(ids)
    assert guard.erased == kept


def test_ids_may_be_numpy_integers() -> None:
    guard = flagging()
    guard.erase(np.int64(the_flagged(guard)))
    assert guard.erased == (the_flagged(guard),)
    assert type(guard.erased[0]) is int


def test_two_concepts_with_the_same_images_are_not_erased_together() -> None:
    guard = flagging()
    first = the_flagged(guard)
    states = guard.state_dict()
    other = next(i for i in states["ids"] if i != first)
    at, to = (states["ids"].index(i) for i in (first, other))
    for tensor in states["pairs"].values():
        tensor[to] = tensor[at]
    guard.load_state_dict(states)
    message = rf"erased together: concept {other} has the images of concept {first}\. Erase one"
    with pytest.raises(ValueError, match=message):
        guard.erase([first, other])
    assert guard.erased == ()
    guard.erase(first)
    with pytest.raises(ValueError, match=message):
        guard.erase(other)
    assert guard.erased == (first,)


def test_restoring_what_is_not_erased_names_what_is() -> None:
    guard = correcting()
    (concept,) = guard.erased
    message = rf"\[77\] are not among .* correction, which are \[{concept}\]"
    with pytest.raises(ValueError, match=message):
        guard.restore([concept, 77])
    assert guard.erased == (concept,)


def test_at_most_so_many_are_erased_as_configured() -> None:
    guard = flagging(max_erased=1)
    first = the_flagged(guard)
    other = next(i for i in range(QUICK["concepts"]) if i != first)
    guard.erase(first)
    message = rf"cannot erase \[{other}\] as well: 1 are erased and max_erased is 1; restore one or"
    with pytest.raises(ValueError, match=message):
        guard.erase(other)
    assert guard.erased == (first,)


def test_acts_are_logged(tmp_path: Path) -> None:
    model, states = fallen(), flagging().state_dict()
    guard = ConceptGuard(model, probe=world(PROBE).loader(), config=QUICK, log_dir=tmp_path)
    guard.load_state_dict(states)
    concept = the_flagged(guard)
    guard.erase(concept)
    guard.restore([concept])
    guard.veto(concept)
    guard.approve(concept)
    guard.bake()
    guard.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    written = events.Tensors("concept_guard/report/text_summary")
    texts = [event.tensor_proto.string_val[0].decode() for event in written]
    acts = [
        *(f"{act} {concept}" for act in ("erase", "restore", "veto", "approve")),
        f"bake: {guard.baked}",
    ]
    # Of one step only the last text is shown: it says all.
    assert texts == ["\n\n".join(acts[: i + 1]) for i in range(len(acts))]


def test_acts_do_not_hide_the_table_of_a_round_of_the_same_step(tmp_path: Path) -> None:
    guard = ConceptGuard(fallen(), probe=world(PROBE).loader(), config=QUICK, log_dir=tmp_path)
    report = guard.round()
    assert report is not None
    guard.bake()
    guard.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    last = events.Tensors("concept_guard/report/text_summary")[-1].tensor_proto.string_val[0]
    assert "| risk difference |" in last.decode()
    assert guard.baked.startswith("classifier ")
    assert last.decode().endswith(f"bake: {guard.baked}")


@pytest.mark.parametrize("action", ["project", "rebalance"])
def test_activations_are_kept_only_while_something_is_corrected(action: str) -> None:
    model = fallen()
    guard = flagging(model, action=action)
    images = world(PROBE).images[:4]
    model.train()(images)
    assert guard.tap.captured is None
    guard.erase(the_flagged(guard))
    model.train()(images)
    assert guard.tap.captured is not None
    guard.restore(guard.erased)
    guard.tap.forget()
    model.train()(images)
    assert guard.tap.captured is None


def test_a_closed_guard_keeps_no_reference_images() -> None:
    model = fallen()
    guard = correcting(model)
    train(model, stream(UPDATES + 4, first=UPDATES), guard)  # a round, then tracks once
    concept = guard._corrector.tracked[0]
    assert guard._corrector._references.held is not None
    held = [
        weakref.ref(tensor) for tensor in (*guard._corrector._references.held, concept.carriers)
    ]
    del concept
    guard.close()
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)
