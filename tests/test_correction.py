"""Stage 4b: projecting, rebalancing and baking do what they say, or say why they cannot."""

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from planted import MarkedWorld, marked_world, normal, overlapping_pairs
from torch import Tensor, nn

from concept_guard.correction import (
    Gate,
    GroupCounts,
    Projection,
    bake_into,
    check_bakeable,
    grouped,
    projection,
)
from concept_guard.directions import Scatter, Subspace, WithinClassPair, within_class_pair
from concept_guard.errors import BakeError
from concept_guard.influence import erase, steps
from concept_guard.tracking import Tracked, images_with

EPS = torch.finfo(torch.float64).eps


def tracked(concept: int, filter: Tensor, signal: Tensor, absent: float = 0.0) -> Tracked:
    pair = WithinClassPair(filter, signal, absent, 1.0, 0.1)
    none = torch.zeros(0, 1).bool()
    return Tracked(concept, 0, pair, none, 0.5, torch.zeros(0).long(), none)


def several(rng: torch.Generator, k: int = 3, c: int = 8) -> list[Tracked]:
    """Return float64 concepts that overlap."""
    filters, signals = overlapping_pairs(rng, k, c)
    return [tracked(i, filters[i], signals[i], 0.5 * i - 1) for i in range(k)]


def stacked(concepts: Sequence[Tracked]) -> tuple[Tensor, Tensor, Tensor]:
    filters = torch.stack([t.pair.filter for t in concepts])
    signals = torch.stack([t.pair.signal for t in concepts])
    return filters, signals, torch.tensor([t.pair.absent for t in concepts]).to(filters)


