"""The text of a round: one row per flag, then the verdict."""

from dataclasses import FrozenInstanceError, replace

import pytest

from concept_guard.flags import Flag
from concept_guard.records import RoundReport, markdown, table

FLAG = Flag(
    concept=7,
    class_index=3,
    risk_difference=0.4567,
    interval=(0.3, 0.6),
    p_value=1e-9,
    q_value=3.14159e-7,
    fixed=12,
    broken=1,
    present=40,
    examples=(5, 2, 0, 9),
    status="erased",
)
OTHER = replace(
    FLAG,
    concept=11,
    class_index=0,
    risk_difference=0.05,
    interval=(0.01, 0.1),
    q_value=0.2,
    status="found",
)


def report(*flags: Flag, verdict: str = "concept 7 pulls towards class 3.") -> RoundReport:
    """Return a report with the given flags; the rest is filler."""
    return RoundReport(
        step=100,
        concepts=(),
        flags=flags,
        erased=(),
        accuracy=0.9,
        worst_group_accuracy=0.4,
        worst_class_recall=0.7,
        error_share_explained=0.5,
        accuracy_if_erased=None,
        worst_group_accuracy_if_erased=None,
        leak={7: 0.031},
        cosine_to_last=1.0,
        penalty=0.0,
        errors_seen=30,
        images_seen=300,
        seconds=1.5,
        overhead=0.03,
        verdict=verdict,
        readable={7: 0.712},
    )


def test_the_table_has_one_aligned_row_per_flag_and_ends_with_the_verdict() -> None:
    assert table(report(FLAG, OTHER)).splitlines() == [
        "concept  class       risk difference        q  fixed/broken  present  leak  readable  "
        "status  examples",
        "-------  -----  --------------------  -------  ------------  -------  ----  --------  "
        "------  --------",
        "      7  3      +0.46 [+0.30, +0.60]  3.1e-07          12/1       40  0.03      0.71  "
        "erased  5, 2, 0",
        "     11  0      +0.05 [+0.01, +0.10]      0.2          12/1       40     -         -  "
        "found   5, 2, 0",
        "concept 7 pulls towards class 3.",
    ]


def test_without_flags_only_the_verdict_is_shown() -> None:
    verdict = "no evidence: 3 errors seen among 300 probe images."
    assert table(report(verdict=verdict)) == verdict
    assert markdown(report(verdict=verdict)) == f"**{verdict}**"


@pytest.mark.parametrize("show", [table, markdown])
def test_names_replace_indices_where_they_are_known(show: object) -> None:
    assert callable(show)
    text = show(report(FLAG), ["cat", "dog", "cow", "gull"], ["a.png", "b.png", "c.png"])
    assert "gull" in text
    assert "5, c.png, a.png" in text  # image 5 has no name: its index stays


def test_markdown_tells_which_slot_shows_a_concept() -> None:
    lines = markdown(report(FLAG, OTHER), slots={7: 2}).splitlines()
    assert lines[0] == "**concept 7 pulls towards class 3.**"
    assert lines[2].startswith("| slot | concept | class |")
    assert set(lines[3]) == set("|- ")
    assert lines[4].startswith("| 2 | 7 | 3 |")
    assert lines[5].startswith("| - | 11 | 0 |")


@pytest.mark.parametrize("name", ["a|b", "<b>", "a_b*", "two\nlines"])
def test_a_name_cannot_break_the_markdown_table(name: str) -> None:
    lines = markdown(report(FLAG), class_names=[name] * 4).splitlines()
    assert len(lines) == 5
    cells = lines[-1].replace("\\|", "").count("|")
    assert cells == lines[2].count("|")
    assert "<b>" not in lines[-1].replace("\\<", "")


def test_flagged_concepts_come_once_and_strongest_first() -> None:
    flags = (OTHER, FLAG, replace(FLAG, class_index=1, q_value=0.3))
    assert report(*flags).flagged == (7, 11)
    tied = replace(OTHER, concept=2, risk_difference=0.5)
    assert report(OTHER, tied).flagged == (2, 11)


@pytest.mark.parametrize("status", ["vetoed", "unconfirmed"])
def test_what_was_vetoed_or_not_confirmed_is_shown_but_not_held_to_drive_errors(
    status: str,
) -> None:
    shown = report(FLAG, replace(OTHER, status=status))
    assert shown.flagged == (7,)
    assert status in table(shown)


@pytest.mark.parametrize("status", ["found", "erased", "waiting"])
def test_every_other_status_counts_as_flagged(status: str) -> None:
    assert report(replace(FLAG, status=status)).flagged == (7,)


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        report().step = 3


def test_a_report_says_which_concepts_stayed_came_and_went() -> None:
    changed = replace(
        report(FLAG),
        drift={3: 0.91, 7: 0.99},
        new=(12, 13),
        vanished=(5,),
        cosine_to_last=0.95,
        notes=("2 of 5 concepts are missing: no <support>",),
    )
    identity = (
        "2 concepts found again (mean cosine 0.95, least 0.91: concept 3); new: 12, 13; gone: 5"
    )
    assert changed.identity == identity
    assert table(changed).splitlines()[-3:] == [identity, *changed.notes, changed.verdict]
    assert table(replace(changed, flags=())).splitlines() == [
        identity,
        *changed.notes,
        changed.verdict,
    ]
    text = markdown(changed)
    assert identity in text
    assert "no \\<support>" in text
    only_gone = replace(report(), vanished=(5,), cosine_to_last=0.0)
    assert only_gone.identity == "0 concepts found again (mean cosine 0.00); gone: 5"
    assert not report(FLAG).identity  # control: a first round has nothing to compare with
