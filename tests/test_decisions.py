"""The files through which people on the command line reach a run, and its end of the channel."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from concept_guard.decisions import (
    DECISIONS,
    FOLDER,
    STANDING,
    Channel,
    Decision,
    FlagLine,
    Standing,
    append,
    lines,
)

APPROVE = Decision("approve", (3,), 8, "2025-01-01 10:00:00+00:00")
VETO = Decision("veto", (4, 5), 8, "2025-01-01 10:01:00+00:00")
STANDS = Standing(
    stage="training",
    step=8,
    due=16,
    written="2025-01-01 09:59:00+00:00",
    verdict="flagged: concept 3 drives errors towards class ant",
    corrects=True,
    concepts=(3, 4, 5),
    erased=(5,),
    flags=(
        FlagLine(3, "ant", "waiting", 0.5, 1e-8, "erasing it repairs 9 of 10 errors"),
        FlagLine(4, "bee", "unconfirmed", 0.25, 0.01, ""),
    ),
    decisions_read=0,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has had one round."""
    STANDS.write(tmp_path / "run" / FOLDER)
    return tmp_path / "run"


def taken(channel: Channel, step: int = 8) -> list[Decision]:
    return list(channel.take(step))


def test_both_files_give_back_what_was_written(tmp_path: Path) -> None:
    STANDS.write(tmp_path)
    assert Standing.read(tmp_path) == STANDS
    assert [path.name for path in tmp_path.iterdir()] == [STANDING]  # nothing half written
    for decision in (APPROVE, VETO):
        append(tmp_path, decision)
    assert list(map(Decision.parsed, lines(tmp_path)[0])) == [APPROVE, VETO]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 3}', "nonsense"])
def test_a_standing_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / STANDING).write_text(text, encoding="utf8")
    with pytest.raises(ValueError, match="."):
        Standing.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"act": "bake"},
        {"act": ["approve"]},
        {"ids": []},
        {"ids": [True]},
        {"ids": ["3"]},
        {"ids": 3},
        {"step": None},
        {"step": 1.5},
    ],
    ids=str,
)
def test_a_line_that_is_no_decision_is_told_from_one(change: dict[str, Any]) -> None:
    whole = {"act": "approve", "ids": [3], "step": 8, "time": APPROVE.time}
    assert Decision.parsed(json.dumps(whole).encode()) == APPROVE  # control
    assert Decision.parsed(json.dumps({**whole, **change}).encode()) is None


def test_a_channel_takes_each_decision_once_and_in_order(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    assert taken(channel, -1) == []
    (tmp_path / FOLDER).mkdir()
    append(tmp_path / FOLDER, APPROVE)
    assert taken(channel) == [APPROVE]
    append(tmp_path / FOLDER, VETO)
    append(tmp_path / FOLDER, APPROVE)
    assert taken(channel) == [VETO, APPROVE]
    assert (taken(channel), channel.read) == ([], 3)


def test_decisions_on_a_round_still_to_come_wait_and_hold_back_later_ones(run: Path) -> None:
    channel = Channel(run)
    channel.read = 0  # as loaded from a checkpoint
    append(run / FOLDER, APPROVE)
    append(run / FOLDER, Decision("veto", (4,), 2, "now"))
    assert (taken(channel, 7), channel.read) == ([], 0)
    assert [decision.act for decision in taken(channel, 8)] == ["approve", "veto"]


def test_decisions_on_an_earlier_run_are_passed_over(run: Path) -> None:
    append(run / FOLDER, APPROVE)
    channel = Channel(run)
    assert channel.read == 1  # what a checkpoint before the first round would hold
    with pytest.warns(UserWarning, match=rf"{run}.*: 1 decisions on an earlier run are passed ove"):
        assert taken(channel) == []
    append(run / FOLDER, VETO)
    assert taken(channel) == [VETO]


def test_a_torn_line_is_told_not_read_and_does_no_harm_to_the_next(run: Path) -> None:
    channel = Channel(run)
    assert taken(channel) == []
    append(run / FOLDER, APPROVE)
    with (run / FOLDER / DECISIONS).open("ab") as file:
        file.write(b'{"act": "veto", "ids')
    with pytest.warns(UserWarning, match=r"last line of decisions.jsonl is torn and is not read: "):
        assert taken(channel) == [APPROVE]
    assert taken(channel) == []  # and no second warning
    append(run / FOLDER, VETO)
    with pytest.warns(UserWarning, match="line 2 is no decision and is passed over"):
        assert taken(channel) == [VETO]
    assert channel.read == 3


def test_a_removed_file_starts_anew(run: Path) -> None:
    channel = Channel(run)
    channel.read = 2
    append(run / FOLDER, APPROVE)
    assert (taken(channel), channel.read) == ([], 1)
    (run / FOLDER / DECISIONS).unlink()
    assert (taken(channel), channel.read) == ([], 0)
    append(run / FOLDER, VETO)
    assert taken(channel) == [VETO]


def test_a_folder_out_of_reach_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / FOLDER / DECISIONS).mkdir(parents=True)
    channel = Channel(tmp_path)
    channel.read = 2
    with pytest.warns(UserWarning, match=r"decisions.jsonl cannot be read.*Training goes on") as w:
        assert (taken(channel), taken(channel), channel.read) == ([], [], 2)
    assert len(w) == 1
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"standing.json cannot be written .*Training goes on"):
        Channel(tmp_path / "file").tell(STANDS)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_copied_channel_is_inert(run: Path, copied: Callable[[Channel], Channel]) -> None:
    channel = Channel(run)
    channel.read = 0
    append(run / FOLDER, APPROVE)
    other = copied(channel)
    assert taken(other) == []
    (run / FOLDER / STANDING).unlink()
    other.tell(STANDS)
    assert not (run / FOLDER / STANDING).exists()
    assert taken(channel) == [APPROVE]  # control
