"""The tab of TensorBoard, asked over WSGI: what it lists, shows and refuses."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from board_runs import SLOT, card, kept, picture, round_entry, write, write_round
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.base_plugin import TBContext
from test_layout import SLOW_TO_IMPORT, loaded_by
from werkzeug.test import Client, TestResponse

from concept_guard.board import ConceptGuardPlugin, runs
from concept_guard.entries import PLUGIN
from concept_guard.history import HistoryReader, RunHistory
from concept_guard.report import runs as report_runs


class Board:
    """The plugin with TensorBoard's own list of runs, but without its server."""

    def __init__(self, logdir: Path) -> None:
        self._logdir, self._runs = str(logdir), EventMultiplexer()
        provider = MultiplexerDataProvider(self._runs, self._logdir)
        self.plugin = ConceptGuardPlugin(TBContext(logdir=self._logdir, data_provider=provider))
        self._apps = {route: Client(app) for route, app in self.plugin.get_plugin_apps().items()}
        self.reload()

    def reload(self) -> None:
        """Let TensorBoard read what was written since."""
        self._runs.AddRunsFromDirectory(self._logdir)
        self._runs.Reload()

    def get(self, route: str, **options: Any) -> TestResponse:
        """Ask with options of werkzeug."""
        return self._apps[route].get(route, **options)

    def ask(self, route: str, **query: object) -> TestResponse:
        """Ask with parameters."""
        return self.get(route, query_string={key: str(value) for key, value in query.items()})

    def post(self, route: str) -> TestResponse:
        """Try to change something."""
        return self._apps[route].post(route)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    write_round(tmp_path / "a", 1)
    write_round(tmp_path / "a", 101, shade=200)
    write_round(tmp_path / "deep" / "b", 1, "dog")
    return Board(tmp_path)


def said(response: TestResponse) -> str:
    """Return what a refusal says, which has to be a plain sentence."""
    assert response.content_type == "text/plain; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "Traceback" not in response.text
    return response.text


def test_runs_in_which_a_guard_has_written_are_listed(board: Board, tmp_path: Path) -> None:
    write(tmp_path / "foreign", (3, card(picture())))  # control: a run without entries
    board.reload()
    content = json.loads(board.get("/runs").text)
    assert content == {
        "runs": ["a", "deep/b"],
        "newest": "a",
        "folder": str(tmp_path),
        "problem": "",
    }
    write_round(tmp_path / "deep" / "b", 300, "dog")
    board.reload()
    assert json.loads(board.get("/runs").text)["newest"] == "deep/b"


def test_a_view_shows_one_run_or_two(board: Board) -> None:
    one, two = board.ask("/view", run="a"), board.ask("/view", run="a", other="deep/b")
    assert one.content_type == "text/html; charset=utf-8"
    assert "cat" in one.text
    assert "dog" not in one.text
    assert "cat" in two.text
    assert "dog" in two.text
    assert one.headers["Concept-Guard-Steps"] == "101"
    assert two.headers["Concept-Guard-Steps"] == "101,1"


def test_nobody_may_put_a_script_into_a_view(tmp_path: Path) -> None:
    write_round(tmp_path / "<b>a", 1, "<script>alert(1)</script>")
    response = Board(tmp_path).ask("/view", run="<b>a")
    assert response.status_code == 200
    assert "<script" not in response.text
    assert "<b>a" not in response.text
    assert "&lt;script&gt;" in response.text
    policy = response.headers["Content-Security-Policy"]
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_without_runs_the_view_says_what_to_do(tmp_path: Path) -> None:
    board = Board(tmp_path)
    content = json.loads(board.get("/runs").text)
    assert content == {"runs": [], "newest": None, "folder": str(tmp_path), "problem": ""}
    response = board.get("/view")
    assert response.status_code == 200
    assert "log_dir" in response.text


