"""The page of a run's history: what is shown, what is refused, and what is never overwritten."""

import warnings
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from concept_guard import cli, showing
from concept_guard.entries import RoundEntry
from concept_guard.history import RunHistory

ROUNDS = (RoundEntry(step=8, time="now", verdict="flagged"),)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders with events, of whose guards each says that it had a round."""
    for name in ("a", "b"):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("loss", 1.0, 1)
    monkeypatch.setattr(
        showing, "read_history", lambda _folder, name: RunHistory(name=name, rounds=ROUNDS)
    )
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2) -> str:
    """Return what stands on stderr when the page is not written."""
    assert cli.main(["report", *map(str, words)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    return err


def test_the_page_lies_in_the_folder_of_the_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(runs / "a")]) == 0
    page = runs / "a" / "concept_guard" / "history.html"
    assert capsys.readouterr().out == (f"{runs}/a: 1 round, 0 acts, 0 cards\npage: {page}\n")
    text = page.read_text(encoding="utf8")
    assert text.lower().startswith("<!doctype html>")
    assert f"concept-guard report {runs}/a" in text
    assert not list(runs.rglob("*.part"))


def test_two_runs_stand_side_by_side_under_names_that_differ(runs: Path) -> None:
    page = runs / "both.html"
    showing.show([runs / "a", runs / "b"], page)
    assert page.stat().st_size
    assert [n for _, n in showing._named([runs / "a", runs / "b"])] == ["a", "b"]
    (runs / "c" / "a").mkdir(parents=True)
    same = [runs / "a", runs / "c" / "a"]
    assert [n for _, n in showing._named(same)] == [str(folder) for folder in same]


def test_an_earlier_page_is_replaced_and_nothing_else(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = runs / "mine.html"
    for _ in range(2):
        assert cli.main(["report", str(runs / "a"), "--output", str(page)]) == 0
    capsys.readouterr()
    for text in ("<html>my own page</html>", ""):
        page.write_text(text, encoding="utf8")
        said = refused(capsys, runs / "a", "--output", page)
        assert said == (
            f"concept-guard: {page} is no page of concept-guard report and is kept; name "
            "another: --output FILE\n"
        )
        assert page.read_text(encoding="utf8") == text
    assert "is a folder; expected the name of a page" in refused(
        capsys, runs / "a", "--output", runs / "b"
    )
    below = runs / "mine.html" / "x.html"  # a file is no folder
    assert "cannot be" in refused(capsys, runs / "a", "--output", below, code=1)


def test_a_run_that_is_not_there_is_named_with_those_that_are(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(capsys, runs / "A") == (
        f"concept-guard: {runs}/A: no such folder; expected the folder of a run, the guard's "
        f"log_dir; runs in {runs}: a, b\n"
    )
    for number in range(20):
        SummaryWriter(str(runs / f"c{number:02}")).close()
    assert refused(capsys, runs / "A").endswith("a, b, c00, c01, c02, c03, c04, c05 and 14 more\n")
    assert "is named twice" in refused(capsys, runs / "a", f"{runs}/b/../a")


def test_a_folder_without_events_says_what_to_do(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    said = refused(capsys, runs)
    assert f"{runs}: no TensorBoard events here; expected the guard's log_dir." in said
    assert f"log_dir='{runs}'" in said
    assert said.endswith(f"or name a run: runs in {runs}: a, b\n")


def test_events_of_others_are_told_from_those_of_a_guard(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    said = refused(capsys, runs / "a")
    assert "but none in which a guard says what it found. Wait for its first round" in said
    assert not (runs / "a" / "concept_guard").exists()


def test_what_cannot_be_read_is_a_warning(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = RunHistory(name="a", rounds=ROUNDS, problems=("events.1 is not readable to its end",))
    monkeypatch.setattr(showing, "read_history", lambda *_: torn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["report", str(runs / "a")]) == 0
    assert capsys.readouterr().err == (f"warning: {runs}/a: events.1 is not readable to its end\n")
