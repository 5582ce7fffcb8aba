"""The history of a run: read back it is what was written, whatever else lies in its folder."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from test_logs import card, flag, report
from torch.nn.functional import cross_entropy
from torch.utils.tensorboard.summary import scalar
from worlds import PROBE, QUICK, UPDATES, fallen, sgd, stream, world

from concept_guard import ConceptGuard, summaries, tags
from concept_guard.entries import ActEntry, RoundEntry, StartEntry, dumped, parsed
from concept_guard.events import EventFile
from concept_guard.history import HistoryReader, read_history
from concept_guard.logs import Act, EventLog


def written(folder: Path, *rounds: int, close: bool = True) -> EventLog:
    log = EventLog(folder, model="ResNet", hparams={"tap": "pre_logits"}, class_names=["a", "b"])
    for step in rounds:
        log.write(report(step, flag(5)), {5: card()}, {5: 0}, [Act("flag", (5,), f"at {step}")])
    if close:
        log.close()
    return log


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    log = EventLog(tmp_path, class_names=["cat", "dog"], file_names=list("abcdef"))
    record = report(10, flag(5, "erased"), flag(9, "unconfirmed"), erased=(5,))
    log.write(record, {5: card()}, {5: 2}, [Act("erase", (5,), "begins")])
    log.act(12, Act("veto", (9,), "veto 9", "person"))
    log.estimated(13, [5], 0.125)
    log.close()
    history = read_history(tmp_path, "run")
    assert (history.name, history.problems, history.empty) == ("run", (), False)
    (start,) = history.starts
    assert (start.step, start.classes) == (10, ("cat", "dog"))
    (found,) = history.rounds
    assert found.verdict == record.verdict
    assert found.numbers["probe/top1"] == record.accuracy
    assert found.numbers["cost/overhead_pct"] == pytest.approx(3)
    assert [(c.id, c.slot, c.erased, c.leak) for c in found.concepts] == [
        (5, 2, True, 0.05),
        (9, None, False, None),
    ]
    (evidence,) = found.concepts[0].flags
    assert (evidence.class_name, evidence.examples) == ("dog", ("e", "c"))
    assert (evidence.risk_difference, evidence.interval) == (0.4, (0.4 - 0.1, 0.4 + 0.1))
    assert [(g.class_name, g.carried, g.accuracy) for g in found.groups] == [
        ("dog", True, 0.9),
        ("dog", False, None),
    ]
    assert [(a.step, a.act, a.by) for a in history.acts] == [
        (10, "erase", "guard"),
        (12, "veto", "person"),
        (13, "re_estimate", "guard"),
    ]
    assert set(history.cards) == {(10, 2)}
    assert history.cards[10, 2].startswith(b"\xff\xd8\xff")


def test_all_cards_are_kept_where_tensorboard_keeps_ten(tmp_path: Path) -> None:
    written(tmp_path, *range(1, 31))
    assert set(read_history(tmp_path).cards) == {(step, 0) for step in range(1, 31)}


def test_a_reader_follows_a_run_that_is_being_written(tmp_path: Path) -> None:
    reader = HistoryReader(tmp_path)
    assert reader.read().empty
    log = written(tmp_path, 1, 2, close=False)
    assert [r.step for r in reader.read().rounds] == [1, 2]
    assert [r.step for r in reader.read().rounds] == [1, 2]
    log.write(report(3), {}, {})
    assert [r.step for r in reader.read().rounds] == [1, 2, 3]
    log.close()


def test_a_resumed_run_replaces_what_the_interrupted_one_did_later(tmp_path: Path) -> None:
    written(tmp_path, 100, 200, 300)
    written(tmp_path, 200)
    history = read_history(tmp_path)
    assert [r.step for r in history.rounds] == [100, 200]
    assert [a.step for a in history.acts] == [100, 200]
    assert [s.step for s in history.starts] == [100, 200]
    assert set(history.cards) == {(100, 0), (200, 0)}


@pytest.mark.parametrize("lost", [1, 100, 1000])
def test_a_torn_end_costs_what_was_torn_and_no_more(tmp_path: Path, lost: int) -> None:
    written(tmp_path, 1, 2, 3, close=False)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    reader = HistoryReader(tmp_path)
    path.write_bytes(whole[:-lost])
    assert [r.step for r in reader.read().rounds] == [1, 2]
    path.write_bytes(whole)  # it was only being written
    assert [r.step for r in reader.read().rounds] == [1, 2, 3]


def test_bytes_that_are_no_events_hide_nothing(tmp_path: Path) -> None:
    written(tmp_path, 1)
    (tmp_path / "events.out.tfevents.0.foreign").write_bytes(b"not events" * 100)
    (tmp_path / "events.out.tfevents.9.folder").mkdir()
    history = read_history(tmp_path)
    assert [r.step for r in history.rounds] == [1]


def test_a_damaged_file_is_read_up_to_the_damage(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[-2000] ^= 255
    path.write_bytes(bytes(data))
    assert [r.step for r in read_history(tmp_path).rounds] == [1]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b'{"kind":"other"}', b'{"kind":"round","step":"x"}', b"\xff\xfe"]
)
def test_entries_of_another_kind_are_left_out_and_said(tmp_path: Path, data: bytes) -> None:
    written(tmp_path, 1)
    strange = summaries.kept(tags.HISTORY, StartEntry(step=0, time="", version="", model=""))
    strange.value[0].tensor.string_val[0] = data
    EventFile(tmp_path).append(2, [strange, scalar("other", 1.0)], stale_from=2)
    history = read_history(tmp_path)
    assert [r.step for r in history.rounds] == [1]
    (problem,) = history.problems
    assert problem.startswith("entries left out: ")


def test_an_entry_of_another_version_is_refused_and_one_with_more_in_it_is_not() -> None:
    entry = ActEntry(step=1, time="now", act="veto", concepts=(3,))
    assert parsed(dumped(entry)) == entry
    more = dumped(entry).replace(b'{"kind"', b'{"new":1,"kind"')
    assert parsed(more) == entry
    with pytest.raises(ValueError, match="schema version 2, expected 1"):
        parsed(dumped(entry).replace(b'"schema_version":1', b'"schema_version":2'))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_back_as_unknown(tmp_path: Path, value: float) -> None:
    log = EventLog(tmp_path)
    strange = replace(flag(5), risk_difference=value, interval=(value, 0.5))
    log.write(report(1, strange, accuracy=value, leak={5: value}), {}, {5: 0})
    log.close()
    (found,) = read_history(tmp_path).rounds
    assert found.numbers["probe/top1"] is None
    assert found.concepts[0].leak is None
    assert found.concepts[0].flags[0].interval == (None, 0.5)


def test_hostile_names_come_back_as_they_are(tmp_path: Path) -> None:
    name = "<script>alert(1)</script>\u202e\x00\n\"'"
    log = EventLog(tmp_path, class_names=[name] * 3, file_names=[name] * 9)
    log.write(report(1, flag(5)), {5: card()}, {5: 0})
    log.close()
    (found,) = read_history(tmp_path).rounds
    assert found.concepts[0].flags[0].class_name == name
    assert found.concepts[0].flags[0].examples == (name, name)


def test_a_guard_in_training_leaves_its_whole_history(tmp_path: Path) -> None:
    model = fallen()
    optimizer = sgd(model, lr=1e-4)
    settings = {**QUICK, "every": 4, "track_every": 2}
    with ConceptGuard(
        model, probe=world(PROBE).loader(), config=settings, log_dir=tmp_path
    ) as guard:
        model.train()
        for images, labels in stream(UPDATES + 9, first=UPDATES):
            losses = cross_entropy(model(images), labels, reduction="none")
            guard.loss(losses, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step()
        (concept,) = guard.erased
        guard.restore(concept)
        guard.bake()
        last = guard.report
    history = read_history(tmp_path)
    assert not history.problems
    assert [r.step for r in history.rounds] == [1, 5, 9]
    assert last is not None
    assert history.rounds[-1].numbers["probe/top1"] == last.accuracy
    acts = [(a.act, a.concepts, a.by) for a in history.acts]
    assert acts[:2] == [("flag", (concept,), "guard"), ("erase", (concept,), "guard")]
    assert ("re_estimate", (concept,), "guard") in acts
    assert acts[-2:] == [("restore", (concept,), "person"), ("bake", (), "guard")]
    groups = history.rounds[-1].groups
    assert {g.concept for g in groups} == {concept}
    images = sum(g.images for g in groups)
    assert images == last.images_seen
    right = sum(g.images * g.accuracy for g in groups if g.accuracy is not None)
    assert right / images == pytest.approx(last.accuracy, abs=1e-4)  # they are rounded
    bare = sum(g.images * (g.accuracy_uncorrected or 0) for g in groups)
    assert bare / images == pytest.approx(last.accuracy_uncorrected, abs=1e-4)
    assert last.accuracy_uncorrected != last.accuracy
    assert isinstance(history.rounds[0], RoundEntry)
    assert history.rounds[0].groups[0].accuracy_uncorrected is None  # nothing was projected out