def test_a_view_is_drawn_again_only_if_there_is_something_new(board: Board, tmp_path: Path) -> None:
    first = board.ask("/view", run="a")
    known = {"If-None-Match": first.headers["ETag"]}
    again = board.get("/view", query_string={"run": "a"}, headers=known)
    assert (again.status_code, again.text) == (304, "")
    write(tmp_path / "a", (150, card(picture())), name="1.other")  # of a round not yet written
    write_round(tmp_path / "a", 201)  # TensorBoard has not read it yet
    new = board.get("/view", query_string={"run": "a"}, headers=known)
    assert new.status_code == 200
    assert new.headers["Concept-Guard-Steps"] == "201"


def test_cards_are_pictures_that_a_browser_may_keep(board: Board) -> None:
    response = board.ask("/card", run="a", step=101, slot=SLOT)
    assert response.data == picture(200)
    assert response.content_type == "image/jpeg"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "max-age=86400" in response.headers["Cache-Control"]
    view = board.ask("/view", run="a").text
    assert "card?run=a&amp;step=101&amp;slot=1&amp;content=" in view
    assert board.ask("/card", run="a", step=1, slot=SLOT).data == picture(100)


def test_a_card_that_a_resumed_run_drew_anew_has_another_address(tmp_path: Path) -> None:
    def address() -> str:
        text = Board(tmp_path).ask("/view", run="a").text
        return text[text.index("card?run=a") :].partition('"')[0]

    write_round(tmp_path / "a", 1)
    before = address()
    assert address() == before
    write_round(tmp_path / "a", 1, shade=7)
    assert address() != before


def test_a_png_is_a_picture_and_a_page_is_none(tmp_path: Path) -> None:
    run = tmp_path / "a"
    page = b"<html><script>alert(1)</script></html>"
    write(run, (1, card(picture(kind="PNG"), 0)), (1, card(page, 2)), (1, kept(round_entry(1))))
    board = Board(tmp_path)
    assert board.ask("/card", run="a", step=1, slot=0).content_type == "image/png"
    refused = board.ask("/card", run="a", step=1, slot=2)
    assert refused.status_code == 404
    assert said(refused) == "run 'a' has no picture of slot 2 at update 1."


@pytest.mark.parametrize(
    "name",
    [
        "nope",
        "..",
        "../a",
        "a/../a",
        "/etc",
        "./a",
        "a/",
        "a\0",
        "~",
        "%2e%2e",
        "é" * 5000,
        "{}<b>",
    ],
)
@pytest.mark.parametrize("route", ["/view", "/card"])
def test_a_run_that_tensorboard_does_not_name_is_not_there(
    board: Board, tmp_path: Path, route: str, name: str
) -> None:
    response = board.ask(route, run=name, step=1, slot=SLOT)
    assert response.status_code == 404
    text = said(response)
    assert len(text) < 1000 + len(str(tmp_path))
    assert text.startswith(f"no run {name[:200]!r} of concept_guard in {str(tmp_path)!r}; ")
    assert text.endswith("there are: a, deep/b.")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_run_outside_the_log_folder_is_not_read(tmp_path: Path, name: str) -> None:
    """Whatever list TensorBoard may have: names are folders below the log folder."""
    write_round(tmp_path / "outside", 1)
    write_round(tmp_path / "logs" / "a", 1)
    outside = str(tmp_path / "outside") if name.startswith("/") else name

    class Provider:
        def list_tensors(self, *_: object, **__: object) -> dict[str, dict[str, object]]:
            return {"a": {}, outside: {}}

    context = TBContext(logdir=str(tmp_path / "logs"), data_provider=Provider())
    apps = ConceptGuardPlugin(context).get_plugin_apps()
    assert json.loads(Client(apps["/runs"]).get("/").text)["runs"] == ["a"]
    assert Client(apps["/view"]).get("/", query_string={"run": "a"}).status_code == 200  # control
    assert Client(apps["/view"]).get("/", query_string={"run": outside}).status_code == 404


