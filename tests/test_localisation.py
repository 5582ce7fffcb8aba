"""Where in an image a concept is: the map points at the planted mark, whatever the tap."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn
from worlds import MARK, PROBE, SIDE, correcting, fallen, mark, net, the_flagged, world

from concept_guard.directions import Scatter, within_class_pair
from concept_guard.localisation import CELLS, location_maps
from concept_guard.taps import Tap

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
CORNERS = [(0, 0), (0, SIDE - MARK), (SIDE - MARK, 0), (SIDE - MARK, SIDE - MARK)]
CLEAN = world(PROBE, planted=False)


def marked_at(images: Tensor, top: int, left: int) -> Tensor:
    """Return the images with the mark at another place."""
    return mark(images.roll((-top, -left), (2, 3))).roll((top, left), (2, 3))


def direction_of_the_mark(tap: Tap) -> Tensor:
    """Estimate the mark's filter from images whose mark is known, wherever it sits."""
    count = 100
    plain, labels = CLEAN.images[:count], CLEAN.labels[:count]
    places = torch.arange(count) % 4
    marked = torch.stack(
        [marked_at(x[None], *CORNERS[p])[0] for x, p in zip(plain, places, strict=True)]
    )
    rows = tap.read([(torch.cat([plain, marked]), labels.repeat(2))], max_rows=10**6, seed=0).rows
    present = (rows[count:] - rows[:count]).norm(dim=2)
    present = present > 0.5 * present.amax(dim=1, keepdim=True)  # the positions that moved
    carries = torch.cat([torch.zeros_like(present), present])
    of_rows = labels.repeat(2).repeat_interleave(rows.shape[1])
    pair = within_class_pair(Scatter(rows.flatten(0, 1), of_rows), carries.flatten())
    assert pair is not None
    return pair.filter


