"""Stage 3b: statistics are exact, and a flag needs a mark that causes the errors it goes with."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from planted import OFFSET, MarkedWorld, marked_world, normal
from torch import Tensor

from concept_guard.association import Association, associate
from concept_guard.directions import Membership
from concept_guard.flags import Candidate, Flag, _objection, candidates, confirm
from concept_guard.influence import Control, Effect, Tail
from concept_guard.reading import Reading
from concept_guard.taps import Edit


def table_of(difference: list[list[float]], q_value: list[list[float]]) -> Association:
    values, q = (torch.tensor(t, dtype=torch.float64) for t in (difference, q_value))
    return Association(values, values, values, torch.zeros_like(q), q, values.long())


def test_candidates_are_ordered_limited_and_name_one_class_per_concept() -> None:
    found = table_of(
        [[0.3, 0.5], [0.9, 0.2], [0.7, 0.0], [0.09, 0.05], [0.1, -0.8]],
        [[0.01, 0.02], [0.06, 0.01], [0.05, 0.9], [0.0, 0.0], [0.0, 0.0]],
    )
    everything = [(2, 0), (0, 1), (1, 1), (4, 0)]
    assert candidates(found, 0.05, 10) == everything
    assert candidates(found, 0.05, 2) == everything[:2]
    assert candidates(found, 0.06, 1) == [(1, 0)]
    assert candidates(found, 0.001, 10) == [(4, 0)]
    assert candidates(found, 0.05, 0) == []


FLAG = Flag(7, 0, 0.9, (0.8, 0.95), 1e-9, 1e-8, 0, 0, 72, (), "found", "")


def reading_of(world: MarkedWorld, logits: Tensor) -> Reading:
    indices = 3 * torch.arange(len(world.labels)) + 1
    return Reading(world.rows[:, None], logits, world.labels, indices, 9999, (1, 1))


def tail_of(rows: Tensor, head: Callable[[Tensor], Tensor]) -> Tail:
    """Return what maps edits of the rows to logits of a head."""

    def tail(edit: Edit | None, at: Tensor | None) -> Tensor:
        logits = head(rows if edit is None else edit(rows))
        return logits if at is None else logits[at]

    return tail


def confirmed(
    world: MarkedWorld,
    *,
    present: Tensor | None = None,
    logits: Callable[[Tensor], Tensor] | None = None,
) -> Candidate:
    """Confirm presence on a world; `logits` stands in for its head."""
    head = logits or world.logits
    return confirm(
        FLAG,
        reading_of(world, head(world.rows)),
        (world.mark if present is None else present)[:, None],
        tail_of(world.rows, head),
        seed=0,
    )


def test_a_mark_that_drives_errors_is_found_with_its_evidence() -> None:
    world = marked_world()
    noisy = (world.rows - OFFSET) @ (world.seen + 0.8 * world.beside) > 1.5
    result = confirmed(world, present=noisy)
    flag, driven = result.flag, world.mark & (world.labels != 0)
    assert flag.status == "found"
    total = int(driven.sum())
    assert flag.reason.startswith("erasing it moves the wrong logit by -")
    assert f"changes {total} and repairs {total} of the {total} errors" in flag.reason
    assert (flag.fixed, flag.broken) == (total, 0)
    assert flag.examples == tuple((3 * driven.nonzero()[:16, 0] + 1).tolist())
    assert (flag.concept, flag.class_index, flag.q_value) == (7, 0, 1e-8)
    assert torch.equal(result.present[:, 0], world.mark)
    predicted = world.logits(world.rows).argmax(dim=1)
    table = associate(world.mark[:, None], predicted, world.labels, 4)  # not that of the guess
    ends = float(table.low[0, 0]), float(table.high[0, 0])
    assert (flag.risk_difference, flag.interval) == (float(table.difference[0, 0]), ends)
    assert result.separation > 0.5
    assert result.pair is not None
    assert torch.cosine_similarity(result.pair.signal, world.signal, dim=0) > 0.99


def test_all_positions_of_an_image_count_as_one() -> None:
    marks = marked_world().amount
    world = marked_world(count=2400, amount=torch.cat([marks, torch.zeros(1200).double()]))
    rows = world.rows.view(2, 1200, -1).transpose(0, 1)  # the second position never has the mark
    labels, head = world.labels[:1200], world.head + 2 * world.pull

    def logits(x: Tensor) -> Tensor:
        return x.mean(dim=1) @ head.T

    indices = torch.arange(1200)
    reading = Reading(rows, logits(rows), labels, indices, 1200, (1, 2))
    present = world.mark.view(2, 1200).T
    result = confirm(FLAG, reading, present, tail_of(rows, logits), seed=0)
    assert result.flag.status == "found"
    assert torch.equal(result.present, present)
    assert result.flag.fixed == int((world.mark[:1200] & (labels != 0)).sum())


def beside_the_rows(world: MarkedWorld) -> Callable[[Tensor], Tensor]:
    """Return a head that makes the same errors on marked images, but not by reading the mark."""
    return lambda rows: rows @ world.head.T + 10.0 * world.mark[:, None] * torch.eye(4)[0]


def test_a_mark_that_goes_with_errors_but_does_not_cause_them_is_unconfirmed() -> None:
    world = marked_world()
    flag = confirmed(world, logits=beside_the_rows(world)).flag
    assert flag.status == "unconfirmed"
    assert "erasing it moves the wrong logit up" in flag.reason or "changes 0 of" in flag.reason
    reading = reading_of(world, world.logits(world.rows))
    blind = tail_of(world.rows, lambda _: reading.logits)
    still = confirm(FLAG, reading, world.mark[:, None], blind, seed=0).flag
    assert (still.status, still.fixed, still.broken) == ("unconfirmed", 0, 0)
    assert "moves the wrong logit up (+0.00)" in still.reason


@pytest.mark.parametrize(("share", "status"), [(0.45, "unconfirmed"), (0.55, "found")])
def test_half_of_the_driven_errors_must_leave_the_class(share: float, status: str) -> None:
    world = marked_world()
    logits = world.logits(world.rows)
    driven = (world.mark & (world.labels != 0)).nonzero()[:, 0]
    freed = torch.zeros(len(logits))
    freed[driven] = 0.1
    freed[driven[: round(share * len(driven))]] = 100.0

    def head(rows: Tensor) -> Tensor:  # the more of the mark is gone, the lower the wrong logit
        gone = (world.rows - rows) @ world.seen / (world.signal @ world.seen)
        return logits - (freed * gone.clamp(0, 1))[:, None] * torch.eye(4)[0]

    reading, tail = reading_of(world, logits), tail_of(world.rows, head)
    flag = confirm(FLAG, reading, world.mark[:, None], tail, seed=0).flag
    assert flag.status == status
    changed = f"erasing it changes {flag.fixed} of the {len(driven)} errors"
    assert (changed in flag.reason) is (status == "unconfirmed")


def test_a_mark_without_errors_is_unconfirmed() -> None:
    world = marked_world()
    flag = confirmed(world, logits=lambda rows: rows @ world.head.T).flag
    assert flag.status == "unconfirmed"
    assert "once presence is sharpened" in flag.reason


def test_a_matter_of_degree_is_the_evidence_of_the_class_and_unconfirmed() -> None:
    labels = torch.arange(4800) % 4
    amount = 0.4 * normal(torch.Generator().manual_seed(1), 4800) + 1.0 * (labels == 0)
    world = marked_world(count=4800, amount=amount)
    result = confirmed(world, present=amount > 0.6)  # where the head says class 0
    assert result.flag.status == "unconfirmed"
    assert "matter of degree" in result.flag.reason
    assert result.flag.fixed > 100  # erasing does repair errors: the separation alone decides


@pytest.mark.parametrize(
    ("valley", "peak", "complaint"),
    [
        (0, 4, "too few images tell a mark from a matter of degree (0 between"),  # chance .06
        (0, 5, ""),  # chance .03
        (20, 30, "it is a matter of degree (20 images between"),
    ],
)
def test_few_images_are_not_called_a_matter_of_degree(
    valley: int, peak: int, complaint: str
) -> None:
    caused = Effect(fixed=5, broken=0, driven=5, freed=5, repaired=5, logit_change=-1.0)
    sharp = Membership(torch.ones(1, dtype=torch.bool), valley, peak)
    found = _objection(sharp, caused, 0.9)
    assert found.startswith(complaint)
    assert bool(found) == bool(complaint)


@pytest.mark.parametrize(
    ("own", "complaint"),
    [
        ((12, 0, 90), ""),  # chance .0002
        ((9, 0, 90), "it is a matter of degree (20 images between"),  # chance .002
        ((40, 9, 90), "it is a matter of degree (20 images between"),  # separation .63
        ((90, 0, 80), "it is a matter of degree (20 images between"),  # most of it lacks it
    ],
)
def test_a_mark_that_divides_its_own_class_stands_among_look_alikes(
    own: tuple[int, int, int], complaint: str
) -> None:
    caused = Effect(fixed=5, broken=0, driven=5, freed=5, repaired=5, logit_change=-1.0)
    sharp = Membership(torch.ones(1, dtype=torch.bool), 20, 13, *own)
    found = _objection(sharp, caused, 0.9)
    assert found.startswith(complaint)
    assert bool(found) == bool(complaint)


def test_a_mark_among_look_alikes_is_found_only_where_its_class_is_divided() -> None:
    rng = torch.Generator().manual_seed(3)
    labels = torch.arange(2400) % 4
    amount = 0.12 * normal(rng, 2400).abs()
    others, own = labels != 0, labels == 0
    drawn = torch.rand(2400, generator=rng, dtype=torch.float64)
    amount[others & (drawn < 0.05)] = 0.4 + 10 * drawn[others & (drawn < 0.05)]  # .4 to .9
    amount[others & (drawn > 0.98)] = 1.0  # the marked ones
    has = own & (drawn < 0.9)
    amount[has] = 1.0
    divided = marked_world(count=2400, amount=amount)
    result = confirmed(divided, present=amount > 0.5)
    assert result.flag.status == "found"
    assert "in the class itself" in result.flag.reason
    spread = amount.clone()
    spread[own] = drawn[own] * 1.2  # the class as a continuum: its own evidence
    control = confirmed(marked_world(count=2400, amount=spread), present=spread > 0.5)
    assert control.flag.status == "unconfirmed"
    assert "matter of degree" in control.flag.reason


def only(carriers: int) -> Tensor:
    """Return amounts of a mark on most of class 0 and on that many images of other classes."""
    labels = torch.arange(1200) % 4
    amount = ((labels == 0) & (torch.arange(1200) % 20 > 0)).double()
    amount[(labels != 0).nonzero()[7 : 7 * carriers + 1 : 7, 0]] = 1.0
    return amount


@pytest.mark.parametrize(
    ("world", "reason"),
    [
        (marked_world(rates=(0.95, 0.8, 0.8, 0.8)), "most images of other classes carry it"),
        (marked_world(rates=(0.95, 0.95, 0.02, 0.02)), "tells whole classes apart .* within"),
        (marked_world(amount=only(2)), "^2 images of other classes carry it, expected at least 5"),
        (marked_world(amount=only(4)), "^4 images of other classes carry it, expected at least 5"),
    ],
    ids=["most", "classes", "two", "four"],
)
def test_presence_that_is_no_basis_for_a_test_is_unconfirmed(
    world: MarkedWorld, reason: str
) -> None:
    result = confirmed(world)
    assert result.flag.status == "unconfirmed"
    assert re.search(reason, result.flag.reason)
    assert confirmed(marked_world(amount=only(5))).flag.status == "found"  # control


def test_presence_that_cannot_be_sharpened_is_not_called_rare() -> None:
    world = marked_world(rates=(0.0, 0.3, 0.3, 0.3))
    same = torch.zeros_like(world.rows)
    reading = replace(reading_of(world, world.logits(world.rows)), rows=same[:, None])
    tail = tail_of(world.rows, lambda _: reading.logits)
    result = confirm(FLAG, reading, world.mark[:, None], tail, seed=0)
    assert result.flag.status == "unconfirmed"
    assert result.flag.reason.startswith("its presence cannot be told from its absence once")


def test_a_concept_that_moves_the_logit_no_more_than_any_direction_is_unconfirmed() -> None:
    world = marked_world()
    logits, axis = world.logits(world.rows), world.signal / world.signal.norm()

    def fragile(beside: float) -> Candidate:
        def head(rows: Tensor) -> Tensor:  # any move lowers the wrong logit
            move = rows - world.rows
            along = (move @ axis).abs()
            across = (move.square().sum(dim=1) - along.square()).clamp_min(0).sqrt()
            return logits - 10.0 * (along + beside * across)[:, None] * torch.eye(4)[0]

        tail = tail_of(world.rows, head)
        return confirm(FLAG, reading_of(world, logits), world.mark[:, None], tail, seed=0)

    result = fragile(beside=2.0).flag
    assert result.status == "unconfirmed"
    assert re.search(r"^99 of 99 random directions .* down as far \(-\d+", result.reason)
    control = fragile(beside=0.5).flag
    assert control.status == "found"
    assert re.search("random directions moves it by -.* at most, along the filter", control.reason)


@pytest.mark.parametrize(("as_low", "held"), [(0, True), (4, True), (5, False)])
def test_one_random_direction_in_twenty_may_move_the_logit_as_far(as_low: int, held: bool) -> None:
    control = Control(-1.0, (-1.0,) * as_low + (-0.9,) * (99 - as_low), -0.5)
    assert (control.objection == "") is held
    assert held or control.objection.startswith(f"{as_low} of 99 random directions")