def test_a_link_in_the_log_folder_is_followed(tmp_path: Path) -> None:
    write_round(tmp_path / "elsewhere", 1)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "linked").symlink_to(tmp_path / "elsewhere")
    board = Board(tmp_path / "logs")
    write_round(tmp_path / "logs" / "linked", 101)
    board.reload()
    listed = json.loads(board.get("/runs").text)["runs"]
    if not listed:
        pytest.skip("this TensorBoard does not follow links")
    assert board.ask("/view", run="linked").headers["Concept-Guard-Steps"] == "101"


@pytest.mark.parametrize("key", ["step", "slot"])
@pytest.mark.parametrize("value", ["", "-1", "1.5", "x", "1e3", " 1", "²", "٣", "9" * 400])
def test_a_number_that_is_none_is_refused(board: Board, key: str, value: str) -> None:
    response = board.ask("/card", **{"run": "a", "step": 1, "slot": SLOT, key: value})
    assert response.status_code == 400
    assert said(response) == f"{key}={value[:50]!r} is not a whole number from 0 on."


def test_other_bad_requests_are_refused_in_words(board: Board) -> None:
    response = board.ask("/view", other="a")
    assert response.status_code == 400
    assert said(response) == "`other` is compared with `run`: name that one as well."
    response = board.post("/runs")
    assert response.status_code == 405
    assert said(response) == "POST is not answered; use GET."


