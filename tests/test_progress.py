"""The lines of a training: aligned, short, each thing once, and none where nobody reads them."""

import logging
import os
import pty
import re
import struct
import subprocess
import sys
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from typing import Any

import pytest
from worlds import flagging

from concept_guard.logs import RoundReport
from concept_guard.training.progress import WIDTH, Progress, fitted

NOTE = "concept 3 is not corrected any more"
DECIDE = "1 concept waits for approval: concept-guard approve runs/a 7"
BAR = """
import logging, sys
from concept_guard import cli
from concept_guard.training.progress import Progress
with cli._progress_on_stderr(quiet=len(sys.argv) > 1):
    made = Progress("with guard", epochs=1, total=200, interval=1, folder="a", corrects=True)
    with made.bar:
        for update in range(1, 201):
            made.update(update, 0.5 if made.wants_loss(update) else None)
        made.epoch(200, 1, 0.5, 0.9)
"""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", logger="concept_guard")
    return caplog


@pytest.fixture
def real() -> RoundReport:
    report = flagging().report
    assert report is not None
    return report


def progress(**given: Any) -> Progress:
    keys = {"epochs": 5, "total": 400, "interval": 50, "folder": Path("runs/a"), "corrects": True}
    return Progress("with guard", **{**keys, **given})


def flagged(report: RoundReport, *ids: int, status: str = "found") -> RoundReport:
    flags = tuple(replace(report.flags[0], concept=i, status=status) for i in ids)
    return replace(report, flags=flags, verdict=f"flagged: {ids}")


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_lines_of_a_run_are_aligned_below_one_header(
    said: pytest.LogCaptureFixture, real: RoundReport
) -> None:
    base = replace(real, accuracy=0.9, worst_group_accuracy=0.25, overhead=0.093, notes=())
    shown = progress()
    quiet = replace(base, flags=(), verdict="no evidence: 3 errors", erased=())
    shown.round(replace(quiet, step=50))
    shown.round(replace(quiet, step=100, verdict="no evidence: 4 errors"))
    shown.update(150, 0.125)
    shown.epoch(160, 2, 0.25, 0.5)
    shown.round(replace(flagged(base, 3, 12), step=200, erased=(3, 12)))
    shown.round(replace(flagged(base, 3, 12), step=300, erased=(3, 12), leak={3: 0.05, 12: 0.2}))
    shown.round(replace(flagged(base, 12), step=350, erased=(12,), withdrawn=(3,), notes=(NOTE,)))
    shown.round(replace(flagged(base, 12), step=390, erased=()))  # a person said so
    shown.round(replace(flagged(base, 12), step=400, erased=(12,)))
    found = len(real.concepts)
    assert lines(said) == [
        "with guard: 5 epochs, 400 updates",
        "update  accuracy  worst group  concepts  flagged    done              cost  next",
        f"    50     0.900        0.250  {found:8}  -          -                 9.3%  train on",
        "        no evidence: 3 errors",
        f"   100     0.900        0.250  {found:8}  -          -                 9.3%  train on",
        "   150                                              loss 0.125",
        "   160     0.500                                    epoch 2 of 5, loss 0.250",
        f"   200     0.900        0.250  {found:8}  3, 12      erased 3, 12      9.3%"
        "  look at concept 3, 12",
        "        flagged: (3, 12)",
        f"   300     0.900        0.250  {found:8}  3, 12      keeps 3, 12       9.3%"
        "  train on, leak 0.20",
        f"   350     0.900        0.250  {found:8}  12         withdrew 3        9.3%"
        "  read the note below",
        f"        {NOTE}",
        "        flagged: (12,)",
        f"   390     0.900        0.250  {found:8}  12         restored 12       9.3%  train on",
        f"   400     0.900        0.250  {found:8}  12         erased 12         9.3%"
        "  look at concept 12",
    ]


def test_no_line_is_wider_than_a_terminal(
    said: pytest.LogCaptureFixture, real: RoundReport
) -> None:
    many = range(100_000, 100_040)
    for total in (400, 99_999_999):
        shown = progress(total=total)
        for step, status in ((total - 2, "found"), (total - 1, "waiting"), (total, "erased")):
            report = replace(flagged(real, *many, status=status), step=step, overhead=1.0)
            shown.round(replace(report, erased=tuple(many), notes=("word " * 99,)))
    # The command to approve 40 concepts is one line, to be copied.
    wide = [line for line in lines(said) if len(line) > WIDTH and "approve runs/a" not in line]
    assert not wide


