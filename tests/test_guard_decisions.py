"""A run carries out what people decide on the command line, and nothing else changes."""

import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_guard_resume import differences
from torch import nn
from worlds import PROBE, QUICK, UPDATES, fallen, logits, sgd, stream, the_flagged, world

from concept_guard import BakeError, ConceptGuard, cli
from concept_guard.decisions import ACTS, FOLDER, STANDING, Decision, Standing, append


def manual(folder: Path | None, model: nn.Module | None = None, **config: object) -> ConceptGuard:
    """Return a guard whose flag waits."""
    settings = {**QUICK, "approve": "manual", **config}
    return ConceptGuard(
        model or fallen(), probe=world(PROBE).loader(), config=settings, log_dir=folder
    )


def decide(folder: Path, act: str, *ids: int) -> None:
    assert cli.main([act, str(folder), *map(str, ids)]) == 0


def standing(folder: Path) -> Standing:
    return Standing.read(folder / FOLDER)


def texts(folder: Path) -> str:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    written = events.Tensors("concept_guard/report/text_summary")
    return "\n".join(event.tensor_proto.string_val[0].decode() for event in written)


class Run:
    """A model in training with its guard, whose flags wait."""

    def __init__(self, folder: Path | None, **config: object) -> None:
        self.model = fallen()
        self.optimizer = sgd(self.model, lr=1e-4)  # the flags of the first round remain
        self.guard = manual(folder, self.model, **config)
        self.done = 0

    def go(self, until: int) -> Iterator[bytes]:
        """Train; yield a checkpoint after every step."""
        self.model.train()
        for images, labels in stream(UPDATES + until, first=UPDATES + self.done):
            losses = nn.functional.cross_entropy(self.model(images), labels, reduction="none")
            self.guard.loss(losses, labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.guard.step()
            self.done += 1
            yield self.saved()

    def train(self, until: int) -> None:
        """Train."""
        for _ in self.go(until):
            pass

    def saved(self) -> bytes:
        """Return a checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer, "guard": self.guard}
        return pickle.dumps({name: part.state_dict() for name, part in parts.items()})

    def load(self, raw: bytes) -> None:
        """Go on from a checkpoint, in the order in which a user may load its parts."""
        saved = pickle.loads(raw)
        self.guard.load_state_dict(saved["guard"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.done = saved["guard"]["steps"]


def before_the_next_round(guard: ConceptGuard, act: Callable[[], None]) -> None:
    """Let something happen in the step of the next round, before it looks."""
    look = guard._watch.round

    def acted(step: int, overhead: float) -> Any:
        guard._watch.round = look  # type: ignore[method-assign]
        act()
        return look(step, overhead)

    guard._watch.round = acted  # type: ignore[method-assign]


def unlike(one: bytes, other: bytes, *, read: bool = True) -> list[str]:
    """Return where two checkpoints differ; `read` says whether the count of decisions counts."""
    found = differences(pickle.loads(one), pickle.loads(other))
    return [path for path in found if read or path != "/guard/decisions_read"]


def test_without_decisions_nothing_changes_and_with_one_it_does(tmp_path: Path) -> None:
    one, other, third = Run(None), Run(tmp_path / "a"), Run(tmp_path / "b")
    for run in (one, other, third):
        run.train(2)
    decide(tmp_path / "b", "approve", the_flagged(third.guard))
    for run in (one, other, third):
        run.train(10)
    assert unlike(one.saved(), other.saved()) == []
    assert unlike(one.saved(), third.saved())  # control


@pytest.mark.parametrize("act", ACTS)
def test_a_decision_does_what_the_same_call_does_just_before_the_round(
    tmp_path: Path, act: str
) -> None:
    states = []
    for called in (False, True):
        folder = tmp_path / str(called)
        run = Run(folder, approve="auto" if act == "restore" else "manual")
        run.train(4)
        concept = the_flagged(run.guard)
        before = run.guard.erased
        if called:
            before_the_next_round(run.guard, lambda g=run.guard, c=concept: getattr(g, act)(c))
        else:
            decide(folder, act, concept)
        run.train(8)
        assert run.guard.erased == before  # nothing happens between rounds
        run.train(9)
        states.append(run.saved())
        expected = () if act in {"veto", "restore"} else (concept,)
        assert run.guard.erased == expected
        assert run.guard.report is not None
        (status,) = (f.status for f in run.guard.report.flags if f.concept == concept)
        assert status == ("vetoed" if expected == () else "erased")
    assert unlike(*states, read=False) == []
    assert unlike(*states) == ["/guard/decisions_read"]


def test_an_approved_concept_is_corrected_and_others_are_not(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(2)
    plain, concept = logits(run.model), the_flagged(run.guard)
    assert standing(tmp_path).waiting == (concept,)
    decide(tmp_path, "approve", concept)
    assert torch.equal(logits(run.model), plain)  # the command itself touches nothing
    run.guard.round()
    assert run.guard.erased == (concept,)
    assert logits(run.model)[:, 0].mean() < plain[:, 0].mean() - 1  # it pulled towards class 0
    assert (standing(tmp_path).waiting, standing(tmp_path).erased) == ((), (concept,))
    assert f"approve {concept} (from the command line)" in texts(tmp_path)


def test_carrying_out_decisions_leaves_model_and_random_numbers_untouched(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(2)
    decide(tmp_path, "approve", the_flagged(run.guard))
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    modes = {module: module.training for module in run.model.modules()}
    draws = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    run.guard.round()
    assert run.guard.erased  # otherwise nothing would have been at stake
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == draws[1:]  # noqa: NPY002
    assert {module: module.training for module in run.model.modules()} == modes
    assert run.model.state_dict().keys() == weights.keys()
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.thorough
def test_a_run_set_back_before_the_decision_repeats_itself_bit_for_bit(tmp_path: Path) -> None:
    run = Run(tmp_path)
    saved = [run.saved(), *run.go(10)]  # rounds after 1 and 9
    decide(tmp_path, "approve", the_flagged(run.guard))
    saved += run.go(18)  # carried out in step 17
    assert run.guard.erased
    for done in (0, 1, 5, 8, 17):
        again = Run(tmp_path)
        again.load(saved[done])
        assert bool(again.guard.erased) == (done == 17)
        again.train(18)
        assert unlike(saved[18], again.saved()) == [], done
    fresh = Run(tmp_path)
    with pytest.warns(UserWarning, match="1 decisions on an earlier run"):
        fresh.train(18)
    assert unlike(saved[18], fresh.saved())  # control: not loaded


def test_a_stopped_run_takes_up_decisions_in_its_first_step(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(3)
    raw, concept = run.saved(), the_flagged(run.guard)
    run.guard.close()
    assert standing(tmp_path).stage == "stopped"
    decide(tmp_path, "approve", concept)
    again = Run(tmp_path)
    again.load(raw)
    assert again.guard.erased == ()  # the model's weights may come later
    again.train(4)
    assert again.guard.erased == (concept,)
    assert (standing(tmp_path).stage, standing(tmp_path).waiting) == ("training", ())
    called = Run(None)
    called.load(raw)
    called.guard._schedule.go_on = lambda: called.guard.approve(concept)  # type: ignore[method-assign]
    for one in (again, called):
        one.train(9)
    assert unlike(again.saved(), called.saved(), read=False) == []


def test_pending_decisions_survive_stopping_twice(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(2)
    decide(tmp_path, "approve", the_flagged(run.guard))
    first, second = Run(tmp_path), Run(tmp_path)
    first.load(run.saved())
    second.load(first.saved())  # stopped before any step
    for one in (first, second):
        one.train(9)
    assert first.guard.erased
    assert unlike(first.saved(), second.saved()) == []


def test_a_decision_is_not_carried_out_again_after_resuming(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(2)
    concept = the_flagged(run.guard)
    decide(tmp_path, "erase", concept)
    run.train(9)
    assert run.guard.erased == (concept,)
    run.guard.restore(concept)
    again = Run(tmp_path)
    again.load(run.saved())
    for one in (run, again):
        one.train(10)
        assert one.guard.erased == ()
    assert unlike(run.saved(), again.saved()) == []


def test_what_cannot_be_done_is_told_and_the_round_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, max_erased=1)
    run.train(2)
    plain, concept = logits(run.model), the_flagged(run.guard)
    other = next(i for i in range(QUICK["concepts"]) if i != concept)
    gone = Decision("veto", (77,), 1, "now")
    append(tmp_path / FOLDER, gone)
    decide(tmp_path, "approve", concept)
    decide(tmp_path, "erase", other)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = run.guard.round()
    said = [str(warning.message) for warning in caught]
    assert said[0].startswith("veto 77 (from the command line) is not done: concepts [77] are not")
    assert "max_erased is 1; restore one or raise max_erased. Training goes on." in said[1]
    assert len(said) == 2
    assert report is not None
    assert run.guard.erased == (concept,)
    assert not torch.equal(logits(run.model), plain)
    assert "veto 77 (from the command line): not done: concepts [77] are not" in texts(tmp_path)


def test_an_erasure_on_numbers_that_are_not_finite_is_not_said_to_be_done(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(2)
    decide(tmp_path, "erase", the_flagged(run.guard))
    run.guard.loss(torch.tensor(float("nan")))
    with (
        pytest.warns(UserWarning, match="is not done: nothing is erased, because activations, log"),
        pytest.warns(UserWarning, match="round at step 2 skipped: the training loss hold NaN"),
    ):
        assert run.guard.round() is None
    assert run.guard.erased == ()
    assert "not done: nothing is erased" in texts(tmp_path)


def test_baking_carries_out_what_came_after_the_last_round(tmp_path: Path) -> None:
    run, other = Run(tmp_path / "a"), Run(tmp_path / "b")
    for one in (run, other):
        one.train(2)
    concept = the_flagged(run.guard)
    decide(tmp_path / "a", "approve", concept)
    run.guard.bake()
    other.guard.approve(concept)
    plain = logits(fallen())
    corrected = logits(other.model)
    other.guard.bake()
    assert not torch.equal(corrected, plain)
    assert torch.equal(logits(run.model), logits(other.model))
    assert (standing(tmp_path / "a").stage, standing(tmp_path / "a").waiting) == ("finished", ())
    run.guard.close()
    assert standing(tmp_path / "a").stage == "finished"


def test_a_run_is_finished_even_where_baking_is_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.train(1)

    def fail(_: object) -> None:
        raise BakeError("no linear map")

    monkeypatch.setattr(run.guard._corrector, "bake", fail)
    with pytest.raises(BakeError, match="no linear map"):
        run.guard.bake()
    assert standing(tmp_path).stage == "finished"
    run.train(9)  # but who goes on is believed
    assert standing(tmp_path).stage == "training"


def test_nothing_is_written_before_the_first_round(tmp_path: Path) -> None:
    guard = manual(tmp_path, start=100)
    guard.close()
    assert not (tmp_path / FOLDER).exists()


def test_a_standing_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / FOLDER / f"{STANDING}.part").mkdir(parents=True)  # where a file should be
    run = Run(tmp_path)
    with pytest.warns(UserWarning, match="standing.json cannot be written") as caught:
        run.train(10)
    assert len([w for w in caught if "standing" in str(w.message)]) == 1
    plain = Run(None)
    plain.train(10)
    assert unlike(run.saved(), plain.saved()) == []


def test_standing_says_when_the_next_round_is_due_and_names_classes(tmp_path: Path) -> None:
    model = fallen()
    guard = ConceptGuard(
        model,
        probe=world(PROBE).loader(),
        config={**QUICK, "action": "observe"},
        log_dir=tmp_path,
        class_names=["zebra", "b", "c", "d"],
    )
    for images, labels in stream(UPDATES + 2, first=UPDATES):
        guard.loss(nn.functional.cross_entropy(model(images), labels))
        guard.step()
    found = standing(tmp_path)
    assert (found.step, found.due, found.corrects) == (1, 9, False)
    held = the_flagged(guard)
    assert ("zebra", "found") in {
        (f.class_name, f.status) for f in found.flags if f.concept == held
    }
    assert guard.report is not None
    assert found.concepts == tuple(c.id for c in guard.report.concepts)


# --- cards --------------------------------------------------------------------------------------


def test_the_guard_gives_the_cards_of_its_last_round(tmp_path: Path) -> None:
    guard = manual(tmp_path)
    assert guard.cards == {}
    guard.round()
    concept = the_flagged(guard)
    card = guard.cards[concept]
    assert (card.images.device.type, card.maps.device.type) == ("cpu", "cpu")
    magenta = card.images[:, :, :3, :3].mean(dim=(0, 2, 3))
    assert magenta[1] < magenta[[0, 2]].min() - 0.3  # the planted mark, in the upper left corner
    guard.cards.clear()
    assert concept in guard.cards  # a copy
    guard.round()
    assert guard.cards[concept] is card, "it shows what it did: nothing is drawn anew"
    silent = manual(None)
    silent.round()
    assert silent.cards == {}
