"""The report: one page, in order, escaped, self-contained, and written whole or not at all."""

import base64
import os
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch
from jinja2 import Environment
from PIL import Image
from torch import Tensor

from concept_guard.report import (
    BeforeAfter,
    Comparison,
    ConceptEntry,
    Contribution,
    ErrorRow,
    GroupRow,
    ImageEntry,
    InfluenceRow,
    Report,
    SuspectEntry,
    drawing,
    page,
    render,
    write_html,
)
from concept_guard.report.pictures import jpeg, png

VOID = {"meta", "img", "br", "link", "input", "hr"}
HOSTILE = ["<script>alert(1)</script>", '" onerror="alert(1)', "</style>", "{{ 7 * 7 }}", "a & b"]
CARD = png(torch.linspace(0, 1, 3 * 4 * 6).view(3, 4, 6))
PHOTO = jpeg(torch.linspace(0, 1, 3 * 8 * 8).view(3, 8, 8))
FLAG = ConceptEntry(
    id=3,
    class_name="gull",
    status="found",
    reason="erasing it moves the wrong logit by -4.31",
    risk_difference=0.4567,
    interval=(0.3, 0.6),
    q_value=3.14159e-7,
    fixed=21,
    broken=2,
    present=52,
    images=300,
    errors=(ErrorRow("a/1.png", "tern", "gull"), ErrorRow("a/2.png", "duck", "gull")),
    card=CARD,
)
UNCONFIRMED = replace(
    FLAG, id=8, class_name="duck", status="unconfirmed", reason="a matter of degree", q_value=1e-12
)
IMAGE = ImageEntry(
    file="a/1.png",
    label="tern",
    predicted="gull",
    picture=PHOTO,
    contributions=(Contribution(3, 2.345, -1.5), Contribution(5, 0.25, 0.75)),
    flip="Erasing concept 3 changes the prediction.",
    repair="Erasing half of concept 3 makes it right.",
)
EMPTY = Report(
    title="Audit of a model",
    subtitle="300 images in photos",
    verdict="No evidence: 0 errors seen among 300 images.",
    facts=(),
    concepts=(),
    groups=(),
    influence=(),
    images=(),
    other_errors=(),
)
FULL = replace(
    EMPTY,
    verdict="Concept 3 pulls towards gull.",
    facts=(("Tap", "layer4"), ("Seed", "7")),
    concepts=(UNCONFIRMED, FLAG),
    groups=(
        GroupRow("tern", 3, carried=True, images=31, accuracy=0.25),
        GroupRow("tern", 3, carried=False, images=87, accuracy=0.8125),
        GroupRow("crow", 3, carried=True, images=2, accuracy=0.125),
        GroupRow("crow", 3, carried=False, images=0, accuracy=None),
    ),
    influence=(InfluenceRow(6, "crow", -0.375, 0.00123),),
    images=(IMAGE,),
    other_errors=(ErrorRow("b/9.png", "crow", "heron"),),
    suspects=(
        SuspectEntry(12, "images with it are not misled", (ErrorRow("c/4.png", "a", "b"),), CARD),
    ),
    trained=(
        replace(
            FLAG,
            id=1,
            status="erased",
            errors=(
                ErrorRow("t/1.png", "tern", "gull", "tern"),
                ErrorRow("t/2.png", "tern", "gull", "crow"),
            ),
        ),
    ),
    comparisons=(
        Comparison(
            "Without and with",
            "Two models.",
            "plain",
            "guarded",
            (BeforeAfter("Worst group", 0.412, 0.853, ("marked", "unmarked")),),
        ),
    ),
    notes=("2 of 16 concepts are missing.",),
    command="concept-guard audit photos",
)


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.problems: list[str] = []
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and its attributes."""
        self.tags.append((tag, dict(attrs)))
        if len(dict(attrs)) < len(attrs):
            self.problems.append(f"<{tag}> repeats an attribute")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close the innermost tag if it is this one."""
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes another tag")

    def handle_data(self, data: str) -> None:
        """Note a text."""
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def shape(self) -> tuple[object, ...]:
        """All that a text cannot change as long as it stays text."""
        return self.problems, [(tag, list(attrs)) for tag, attrs in self.tags]

    @property
    def text(self) -> str:
        """All the text, in one line."""
        return " ".join(" ".join(self.texts).split())

    def values(self, attribute: str) -> list[str]:
        """Return the values of an attribute, wherever it stands."""
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def errors(count: int) -> tuple[ErrorRow, ...]:
    return tuple(ErrorRow(f"many/{n:04d}.png", "tern", "gull") for n in range(count))