def test_what_waits_is_said_once_with_the_command_to_approve_it(
    said: pytest.LogCaptureFixture, real: RoundReport
) -> None:
    shown = progress()
    for step in (100, 200):
        shown.round(replace(flagged(real, 7, status="waiting"), step=step))
    assert [line.endswith("approve or veto 7") for line in lines(said)].count(True) == 2
    assert lines(said).count(DECIDE) == 1
    shown.round(replace(flagged(real, 3, 7, status="waiting"), step=300))  # control
    assert DECIDE.replace("1 concept waits", "2 concepts wait").replace("a 7", "a 3 7") in lines(
        said
    )


def test_who_only_watches_is_told_how_to_correct(
    said: pytest.LogCaptureFixture, real: RoundReport
) -> None:
    for corrects, end in ((False, "look, set guard.action"), (True, "train on")):
        said.clear()
        progress(corrects=corrects).round(replace(flagged(real, 7), step=100, erased=()))
        assert lines(said)[2].endswith(end)


def test_a_run_that_goes_on_keeps_what_it_had_erased(
    said: pytest.LogCaptureFixture, real: RoundReport
) -> None:
    for erased, done in (((7,), "keeps 7"), ((), "erased 7")):
        said.clear()
        progress(updates=90, erased=erased).round(replace(real, step=100, erased=(7,)))
        assert done in lines(said)[2]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ((), ""),
        ((3,), "erased 3"),
        ((3, 12), "erased 3, 12"),
        ((3, 12, 4, 5), "erased 3 +3"),
        ((123456789, 1), "erased 2 ids"),
    ],
)
def test_ids_are_cut_to_a_width(ids: tuple[int, ...], text: str) -> None:
    assert fitted("erased ", ids, 14) == text


def test_a_long_run_says_its_loss_a_hundred_times_at_most() -> None:
    shown = progress(total=100_000)
    assert sum(shown.wants_loss(update) for update in range(1, 100_001)) == 100
    shown = progress(total=100_000, interval=5000)  # control: rarer, if asked for
    assert sum(shown.wants_loss(update) for update in range(1, 100_001)) == 20


def test_a_long_run_says_a_hundred_epochs_at_most(said: pytest.LogCaptureFixture) -> None:
    for epochs, count in ((1000, 100), (150, 75), (100, 100), (3, 3)):
        said.clear()
        shown = progress(epochs=epochs)
        for epoch in range(1, epochs + 1):
            shown.epoch(epoch, epoch, 0.5, 0.5)
        assert len(lines(said)) == 2 + count
        assert f"epoch {epochs} of {epochs}" in lines(said)[-1]


def on_terminal(*words: str) -> str:
    """Return what the script writes to a terminal of 80 columns."""
    child, end = pty.fork()
    if child == 0:
        ioctl(2, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", BAR, *words])
    written = b""
    with os.fdopen(end, "rb", buffering=0) as terminal:
        while True:
            try:
                part = terminal.read(4096)
            except OSError:  # the other end is closed
                part = b""
            if not part:
                break
            written += part
    assert os.waitpid(child, 0)[1] == 0, written
    return written.decode()


def in_file(folder: Path, *words: str) -> str:
    """Return what the script writes to a file."""
    log = folder / "log.txt"
    with log.open("wb") as file:
        command = [sys.executable, "-c", BAR, *words]
        subprocess.run(command, check=True, stderr=file, stdout=file, timeout=120)
    return log.read_bytes().decode()


@pytest.mark.slow
def test_a_bar_stands_on_a_terminal_and_plain_lines_in_a_file(tmp_path: Path) -> None:
    seen = on_terminal()
    assert "200/200" in seen
    assert "\r" in seen
    whole = re.sub(r"\r+\n", "\n", seen).split("\n")
    assert any(re.fullmatch(r"(.*\r)? +200 +0\.900 +epoch 1 of 1, loss 0\.500", x) for x in whole)
    assert "loss 0.500\n" not in seen.replace("epoch 1 of 1, loss 0.500", "")  # it is in the bar
    kept = in_file(tmp_path)
    assert "\r" not in kept
    assert "it/s" not in kept
    assert len(kept.splitlines()) == 2 + 100 + 1
    assert on_terminal("quiet") == in_file(tmp_path, "quiet") == ""


def test_nobody_who_did_not_ask_for_lines_gets_a_bar() -> None:
    logging.getLogger("concept_guard").setLevel(logging.WARNING)
    try:
        assert progress().bar.disable
    finally:
        logging.getLogger("concept_guard").setLevel(logging.NOTSET)
