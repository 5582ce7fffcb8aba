"""The images of a run: digits with a planted shortcut, folders, damage, and the order of epochs."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photos import write_photos
from PIL import Image

from concept_guard.errors import ConfigError
from concept_guard.training import Recipe
from concept_guard.training.digits import Planted, load_digits, plant
from concept_guard.training.images import Images, held_out, split_folder
from concept_guard.training.splits import epoch_batches, open_splits, ordered


def folder_recipe(photos: Path, **keys: Any) -> Recipe:
    given: dict[str, Any] = {"img_size": 24, "batch_size": 8, "epochs": 1, "lr": 0.05}
    return Recipe(data_dir=str(photos), model="resnet10t", **{**given, **keys})


def test_the_digits_are_split_by_class_without_overlap() -> None:
    found = load_digits(8, None, 1 / 3, 0)
    assert {name: len(part.labels) for name, part in found.items()} == {
        "train": 900,
        "probe": 450,
        "clean": 447,
    }
    for part in found.values():
        shares = part.labels.bincount() / len(part.labels)
        assert (shares - 0.1).abs().max() < 0.005
        assert not part.planted.any()
    rows = torch.cat([part.images[:, 0].flatten(1) for part in found.values()])
    assert len(rows.unique(dim=0)) == 1797  # the images are all different, so none is used twice


def test_the_split_depends_on_the_seed_alone() -> None:
    first, again, other = (load_digits(8, None, 1 / 3, seed) for seed in (1, 1, 2))
    for name in first:
        assert torch.equal(first[name].images, again[name].images)
        assert not torch.equal(first[name].images, other[name].images)


@pytest.mark.parametrize("kind", ["tint", "mark"])
def test_the_shortcut_lies_where_it_was_planted(kind: str) -> None:
    planted = Planted(kind=kind, label=7, share_in_class=0.9, share_elsewhere=0.03, strength=0.4)
    without, found = load_digits(32, None, 1 / 3, 0), load_digits(32, planted, 1 / 3, 0)
    for name in ("train", "probe"):
        part, own = found[name], found[name].labels == 7
        assert int(part.planted[own].sum()) == round(0.9 * int(own.sum()))
        assert int(part.planted[~own].sum()) == round(0.03 * int((~own).sum()))
        changed = (part.images != without[name].images).flatten(1).any(dim=1)
        assert torch.equal(changed, part.planted)
        is_grey = (part.images[:, 0] == part.images[:, 2]).flatten(1).all(dim=1)
        assert torch.equal(~is_grey, part.planted)
    assert torch.equal(found["clean"].images, without["clean"].images)
    assert bool(found["marked"].planted.all())
    touched = (found["marked"].images != found["clean"].images).any(dim=1)
    assert bool(touched[:, 6:, 6:].any()) is (kind == "tint")
    assert bool(touched[:, :6, :6].flatten(1).any(dim=1).all())


def test_without_shares_nothing_is_planted_in_training() -> None:
    planted = Planted(share_in_class=0.0, share_elsewhere=0.0)
    without, found = load_digits(8, None, 1 / 3, 0), load_digits(8, planted, 1 / 3, 0)
    assert torch.equal(found["train"].images, without["train"].images)


def test_strength_is_the_share_of_colour() -> None:
    images, everyone = torch.rand(4, 3, 8, 8), torch.ones(4, dtype=torch.bool)
    full = plant(images, Planted(strength=1.0), everyone)
    assert torch.equal(full, full[:1, :, :1, :1].expand_as(full))  # nothing of the image is left
    half = plant(images, Planted(strength=0.5), everyone)
    torch.testing.assert_close(half, (images + full) / 2)
    assert torch.equal(plant(images, Planted(), ~everyone), images)


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 9)
)
def test_every_class_is_kept_and_held_out(counts: list[int], share: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    kept, held = held_out(labels, share, seed)
    assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(len(labels)))
    for label, count in enumerate(counts):
        number = int((labels[held] == label).sum())
        assert 1 <= number < count
        assert abs(number - count * share) <= 1 or number in (1, count - 1)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", {"train": 10, "test": 4})


def test_a_share_of_each_class_is_held_out_as_probe(photos: Path) -> None:
    splits = open_splits(folder_recipe(photos))
    assert splits.classes == ("ant", "bee", "cat")
    assert splits.sizes == {"train": 24, "probe": 6, "test": 12}
    labels = [
        label for _, labels in ordered(splits.probe, folder_recipe(photos)) for label in labels
    ]
    assert torch.stack(labels).bincount().tolist() == [2, 2, 2]
    train, probe = splits.train, splits.probe
    assert isinstance(train, Images)
    assert isinstance(probe, Images)
    names = {part.name(index) for part in (train, probe) for index in range(len(part))}
    assert len(names) == 30


def test_a_probe_folder_is_found_by_its_synonym(photos: Path) -> None:
    write_photos(photos, {"validation": 3})
    splits = open_splits(folder_recipe(photos, val_split="val"))
    assert splits.sizes == {"train": 30, "probe": 9, "test": 12}
    assert split_folder(str(photos), "val") == photos / "validation"
    assert split_folder(str(photos), "nothing") is None  # timm would take the whole folder


def test_classes_keep_their_number_where_a_split_lacks_one(photos: Path) -> None:
    for path in (photos / "test" / "ant").iterdir():
        path.unlink()
    recipe = folder_recipe(photos)
    (_, labels), *_ = ordered(open_splits(recipe).tests["test"], recipe)
    assert set(labels.tolist()) == {1, 2}


def test_a_class_without_training_images_is_named(photos: Path) -> None:
    (photos / "test" / "ant").rename(photos / "test" / "dog")
    with pytest.raises(ConfigError, match="classes dog have no training images; expected .*ant"):
        open_splits(folder_recipe(photos))


def test_images_outside_the_class_folders_are_named(photos: Path) -> None:
    (photos / "train" / "ant" / "0.png").rename(photos / "train" / "lost.png")
    with pytest.raises(ConfigError, match="1 images such as lost.png lie in no class folder"):
        open_splits(folder_recipe(photos))


def test_an_empty_split_is_named(photos: Path) -> None:
    for path in photos.glob("test/*/*"):
        path.unlink()
    with pytest.raises(ConfigError, match="test: Found 0 images"):
        open_splits(folder_recipe(photos))


def test_a_class_that_cannot_be_shared_is_named(photos: Path) -> None:
    for path in sorted((photos / "train" / "bee").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ConfigError, match="classes bee have a single training image"):
        open_splits(folder_recipe(photos))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_left_out_with_one_warning(photos: Path, workers: int) -> None:
    recipe = folder_recipe(photos, workers=workers)
    broken = photos / "test" / "bee" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    test = open_splits(recipe).tests["test"]
    assert isinstance(test, Images)
    batches = [images for images, _ in ordered(test, recipe)]
    assert test.unreadable() == [str(broken)]  # also when a worker process met it
    assert torch.equal(torch.cat(batches)[5], torch.cat(batches)[6])  # its neighbour stands in
    with pytest.warns(UserWarning, match=rf"{broken}: unreadable image \(.+\); it is left out"):
        test.check()
    test.check()  # warnings are errors here: a second one would fail


def test_no_readable_image_at_all_is_an_error(photos: Path) -> None:
    for path in photos.glob("test/*/*"):
        path.write_bytes(b"no image")
    recipe = folder_recipe(photos)
    with pytest.raises(ConfigError, match="no image of its split can be read"):
        list(ordered(open_splits(recipe).tests["test"], recipe))


@pytest.mark.parametrize("aug", ["rrc", "flip"])
def test_augmentation_depends_on_seed_epoch_and_image_alone(photos: Path, aug: str) -> None:
    splits = open_splits(folder_recipe(photos, aug=aug))
    train = splits.train
    assert isinstance(train, Images)
    state = torch.get_rng_state(), random.getstate()
    first = [train[index][0] for index in range(8)]
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1] == random.getstate()
    torch.rand(3), random.random()
    assert torch.equal(train[5][0], first[5])
    train.epoch = 1
    assert any(not torch.equal(train[index][0], first[index]) for index in range(8))


def test_without_augmentation_training_images_are_read_as_they_are(photos: Path) -> None:
    train = open_splits(folder_recipe(photos, aug="none", crop_pct=1.0)).train
    assert isinstance(train, Images)
    image = train[0][0]
    train.epoch = 1
    assert torch.equal(train[0][0], image)
    pixels = torch.from_numpy(np.asarray(Image.open(train.name(0))).copy())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(image, ((pixels / 255 - mean) / std).permute(2, 0, 1))


def test_an_epoch_can_be_entered_in_the_middle() -> None:
    recipe = Recipe(dataset="digits", model="resnet10t", batch_size=128, epochs=2, lr=0.05)
    splits = open_splits(recipe)
    whole = [labels for _, labels in epoch_batches(splits, recipe, 3, 0)]
    rest = [labels for _, labels in epoch_batches(splits, recipe, 3, 4)]
    assert len(whole) == 7
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))
    other = [labels for _, labels in epoch_batches(splits, recipe, 4, 0)]
    assert not torch.equal(other[0], whole[0])
