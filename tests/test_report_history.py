"""The view of a run: what its rounds said is shown, in little room, escaped, and never invented."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from typing import Any

import pytest
from jinja2 import Environment
from PIL import Image
from test_report import EMPTY, HOSTILE, Page

from concept_guard.entries import (
    ActEntry,
    ConceptEntry,
    FlagEntry,
    GroupEntry,
    RoundEntry,
    StartEntry,
)
from concept_guard.history import RunHistory
from concept_guard.report import drawing, fragment, render, run_page, runs, style
from concept_guard.report.charts import Scale, Series, chart, thinned
from concept_guard.report.stories import by_importance, stories

TIME = "2026-01-02 03:04"
UNSEEN = ["\u202eevil", "\x1b[31mred", "a\u2066b", "nul\x00"]


def jpeg(size: int = 8) -> bytes:
    file = BytesIO()
    Image.effect_noise((size, size), 90).convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()


CARD = jpeg()


def flag(status: str = "found", **changes: Any) -> FlagEntry:
    given = {
        "class_name": "gull",
        "risk_difference": 0.4567,
        "interval": (0.3, None),
        "q_value": 3.14159e-7,
        "fixed": 21,
        "broken": 2,
        "present": 52,
        "status": status,
        "reason": "erasing it moves the wrong logit",
        "examples": ("val/a.png", "val/b.png"),
    }
    return FlagEntry(**{**given, **changes})


def concept(status: str = "found", **changes: Any) -> ConceptEntry:
    given = {"id": 3, "slot": 0, "flags": (flag(status),), "erased": status == "erased"}
    return ConceptEntry(**{**given, **changes})


def group(class_name: str, carried: bool, images: int, *accuracies: float | None) -> GroupEntry:
    accuracy, uncorrected = [*accuracies, None][:2]
    return GroupEntry(
        concept=3,
        class_name=class_name,
        carried=carried,
        images=images,
        accuracy=accuracy,
        accuracy_uncorrected=uncorrected,
    )


def a_round(step: int, *concepts: ConceptEntry, **changes: Any) -> RoundEntry:
    given = {
        "step": step,
        "time": TIME,
        "verdict": f"verdict of {step}",
        "numbers": {"probe/top1": 0.5 + step / 10000, "summary/n_flagged": len(concepts)},
        "images": 540,
        "errors": 22,
        "concepts": concepts,
        "found": 12,
    }
    return RoundEntry(**{**given, **changes})


def act(step: int, name: Any, *concepts: int, **changes: Any) -> ActEntry:
    return ActEntry(step=step, time=TIME, act=name, concepts=concepts, **changes)


START = StartEntry(step=0, time=TIME, version="1.2", model="ResNet", settings={"start": "70"})
BEFORE = (group("tern", True, 31, 0.25), group("tern", False, 87, 0.8), group("auk", True, 4, 0.0))
AFTER = (
    group("tern", True, 31, 0.75, 0.375),
    group("tern", False, 87, 0.9, 0.91),
    group("auk", True, 4, 0.0, 0.0),
)
RUN = RunHistory(
    name="runs/a",
    starts=(START,),
    rounds=(
        a_round(100),
        a_round(200, concept("unconfirmed")),
        a_round(300, concept(), groups=BEFORE),
        a_round(400, concept("erased", leak=0.125, readable=0.75, drift=0.875), groups=AFTER),
        a_round(500, concept("erased"), concept("waiting", id=8, slot=1), groups=AFTER),
    ),
    acts=(
        act(300, "flag", 3, text="drives errors"),
        act(300, "erase", 3, text="projected out"),
        *(act(step, "re_estimate", 3) for step in (325, 350, 375)),
        act(450, "veto", 9, text="kept on purpose", by="person"),
    ),
    cards={(step, 0): CARD for step in (200, 300, 400, 500)} | {(500, 1): CARD},
)
OTHER = replace(RUN, name="runs/b", rounds=RUN.rounds[:3], acts=(), cards={})


def address(name: str, step: int, slot: int) -> str:
    return f"card?{name}-{step}-{slot}"


def view(*shown: RunHistory) -> Page:
    return Page(fragment(shown, address))


def long_run(rounds: int, concepts: int = 8) -> RunHistory:
    """Return a run in which states change all the time."""
    states = ("found", "unconfirmed", "erased", "found")
    told = []
    for n in range(1, rounds + 1):
        entries = (
            concept(states[(n // (7 + i)) % 4], id=i, slot=i, leak=n % 10 / 10)
            for i in range(concepts)
        )
        told.append(a_round(100 * n, *entries, groups=AFTER))
    return RunHistory(
        name="long",
        rounds=tuple(told),
        acts=tuple(act(100 * n, ("flag", "erase", "re_estimate")[n % 3], 3) for n in range(rounds)),
        cards={(100 * n, slot): CARD for n in range(1, rounds + 1) for slot in range(concepts)},
    )


def test_all_that_the_rounds_said_is_shown() -> None:
    page = view(RUN)
    expected = [
        *("runs/a", "Verdict of 500.", "Model ResNet", "Last update 500", "Rounds 5"),
        *("Concepts found 12", "Flagged 2", "Probe accuracy 0.550", "540, 22 of them wrong"),
        *("Concept 3, towards gull erased", "Concept 8, towards gull waiting"),
        *("+0.46 [+0.30, –]", "q = 3.1e-07", "21 repaired", "2 broken", "val/a.png val/b.png"),
        *("update 300 +0.46, q = 3.1e-07, found", "update 400 +0.46, q = 3.1e-07, left +0.12"),
        "300 flag 3 drives errors guard, 2026-01-02 03:04",
        "325 to 375 estimate anew 3 3 times guard",
        "450 veto 9 kept on purpose person",
    ]
    assert [part for part in expected if part not in page.text.replace(" ,", ",")] == []
    sources = set(page.values("src"))
    assert sources == {address("runs/a", step, slot) for step, slot in RUN.cards}
    assert "Concept 3" not in view(replace(RUN, rounds=RUN.rounds[:1])).text  # control


def test_the_timeline_says_what_it_draws() -> None:
    (row,) = [said for said in view(RUN).values("aria-label") if said.startswith("Concept 3:")]
    assert row == (
        "Concept 3: listed in 1 round at update 200; flagged in 1 round at update 300; under "
        "correction in 2 rounds from update 400 to 500. flag at update 300; erase at update 300."
    )
    html = fragment([RUN], address)
    _, _, lane = html.partition(f'aria-label="{row}"')
    lane = lane.partition("lane-name")[0]
    drawn = dict(re.findall(r'<path class="bar-(\w+)" d="(M[\d.]+ \d+H[\d.]+v\d+)', lane))
    assert drawn["listed"] == "M400 5H600v2"  # 200 to 300 of 500 updates
    assert drawn["flagged"] == "M600 3H800v6"
    assert drawn["erased"] == "M800 0H1000v12"
    assert "Pairs were estimated anew 3 times." in html


def test_the_groups_are_those_of_the_first_flag_and_of_the_last_round() -> None:
    html = fragment([RUN], address)
    text = Page(html).text
    assert "True class Images update 300 update 500 uncorrected" in text
    # All classes but gull: (31 * .25 + 4 * 0) / 35, (31 * .75) / 35, (31 * .375) / 35.
    assert "all classes but gull, with it 35 0.221 worst 0.664 worst 0.332 worst" in text
    assert "all classes but gull, without 87 0.800 0.900 0.910" in text
    assert "tern, with it 31 0.250 0.750 0.375" in text
    assert "tern, without 87 0.800 0.900 0.910" in text
    assert "auk, with it 4 0.000 0.000 0.000" in text  # too few images to be the worst
    once = replace(RUN, rounds=(*RUN.rounds[:2], a_round(300, concept(), groups=BEFORE)))
    assert "True class Images update 300 all" in view(once).text
    early = a_round(200, concept("unconfirmed"), groups=(group("tern", True, 31, 0.1),))
    since = view(replace(RUN, rounds=(RUN.rounds[0], early, *RUN.rounds[2:]))).text
    assert "tern, with it 31 0.250 0.750" in since  # not the 0.1 from before the flag
    never = replace(RUN, rounds=(a_round(200, concept("unconfirmed"), groups=BEFORE),))
    assert "True class" not in view(never).text  # control


@pytest.mark.parametrize(
    ("acts", "waits"),
    [
        ((), True),
        ((act(600, "bake"),), False),
        ((act(500, "approve", 8, by="person"),), False),
        ((act(500, "flag", 8),), True),
    ],
)
def test_what_waits_for_approval_is_said_with_the_command(
    acts: tuple[ActEntry, ...], waits: bool
) -> None:
    text = view(replace(RUN, name="my runs/a", acts=acts)).text
    assert ("concept-guard approve 'my runs/a' 8" in text) == waits
    assert ("1 flag waits for a decision." in text) == waits


@pytest.mark.parametrize("shown", [(), (RunHistory("none"),)])
def test_an_empty_folder_is_told_what_to_do(shown: tuple[RunHistory, ...]) -> None:
    text = view(*shown).text
    assert 'log_dir="runs/a"' in text
    assert "concept-guard run recipes/quickstart.yaml" in text
    assert "after guard.start updates" in text
    begun = view(RunHistory("begun", starts=(START,), problems=("a.tfevents is torn",))).text
    assert "No round yet. The first comes after 70 updates (guard.start)." in begun
    assert "Not readable: a.tfevents is torn" in begun
    assert "log_dir" not in begun  # control


def test_two_runs_stand_side_by_side_and_their_curves_differ_without_colours() -> None:
    page, html = view(RUN, OTHER), fragment([RUN, OTHER], address)
    assert "Quantity runs/a runs/b" in page.text
    assert "Last update 500 300" in page.text
    assert "Verdict Verdict of 500. Verdict of 300." in page.text
    (said,) = [
        label for label in page.values("aria-label") if label.startswith("Probe accuracy, as it is")
    ]
    assert said == (
        "Probe accuracy, as it is. runs/a: 0.510 at update 100, 0.550 at update 500; lowest 0.510, "
        "highest 0.550. runs/b: 0.510 at update 100, 0.530 at update 300; lowest 0.510, highest "
        "0.530."
    )
    assert 'class="curve curve-1"' in html
    assert re.search(r"\.curve-1\{[^}]*stroke-dasharray", style())
    assert 'id="run-1-concept-3"' in html
    assert 'id="run-2-concept-3"' in html
    half = view(RUN, RunHistory("none"))
    assert "No guard has written here yet." in half.text
    assert "Verdict Verdict of 500. –" in half.text


@pytest.mark.parametrize(
    "shown",
    [(), (RunHistory("none"),), (RUN,), (RUN, OTHER), (RUN, RUN), (long_run(30, 40),)],
    ids=["no run", "empty", "one", "two", "twice", "many concepts"],
)
def test_the_page_is_well_formed_and_can_be_read_aloud(shown: tuple[RunHistory, ...]) -> None:
    html = run_page(shown) if shown else run_page([RunHistory("")])
    page = Page(html)
    assert page.problems == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    links = {link.removeprefix("#") for link in page.values("href")}
    assert links | set(page.values("aria-labelledby")) <= set(ids)
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert all(attrs.get("alt") for tag, attrs in page.tags if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in page.tags if tag == "th")
    for tag, attrs in page.tags:
        if {"strip", "wide"} & set((attrs.get("class") or "").split()):
            assert attrs.get("tabindex") == "0", tag
        if attrs.get("tabindex") == "0":  # what scrolls is reached by keyboard and has a name
            assert attrs.get("role") == "region", tag
            assert attrs.get("aria-label"), tag
        if attrs.get("role") == "img":
            assert attrs.get("aria-label"), tag


def test_the_page_asks_for_nothing_outside_itself_and_runs_nothing() -> None:
    html = run_page([RUN, OTHER], command="concept-guard report runs/a")
    page = Page(html)
    bare = re.sub(r"base64,[^\"]*", "", html)
    assert not re.search(r"https?://|//\w|@import|url\(|\son\w+=|\sstyle=", bare)
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.values("src"))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert "concept-guard report runs/a" in page.text
    assert "<html" not in fragment([RUN], address)


def hostile(text: str) -> RunHistory:
    """Return a run that has a text wherever it can have one."""
    evil = flag(class_name=text, reason=text, examples=(text,))
    entry = concept(flags=(evil, evil))
    groups = (group(text, True, 9, 0.5, 0.25),)
    return RunHistory(
        name=text,
        starts=(START.model_copy(update={"time": text, "version": text, "model": text}),),
        rounds=tuple(
            a_round(step, entry, verdict=text, notes=(text,), time=text, groups=groups)
            for step in (100, 200)
        ),
        acts=(act(100, "flag", 3, text=text), act(200, "bake", text=text)),
        cards={(100, 0): CARD, (200, 0): CARD},
        problems=(text,),
    )


@pytest.fixture
def fresh_templates() -> Iterator[None]:
    runs._templates.cache_clear()
    yield
    runs._templates.cache_clear()


@pytest.mark.usefixtures("fresh_templates")
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_and_never_obeyed(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shape(name: str) -> tuple[object, ...]:
        return view(hostile(name), hostile(name)).shape

    harmless = shape("harmless")
    assert shape(text) == harmless
    assert view(hostile(text)).text.count(text) >= 20
    careless = partial(Environment)
    monkeypatch.setattr(drawing, "Environment", lambda **k: careless(**k | {"autoescape": False}))
    runs._templates.cache_clear()
    obeyed = shape(text) != harmless
    assert obeyed == any(mark in text for mark in '<"')  # control: without escaping it shows


@pytest.mark.parametrize("text", UNSEEN)
def test_characters_that_are_not_seen_are_spelled_out(text: str) -> None:
    html = run_page([hostile(text)], command=text)
    assert not re.search("[\u202e\u2066\x1b\x00]", html)
    assert text.encode("unicode_escape").decode() in html
    report = render(replace(EMPTY, title=text, history=hostile(text)))
    assert not re.search("[\u202e\u2066\x1b\x00]", report)
    kept = "Möwe \u05d0 line\nbreak"  # control: other scripts stay as they are
    assert kept in run_page([replace(RUN, rounds=(a_round(1, verdict=kept),))])


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1e300])
def test_numbers_that_cannot_be_drawn_are_gaps(value: float | None) -> None:
    numbers = {"probe/top1": value, "summary/n_flagged": value}
    rounds = (
        RUN.rounds[0],
        a_round(150, numbers=numbers),
        a_round(160, numbers={}),
        *RUN.rounds[1:],
    )
    html = fragment([replace(RUN, rounds=rounds)], address)
    assert not re.search(r'd="[^"]*(nan|inf|e\+)', html)
    assert top1_path(html).count("M") == 2
    assert top1_path(fragment([RUN], address)).count("M") == 1  # control


def top1_path(html: str) -> str:
    """Return the curve of the accuracy."""
    _, _, rest = html.partition('aria-label="Probe accuracy.')
    (path,) = re.findall(r'class="curve curve-0" d="([^"]*)"', rest.partition("</svg>")[0])
    return str(path)


def test_concepts_that_were_only_listed_are_named_but_take_no_room() -> None:
    listed = concept("unconfirmed", id=5, slot=None)
    rounds = (*RUN.rounds[:2], a_round(300, concept(), listed))
    page = view(replace(RUN, rounds=rounds))
    assert not [link for link in page.values("href") if link.endswith("concept-5")]
    assert "1 more concept With" in page.text
    assert "Concept 5 gull +0.46 unconfirmed: erasing it moves the wrong logit 300" in page.text
    decided = replace(RUN, rounds=rounds, acts=(act(300, "veto", 5, by="person"),))
    assert "#run-1-concept-5" in view(decided).values("href")  # control


def test_a_value_that_is_not_of_the_last_round_says_of_which_it_is() -> None:
    rounds = [a_round(n, numbers={"probe/top1": 0.5, "cost/overhead_pct": 4.0}) for n in (100, 200)]
    rounds.append(a_round(300, numbers={"probe/top1": 0.75}))
    text = view(replace(RUN, rounds=tuple(rounds))).text
    assert "as it is 0.750 " in text
    assert "share 4.0 (update 200)" in text


def test_the_curves_of_a_concept_have_a_gap_where_no_round_spoke_of_it() -> None:
    rounds = [a_round(100 * n, concept(leak=n / 10), concept(id=9)) for n in range(1, 6)]
    (said,) = concept_curve(rounds)
    assert said.count("M") == 1
    rounds[2] = a_round(300, concept(id=9))
    (said,) = concept_curve(rounds)
    assert said.count("M") == 2
    assert said.count("h0") == 2


def concept_curve(rounds: Sequence[RoundEntry]) -> list[str]:
    """Return what is drawn of what was left of concept 3."""
    html = fragment([replace(RUN, rounds=tuple(rounds))], address)
    assert re.search("left under correction: 0.10 at update 100", html.replace("+", ""))
    return re.findall(r'class="curve curve-1" d="([^"]{9,})"', html)[:1]


def test_a_step_that_no_training_reaches_stretches_no_axis() -> None:
    far = RUN.rounds[-1].model_copy(update={"step": 10**400})
    page = view(replace(RUN, rounds=(*RUN.rounds, far)))
    assert "Last update 500" in page.text


def test_a_chart_has_its_values_where_its_axis_says() -> None:
    points = [(0, 0.0), (50, None), (100, 1.0)]
    drawn = chart("T", [Series("s", points)], (0, 100), Scale(low=0.0, high=1.0))
    assert drawn is not None
    ends = {tick.text: tick.at for tick in drawn.up}
    xs = {tick.text: tick.at for tick in drawn.across}
    assert drawn.lines[0].path == (
        f"M{xs['0']:g} {ends['0.0']:g}h0M{xs['100']:g} {ends['1.0']:g}h0"
    )
    assert chart("T", [Series("s", [(0, None)])], (0, 100), Scale()) is None


@pytest.mark.parametrize(
    "values", [(0.0, 0.0), (1.0, 1.0), (1e-9, 2e-9), (9e11, -9e11), (5.0,), (-0.3, 0.2)]
)
def test_every_axis_holds_its_values_between_a_few_ticks(values: tuple[float, ...]) -> None:
    drawn = chart("T", [Series("s", list(enumerate(values)))], (0, 9), Scale())
    assert drawn is not None
    assert 2 <= len(drawn.up) <= 6
    assert len({tick.text for tick in drawn.up}) == len(drawn.up)
    inside = [float(y) for y in re.findall(r"[ML][\d.]+ ([-\d.]+)", drawn.lines[0].path)]
    assert all(drawn.up[-1].at - 0.1 <= y <= drawn.up[0].at + 0.1 for y in inside)


def test_a_long_curve_keeps_its_ends_and_extremes() -> None:
    points = [(n, 0.5) for n in range(10_000)]
    points[4321], points[8765] = (4321, 0.9), (8765, 0.1)
    kept = thinned(points)
    assert len(kept) <= 300
    assert {points[0], points[-1], points[4321], points[8765]} <= set(kept)
    assert points[4321] not in points[::34]  # control: every n-th point would lose it


def test_cards_are_kept_where_something_changed() -> None:
    rounds = tuple(a_round(n, concept("found" if n < 501 else "erased")) for n in range(1, 1001))
    (story,) = stories(replace(RUN, rounds=rounds, cards={(n, 0): CARD for n in range(1, 1001)}))
    order = by_importance(story)
    assert order[:3] == [1000, 1, 501]
    assert len(order) == 40
    gaps = sorted(order)
    assert max(b - a for a, b in zip(gaps, gaps[1:], strict=False)) <= 60  # spread over the run
    assert 501 not in range(1, 1001, 1000 // 40 + 1)  # control: evenly spread alone would miss it


def test_a_page_carries_three_megabytes_of_pictures_at_most() -> None:
    big = jpeg(260)
    cards = {at: big for at in long_run(200).cards}
    run = replace(long_run(200), cards=cards)
    assert 4 / 3 * len(big) * 8 * 40 > 2 * runs.PICTURE_BYTES  # control: there is more
    for shown in ([run], [run, replace(run, name="again")]):
        html = run_page(shown)
        inside = sum(len(found) for found in re.findall(r"base64,[^\"]*", html))
        assert 0.8 * runs.PICTURE_BYTES < inside < 1.05 * runs.PICTURE_BYTES
        for slot in range(8):  # none is starved
            assert f"Last card of concept {slot}" in html


def test_a_card_that_is_no_picture_costs_itself_alone() -> None:
    html = run_page([replace(RUN, cards=RUN.cards | {(500, 0): b"<svg onload=alert(1)>"})])
    assert "1 card left out: neither PNG nor JPEG" in html
    assert html.count('src="data:image/jpeg;base64,') == len(RUN.cards) - 1


@pytest.mark.slow
def test_ten_thousand_rounds_are_shown_in_little_time_and_room() -> None:
    run = long_run(10_000)
    fragment([RUN], address)  # the templates are compiled once
    began = time.process_time()
    html = fragment([run], address)
    assert time.process_time() - began < 2
    assert len(html) < 1_000_000
    assert Page(html).problems == []


def test_a_thousand_rounds_take_little_room() -> None:
    html = fragment([long_run(1000)], address)
    assert len(html) < 1_000_000
    assert "more rows are not shown" in html
    assert len(fragment([long_run(1000), RUN], address)) < 1_500_000


def test_the_page_of_a_run_has_the_same_view() -> None:
    html = render(replace(EMPTY, history=RUN))
    page = Page(html)
    assert page.problems == []
    assert "What the guard saw and did, round by round" in page.text
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    for said in view(RUN).values("aria-label"):
        assert said in page.values("aria-label") or said == "Contents"
    assert "round by round" not in render(EMPTY)  # control


def test_showing_runs_needs_no_torch() -> None:
    code = (
        "import sys, concept_guard.report.runs\n"
        "heavy = {'torch', 'numpy', 'scipy', 'timm', 'tensorboard'}\n"
        "print(*heavy & set(sys.modules))\n"
        "import numpy\n"
        "print(*heavy & set(sys.modules))"  # control
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.splitlines() == ["", "numpy"]


@pytest.mark.parametrize("value", [None, float("nan"), float("-inf")])
def test_evidence_that_is_not_known_is_a_dash(value: float | None) -> None:
    unknown = flag(risk_difference=value, q_value=value, interval=(value, value))
    text = view(replace(RUN, rounds=(a_round(100, concept(flags=(unknown,))),))).text
    assert "Risk difference – [–, –]" in text
    assert "q = –" in text
