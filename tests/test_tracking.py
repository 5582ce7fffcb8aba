"""Stage 4a: a tracked pair follows the network, and its references cover all four groups."""

import pytest
import sklearn.covariance
import torch
from planted import MarkedWorld, auc, marked_world, normal
from torch import Tensor

from concept_guard.directions import Scatter, WithinClassPair, within_class_pair
from concept_guard.influence import erase
from concept_guard.tracking import Tracked, reference_images


def tracked(world: MarkedWorld, rows: Tensor) -> Tracked:
    pair = within_class_pair(Scatter(rows, world.labels), world.mark)
    assert pair is not None
    images, carriers = torch.arange(len(rows)), world.mark[:, None]
    return Tracked(7, 0, pair, carriers, 0.9, images, carriers)


def left_of_the_mark(rows: Tensor, world: MarkedWorld, pair: WithinClassPair) -> float:
    """Return how long the mark still is, in the means of class 1, once the pair is erased."""
    reference = torch.tensor([pair.absent]).to(rows)
    done = erase(rows, pair.filter[None], pair.signal[None], reference)
    one = world.labels == 1
    return float((done[one & world.mark].mean(dim=0) - done[one & ~world.mark].mean(dim=0)).norm())


def test_a_tracked_pair_follows_a_turn_of_the_feature_space(rng: torch.Generator) -> None:
    world = marked_world()
    rows = world.rows.double()
    before = tracked(world, rows)
    turn = torch.linalg.qr(normal(rng, 16, 16))[0]
    turned = rows @ turn
    after = before.moved_to(turned[:, None], world.labels)
    tol = 1e6 * torch.finfo(torch.float64).eps  # 1,200 rows of size 10, a condition below 1e3
    torch.testing.assert_close(after.pair.filter, before.pair.filter @ turn, rtol=0, atol=tol)
    torch.testing.assert_close(after.pair.signal, before.pair.signal @ turn, rtol=0, atol=tol)
    assert auc(turned @ after.pair.filter, world.mark) > 0.999
    assert left_of_the_mark(turned, world, after.pair) < 0.7  # noise of 22 marked rows: .34
    # Control: the pair of before reads and erases something else now.
    assert auc(turned @ before.pair.filter, world.mark) < 0.9
    assert left_of_the_mark(turned, world, before.pair) > 2
    kept = [getattr(after, n) for n in ("concept", "class_index", "separation")]
    assert kept == [7, 0, 0.9]
    assert after.images is before.images
    assert after.carriers is before.carriers


def test_every_position_of_a_reference_image_counts_with_its_own_presence() -> None:
    world = marked_world()
    rows = world.rows.double().view(300, 4, 16).transpose(0, 1)[:, :150].reshape(300, 2, 16)
    labels = torch.arange(4).repeat_interleave(150)[::2]
    flat = rows.flatten(0, 1)
    world_labels = labels.repeat_interleave(2)
    present = world.mark.view(300, 4).T[:, :150].reshape(300, 2)
    pair = within_class_pair(Scatter(flat, world_labels), present.flatten())
    assert pair is not None
    start = Tracked(1, 0, pair, present, 0.5, torch.arange(300), present)
    moved = start.moved_to(3 * rows, labels).pair
    torch.testing.assert_close(moved.signal, 3 * pair.signal)
    torch.testing.assert_close(3 * moved.filter, pair.filter)


def test_tracking_keeps_the_shrinkage_of_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    world = marked_world()
    before = tracked(world, world.rows)
    noisy = world.rows + 3 * normal(torch.Generator().manual_seed(1), 1200, 16).float()
    estimated = within_class_pair(Scatter(noisy, world.labels), world.mark)
    assert estimated is not None
    assert estimated.shrinkage != before.pair.shrinkage  # control
    monkeypatch.setattr(sklearn.covariance, "ledoit_wolf_shrinkage", None)
    assert before.moved_to(noisy[:, None], world.labels).pair.shrinkage == before.pair.shrinkage


def test_rows_that_do_not_determine_a_pair_leave_the_old_one() -> None:
    world = marked_world()
    before = tracked(world, world.rows)
    assert before.moved_to(torch.ones(1200, 1, 16), world.labels) is before
    assert before.moved_to(world.rows[:, None], world.mark.long()) is before


def groups(carried: Tensor, labels: Tensor, chosen: Tensor, k: int) -> list[int]:
    """Return how many chosen images are in the class or not, with the concept or not."""
    return [
        int((((labels == k) == inside) & (carried == with_it))[chosen].sum())
        for inside in (False, True)
        for with_it in (False, True)
    ]


def test_reference_images_give_equal_room_to_the_four_groups() -> None:
    world = marked_world()
    sizes = groups(world.mark, world.labels, torch.arange(1200), 0)
    assert sizes[2] < 20 < 40 < sizes[1]  # few images of the class are without its mark
    chosen = reference_images(world.mark, world.labels, 0, 160, seed=0)
    spread = groups(world.mark, world.labels, chosen, 0)
    assert spread[2] == sizes[2]
    rest = 160 - sizes[2]
    assert sorted(spread)[1:] == [rest // 3, rest // 3, rest - 2 * (rest // 3)]
    assert len(chosen) == 160
    assert (chosen.diff() > 0).all()
    assert groups(world.mark, world.labels, torch.arange(160), 0)[1] < 20  # control: the first


@pytest.mark.parametrize("limit", [0, 3, 4, 7, 1199, 1200, 5000])
def test_never_more_references_than_the_limit_nor_fewer_than_there_are(limit: int) -> None:
    world = marked_world()
    chosen = reference_images(world.mark, world.labels, 0, limit, seed=0)
    assert len(chosen) == min(limit, 1200)
    assert len(chosen.unique()) == len(chosen)
    if limit >= 4:
        assert min(groups(world.mark, world.labels, chosen, 0)) >= 1


def test_references_repeat_for_a_seed_and_leave_the_random_state_alone() -> None:
    world = marked_world()
    state = torch.get_rng_state()
    first, again, other = (
        reference_images(world.mark, world.labels, 0, 50, seed=s) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_group_without_images_leaves_its_room_to_the_others() -> None:
    labels = torch.arange(100) % 2
    chosen = reference_images(labels == 0, labels, 0, 40, seed=0)
    assert groups(labels == 0, labels, chosen, 0) == [20, 0, 0, 20]
