"""TensorBoard events: read back, they are exactly the planned tags, and training never notices."""

import copy
import io
import math
import pickle
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from concept_guard import events
from concept_guard.directions import Concept
from concept_guard.flags import Flag
from concept_guard.history import read_history
from concept_guard.logs import Act, Card, EventLog, RoundReport, assign_slots, card_image
from concept_guard.records import Group

# Written out once more, so that the table in the library cannot vouch for itself.
ALWAYS = {
    f"concept_guard/{tag}"
    for tag in (
        "summary/n_concepts",
        "summary/n_flagged",
        "summary/n_erased",
        "summary/penalty",
        "probe/top1",
        "probe/worst_group",
        "probe/worst_class_recall",
        "probe/error_share_explained",
        "stability/cosine_to_last",
        "cost/round_s",
        "cost/overhead_pct",
    )
}
IF_ERASED = {
    f"concept_guard/probe/{tag}"
    for tag in (
        "top1_if_erased",
        "worst_group_if_erased",
        "top1_uncorrected",
        "worst_group_uncorrected",
    )
}

SLOT_VALUES = ("risk_difference", "q_value", "leak", "readable", "drift")


def slot_tags(slot: int) -> set[str]:
    return {f"concept_guard/slot_{slot}/{tag}" for tag in SLOT_VALUES}


def flag(concept: int, status: str = "found", q: float = 0.01, rd: float = 0.4) -> Flag:
    return Flag(concept, 1, rd, (rd - 0.1, rd + 0.1), q / 10, q, 9, 1, 30, (4, 2), status)


def report(step: int, *flags: Flag, erased: tuple[int, ...] = (), **changes: object) -> RoundReport:
    unit = torch.ones(2)
    values: dict[str, object] = {
        "step": step,
        "concepts": tuple(Concept(k, unit, unit, 0.0, 0.5, (0,)) for k in range(3)),
        "flags": flags,
        "erased": erased,
        "accuracy": 0.75,
        "worst_group_accuracy": 0.25,
        "worst_class_recall": 0.5,
        "error_share_explained": 0.6,
        "accuracy_if_erased": 0.8,
        "worst_group_accuracy_if_erased": 0.7,
        "leak": dict.fromkeys(erased, 0.05),
        "cosine_to_last": 0.97,
        "penalty": 0.0,
        "errors_seen": 25,
        "images_seen": 100,
        "seconds": 1.5,
        "overhead": 0.03,
        "verdict": "concept 5 pulls towards class 1.",
        "readable": dict.fromkeys(erased, 0.75),
        "drift": dict.fromkeys(erased, 0.9),
        "accuracy_uncorrected": 0.7,
        "worst_group_uncorrected": 0.2,
        "groups": (Group(1, 5, True, 30, 0.9, 0.8), Group(1, 5, False, 0, None, None)),
    }
    return RoundReport(**{**values, **changes})