def hostile(text: str) -> Report:
    """Return a report that has a text wherever it can have one."""
    row = ErrorRow(text, text, text, text)
    flags = tuple(
        replace(FLAG, id=n, class_name=text, reason=text, errors=(row,), status=status)
        for n, status in enumerate(page.HELD + page.NOT_HELD)
    )
    return Report(
        title=text,
        subtitle=text,
        verdict=text,
        facts=((text, text),),
        concepts=flags,
        groups=(GroupRow(text, 3, carried=True, images=9, accuracy=0.5),),
        influence=(InfluenceRow(3, text, 0.5, 0.5),),
        images=(
            replace(IMAGE, file=text, predicted=text, flip=text, repair=text),
            replace(IMAGE, file=text, label=text),
        ),
        other_errors=(row,),
        suspects=(SuspectEntry(12, text, (row,), CARD),),
        trained=(replace(FLAG, id=1, class_name=text, reason=text, errors=(row,)),),
        comparisons=(
            Comparison(text, text, text, text, (BeforeAfter(text, 0.5, 0.5, (text, text)),)),
        ),
        notes=(text,),
        command=text,
    )


def test_every_field_is_on_the_page() -> None:
    html = render(FULL)
    text = Page(html).text
    expected = [
        *("Audit of a model", "300 images in photos", "Concept 3 pulls towards gull."),
        *("Tap", "layer4", "Seed", "7", "concept-guard audit photos"),
        *("Concept 3 drives errors towards gull", "found", FLAG.reason),
        *("+0.46 [+0.30, +0.60]", "q = 3.1e-07", "21 repaired", "2 broken"),
        "2 of the 52 images of other classes that carry it are predicted as gull, among 300 images",
        *("a/1.png tern gull", "a/2.png duck gull", "True classes: tern (1), duck (1)"),
        *("Concept 8 towards duck", "unconfirmed: a matter of degree"),
        *("tern Concept 3 0.250 of 31 worst 0.812 of 87", "crow Concept 3 0.125 of 2 – of 0"),
        *("Concept 6 crow -0.38 0.0012", "tern taken for gull"),
        *("Concept 3 +2.35 -1.50", "Concept 5 +0.25 +0.75", IMAGE.flip, IMAGE.repair),
        *("b/9.png crow heron", FULL.notes[0]),
        *("Without and with Two models.", "plain guarded Change"),
        "Worst group 0.412 marked 0.853 unmarked +0.441",
        *("Concept 12 1 error, taken for b (1); not confirmed", "c/4.png a b"),
        "Not confirmed: images with it are not misled. It is shown because it speaks most for 1 of",
        *("Concept 1 drove errors towards gull erased", "t/1.png tern gull tern, right"),
        "t/2.png tern gull crow",
        "1 of these 2 is right after training.",
    ]
    squeezed = text.replace(" ,", ",")
    assert [part for part in expected if part not in squeezed] == []
    for picture, kind in ((CARD, "png"), (PHOTO, "jpeg")):
        assert f'src="data:image/{kind};base64,{base64.b64encode(picture).decode()}"' in html


@pytest.mark.parametrize("report", [FULL, EMPTY, hostile(HOSTILE[0])])
def test_the_page_is_well_formed(report: Report) -> None:
    html = render(report)
    parsed = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    assert parsed.problems == []
    ids = parsed.values("id")
    assert len(ids) == len(set(ids))
    links = [link.removeprefix("#") for link in parsed.values("href")]
    assert set(links) | set(parsed.values("aria-labelledby")) <= set(ids)
    assert Page(html.replace("</main>", "")).problems  # control