def quadrant(maps: Tensor) -> Tensor:
    """Return which quarter of each map holds most of it: 0 and 1 above, 2 and 3 below."""
    height, width = maps.shape[1:]
    assert height % 2 == width % 2 == 0
    quarters = maps.view(len(maps), 2, height // 2, 2, width // 2).sum(dim=(2, 4))
    return quarters.flatten(1).argmax(dim=1)


def resnet() -> nn.Module:
    return fallen()


def vit() -> nn.Module:
    return net("test_vit", img_size=SIDE, patch_size=4)


def swin() -> nn.Module:
    sizes = {"img_size": SIDE, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    return net("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), **sizes)


@pytest.mark.parametrize(
    ("build", "where", "shape"),
    [
        (resnet, "pre_logits", (CELLS, CELLS)),  # pooled: by occlusion
        (resnet, "module:layer1", (4, 4)),
        (vit, "module:patch_embed", (4, 4)),
        (swin, "module:layers.0", (8, 8)),
    ],
)
def test_the_map_points_at_the_quarter_of_the_mark(
    build: Callable[[], nn.Module], where: str, shape: tuple[int, int]
) -> None:
    tap = Tap(build(), where, CLEAN.images[:2])
    direction = direction_of_the_mark(tap)
    images = torch.cat([marked_at(CLEAN.images[200:204], *corner) for corner in CORNERS])
    maps = location_maps(tap, images, direction)
    assert maps.shape == (16, *shape)
    assert maps.amin() == 0
    torch.testing.assert_close(maps.amax(dim=(1, 2)), torch.ones(16))
    hits = quadrant(maps) == torch.arange(4).repeat_interleave(4)
    assert hits.sum() >= 14


def test_the_map_of_a_flagged_concept_points_at_the_mark() -> None:
    guard = correcting(fallen())
    assert guard.report is not None
    concept = the_flagged(guard)
    (flag,) = (f for f in guard.report.flags if f.concept == concept)
    (tracked,) = guard._corrector.tracked
    images = world(PROBE).images[list(flag.examples[:8])]
    maps = location_maps(guard.tap, images, tracked.pair.filter)  # as its card does
    assert (quadrant(maps) == 0).sum() >= 6


def test_a_concept_without_a_place_has_an_empty_map() -> None:
    tap = Tap(fallen(), "pre_logits", CLEAN.images[:2])
    maps = location_maps(tap, CLEAN.images[:3], torch.zeros(tap.channels))
    assert maps.shape == (3, CELLS, CELLS)
    assert not maps.any()


@pytest.mark.parametrize("where", ["pre_logits", "module:pool"])
def test_a_concept_that_is_everywhere_alike_has_an_empty_map(where: str) -> None:
    conv, pool = nn.Conv2d(3, 4, 1), nn.AvgPool2d(2)
    nn.init.constant_(conv.weight, 1.0)
    nn.init.constant_(conv.bias, -1.0)  # only white pixels get through the rectifier
    parts = {"conv": conv, "rectifier": nn.ReLU(), "pool": pool, "whole": nn.AdaptiveAvgPool2d(1)}
    model = nn.Sequential(OrderedDict(**parts, flat=nn.Flatten(), head=nn.Linear(4, 3)))
    board = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 * 0.7 + 0.1
    images = board.expand(2, 3, SIDE, SIDE)
    tap = Tap(model, where, images)
    maps = location_maps(tap, images, torch.ones(4))
    assert maps.shape == (2, CELLS, CELLS)
    assert not maps.any()
    brighter = images.clone()
    brighter[:, :, :2, :2] *= 1.01  # control: a place that is not quite like the others
    assert (location_maps(tap, brighter, torch.ones(4))[:, 0, 0] == 1).all()


@pytest.mark.parametrize(("top", "left", "side"), [(1, 3, 1), (0, 0, 2), (1, 0, 1)])
def test_the_peak_is_at_the_spot_also_near_the_border(top: int, left: int, side: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    images = torch.zeros(1, 3, 4, 5)  # smaller than the grid: covered pixel by pixel
    images[:, :, top : top + side, left : left + side] = 1.0
    tap = Tap(model, "pre_logits", images)
    with torch.no_grad():
        direction = model[0].weight[:, :, 0, 0].sum(dim=1)  # what a white pixel writes
    maps = location_maps(tap, images, direction)
    assert maps.shape == (1, 4, 5)
    assert maps[0].argmax() == top * 5 + left
    assert (maps[0] == 1).sum() == 1


def test_images_of_another_size_have_a_map_of_their_own_size() -> None:
    tap = Tap(fallen(), "module:layer1", CLEAN.images[:2])
    wide = torch.cat([CLEAN.images[:2], marked_at(CLEAN.images[2:4], 0, 0)], dim=3)
    maps = location_maps(tap, wide, direction_of_the_mark(tap))
    assert (tap.grid, maps.shape) == ((4, 4), (2, 4, 8))
    assert (maps[:, :2, 4:6].sum(dim=(1, 2)) > maps[:, :, :4].sum(dim=(1, 2))).all()


def test_a_fine_map_behind_a_mean_is_used_in_place_of_covering() -> None:
    model = net()  # 224 pixels give its last map a side of 7
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    tap = Tap(model, "pre_logits", images)
    maps = tap.pooled_from(images)
    assert maps is not None
    assert maps.shape == (2, 7, 7, tap.channels)
    rows = tap.read([(images, torch.zeros(2).long())], max_rows=10, seed=0).rows[:, 0]
    torch.testing.assert_close(maps.mean(dim=(1, 2)), rows)
    directions = torch.randn(2, tap.channels, generator=torch.Generator().manual_seed(1))
    found = location_maps(tap, images, directions)
    assert found.shape == (2, 7, 7)
    for n in range(2):  # one filter per image is the same as each image with its filter
        torch.testing.assert_close(
            location_maps(tap, images[n : n + 1], directions[n])[0], found[n]
        )
        peak = (maps[n].flatten(0, 1) @ directions[n]).argmax()
        assert found[n].argmax() == peak


def test_a_map_whose_mean_is_not_the_row_is_not_used() -> None:
    model = net()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    model.global_pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
    tap = Tap(model, "pre_logits", images)
    assert tap.pooled_from(images) is None
    assert Tap(net(), "module:layer1", images).pooled_from(images) is None
    assert (
        Tap(nn.Sequential(nn.Flatten(), nn.Linear(150528, 3)), "pre_logits", images).pooled_from(
            images
        )
        is None
    )


def test_locating_changes_nothing(untouched: Untouched) -> None:
    model = fallen()
    tap = Tap(model, "pre_logits", CLEAN.images[:2])
    images = CLEAN.images[:2].clone()
    with untouched(model):
        location_maps(tap, images, torch.ones(tap.channels))
    assert torch.equal(images, CLEAN.images[:2])
