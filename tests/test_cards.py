"""Concept cards: the picture shows the image, the place of the concept, and what was wrong."""

import pytest
import torch
from torch import Tensor

from concept_guard import cards
from concept_guard.cards import TILES, Card, card_image, displayable

TILE = 96 + 2 * 3  # pixels of an image and its frame
STRIDE = TILE + 4  # and the gap


def tile(sheet: Tensor, column: int, row: int) -> Tensor:
    """Return the `(3, 96, 96)` picture in a place of the sheet."""
    top, left = 4 + row * STRIDE + 3, 4 + column * STRIDE + 3
    return sheet[:, top : top + 96, left : left + 96]


def frame(sheet: Tensor, column: int, row: int) -> list[float]:
    """Return the colour of the frame of a place of the sheet, to one decimal."""
    colour = sheet[:, 4 + row * STRIDE + 1, 4 + column * STRIDE + 1]
    return [round(value, 1) for value in colour.tolist()]


def corner_map(count: int, size: int = 4) -> Tensor:
    """Return maps that are 1 in the upper left quarter and 0 elsewhere."""
    maps = torch.zeros(count, size, size)
    maps[:, : size // 2, : size // 2] = 1.0
    return maps


def test_the_upper_row_is_the_image_itself_in_whole_pixels(rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 32, 32, generator=rng)
    sheet = card_image(Card(images, corner_map(2)))
    enlarged = images.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(tile(sheet, 0, 0), enlarged[0])
    torch.testing.assert_close(tile(sheet, 1, 0), enlarged[1])


def test_the_lower_row_keeps_the_place_of_the_concept_and_darkens_the_rest() -> None:
    images = torch.ones(1, 3, 32, 32) * torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1)
    sheet = card_image(Card(images, corner_map(1)))
    marked = tile(sheet, 0, 1)
    torch.testing.assert_close(marked[:, 5, 5], torch.tensor([1.0, 0.5, 0.0]))
    outside = marked[:, 90, 90]
    assert outside.max() < 0.3
    assert outside.max() == outside.min(), "outside must have lost its colour"
    # Control: without the map, that pixel is as bright as the image.
    assert tile(sheet, 0, 0)[:, 90, 90].max() == 1.0


def test_a_line_runs_around_the_place() -> None:
    yellow = torch.tensor([1.0, 0.85, 0.0])
    images = torch.full((1, 3, 32, 32), 0.5)
    sheet = card_image(Card(images, corner_map(1)))
    diagonal = tile(sheet, 0, 1).diagonal(dim1=1, dim2=2).T
    on_line = (diagonal == yellow).all(dim=1).nonzero().flatten()
    assert 1 <= len(on_line) <= 4
    assert 40 < on_line.float().mean() < 56  # the middle of the picture is at 48
    whole = card_image(Card(images, torch.ones(1, 4, 4)))
    assert not (tile(whole, 0, 1) == yellow.view(3, 1, 1)).all(dim=0).any()


def test_only_a_misclassified_image_has_a_red_frame() -> None:
    sheet = card_image(Card(torch.zeros(2, 3, 32, 32), corner_map(2), (True, False)))
    assert [frame(sheet, column, 0) for column in (0, 1)] == [[0.9, 0.1, 0.1], [0.8, 0.8, 0.8]]
    assert frame(sheet, 0, 1) == [0.9, 0.1, 0.1]


def test_a_map_without_a_place_leaves_one_row() -> None:
    images = torch.zeros(2, 3, 32, 32)
    assert card_image(Card(images, torch.ones(2, 1, 1))).shape == (3, STRIDE + 4, 2 * STRIDE + 4)
    assert card_image(Card(images, torch.ones(2, 2, 2))).shape == (
        3,
        2 * STRIDE + 4,
        2 * STRIDE + 4,
    )


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 48), (224, 224), (60, 200), (300, 2)])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_every_size_gives_a_bounded_sheet(
    rng: torch.Generator, height: int, width: int, count: int
) -> None:
    images = 3 * torch.rand(count, 3, height, width, generator=rng) - 1
    images[0, 0, 0, 0] = float("nan")
    sheet = card_image(Card(images, torch.rand(count, 7, 5, generator=rng)))
    assert sheet.dtype == torch.float32
    assert 0.0 <= sheet.min() <= sheet.max() <= 1.0
    assert sheet.shape[1] <= 2 * STRIDE + 4
    assert sheet.shape[2] <= TILES * STRIDE + 4


def test_drawing_changes_neither_the_card_nor_the_random_state(rng: torch.Generator) -> None:
    images, maps = torch.rand(2, 3, 16, 16, generator=rng), torch.rand(2, 2, 2, generator=rng)
    card = Card(images.clone(), maps.clone())
    state = torch.get_rng_state()
    card_image(card)
    torch.testing.assert_close(card.images, images, rtol=0, atol=0)
    torch.testing.assert_close(card.maps, maps, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_normalised_images_come_back_up_to_one_shift_and_scale(rng: torch.Generator) -> None:
    images = torch.rand(4, 3, 8, 8, generator=rng)
    images[0, 0, 0, 0], images[1, 1, 1, 1] = 0.0, 1.0
    torch.testing.assert_close(displayable((images - 0.5) / 0.25), images)


def test_a_broken_pixel_does_not_darken_the_card(rng: torch.Generator) -> None:
    images = torch.rand(1, 3, 8, 8, generator=rng)
    images[0, 0, 0, :3] = torch.tensor([0.0, 1.0, float("inf")])
    shown = displayable(images)
    torch.testing.assert_close(shown[..., 1:, :], images[..., 1:, :])


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_without_three_channels_become_grey(rng: torch.Generator, channels: int) -> None:
    shown = displayable(torch.rand(2, channels, 4, 4, generator=rng))
    assert shown.shape == (2, 3, 4, 4)
    torch.testing.assert_close(shown[:, 0], shown[:, 2])


@pytest.mark.parametrize("value", [0.3, float("nan"), float("inf")])
def test_images_without_contrast_are_still_finite(value: float) -> None:
    assert displayable(torch.full((2, 3, 4, 4), value)).eq(0).all()


@pytest.mark.parametrize(
    ("images", "maps", "wrong"),
    [
        ((0, 3, 8, 8), (0, 2, 2), ()),
        ((2, 1, 8, 8), (2, 2, 2), ()),
        ((2, 3, 8, 8), (3, 2, 2), ()),
        ((2, 3, 8, 8), (2, 2), ()),
        ((2, 3, 8, 8), (2, 2, 2), (True,)),
    ],
)
def test_a_card_that_does_not_fit_together_is_refused(
    images: tuple[int, ...], maps: tuple[int, ...], wrong: tuple[bool, ...]
) -> None:
    with pytest.raises(ValueError, match=r"card with images \(.*expected images \(n, 3, H, W\)"):
        Card(torch.zeros(images), torch.zeros(maps), wrong)


@pytest.mark.parametrize(("side", "shown"), [(16, 224), (100, 200), (448, 224)])
def test_a_single_picture_is_dark_but_for_the_place(side: int, shown: int) -> None:
    image = torch.full((3, side, side), 0.8)
    place = torch.zeros(4, 4)
    place[:2, :2] = 1.0
    whole, marked = cards.picture(image), cards.marked_picture(image, place)
    assert whole.shape == marked.shape == (3, shown, shown)
    torch.testing.assert_close(whole, torch.full_like(whole, 0.8))
    torch.testing.assert_close(
        marked[:, : shown // 4, : shown // 4], whole[:, : shown // 4, : shown // 4]
    )
    assert marked[:, -shown // 4 :, -shown // 4 :].max() < 0.3