def card(seed: int = 0) -> Card:
    """Return the hardest card to compress: full of noise."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(8, 3, 96, 96, generator=rng)
    return Card(images, torch.rand(8, 12, 12, generator=rng))


def read(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def texts(events: EventAccumulator) -> list[tuple[int, str]]:
    tag = "concept_guard/report/text_summary"  # TensorBoard's own ending of a text tag
    return [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)]


def test_the_tags_read_back_are_exactly_the_planned_ones(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(report(100, flag(5)), {5: card()}, {5: 0})
    erase = Act("erase", (5,), "the correction of concept 5 begins")
    later = report(300, flag(5, "erased"), flag(9), erased=(5,))
    log.write(later, {9: card()}, {5: 0, 9: 1}, [erase])
    log.act(310, Act("veto", (5, 9), "veto 5, 9", "person"))
    log.estimated(325, [5], 0.01)
    log.close()
    tags = read(tmp_path).Tags()
    slots = slot_tags(0) | (slot_tags(1) - {f"concept_guard/slot_1/{t}" for t in SLOT_VALUES[2:]})
    acts = {f"concept_guard/acts/{act}" for act in ("erase", "veto", "re_estimate")}
    moved = {"concept_guard/stability/misread"}
    assert set(tags["scalars"]) == ALWAYS | IF_ERASED | slots | acts | moved
    assert set(tags["images"]) == {"concept_guard/cards/slot_0", "concept_guard/cards/slot_1"}
    assert set(tags["tensors"]) == {"concept_guard/report/text_summary", "concept_guard/history"}
    assert not any(tags[kind] for kind in ("histograms", "audio", "distributions", "graph"))


def test_every_value_lands_under_its_own_tag_at_its_step(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(report(300, flag(5, "erased", 0.02, 0.33), erased=(5,)), {}, {5: 2})
    log.close()
    events = read(tmp_path)
    expected = {
        "summary/n_concepts": 3,
        "summary/n_flagged": 1,
        "summary/n_erased": 1,
        "summary/penalty": 0,
        "probe/top1": 0.75,
        "probe/top1_if_erased": 0.8,
        "probe/top1_uncorrected": 0.7,
        "probe/worst_group": 0.25,
        "probe/worst_group_uncorrected": 0.2,
        "probe/worst_group_if_erased": 0.7,
        "probe/worst_class_recall": 0.5,
        "probe/error_share_explained": 0.6,
        "slot_2/risk_difference": 0.33,
        "slot_2/q_value": 0.02,
        "slot_2/leak": 0.05,
        "slot_2/readable": 0.75,
        "slot_2/drift": 0.9,
        "stability/cosine_to_last": 0.97,
        "cost/round_s": 1.5,
        "cost/overhead_pct": 3,
    }
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {tag for tag in found} == {f"concept_guard/{tag}" for tag in expected}
    for tag, value in expected.items():
        (event,) = found[f"concept_guard/{tag}"]
        assert event.step == 300
        assert event.value == pytest.approx(value, rel=1e-6)  # events hold float32


def test_a_concept_flagged_twice_shows_its_stronger_flag(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(report(1, flag(5, q=0.04, rd=0.9), flag(5, q=0.001, rd=0.2)), {}, {5: 0})
    log.close()
    (event,) = read(tmp_path).Scalars("concept_guard/slot_0/risk_difference")
    assert event.value == pytest.approx(0.2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_left_out(tmp_path: Path, value: float) -> None:
    log = EventLog(tmp_path)
    log.write(report(10, worst_group_accuracy=value, accuracy_if_erased=None), {}, {})
    log.close()
    missing = {"concept_guard/probe/worst_group", "concept_guard/probe/top1_if_erased"}
    assert set(read(tmp_path).Tags()["scalars"]) == (ALWAYS | IF_ERASED) - missing


def test_the_card_decodes_to_the_picture_that_was_drawn(tmp_path: Path) -> None:
    smooth = torch.linspace(0, 1, 96).expand(2, 3, 96, 96)
    drawn = Card(smooth, torch.ones(2, 12, 12), errors=smooth.flip(3))
    log = EventLog(tmp_path, class_names=["cat", "dog"])
    log.write(report(10, flag(5)), {5: drawn, 8: card(1)}, {5: 3})  # concept 8 has no slot
    log.close()
    found = read(tmp_path)
    assert found.Tags()["images"] == ["concept_guard/cards/slot_3"]
    (event,) = found.Images("concept_guard/cards/slot_3")
    pixels = np.asarray(Image.open(io.BytesIO(event.encoded_image_string))).astype(int)
    caption = "concept 5 towards dog, found: risk difference +0.40, q = 1.0e-02"
    sheet = (card_image(drawn, caption).permute(1, 2, 0) * 255).numpy().astype(int)
    assert (event.height, event.width) == sheet.shape[:2] == pixels.shape[:2]
    assert np.abs(pixels - sheet).mean() < 6  # a JPEG
    other = (card_image(drawn, caption.replace("5", "8")).permute(1, 2, 0) * 255).numpy()
    assert np.abs(pixels - other)[:20].mean() > 1.05 * np.abs(pixels - sheet)[:20].mean()


def test_a_hundred_rounds_of_the_worst_cards_in_all_slots_fit_into_20_mb(tmp_path: Path) -> None:
    noise = [card(k) for k in range(8)]
    cards = {k: replace(c, errors=c.images.flip(0)) for k, c in enumerate(noise)}
    log = EventLog(tmp_path, hparams={"seed": 0})
    flags = [flag(k, "erased") for k in range(8)]
    log.write(report(1, *flags, erased=tuple(range(8))), cards, {k: k for k in range(8)})
    (file,) = tmp_path.iterdir()
    assert 100_000 < file.stat().st_size < 165_000
    before = file.stat().st_size
    log.write(report(2, *flags, erased=tuple(range(8))), cards, {k: k for k in range(8)})
    assert file.stat().st_size - before < 12_000  # nothing new is shown
    for step in range(3, 11):  # of eight re-estimations
        log.estimated(step, range(8), 0.5)
    log.close()
    assert file.stat().st_size < 180_000


def test_the_groups_of_many_classes_take_little_room_and_lose_no_image(tmp_path: Path) -> None:
    groups = tuple(
        Group(k, 5, carried, images, 0.5 if images else None, 0.25 if images else None)
        for k in range(1000)
        for carried, images in ((False, 10), (True, k % 7))
    )
    log = EventLog(tmp_path)
    log.write(report(1, flag(5), groups=groups), {}, {5: 0})
    log.close()
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < 20_000
    (found,) = read_history(tmp_path).rounds
    for carried in (False, True):
        whole = sum(g.images for g in groups if g.carried == carried)
        kept = [g for g in found.groups if g.carried == carried]
        assert sum(g.images for g in kept) == whole
        assert len(kept) == 21
        assert kept[-1].class_name == "980 other classes"
        assert all(g.accuracy == 0.5 for g in kept)
        assert "1" in {g.class_name for g in kept}, "the class of the flag is always there"


def test_a_card_is_written_again_when_it_shows_something_else(tmp_path: Path) -> None:
    one, other = card(), card(1)
    log = EventLog(tmp_path)
    log.write(report(1, flag(5)), {5: one}, {5: 0})
    log.write(report(2, flag(5)), {5: one}, {5: 0})
    log.write(report(3, flag(5)), {5: other}, {5: 0})  # other images
    log.write(report(4, flag(5, "erased"), erased=(5,)), {5: other}, {5: 0})  # another status
    log.write(report(5, flag(5, "erased"), erased=(5,)), {5: other}, {5: 1})  # another slot
    log.close()
    assert sorted(read_history(tmp_path).cards) == [(1, 0), (3, 0), (4, 0), (5, 1)]


def test_the_report_and_human_acts_share_one_text_tag(tmp_path: Path) -> None:
    log = EventLog(tmp_path, class_names=["cat", "dog"], file_names=list("abcdef"))
    log.write(report(100, flag(5)), {}, {5: 0})
    log.act(140, Act("erase", (5,), "erase: concept 5", "person"))
    log.close()
    (step, text), act = texts(read(tmp_path))
    assert step == 100
    assert "| 0 | 5 | dog |" in text
    assert "e, c" in text
    assert act == (140, "erase: concept 5")


def test_hyperparameters_make_no_second_run_and_no_second_file(tmp_path: Path) -> None:
    log = EventLog(tmp_path, hparams={"tap": "pre_logits", "start": 5, "action": ("project",)})
    log.write(report(10), {}, {})
    live = read(tmp_path)
    log.write(report(20), {}, {})  # a TensorBoard that is already running must see this
    log.close()
    live.Reload()
    assert [e.step for e in live.Scalars("concept_guard/probe/top1")] == [10, 20]
    assert len(list(tmp_path.rglob("*"))) == 1
    plugin = live.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams"
    assert b"pre_logits" in plugin.content
    assert b"('project',)" in plugin.content
    assert "_hparams_/session_end_info" in live.summary_metadata


def test_without_hyperparameters_none_are_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(report(10), {}, {})
    log.close()
    assert "_hparams_/experiment" not in read(tmp_path).summary_metadata


def test_a_resumed_run_replaces_what_the_interrupted_one_wrote_later(tmp_path: Path) -> None:
    first = EventLog(tmp_path)
    for step in (100, 200, 300):
        first.write(report(step, accuracy=0.1), {}, {})
    first.close()
    resumed = EventLog(tmp_path)  # from a checkpoint at step 150
    for step in (200, 300):
        resumed.write(report(step, accuracy=0.9), {}, {})
    resumed.close()
    points = [
        (e.step, round(e.value, 1)) for e in read(tmp_path).Scalars("concept_guard/probe/top1")
    ]
    assert points == [(100, 0.1), (200, 0.9), (300, 0.9)]


def test_an_act_right_after_resuming_keeps_the_round_of_that_step(tmp_path: Path) -> None:
    first = EventLog(tmp_path)
    for step in (100, 200):
        first.write(report(step), {}, {})
    first.close()
    resumed = EventLog(tmp_path)
    resumed.act(100, Act("veto", (5,), "veto: concept 5"))
    resumed.close()
    events = read(tmp_path)
    assert [e.step for e in events.Scalars("concept_guard/probe/top1")] == [100]
    assert (100, "veto: concept 5") in texts(events)


def test_a_folder_that_cannot_be_written_warns_once_and_events_wait(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    log = EventLog(blocked / "run")
    with pytest.warns(UserWarning, match=r"log_dir='.*file/run' cannot be written.*log_dir=None"):
        log.write(report(10), {}, {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.act(15, Act("erase", (5,), "erase 5", "person"))
        blocked.unlink()
        log.write(report(20), {}, {})
        log.close()
    points = [e.step for e in read(blocked / "run").Scalars("concept_guard/probe/top1")]
    assert points == [10, 20]
    history = read_history(blocked / "run")
    assert [e.step for e in history.acts] == [15]
    assert not history.problems


def test_a_folder_that_stays_unwritable_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    log = EventLog(tmp_path / "file" / "run")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            log.write(report(step), {}, {})
        log.close()
    assert len(caught) == 1
    assert (tmp_path / "file").read_text() == "not a folder"


def test_errors_that_are_not_the_disks_are_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_events: object) -> bytes:
        raise RuntimeError("a defect")

    monkeypatch.setattr(events, "_records", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        EventLog(tmp_path).write(report(10), {}, {})


def test_a_copy_is_inert_and_the_original_goes_on(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "run")
    log.write(report(10), {}, {})
    for twin in (copy.copy(log), copy.deepcopy(log), pickle.loads(pickle.dumps(log))):
        twin.write(report(15), {}, {})
        twin.close()
    log.write(report(20), {}, {})
    log.close()
    steps = [e.step for e in read(tmp_path / "run").Scalars("concept_guard/probe/top1")]
    assert steps == [10, 20]


@pytest.mark.parametrize("folder", [None, "run"])
def test_nothing_is_written_without_a_folder_or_before_the_first_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    log = EventLog(folder)
    if folder is None:
        log.write(report(10), {5: card()}, {5: 0})
        log.act(10, Act("erase", (5,)))
        log.estimated(10, [5], 0.0)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_log_writes_nothing_more(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write(report(10), {}, {})
    log.close()
    log.write(report(20), {}, {})
    log.close()
    assert [e.step for e in read(tmp_path).Scalars("concept_guard/probe/top1")] == [10]


def random_states() -> list[str]:
    legacy = np.random.mtrand._rand  # what `np.random.rand` and its like use
    return [str(random.getstate()), str(legacy.get_state()), str(torch.get_rng_state().tolist())]


def test_writing_leaves_every_random_state_as_it_was(tmp_path: Path) -> None:
    before = random_states()
    log = EventLog(tmp_path, hparams={"seed": 0})
    log.write(report(10, flag(5)), {5: card()}, {5: 0})
    log.close()
    assert random_states() == before
    torch.rand(1)  # control
    assert random_states() != before


def test_importing_the_module_does_not_import_tensorboard() -> None:
    def loaded(statement: str) -> str:
        code = f"import sys; {statement}; print('tensorboard' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip()

    assert loaded("import concept_guard.logs") == "False"
    assert loaded("import torch.utils.tensorboard") == "True"  # control


def test_a_concept_keeps_its_slot_while_it_is_flagged_or_erased() -> None:
    slots = assign_slots({}, report(1, flag(5), flag(9, q=0.02)))
    assert slots == {5: 0, 9: 1}
    slots = assign_slots(slots, report(2, flag(9), flag(7, q=0.02), erased=(9,)))
    assert slots == {9: 1, 7: 0}, "9 stays, 5 is gone, 7 takes the free place"
    slots = assign_slots(slots, report(3, erased=(9,)))
    assert slots == {9: 1}
    assert assign_slots(slots, report(4)) == {}


def test_erased_concepts_come_first_when_slots_run_out() -> None:
    before = {1: 0, 2: 1}
    crowded = report(1, flag(1), flag(2, q=0.02), flag(3, q=1e-9), erased=(4,))
    assert assign_slots(before, crowded, 2) == {4: 1, 1: 0}
    assert assign_slots(before, replace(crowded, erased=()), 2) == before


def test_a_newcomer_with_stronger_evidence_waits_for_a_free_slot() -> None:
    assert assign_slots({9: 0}, report(1, flag(2, q=1e-9), flag(9, q=0.04)), 1) == {9: 0}
    assert assign_slots({}, report(1, flag(9, q=0.04), flag(2, q=1e-9)), 1) == {2: 0}


def test_slots_of_a_larger_page_fit_a_smaller_one() -> None:
    assert assign_slots({5: 7}, report(1, flag(5)), 2) == {5: 0}


@pytest.mark.parametrize("seed", range(5))
def test_slots_are_always_distinct_and_in_range(seed: int) -> None:
    rng = random.Random(seed)
    slots: dict[int, int] = {}
    for step in range(30):
        chosen = rng.sample(range(12), k=rng.randint(0, 12))
        split = rng.randint(0, len(chosen))
        flags = [flag(k, q=rng.random()) for k in chosen[split:]]
        now = report(step, *flags, erased=tuple(chosen[:split]))
        before, slots = slots, assign_slots(slots, now, 5)
        assert len(slots) == min(5, len(chosen))
        assert sorted(set(slots.values())) == sorted(slots.values())
        assert set(slots.values()) <= set(range(5))
        assert all(slots[c] == before[c] for c in slots.keys() & before.keys())