def test_a_fault_is_one_sentence_and_a_traceback_in_the_terminal(
    board: Board, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(runs.Runs, "listed", fail)
    response = board.get("/runs")
    assert response.status_code == 500
    assert said(response) == "This could not be shown; the terminal of TensorBoard says why."
    assert "secret" in caplog.text


@pytest.mark.parametrize("logdir", ["gs://bucket/runs", "s3://bucket", "", None])
def test_where_there_is_no_local_folder_the_tab_says_so(logdir: str | None) -> None:
    context = TBContext(logdir=logdir, data_provider=object())
    apps = ConceptGuardPlugin(context).get_plugin_apps()
    content = json.loads(Client(apps["/runs"]).get("/runs").text)
    assert content["runs"] == []
    asked = f"TensorBoard reads {logdir!r}" if logdir else "TensorBoard has no --logdir"
    assert content["problem"] == (
        f"{asked}, but this tab reads the event files of one local folder. "
        "Start `tensorboard --logdir FOLDER`, with a local folder or a local copy of it."
    )


def test_a_torn_event_hides_itself_alone_and_is_read_when_it_is_whole(
    board: Board, tmp_path: Path
) -> None:
    path = write_round(tmp_path / "a", 201)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    response = board.ask("/view", run="a")
    assert response.status_code == 200
    torn = response.headers["ETag"]
    path.write_bytes(whole)
    assert board.ask("/view", run="a").headers["ETag"] != torn


def test_a_run_whose_folder_was_made_anew_shows_only_the_new_one(
    board: Board, tmp_path: Path
) -> None:
    assert board.ask("/view", run="a").headers["Concept-Guard-Steps"] == "101"
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    write_round(tmp_path / "a", 51, "horse")
    response = board.ask("/view", run="a")
    assert response.headers["Concept-Guard-Steps"] == "51"
    assert "cat" not in response.text


def test_a_file_that_another_has_replaced_is_read_from_its_start(
    board: Board, tmp_path: Path
) -> None:
    board.ask("/view", run="a")
    for step in (1, 101, 151, 201):  # longer than the one before
        new = write_round(tmp_path / "elsewhere", step, "horse")
    (old,) = (tmp_path / "a").iterdir()
    assert new.stat().st_size > old.stat().st_size
    new.replace(old)
    response = board.ask("/view", run="a")
    assert response.headers["Concept-Guard-Steps"] == "201"
    assert "cat" not in response.text


def test_foreign_events_beside_ours_are_no_reason_to_draw_again(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def fragment(histories: list[RunHistory], _: object) -> str:
        drawn.append(histories[0])
        return "drawn"

    monkeypatch.setattr(report_runs, "fragment", fragment)
    board.ask("/view", run="a")
    write(tmp_path / "a", (7, Summary.Value(tag="loss", simple_value=0.5)), name="9.loop")
    (tmp_path / "a" / "other.txt").write_text("nothing")
    board.ask("/view", run="a")
    assert len(drawn) == 1
    (tmp_path / "a" / "events.out.tfevents.99.junk").write_bytes(b"no record" * 99)
    write_round(tmp_path / "a", 201)  # control
    assert board.ask("/view", run="a").headers["Concept-Guard-Steps"] == "201"
    assert len(drawn) == 2


def test_files_that_stay_as_they_are_are_not_read_again(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise AssertionError("read again")

    assert board.ask("/view", run="a").status_code == 200
    monkeypatch.setattr(HistoryReader, "read", fail)
    assert board.ask("/view", run="a").status_code == 200
    write_round(tmp_path / "a", 201)  # control
    assert board.ask("/view", run="a").status_code == 500


def test_many_may_ask_at_once(board: Board, tmp_path: Path) -> None:
    answers: list[tuple[int, str]] = []

    def ask() -> None:
        for _ in range(5):
            response = board.ask("/view", run="a")
            answers.append((response.status_code, response.headers["Concept-Guard-Steps"]))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for step in (201, 301):
        write_round(tmp_path / "a", step)
    for thread in threads:
        thread.join()
    assert {code for code, _ in answers} == {200}
    assert {steps for _, steps in answers} <= {"101", "201", "301"}
    assert board.ask("/view", run="a").headers["Concept-Guard-Steps"] == "301"


def test_only_the_runs_asked_for_last_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "MOST_FOLLOWED", 2)
    for name in "abc":
        write_round(tmp_path / name, 1)
    board = Board(tmp_path)
    for name in "abac":
        board.ask("/view", run=name)
    assert list(board.plugin._runs._followed) == ["a", "c"]
    assert board.ask("/card", run="b", step=1, slot=SLOT).status_code == 200  # read once more


def test_the_tab_is_an_own_frame_that_never_keeps_tensorboard_waiting(
    board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("is_active must not look")

    monkeypatch.setattr(runs.Runs, "listed", fail)
    assert board.plugin.is_active() is False
    assert board.plugin.data_plugin_names() == (PLUGIN,)  # by which TensorBoard sees our data
    assert board.plugin.plugin_name == PLUGIN == runs.PLUGIN
    shown = board.plugin.frontend_metadata()
    assert (shown.es_module_path, shown.tab_name) == ("/index.js", "concept_guard")
    assert shown.es_module_path in board.plugin.get_plugin_apps()


def test_the_frame_needs_nothing_from_outside(board: Board) -> None:
    script, sheet = board.get("/index.js"), board.get("/style.css")
    assert script.content_type == "text/javascript; charset=utf-8"
    assert sheet.content_type == "text/css; charset=utf-8"
    assert "export function render()" in script.text
    assert ".controls" in sheet.text
    for text in (script.text, sheet.text):
        assert "http://" not in text
        assert "https://" not in text
        assert "import " not in text


def test_the_start_of_tensorboard_waits_for_no_slow_package() -> None:
    slow = [*SLOW_TO_IMPORT, "jinja2", "pandas", "PIL"]
    board = loaded_by("import concept_guard.board", slow)
    assert board <= loaded_by("import tensorboard.default", slow)
    assert "pydantic" in loaded_by("import concept_guard.entries", slow)  # control


def test_a_view_is_drawn_without_torch() -> None:
    code = "import concept_guard.board, concept_guard.report.runs, concept_guard.history"
    assert not loaded_by(code) & {"torch", "scipy", "timm"}
