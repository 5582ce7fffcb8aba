"""The board as people see it: a real TensorBoard in a real browser, on runs of a real guard."""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from board_runs import write, write_round
from browser import CHROMIUM, Visit, browsing, has_chromium, pictures_loaded, serving
from tensorboard.compat.proto.summary_pb2 import Summary
from worlds import PROBE, QUICK, UPDATES, fallen, stream, train, world

from concept_guard import ConceptGuard
from concept_guard.history import EVENTS, read_history

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Frame

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not has_chromium(), reason=f"no Chromium at {CHROMIUM}; set $CHROMIUM"),
]
LOADERS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "python"])
ONE, TWO = "real/one", "real/two"
WIDE, NARROW, HEIGHT = 1280, 390, 900
Visiting = Callable[..., Visit]
Keeping = Callable[[Visit, str], None]


def trained(folder: Path, updates: int) -> None:
    """Train a network that has fallen for a mark with a guard that knows nothing of it."""
    model = fallen()
    probe = world(PROBE).loader()
    with ConceptGuard(
        model, probe=probe, config=QUICK, log_dir=folder, class_names="abcd"
    ) as guard:
        train(model, stream(UPDATES + updates, first=UPDATES), guard)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two real runs, one whose last event is torn, a foreign one, and two that will grow."""
    folder = tmp_path_factory.mktemp("logs")
    trained(folder / ONE, 26)
    trained(folder / TWO, 10)
    shutil.copytree(folder / ONE, folder / "torn")
    (events,) = (folder / "torn").glob(EVENTS)
    events.write_bytes(events.read_bytes()[:-11])
    write(folder / "foreign", (1, Summary.Value(tag="loss", simple_value=0.5)))
    (folder / "foreign" / "events.out.tfevents.7.junk").write_bytes(b"no record" * 99)
    for name in ("fast", "python"):
        write_round(folder / f"growing_{name}", 1)
    return folder


@pytest.fixture(scope="module")
def servers(logdir: Path) -> Iterator[dict[bool, str]]:
    with serving(logdir, fast=True) as one, serving(logdir, fast=False) as other:
        yield {True: one, False: other}


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    with browsing() as browser:
        yield browser


@pytest.fixture(scope="module")
def context(chromium: "Browser") -> "BrowserContext":
    """Return one that all pages share, so that TensorBoard's scripts are fetched once."""
    return chromium.new_context(color_scheme="null")


@pytest.fixture
def visiting(chromium: "Browser", context: "BrowserContext") -> Iterator[Visiting]:
    """Open pages, with a clock of their own if asked; in none of them anything may go wrong."""
    opened: list[Visit] = []

    def visit(address: str, width: int = WIDE, *, clock: bool = False) -> Visit:
        page = (chromium.new_context() if clock else context).new_page()
        page.set_viewport_size({"width": width, "height": HEIGHT})
        if clock:
            page.clock.install()
        opened.append(Visit(page, address))
        return opened[-1]

    yield visit
    for visit in opened:
        visit.page.close()
    assert not [trouble for visit in opened for trouble in visit.troubles]


