"""One round: where it starts from, and which of its concepts stand for the same images."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import PROBE, QUICK, fallen, world

from concept_guard import ConceptGuard, rounds, trial
from concept_guard.directions import DirectionPairs, WithinClassPair, fit_pairs
from concept_guard.flags import Candidate, Flag

FLAG = Flag(0, 0, 0.9, (0.8, 0.95), 1e-9, 1e-8, 0, 0, 9, (), "found", "")
PAIR = WithinClassPair(torch.eye(32)[0], torch.eye(32)[0], 0.0, 1.0, 0.0)


def test_a_round_starts_from_the_pairs_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[DirectionPairs | None] = []

    def watched(rows: Tensor, *, init: DirectionPairs | None, **options: Any) -> DirectionPairs:
        starts.append(init)
        return fit_pairs(rows, init=init, **options)

    monkeypatch.setattr(rounds, "fit_pairs", watched)
    guard = ConceptGuard(fallen(), probe=world(PROBE).loader(), config=QUICK)
    guard.round()
    last = guard._watch.last.pairs
    guard.round()
    assert starts[0] is None
    assert starts[1] is last


@pytest.mark.parametrize(
    ("first", "second"), [("found", "unconfirmed"), ("unconfirmed", "found")], ids=str
)
def test_only_a_concept_that_is_found_stands_for_others_with_its_images(
    monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    given, differences = iter([first, "found"]), iter([0.8, 0.9])
    present = torch.arange(400)[:, None] % 10 == 0

    def confirmed(flag: Flag, *_: Any, **__: Any) -> Candidate:
        status, difference = next(given, "unconfirmed"), next(differences, 0.0)
        flag = replace(FLAG, concept=flag.concept, status=status, risk_difference=difference)
        return Candidate(flag, PAIR, present, 0.5)

    def two(*_: Any) -> Sequence[tuple[int, int]]:
        return [(0, 0), (1, 0)]

    monkeypatch.setattr(trial, "confirm", confirmed)
    monkeypatch.setattr(trial, "candidates", two)
    config = {**QUICK, "action": "observe"}
    guard = ConceptGuard(fallen(), probe=world(PROBE).loader(), config=config)
    report = guard.round()
    assert report is not None
    a, b = sorted(report.flags, key=lambda flag: flag.concept)
    assert [flag.risk_difference for flag in report.flags] == [0.9, 0.8]
    assert (a.status, b.status) == (first, second)
    assert ("its images are those of concept" in b.reason) == (second == "unconfirmed")