@pytest.mark.parametrize("report", [FULL, EMPTY])
def test_a_screen_reader_finds_language_headings_alternatives_and_scopes(report: Report) -> None:
    parsed = Page(render(report))
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip([0, *levels], levels, strict=False))
    assert ("html", {"lang": "en"}) in parsed.tags
    assert all(attrs.get("alt") for tag, attrs in parsed.tags if tag == "img")
    assert all(attrs.get("scope") for tag, attrs in parsed.tags if tag == "th")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_shown_and_never_obeyed(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless, parsed = Page(render(hostile("harmless"))), Page(render(hostile(text)))
    assert parsed.shape == harmless.shape
    assert parsed.text == harmless.text.replace("harmless", text)
    careless = partial(Environment)
    monkeypatch.setattr(drawing, "Environment", lambda **k: careless(**k | {"autoescape": False}))
    obeyed = Page(render(hostile(text))).shape != harmless.shape
    assert obeyed == any(mark in text for mark in '<"')  # control: without escaping it shows


@pytest.mark.parametrize("report", [FULL, EMPTY])
def test_the_page_asks_for_nothing_outside_itself(report: Report) -> None:
    html = render(report)
    parsed = Page(html)
    assert not re.search(r"https?://|//\w|@import|url\(", re.sub(r"base64,[^\"]*", "", html))
    assert all(source.startswith("data:image/") for source in parsed.values("src"))
    assert all(link.startswith("#") for link in parsed.values("href"))
    assert not {tag for tag, _ in parsed.tags} & {"script", "link", "iframe", "object", "base"}
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html


def test_held_concepts_stand_open_before_those_that_are_not_held() -> None:
    flags = [
        replace(FLAG, id=20 + n, status=status, q_value=q)
        for n, (status, q) in enumerate(
            [("vetoed", 1e-9), ("found", 0.04), ("unconfirmed", 1e-8), ("erased", 0.01)]
        )
    ]
    flags.append(replace(FLAG, id=30, status="waiting", q_value=0.01, risk_difference=0.5))
    html = render(replace(FULL, concepts=tuple(flags), images=(), trained=()))
    found = re.findall(r"<h3>Concept (\d+) (\w+)", html)
    assert found == [(c, "drives") for c in ("30", "23", "21")] + [
        (c, "towards") for c in ("20", "22")
    ]
    closed = re.findall(r'<details class="panel" id="other-\d">\n<summary><h3>Concept (\d+)', html)
    assert closed == ["20", "22"]
    assert "vetoed: a person keeps it as it is" in html


def test_other_tables_link_to_the_strongest_flag_of_a_held_concept() -> None:
    second = replace(FLAG, class_name="crow", q_value=0.01)
    html = render(replace(FULL, concepts=(second, UNCONFIRMED, FLAG)))
    assert '<a class="id" href="#flag-1">Concept 3</a>' in html
    assert "#flag-2" not in html  # the same concept towards another class
    assert '<span class="id">Concept 6</span>' in html


def test_a_page_without_concepts_and_errors_says_so() -> None:
    html = render(EMPTY)
    text = Page(html).text
    assert "No evidence: 0 errors seen among 300 images." in text
    assert "No evidence: no concept is held to drive errors." in text
    assert "Other misclassified files None." in text
    assert "How to read this page" in text
    for absent in ("not-held", "groups", "influence", "images", "notes", "command", "change"):
        assert f'id="{absent}"' not in html
        assert f'href="#{absent}"' not in html
    assert '<p class="verdict">No evidence.</p>' in render(replace(EMPTY, verdict=""))


@pytest.mark.parametrize(("count", "hidden"), [(20, 0), (21, 1), (400, 380)])
def test_the_first_twenty_files_are_in_sight_and_none_is_lost(count: int, hidden: int) -> None:
    html = render(replace(EMPTY, concepts=(replace(FLAG, errors=errors(count)),)))
    before, _, after = html.partition("<details>")
    assert before.count("many/") == count - hidden
    assert after.count("many/") == hidden
    assert (f"{hidden} more files" in html) == bool(hidden)


@pytest.mark.parametrize(("classes", "more"), [(12, ""), (13, " and 1 more")])
def test_the_most_frequent_true_classes_are_counted(classes: int, more: str) -> None:
    rows = [ErrorRow(f"{n}.png", f"class{n}", "gull") for n in range(classes)]
    rows.append(ErrorRow("again.png", "class5", "gull"))
    text = Page(render(replace(EMPTY, other_errors=tuple(rows)))).text
    assert "True classes: class5 (2), class0 (1), " in text
    assert f"class11 (1){more} Misclassified" in text


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (replace(FLAG, errors=errors(1)), "1 of the 52 images of other classes that carry it is "),
        (replace(FLAG, errors=()), "52 of other classes carry it; none are listed as driven"),
        (replace(FLAG, present=1), "1 of other classes carry it; 2 are listed as driven"),
    ],
)
def test_the_sentence_never_says_more_than_its_numbers(entry: ConceptEntry, expected: str) -> None:
    assert expected in Page(render(replace(EMPTY, concepts=(entry,)))).text


