"""What people are told on the command line, and which decisions are refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from test_decisions import STANDS

from concept_guard import cli
from concept_guard.decisions import (
    ACTS,
    DECISIONS,
    FOLDER,
    STANDING,
    Decision,
    Standing,
    call_to_decide,
    lines,
    waiting,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has had one round."""
    STANDS.write(tmp_path / "run" / FOLDER)
    return tmp_path / "run"


def said(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(list(map(str, words))) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert cli.main(list(map(str, words))) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.mark.parametrize("act", ACTS)
def test_without_ids_the_flags_are_shown_and_nothing_is_decided(
    run: Path, capsys: pytest.CaptureFixture[str], act: str
) -> None:
    assert said(capsys, act, run).splitlines() == [
        f"{run}: training, last round after update 8 (as of 2025-01-01 09:59:00+00:00)",
        "",
        "concept  class  risk difference      q  status",
        "      3  ant              +0.50  1e-08  waiting",
        "    erasing it repairs 9 of 10 errors",
        "      4  bee              +0.25   0.01  unconfirmed",
        "guard: flagged: concept 3 drives errors towards class ant",
        "under correction: 5",
    ]
    assert not (run / FOLDER / DECISIONS).exists()


def test_a_decision_is_written_shown_and_dated(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = said(capsys, "approve", run, 3, 3, 4).splitlines()[-3:]
    assert last == [
        "decided, not yet carried out: approve 3, 4",
        "",
        "approve 3, 4: carried out at the next round, due after update 16, or at the end of the "
        "training, or when the run is resumed, whichever comes first; not waiting now, and "
        "corrected only once flagged: 4",
    ]
    (line,), torn = lines(run / FOLDER)
    decision = Decision.parsed(line)
    assert decision is not None
    assert (decision.act, decision.ids, decision.step, torn) == ("approve", (3, 4), 8, b"")
    shown = said(capsys, "restore", run, "5")
    assert "decided, not yet carried out: approve 3, 4; restore 5\n" in shown


def test_a_stopped_run_carries_decisions_out_when_it_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, stage="stopped")
    assert said(capsys, "veto", run, 4).endswith(
        "\n\nveto 4: carried out when the run is resumed\n"
    )


def changed(run: Path, **fields: Any) -> None:
    Standing(**{**vars(STANDS), **fields}).write(run / FOLDER)


def test_every_reason_against_a_decision_is_named_at_once(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, stage="finished", corrects=False)
    assert refused(capsys, 2, "erase", run, "9", "x", "77", "3").splitlines() == [
        f"concept-guard: erase, {run}: 4 problems",
        "  the run is finished and its correction is folded into the weights, nothing reads a "
        "decision any more; train again, and decide while it trains",
        "  the run only observes (guard.action: observe), so erase has no effect; train with "
        "guard.action=[project,rebalance]",
        "  'x': expected ids of concepts such as 3",
        "  concepts 9, 77 are not among those of the round of update 8: 3, 4, 5",
    ]
    assert not (run / FOLDER / DECISIONS).exists()


@pytest.mark.parametrize(
    ("fields", "words", "message"),
    [
        ({}, ("restore", 3), r"concepts 3 are not among those under correction: 5\n"),
        ({"erased": ()}, ("restore", 5), "not among those under correction: there are none"),
        ({}, ("approve", 2), r"approve, .*: concepts 2 are not .* of the round of update 8: 3, 4"),
        ({"corrects": False}, ("approve", 3), r"only observes.*so approve has no effect; train wi"),
        ({"stage": "finished"}, ("veto", 3), "is finished .*; train again, and decide while"),
    ],
)
def test_a_wrong_decision_is_refused(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    words: tuple[str, int],
    message: str,
) -> None:
    changed(run, **fields)
    told = refused(capsys, 2, words[0], run, words[1])
    assert re.search(message, told), told
    assert not (run / FOLDER / DECISIONS).exists()


def test_vetoing_is_possible_where_a_run_only_observes(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(run, corrects=False)
    said(capsys, "veto", run, 3)
    assert len(lines(run / FOLDER)[0]) == 1


def test_folders_without_a_run_or_a_round_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "other"
    assert refused(capsys, 2, "approve", other, 3) == (
        f"concept-guard: {other}: no such folder; expected the output folder of a run; runs in "
        f"{run.parent}: run\n"
    )
    other.mkdir()
    told = refused(capsys, 2, "approve", other)
    assert f"{other}: no round has ended here" in told
    assert "Wait for the first round, or see guard.start" in told
    (run / FOLDER / STANDING).write_text("{", encoding="utf8")
    assert "standing.json is not readable" in refused(capsys, 2, "veto", run, 3)


def test_a_folder_that_cannot_be_written_is_a_failure(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("concept_guard.deciding.append", full)
    told = refused(capsys, 1, "approve", run, 3)
    assert "decisions.jsonl cannot be written (Permission denied); make the folder writable" in told


def test_options_and_settings_are_no_decisions(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["approve", str(run), "3", "--force"])
    assert "unrecognized arguments: --force" in capsys.readouterr().err
    assert "'a=1': expected ids of concepts" in refused(capsys, 2, "approve", run, "a=1")


def test_the_call_to_decide_is_a_command_that_can_be_pasted(run: Path) -> None:
    assert waiting(STANDS.flags) == (3,)
    assert call_to_decide("out/a b", [3]) == (
        "1 concept waits for approval: concept-guard approve 'out/a b' 3"
    )
    assert call_to_decide(run, [3, 4]).startswith("2 concepts wait for approval: concept-guard ap")
    assert call_to_decide(run, []) == ""