@pytest.fixture
def shot(tmp_path: Path) -> Keeping:
    """Keep a picture of a page, as high as what is in our tab."""
    folder = Path(os.environ.get("CONCEPT_GUARD_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)

    def keep(visit: Visit, name: str) -> None:
        width = visit.page.evaluate("window.innerWidth")
        for frame in [frame for frame in visit.page.frames if "plugin_entry" in frame.url]:
            height = 70 + frame.evaluate("document.documentElement.scrollHeight")
            visit.page.set_viewport_size({"width": width, "height": min(height, 12_000)})
            pictures_loaded(frame)
        visit.page.screenshot(path=folder / f"{name}.png")
        visit.page.set_viewport_size({"width": width, "height": HEIGHT})

    return keep


def choose(board: "Frame", run: str, other: str | None = None) -> None:
    """Choose in the lists, and wait until the view shows it."""
    board.get_by_label("Run", exact=True).select_option(run)
    if other is not None:
        board.get_by_label("Compare with").select_option(other)
    shown = [run, other] if other else [run]
    says(board, ".*".join(rf"{re.escape(name)}: up to update \d+" for name in shown))


def says(board: "Frame", pattern: str, seconds: float = 20) -> None:
    """Wait until the status line says something."""
    status = board.get_by_role("status").filter(has_text=re.compile(pattern))
    status.wait_for(timeout=1000 * seconds)


def steps_of_cards(board: "Frame") -> set[int]:
    """Return the steps whose cards are shown."""
    addresses = board.eval_on_selector_all("main img", "all => all.map(i => i.src)")
    return {int(step) for address in addresses for step in re.findall(r"step=(\d+)", address)}


def fits(board: "Frame") -> bool:
    """Return whether nothing of the page is wider than the window."""
    return bool(board.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


def brightness(board: "Frame") -> float:
    """Return that of the background, from 0 to 255."""
    colour = board.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@LOADERS
def test_curves_and_cards_stand_in_the_tabs_of_tensorboard(
    servers: dict[bool, str], visiting: Visiting, shot: Keeping, fast: bool
) -> None:
    visit = visiting(servers[fast])
    visit.go("scalars")
    visit.page.get_by_text("concept_guard").first.wait_for()
    visit.page.get_by_text("concept_guard/probe/top1", exact=True).first.wait_for()
    shot(visit, f"scalars_{'fast' if fast else 'python'}")
    visit.go("images")
    picture = visit.page.locator("img[src*='individualImage']").first
    picture.wait_for()
    visit.page.wait_for_function(
        "i => i.complete && i.naturalWidth > 50", arg=picture.element_handle()
    )
    shot(visit, f"images_{'fast' if fast else 'python'}")


@LOADERS
def test_a_real_run_is_shown_whole(
    servers: dict[bool, str], logdir: Path, visiting: Visiting, shot: Keeping, fast: bool
) -> None:
    history = read_history(logdir / ONE, ONE)
    steps = {step for step, _ in history.cards}
    assert steps, "the run has no card"
    assert history.rounds[-1].groups, "the run has no groups"
    visit = visiting(servers[fast])
    board = visit.board()
    choose(board, ONE)
    assert history.rounds[-1].verdict.lower() in board.inner_text("main").lower()
    rounds = board.get_by_role("img", name=re.compile(rf"^{len(history.rounds)} rounds"))
    assert rounds.count() == 1  # the timeline
    assert steps_of_cards(board) == steps
    assert pictures_loaded(board)
    assert board.get_by_role("table").filter(has_text="worst").count() >= 1  # groups
    for scheme, width in itertools.product(["light", "dark"], [WIDE, NARROW]):
        visit.page.set_viewport_size({"width": width, "height": HEIGHT})
        visit.page.emulate_media(color_scheme=scheme)
        board.wait_for_function(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        assert fits(board)
        assert (brightness(board) > 128) == (scheme == "light")
        if fast:  # the other looks the same
            shot(visit, f"real_{width}_{scheme}")


def test_a_run_that_is_being_written_grows_without_a_reload(
    servers: dict[bool, str], logdir: Path, visiting: Visiting
) -> None:
    names = {"growing_fast": True, "growing_python": False}
    boards = {name: visiting(servers[fast]).board() for name, fast in names.items()}
    for name, board in boards.items():
        choose(board, name)
        write_round(logdir / name, 101, "zebra")
        assert "zebra" not in board.inner_text("main")
    for name, board in boards.items():
        says(board, rf"{name}: up to update 101")
        assert "zebra" in board.inner_text("main")
        assert steps_of_cards(board) == {1, 101}  # the last one, and its history


def test_two_runs_stand_side_by_side(
    servers: dict[bool, str], visiting: Visiting, shot: Keeping
) -> None:
    visit = visiting(servers[False])
    board = visit.board()
    choose(board, ONE, TWO)
    headings = " ".join(board.locator("main :is(h2, h3)").all_inner_texts())
    assert ONE in headings
    assert TWO in headings
    assert pictures_loaded(board)
    for width in (WIDE, NARROW):
        visit.page.set_viewport_size({"width": width, "height": HEIGHT})
        assert fits(board)
        shot(visit, f"two_{width}")


@LOADERS
def test_a_torn_event_costs_no_more_than_itself(
    servers: dict[bool, str], logdir: Path, visiting: Visiting, fast: bool
) -> None:
    history = read_history(logdir / "torn", "torn")
    assert 1 <= len(history.rounds) <= len(read_history(logdir / ONE).rounds)
    board = visiting(servers[fast]).board()
    choose(board, "torn")
    assert history.rounds[-1].verdict.lower() in board.inner_text("main").lower()
    options = board.get_by_label("Run", exact=True).locator("option").all_inner_texts()
    assert {ONE, TWO, "torn"} <= set(options)
    assert "foreign" not in options  # nothing of a guard in it


def test_an_empty_folder_says_what_to_do_and_fills(
    visiting: Visiting, shot: Keeping, tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with serving(logs, fast=True) as one, serving(logs, fast=False) as other:
        visits = [visiting(one), visiting(other)]
        boards = [visit.board() for visit in visits]
        for board in boards:
            says(board, "No run of a guard so far")
            assert "log_dir" in board.inner_text("main")
            assert board.get_by_label("Run", exact=True).is_disabled()
        shot(visits[0], "empty")
        write_round(logs / "a", 1, "zebra")
        for board in boards:
            says(board, "a: up to update 1")
            assert "zebra" in board.inner_text("main")
        for visit in visits:
            visit.page.goto("about:blank")  # before the servers are gone


def test_every_control_has_a_name_and_the_keyboard_reaches_it(
    servers: dict[bool, str], visiting: Visiting
) -> None:
    visit = visiting(servers[True], NARROW)
    board = visit.board()
    choose(board, ONE)
    tree = board.locator("body").aria_snapshot()
    controls = r"(?:button|link|combobox|checkbox|textbox|table|region|form)\b"
    nodes = re.findall(rf"^\s*- ({controls}.*)$", tree, re.MULTILINE)
    assert {node.split()[0] for node in nodes} >= {"button", "link", "combobox", "checkbox"}
    assert not [node for node in nodes if not re.match(r'[a-z]+ "[^"]+', node)]
    drawings = "main img, main svg:not(svg svg, [aria-hidden=true], [aria-hidden=true] *)"
    named = "all => all.map(e => e.alt || e.ariaLabel || '')"
    assert all(board.eval_on_selector_all(drawings, named))

    board.get_by_label("Run", exact=True).focus()
    reached = []
    for _ in range(4):
        reached.append(board.evaluate("document.activeElement.id || document.activeElement.type"))
        visit.page.keyboard.press("Tab")
    assert reached == ["run", "other", "button", "by-itself"]
    link = board.locator("main a[href^='#']").first
    link.focus()
    visit.page.keyboard.press("Enter")
    target = (link.get_attribute("href") or "")[1:]
    assert board.evaluate("document.activeElement.id") == target
    assert board.locator(f"[id='{target}']").is_visible()
    assert "plugin_entry" in board.url  # it is still our page


def test_a_reader_keeps_their_place_when_a_round_is_added(
    servers: dict[bool, str], logdir: Path, visiting: Visiting
) -> None:
    write_round(logdir / "read", 1)
    write_round(logdir / "read", 101)
    visit = visiting(servers[True], clock=True)
    board = visit.board()
    board.get_by_label("Run", exact=True).locator("option", has_text="read").wait_for(
        state="attached"
    )
    choose(board, "read")
    summary = board.locator("main summary").last
    summary.scroll_into_view_if_needed()
    summary.click()
    place = "e => [e.getBoundingClientRect().top, e.parentElement.open]"
    before = summary.evaluate(place)
    assert before[1]
    write_round(logdir / "read", 201)
    visit.page.clock.fast_forward(11_000)
    says(board, "read: up to update 201")
    after = board.locator("main summary").last.evaluate(place)
    assert after[1]
    assert after[0] == pytest.approx(before[0], abs=3)
    assert board.evaluate("document.activeElement.textContent") == summary.inner_text()


def test_the_choice_outlives_a_reload_and_rest_is_rest(
    servers: dict[bool, str], visiting: Visiting
) -> None:
    visit = visiting(servers[True], clock=True)
    board = visit.board()
    choose(board, TWO, ONE)
    board.get_by_label("Update by itself").uncheck()
    visit.page.reload()
    board = visit.board()
    says(board, f"{TWO}: .*{ONE}: ")
    asked: list[str] = []
    visit.page.on("request", lambda request: asked.append(request.url))
    visit.page.clock.fast_forward(60_000)
    assert not [url for url in asked if "concept_guard" in url]
    board.get_by_role("button", name="Refresh").click()  # control
    board.wait_for_selector("main[aria-busy=false]")
    assert [url for url in asked if "concept_guard/view" in url]


def test_a_hidden_tab_asks_for_nothing(servers: dict[bool, str], visiting: Visiting) -> None:
    visit = visiting(servers[True], clock=True)
    board = visit.board()
    asked: list[str] = []
    visit.page.on("request", lambda request: asked.append(request.url))
    visit.page.get_by_role("tab", name="Text").click()
    visit.page.locator("iframe").wait_for(state="hidden")
    visit.page.clock.fast_forward(60_000)
    assert not [url for url in asked if "plugin/concept_guard" in url]
    visit.page.get_by_role("tab", name="concept_guard").click()  # control
    with visit.page.expect_request(re.compile("plugin/concept_guard/view")):
        visit.page.clock.fast_forward(2_000)
    board.wait_for_selector("main[aria-busy=false]")


def test_where_there_is_no_local_folder_the_tab_says_so(
    servers: dict[bool, str], visiting: Visiting, shot: Keeping
) -> None:
    said = "TensorBoard reads 'gs://x', but <b>."
    listed = {"runs": [], "newest": None, "folder": "gs://x", "problem": said}
    visit = visiting(servers[True])
    visit.page.route("**/plugin/concept_guard/runs", lambda route: route.fulfill(json=listed))
    board = visit.board()
    says(board, "No history can be read")
    assert board.inner_text("main") == said
    shot(visit, "no_folder")


def test_a_server_that_is_gone_is_told_and_asked_again(
    servers: dict[bool, str], visiting: Visiting, shot: Keeping
) -> None:
    visit = visiting(servers[True])
    board = visit.board()
    choose(board, ONE)
    ours = re.compile("plugin/concept_guard/(runs|view)")
    visit.page.route(ours, lambda route: route.abort())
    board.get_by_role("button", name="Refresh").click()
    alert = board.get_by_role("alert")
    alert.wait_for()
    assert "TensorBoard does not answer" in alert.inner_text()
    assert board.locator("main h2").count()  # what was read stays
    shot(visit, "gone")
    visit.page.unroute(ours)
    visit.page.route(ours, lambda route: route.fulfill(status=404, body="no run 'x'."))
    alert.get_by_role("button", name="Try again").click()
    alert.filter(has_text="no run 'x'. (404)").wait_for()
    visit.page.unroute(ours)
    alert.get_by_role("button", name="Try again").click()
    alert.wait_for(state="hidden")
    assert visit.troubles  # control: failures of requests are noted
    visit.troubles.clear()


def test_the_switch_of_tensorboard_makes_the_tab_dark(
    servers: dict[bool, str], visiting: Visiting
) -> None:
    visit = visiting(servers[True])
    board = visit.board()
    assert brightness(board) > 128
    visit.page.locator("app-header-dark-mode-toggle button").click()
    visit.page.get_by_role("menuitem", name="Dark").click()
    board.wait_for_function("matchMedia('(prefers-color-scheme: dark)').matches")
    assert brightness(board) < 128