def test_the_worst_groups_stand_out_and_small_ones_are_muted() -> None:
    groups = [
        GroupRow(name, 3, carried=True, images=count, accuracy=accuracy)
        for name, count, accuracy in [
            *(("all right", 50, 1.0), ("small", 4, 0.0), ("fair", 5, 0.6), ("none", 0, None)),
            *(("poor", 9, 0.5), ("nil", 5, 0.0), ("good", 90, 0.95)),
        ]
    ]
    html = render(replace(EMPTY, groups=tuple(groups)))
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', html, re.DOTALL)
    assert [name for name, _ in rows[:5]] == ["nil", "poor", "fair", "good", "all right"]
    assert {name for name, cells in rows if "worst" in cells} == {"nil", "poor", "fair"}
    assert {name for name, cells in rows if 'num quiet">0.000' in cells} == {"small"}
    right = replace(EMPTY, groups=(groups[0], groups[1]))
    assert "<em>worst" not in render(right)  # no group that counts has errors


def test_groups_of_two_classes_with_the_same_name_are_both_shown() -> None:
    groups = tuple(
        GroupRow("crane", 3, carried=carried, images=10 + n, accuracy=0.5)
        for n in range(2)
        for carried in (True, False)
    )
    text = Page(render(replace(EMPTY, groups=groups))).text
    for n in range(2):
        assert re.search(rf"crane Concept 3 0.500 of {10 + n}.* 0.500 of {10 + n}", text)


@pytest.mark.parametrize(("rows", "collapsed"), [(20, False), (21, True)])
def test_a_long_influence_table_is_collapsed(rows: int, collapsed: bool) -> None:
    influence = tuple(InfluenceRow(n, "gull", n / 100, 0.5) for n in range(rows))
    html = render(replace(EMPTY, influence=influence))
    assert ("<details>" in html) == collapsed
    assert html.index("Concept 19<") < html.index("Concept 0<")  # strongest first


def test_the_first_six_images_are_open() -> None:
    images = tuple(replace(IMAGE, file=f"{n}.png") for n in range(8))
    html = render(replace(EMPTY, images=images))
    opened = re.findall(r'<details class="panel"( open)?>\n<summary><h3 class="file">(\d)', html)
    assert opened == [(" open" if n < 6 else "", str(n)) for n in range(8)]


def test_bars_grow_from_the_middle_in_proportion_and_only_the_strongest_are_drawn() -> None:
    given = (*(Contribution(n, n / 10, None) for n in range(9)), Contribution(99, -1.6, None))
    html = render(replace(EMPTY, images=(replace(IMAGE, contributions=given),)))
    drawn = re.findall(r"Concept (\d+)<.*?style=\"([^\"]*)\"", html)
    assert drawn[:2] == [("99", "left:0.0%;width:50.0%"), ("8", "left:50.0%;width:25.0%")]
    assert [concept for concept, _ in drawn] == ["99", "8", "7", "6", "5", "4", "3", "2"]
    assert "the 8 strongest of 10 concepts" in html


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_contributions_that_cannot_be_drawn_break_nothing(value: float) -> None:
    given = (Contribution(1, value, value), Contribution(2, value, None))
    html = render(replace(EMPTY, images=(replace(IMAGE, contributions=given),)))
    assert "width:0.0%" in html
    assert not re.search(r"(left|width):(nan|inf)", html)