def projected(concepts: Sequence[Tracked], strength: float = 1.0) -> Projection:
    filters, signals, absent = stacked(concepts)
    moves = steps(filters, signals).to(filters)
    return projection(Subspace(filters, moves, absent), strength)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_projection_equals_erasing(rng: torch.Generator, k: int, strength: float) -> None:
    concepts, rows = several(rng, k), 3 * normal(rng, 2, 5, 8)
    expected = erase(rows, *stacked(concepts), strength=strength)
    torch.testing.assert_close(
        projected(concepts, strength)(rows), expected, rtol=0, atol=1e4 * EPS
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_keep_their_type_and_are_projected_in_that_of_the_pair(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    edit, rows = projected(several(rng)), normal(rng, 5, 8).to(dtype)
    assert edit(rows).dtype == dtype
    torch.testing.assert_close(edit(rows), edit(rows.double()).to(dtype), rtol=0, atol=0)


def test_autocast_does_not_coarsen_the_projection() -> None:
    world = marked_world()
    edit, rows = projected([of_the_mark(world)]), world.rows + 20
    plain = edit(rows)
    with torch.autocast("cpu", torch.bfloat16):
        inside = edit(rows)
    assert torch.equal(inside, plain)


def test_a_copied_and_an_unpickled_projection_act_alike(rng: torch.Generator) -> None:
    edit, rows = projected(several(rng)), normal(rng, 5, 8)
    for other in (copy.deepcopy(edit), pickle.loads(pickle.dumps(edit))):
        assert torch.equal(other(rows), edit(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("k", [1, 3])
def test_a_baked_classifier_gives_the_logits_of_the_projected_rows(
    rng: torch.Generator, k: int, strength: float, dtype: torch.dtype
) -> None:
    concepts, rows = several(rng, k), 3 * normal(rng, 50, 8)
    edit, head = projected(concepts, strength), nn.Linear(8, 4).to(dtype)
    with torch.no_grad():
        expected, plain = head(edit(rows).to(dtype)), head(rows.to(dtype))
        weight, bias, version = head.weight, head.bias, head.weight.detach().clone()
        bake_into(head, edit)
        baked = head(rows.to(dtype))
    # Sums of 8 products; projecting enlarges rows of size 10 by up to the moves times the filters.
    size = 10 * (1 + float(edit.moves.norm() * edit.filters.norm()))
    bound = 16 * torch.finfo(dtype).eps * size
    torch.testing.assert_close(baked, expected, rtol=0, atol=bound)
    assert (plain - expected).abs().max() > 0.1  # control: the projection does something
    assert head.weight is weight
    assert head.bias is bias
    assert not torch.equal(weight, version)
    assert weight.requires_grad


@pytest.mark.parametrize(
    ("head", "found"),
    [(None, "no plain linear map"), (nn.Linear(8, 4, bias=False), "a classifier without bias")],
)
def test_what_cannot_be_baked_exactly_is_refused_and_left_alone(
    head: nn.Linear | None, found: str
) -> None:
    before = None if head is None else head.weight.detach().clone()
    with pytest.raises(
        BakeError,
        match=f"tap 'layer4' is followed by {found}, expected a Linear with bias; .*"
        "Use tap: pre_logits .* or keep the guard attached",
    ):
        check_bakeable(head, "layer4", gated=False)
    assert head is None or torch.equal(head.weight, before)
    usable = nn.Linear(8, 4)
    assert check_bakeable(usable, "layer4", gated=False) is usable  # control
    with pytest.raises(BakeError, match=r"gate = true: .* is no linear map.*Set gate: false"):
        check_bakeable(usable, "layer4", gated=True)


def test_a_gate_moves_the_rows_that_carry_a_concept_and_no_other(rng: torch.Generator) -> None:
    concepts = several(rng)
    edit = projected(concepts)
    gated = Projection(edit.filters, edit.moves, edit.reference, Gate(concepts))
    filters = torch.stack([t.pair.filter for t in concepts])
    # Readings of three concepts: all at absence but one at absence, half-way, presence, beyond it.
    readings = torch.tensor([t.pair.absent for t in concepts]).double().repeat(4, 1)
    readings[:, 1] += torch.tensor([0.0, 0.5, 1.0, 2.0]).double()
    rows = torch.linalg.lstsq(filters, readings.T).solution.T
    full, moved = edit(rows) - rows, gated(rows) - rows
    share = (moved * full).sum(dim=1) / full.square().sum(dim=1).clamp_min(1e-300)
    # The step is a tenth of the way wide: 5 widths on either side, 3 concepts' tails at most.
    assert share[1] == pytest.approx(0.5, abs=3e-2)
    assert bool((share[2:] > 0.99).all())
    assert float(moved[0].abs().max()) < 1e-9  # nothing to take out at absence
    without = torch.linalg.lstsq(filters, readings[:1].T - 3.0).solution.T  # far below absence
    assert float((edit(without) - without).norm()) > 1  # control: ungated rows move
    assert float((gated(without) - without).norm()) < 1e-9
    assert bool((Gate(concepts)(rows)[2:] > 0.99).all())


def of_the_mark(world: MarkedWorld, concept: int = 3) -> Tracked:
    pair = within_class_pair(Scatter(world.rows, world.labels), world.mark)
    assert pair is not None
    carriers = world.mark[:, None]
    return Tracked(concept, 0, pair, carriers, 0.9, torch.arange(len(carriers)), carriers)


def started(world: MarkedWorld, *concepts: Tracked) -> GroupCounts:
    counts = GroupCounts()
    for concept in concepts:
        counts.start(concept.concept, world.labels, world.mark, 4)
    return counts


def by_group(values: Tensor, world: MarkedWorld) -> Tensor:
    """Return `(M, 2)` values by class and presence, checking that a group has one value."""
    table = torch.zeros(4, 2)
    for k in range(4):
        for carries in (False, True):
            group = values[(world.labels == k) & (world.mark == carries)]
            assert group.min() == group.max()
            table[k, int(carries)] = group[0]
    return table


def test_the_rarer_group_of_a_class_weighs_more_up_to_five_times() -> None:
    world = marked_world(count=4000, rates=(0.95, 0.05, 0.25, 0.5))
    concept = of_the_mark(world)
    weights = started(world, concept).weights([concept], world.rows[:, None], world.labels)
    assert weights.dtype == torch.float32
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    table = by_group(weights, world)
    ratio = table.max(dim=1).values / table.min(dim=1).values
    counts = torch.stack([torch.bincount(world.labels[world.mark == c]) for c in (False, True)], 1)
    expected = (counts.max(dim=1).values / counts.min(dim=1).values).clamp(max=5.0)
    torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=0)
    assert ratio[0] == ratio[1] == 5.0  # 19 times rarer, held at five
    assert (table[0, 0] > table[0, 1], table[1, 1] > table[1, 0]) == (True, True)
    common = [table[0, 1], table[1, 0], table[2, 0], table[3].min()]
    assert max(common) == min(common)  # the learning rate of common groups is alike


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_is_the_share_of_the_log_ratio_that_is_made_up_for(strength: float) -> None:
    world = marked_world(count=4000, rates=(0.7, 0.3, 0.98, 0.5))
    concept, rows = of_the_mark(world), world.rows[:, None]
    weights = started(world, concept).weights([concept], rows, world.labels, strength)
    table = by_group(weights, world)
    found = table.max(dim=1).values / table.min(dim=1).values
    counts = torch.stack([torch.bincount(world.labels[world.mark == c]) for c in (False, True)], 1)
    ratio = counts.max(dim=1).values / counts.min(dim=1).values
    torch.testing.assert_close(found, (ratio**strength).clamp(max=5.0), rtol=1e-5, atol=0)
    assert ratio[2] > 25  # control: the bound holds after the power
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5)
    plain = started(world, concept).weights([concept], rows, world.labels)
    assert torch.equal(weights, plain) == (strength == 1.0)


def test_without_association_all_weights_are_one() -> None:
    # Control: half of every class carries the mark.
    half = (torch.arange(1200) // 4 % 2).double()
    world = marked_world(amount=half)
    concept = of_the_mark(world)
    weights = started(world, concept).weights([concept], world.rows[:, None], world.labels)
    torch.testing.assert_close(weights, torch.ones(1200), rtol=0, atol=1e-6)
    nothing = GroupCounts().weights([], world.rows[:, None], world.labels)
    assert torch.equal(nothing, torch.ones(1200))


def test_several_concepts_multiply_and_stay_bounded() -> None:
    world = marked_world(count=4000, rates=(0.7, 0.3, 0.3, 0.3))
    one, two = of_the_mark(world, 1), of_the_mark(world, 2)
    alone = started(world, one).weights([one], world.rows[:, None], world.labels)
    both = started(world, one, two).weights([one, two], world.rows[:, None], world.labels)
    torch.testing.assert_close(both, alone.square(), rtol=1e-5, atol=0)
    steep = marked_world(count=4000, rates=(0.98, 0.02, 0.02, 0.02))
    concepts = [of_the_mark(steep, i) for i in range(3)]
    weights = started(steep, *concepts).weights(concepts, steep.rows[:, None], steep.labels)
    assert float(weights.max()) == 5.0
    assert float(weights.min()) >= 0.2 - 1e-7


def test_each_of_several_concepts_is_counted_by_its_own_pair(rng: torch.Generator) -> None:
    world = marked_world(count=4000, rates=(0.7, 0.3, 0.3, 0.3))
    one, other = of_the_mark(world, 1), of_the_mark(world, 2)
    filter_ = normal(rng, world.rows.shape[1]).float()
    at = float((world.rows @ filter_).quantile(0.8))
    other = replace(other, pair=replace(other.pair, filter=filter_, absent=at, gain=0.0))
    seen, alone = (world.rows[:, None], world.labels), []
    counts = GroupCounts()
    for concept in (one, other):
        carried = concept.read(seen[0]).any(dim=1)
        counts.start(concept.concept, world.labels, carried, 4)
        single = GroupCounts()
        single.start(concept.concept, world.labels, carried, 4)
        alone.append(single.weights([concept], *seen))
        assert torch.equal(images_with([one, other], seen[0])[len(alone) - 1], carried)
        expected = grouped(world.labels, carried, 4)
        assert torch.equal(grouped(world.labels, torch.stack([~carried, carried]), 4)[1], expected)
    both = counts.weights([one, other], *seen)
    torch.testing.assert_close(both, (alone[0] * alone[1]).clamp(0.2, 5), rtol=1e-6, atol=0)
    assert not torch.equal(alone[0], alone[1])  # control: they weigh otherwise
    assert len(counts.weights([one, other], seen[0][:0], world.labels[:0])) == 0


def test_presence_is_read_beyond_the_threshold_at_any_position() -> None:
    axes = torch.eye(2)
    concept = tracked(0, axes[0], axes[0], 1.0)  # threshold 1.5
    rows = torch.tensor([[[1.6, 0], [0, 0]], [[0, 9], [1.6, 0]], [[1.4, 9], [0.0, 9]]])
    counts = GroupCounts()
    counts.start(0, torch.zeros(0).long(), torch.zeros(0).bool(), 2)
    counts.weights([concept], rows, torch.tensor([0, 1, 1]))
    assert counts.counts[0].tolist() == [[0.0, 1.0], [1.0, 1.0]]


def test_counts_start_with_the_probe_and_fade() -> None:
    counts = GroupCounts()
    labels, carried = torch.tensor([0, 0, 1, 2]), torch.tensor([True, True, False, True])
    counts.start(5, labels, carried, 4)
    start = torch.tensor([[0, 2], [1, 0], [0, 1], [0, 0]]).double()
    assert torch.equal(counts.counts[5], start)
    concept = tracked(5, torch.ones(1), torch.ones(1), 0.0)
    for _ in range(2):
        counts.weights([concept], torch.ones(3, 1, 1), torch.tensor([3, 3, 0]))
    batch = torch.tensor([[0, 1], [0, 0], [0, 0], [0, 2]]).double()
    expected = 0.998**2 * start + (0.998 + 1) * batch
    torch.testing.assert_close(counts.counts[5], expected, rtol=1e-12, atol=0)
    assert bool((counts.counts[5] == counts.counts[5].round()).logical_not().any())


def test_autocast_does_not_coarsen_presence() -> None:
    world = marked_world()
    rows = world.rows + 500.0  # bfloat16 would round `x . w` by more than a mark is worth
    pair = within_class_pair(Scatter(rows, world.labels), world.mark)
    assert pair is not None
    concept = tracked(0, pair.filter, pair.signal, pair.absent)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weights = started(world, concept).weights([concept], rows[:, None], world.labels)
        results.append(weights)
    assert torch.equal(*results)