@pytest.mark.parametrize(
    ("label", "expected", "sides"),
    [("", "true class unknown", 1), ("gull", "gull, right", 1), ("tern", "tern taken for gull", 2)],
)
def test_the_true_class_has_bars_only_where_it_is_another(
    label: str, expected: str, sides: int
) -> None:
    image = replace(IMAGE, label=label, contributions=(Contribution(3, 1.0, 0.5),), picture=None)
    html = render(replace(EMPTY, images=(image,)))
    assert expected in html
    assert html.count('<i class="of-label"') == sides - 1
    assert "<img" not in html


def test_a_picture_of_another_kind_is_refused_and_an_unknown_status_too() -> None:
    wrong = replace(FULL, images=(replace(IMAGE, picture=b"GIF89a..."),))
    with pytest.raises(ValueError, match=r"begins with b'GIF89a\.\.', expected .* PNG or JPEG"):
        render(wrong)
    with pytest.raises(ValueError, match="concept 3 has status 'sure', expected one of found, "):
        replace(FLAG, status="sure")


def test_the_same_report_gives_the_same_page_and_the_frame_is_small() -> None:
    assert render(FULL) == render(replace(FULL))
    assert len(render(EMPTY)) < 14_000
    assert Path(page.__file__).with_name("template.html.j2").stat().st_size < 25_000
    big = replace(FULL, concepts=(replace(FLAG, errors=errors(1000)),))
    assert len(render(big)) - len(render(FULL)) < 200_000


def test_the_file_holds_the_page_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_html(FULL, path)
    assert path.read_text(encoding="utf8") == render(FULL)
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_file_name_that_is_no_text_is_shown_by_its_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png") if os.name == "posix" else "caf\udce9.png"
    write_html(replace(EMPTY, other_errors=(ErrorRow(name, "a", "b"),)), tmp_path / "r.html")
    assert "caf\\udce9.png" in (tmp_path / "r.html").read_text(encoding="utf8")


def test_an_old_report_survives_whatever_goes_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_html(EMPTY, path)
    old = path.read_bytes()
    with pytest.raises(ValueError, match="PNG or JPEG"):
        write_html(replace(FULL, images=(replace(IMAGE, picture=b"x"),)), path)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_html(FULL, path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["report.html"]
    write_html(FULL, path)
    assert path.read_bytes() != old  # control


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_html(EMPTY, tmp_path / "missing" / "report.html")
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OSError, match=r"folder\.html"):
        write_html(EMPTY, tmp_path / "folder.html")
    assert os.listdir(tmp_path) == ["folder.html"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_write_permission_keeps_its_report(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_html(EMPTY, path)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_html(FULL, path)
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text(encoding="utf8") == render(EMPTY)


def read(picture: bytes) -> Tensor:
    image = Image.open(BytesIO(picture)).convert("RGB")
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255


def test_pictures_come_back_as_they_were() -> None:
    steps = torch.arange(3 * 5 * 7).view(3, 5, 7) / 255
    torch.testing.assert_close(read(png(steps)), steps, rtol=0, atol=1e-6)
    smooth = torch.linspace(0.2, 0.8, 32).expand(3, 32, 32)
    assert (read(jpeg(smooth)) - smooth).abs().max() < 0.05
    assert len(jpeg(smooth, quality=10)) < len(jpeg(smooth, quality=95))
    assert png(steps) == png(steps.double())
    assert png(steps) == png(steps - 0.4 / 255) != png(steps - 0.6 / 255)  # to the nearest


def test_values_outside_the_range_are_clamped() -> None:
    image = torch.tensor([-1.0, 2.0, float("nan"), float("inf")]).expand(3, 1, 4)
    expected = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(3, 1, 4)
    torch.testing.assert_close(read(png(image)), expected)


@pytest.mark.parametrize(
    "image",
    [torch.zeros(4, 4), torch.zeros(1, 4, 4), torch.zeros(3, 0, 4), torch.zeros(3, 4, 4).int()],
)
@pytest.mark.parametrize("encode", [png, jpeg])
def test_what_is_no_image_is_refused_with_its_shape(image: Tensor, encode: object) -> None:
    assert callable(encode)
    with pytest.raises(ValueError, match=r"picture of shape \(.*expected \(3, H, W\) floats"):
        encode(image)
