"""Stage 4a: what a concept does to images is used where images that were left out show it, too."""

import math
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from concept_guard import contrasts, effects
from concept_guard.contrasts import Sums
from concept_guard.effects import CLASSES, EACH, LEAST, STALE, Effect, Sample, effect_of, sampled
from concept_guard.probe import probe_batches
from concept_guard.reading import Reading
from concept_guard.thresholds import balanced_accuracy, threshold_of

SHAPE = (3, 8, 8)


def reading_of(labels: Tensor, indices: Tensor | None = None) -> Reading:
    """Return a reading of images with these classes; its rows say nothing."""
    count = len(labels)
    indices = torch.arange(count) if indices is None else indices
    return Reading(torch.zeros(count, 1, 2), torch.zeros(count, 2), labels, indices, count, (1, 1))


def of_all(labels: Tensor, carried: Tensor) -> Sample:
    """Return all images of a probe as a sample."""
    return Sample(torch.arange(len(labels)), labels, carried)


def drawn(count: int = 400, seed: int = 0, share: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    """Return images of noise, classes, and which images are to carry something."""
    rng = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, *SHAPE, generator=rng), torch.arange(count) % 4
    return images, labels, torch.rand(count, generator=rng) < share


def marked(images: Tensor, carried: Tensor, side: int = 2) -> Tensor:
    """Return the images, some with a square in a corner."""
    images = images.clone()
    images[carried, :, :side, :side] = 2.0
    return images


def batches(images: Tensor, labels: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), labels.split(size), strict=True))


def seen(images: Tensor, labels: Tensor, carried: Tensor, size: int = 64) -> Effect:
    """Return what is seen on all images of a probe."""
    probe = probe_batches(batches(images, labels, size), seed=0)
    return effect_of(probe, of_all(labels, carried))


# The sample


@pytest.fixture
def many() -> tuple[Reading, Tensor]:
    """Return a reading of ten classes of 400 images, and how many of each carry a concept."""
    labels = torch.arange(4000) % 10
    shares = torch.tensor([0.0, 1.0, 0.01, 0.02, 0.04, 0.1, 0.3, 0.5, 0.88, 0.97])
    carried = torch.arange(4000) // 10 < 400 * shares[labels]
    return reading_of(labels, 3 * torch.arange(4000)), carried


def test_the_classes_that_say_most_are_sampled(many: tuple[Reading, Tensor]) -> None:
    reading, carried = many
    sample = sampled(reading, carried, seed=0)
    at = sample.images // 3
    assert torch.equal(sample.carried, carried[at])
    assert torch.equal(sample.images, sample.images.sort().values)
    assert len(sample.images.unique()) == len(sample.images)
    labels = reading.labels[at]
    assert set(labels.tolist()) == {2, 3, 4, 5, 6, 7, 8, 9}  # the others have one kind alone
    ranked = [int(labels[sample.classes == n].unique()) for n in range(CLASSES)]
    assert set(ranked[:2]) == {6, 7}  # as many as are taken, of both kinds
    assert ranked[2:] == [8, 5, 4, 9, 3, 2]
    for k in range(2, 10):
        for present in (False, True):
            there = int(((reading.labels == k) & (carried == present)).sum())
            assert int(((labels == k) & (sample.carried == present)).sum()) == min(there, EACH)


def test_no_more_than_eight_classes_are_sampled() -> None:
    labels = torch.arange(2400) % 12
    carried = torch.arange(2400) // 12 < 1 + labels  # class 0 has one image with it, class 1 two
    sample = sampled(reading_of(labels), carried, seed=0)
    assert set((sample.images % 12).tolist()) == set(range(12 - CLASSES, 12))
    assert int(sample.classes.max()) == CLASSES - 1
    fewer = sampled(reading_of(labels % 3), carried, seed=0)  # control
    assert set((sample.images % 3).tolist()) == set(fewer.classes.tolist()) == {0, 1, 2}


def test_the_seed_chooses_among_the_images_of_a_group(many: tuple[Reading, Tensor]) -> None:
    reading, carried = many
    one, again, other = (sampled(reading, carried, seed) for seed in (0, 0, 1))
    assert one.is_same(again)
    assert not one.is_same(other)
    state = torch.get_rng_state()
    sampled(reading, carried, 0)
    assert torch.equal(state, torch.get_rng_state())
    label = reading.labels[one.images // 3]
    few = (label == 2) & one.carried  # all there are, whatever the seed
    few_of_other = (reading.labels[other.images // 3] == 2) & other.carried
    assert torch.equal(one.images[few], other.images[few_of_other])


def test_nothing_is_sampled_where_no_class_has_images_of_both_kinds() -> None:
    labels = torch.arange(40) % 4
    for carried in (labels == 1, torch.zeros(40).bool(), torch.ones(40).bool()):
        sample = sampled(reading_of(labels), carried, seed=0)
        assert [len(t) for t in sample.as_dict().values()] == [0, 0, 0]
        assert sample.images.dtype == sample.classes.dtype == torch.int64
        assert sample.carried.dtype == torch.bool
    nearly = labels == 1
    nearly[1] = False
    assert len(sampled(reading_of(labels), nearly, seed=0).images) == 10  # control


def test_the_halves_take_turns_in_every_group() -> None:
    rng = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 5, (300,), generator=rng)
    sample = of_all(classes, torch.rand(300, generator=rng) < 0.2)
    for k in range(5):
        for present in (False, True):
            own = sample.halves[(classes == k) & (sample.carried == present)]
            assert own.tolist() == [i % 2 for i in range(len(own))]
    assert len(of_all(classes[:0], sample.carried[:0]).halves) == 0


def test_a_sample_is_stale_once_two_of_a_hundred_images_have_changed() -> None:
    carried = torch.arange(200) % 4 == 0
    sample = Sample(2 * torch.arange(200), torch.zeros(200).long(), carried)
    indices, now = torch.arange(400), carried.repeat_interleave(2)
    assert not sample.is_stale(indices, now)
    most = int(STALE * 200)
    for changed, stale in ((most, False), (most + 1, True)):
        other = now.clone()
        other[2 * torch.arange(changed)] ^= True
        assert sample.is_stale(indices, other) == stale
        left = indices[2 * changed :]  # the first images are not read any more
        assert sample.is_stale(left, now[2 * changed :]) == stale
    beside = now.clone()
    beside[1::2] ^= True  # images that are not of the sample
    assert not sample.is_stale(indices, beside)


def test_a_sample_without_images_is_always_stale() -> None:
    labels = torch.arange(40) % 4
    none = sampled(reading_of(labels), labels == 1, seed=0)
    assert none.is_stale(torch.arange(40), torch.arange(40) % 3 == 0)


def test_samples_are_the_same_if_all_of_them_is() -> None:
    _, labels, carried = drawn(40)
    sample = of_all(labels, carried)
    assert sample.is_same(Sample(**{k: v.clone() for k, v in sample.as_dict().items()}))
    for other in (
        replace(sample, images=sample.images + 1),
        replace(sample, classes=sample.classes.flip(0)),
        replace(sample, carried=~carried),
        Sample(sample.images[:-1], sample.classes[:-1], carried[:-1]),
    ):
        assert not sample.is_same(other)


# What is said, and when nothing is done


def test_what_is_planted_is_used_and_said() -> None:
    images, labels, carried = drawn()
    effect = seen(marked(images, carried), labels, carried)
    assert effect.said == (
        "training images get it and lose it at random; 12 of 192 values of images change with it "
        "(balanced accuracy 1.00)"
    )
    assert effect.shape == torch.Size(SHAPE)
    assert effect.map is not None
    fresh, _, have = drawn(100, seed=1)
    assert torch.equal(effect.map.carried(marked(fresh, have)), have)
    assert not effect.map.carried(fresh).any()  # control
    moved = effect.to(torch.device("meta"))
    assert moved.map is not None
    assert moved.map.gains.device.type == "meta"
    assert (moved.said, moved.sample) == (effect.said, effect.sample)


def refused(effect: Effect, reason: str) -> bool:
    """Return whether nothing is to be edited, and this is said of it."""
    assert effect.to(torch.device("meta")) is effect
    told = re.fullmatch(f"training images are left as they are: {reason}", effect.said)
    return effect.map is None and told is not None


NOTHING = "none of their values certainly changes with it"


def test_nothing_is_done_without_images() -> None:
    images, labels, carried = drawn(40)
    probe = probe_batches(batches(marked(images, carried), labels), seed=0)
    assert refused(effect_of(probe, sampled(reading_of(labels), labels == 1, seed=0)), NOTHING)


def test_nothing_is_done_where_nothing_is_certain() -> None:
    images, labels, carried = drawn()
    assert refused(seen(images, labels, carried), NOTHING)


def test_nothing_is_done_where_one_half_shows_nothing() -> None:
    images, labels, _ = drawn()
    few = torch.arange(400) < 2  # an image of each of two classes, both in the first half
    effect = seen(marked(images, few, side=8), labels, few)
    assert refused(effect, NOTHING)
    sums = Sums(4, torch.Size(SHAPE))
    sums.add(marked(images, few, side=8), torch.zeros(400).long(), labels, few)
    assert sums.map(0) is not None  # control: together they show it


@pytest.mark.parametrize("kind", ["shapes", "integers", "integers later"])
def test_nothing_is_done_with_images_that_cannot_be_compared(kind: str) -> None:
    images, labels, carried = drawn()
    probe = batches(marked(images, carried), labels)
    x, y = probe[-1]
    probe[-1] = {
        "shapes": (x[:, :, :-1], y),
        "integers": probe[-1],
        "integers later": (x.to(torch.uint8), y),
    }[kind]
    if kind == "integers":
        probe = [(x.to(torch.uint8), y) for x, y in probe]
    effect = effect_of(probe_batches(probe, seed=0), of_all(labels, carried))
    assert refused(effect, "the probe's are of several shapes, or no floats")


def test_nothing_is_done_with_what_covers_much(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, carried = drawn()
    large = marked(images, carried, side=4)  # a quarter of the image
    effect = seen(large, labels, carried)
    told = r"48 of 192 values of images change with it, which covers 2\d% of what varies in them, "
    assert refused(effect, told + "more than 10%")
    monkeypatch.setattr(effects, "MOST_LOST", 0.5)  # control
    assert seen(large, labels, carried).map is not None


def faint(images: Tensor, carried: Tensor) -> Tensor:
    """Return the images, one value of some of them larger by 1.5 of its spread."""
    images = images.clone()
    images[carried, 0, 0, 0] += 1.5
    return images


def test_nothing_is_done_with_what_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels, carried = drawn(1000)
    effect = seen(faint(images, carried), labels, carried)
    told = "1 of 192 values of images change with it, and tell it with a balanced accuracy of "
    assert refused(effect, told + r"0\.\d\d only, expected 0\.9")
    (rate,) = re.findall(r"accuracy of (0\.\d\d)", effect.said)
    best = 0.5 * (1 + math.erf(0.75 / math.sqrt(2)))  # a threshold half way between the means
    error = math.sqrt(best * (1 - best) * (1 / carried.sum() + 1 / (~carried).sum())) / 2
    assert float(rate) == pytest.approx(best, abs=4 * error)
    monkeypatch.setattr(effects, "LEAST", 0.7)  # control
    assert seen(faint(images, carried), labels, carried).map is not None


# Images that were left out


@pytest.mark.parametrize("count", [40, 60, 400])
def test_carriers_at_random_are_not_read(count: int) -> None:
    for seed in range(10):
        images, labels, carried = drawn(count, seed)
        assert refused(seen(images, labels, carried), NOTHING)
    planted = images + 999 * carried[:, None, None, None]  # control
    assert seen(planted, labels, carried).map is not None


def test_noise_that_is_taken_for_certain_is_not_read_in_the_other_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(contrasts, "CHANGED", 0.5)
    fooled = 0
    for seed in range(10):
        images, labels, carried = drawn(60, seed)
        effect = seen(images, labels, carried)
        told = r"\d+ of 192 values of images change with it, and tell it with a balanced accuracy "
        assert refused(effect, told + r"of 0\.\d\d only, expected 0\.9")
        sums = Sums(4, torch.Size(SHAPE))
        sums.add(images, torch.zeros(60).long(), labels, carried)
        whole = sums.map(0)
        assert whole is not None
        scores = whole.scores(whole.picked(images))
        rate = balanced_accuracy(scores > threshold_of(scores, carried), carried)
        fooled += rate >= LEAST
    assert fooled == 10  # control: in the images that it was taken from it is read


def test_what_is_planted_in_one_half_alone_is_not_used() -> None:
    images, labels, carried = drawn()
    sample = of_all(labels, carried)
    half = carried & (sample.halves == 0)
    assert refused(seen(marked(images, half), labels, carried), ".+")
    assert seen(marked(images, carried), labels, carried).map is not None  # control


# How the probe is read


class Noisy(Dataset[Any]):
    """Images that are moved at random whenever they are loaded; remembers which ones were."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.loaded.append(int(index))
        moved = 0.01 * (torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002
        return self.images[index] + float(moved), int(self.labels[index])


def random_state() -> list[Any]:
    numpy_state = np.random.get_state()  # noqa: NPY002 - the global state is the point
    return [torch.get_rng_state().tolist(), random.getstate(), str(numpy_state)]


@pytest.mark.parametrize("shuffled", [False, True])
def test_only_the_images_of_the_sample_are_loaded_and_nothing_else_changes(shuffled: bool) -> None:
    images, labels, carried = drawn()
    data = Noisy(marked(images, carried), labels)
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(data, 32, shuffle=shuffled, generator=generator)
    chosen = torch.arange(0, 400, 3)
    sample = Sample(chosen, labels[chosen], carried[chosen])
    before, own = random_state(), generator.get_state()
    effect = effect_of(probe_batches(loader, seed=0), sample)
    assert effect.map is not None
    assert effect.map.changed >= 12
    assert data.loaded == 2 * chosen.tolist()
    assert random_state() == before
    assert torch.equal(generator.get_state(), own)
    again = effect_of(probe_batches(loader, seed=0), sample)
    assert again.map is not None
    for name in ("centre", "gains", "shifts", "threshold"):
        one, other = getattr(effect.map, name), getattr(again.map, name)
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    next(iter(loader))  # control: what a loader of one's own would have done
    assert random_state() != before


def test_a_probe_of_any_kind_shows_the_same() -> None:
    images, labels, carried = drawn()
    images = marked(images, carried)
    chosen = torch.arange(1, 400, 2)
    sample = Sample(chosen, labels[chosen], carried[chosen])
    kept = images.clone()
    ways = (
        batches(images, labels, 7),
        batches(images.to(memory_format=torch.channels_last), labels, 400),
        DataLoader(TensorDataset(images, labels), 50),
    )
    found = [effect_of(probe_batches(way, seed=0), sample) for way in ways]
    assert len({effect.said for effect in found}) == 1
    for effect in found:
        assert effect.map is not None
        assert found[0].map is not None
        torch.testing.assert_close(effect.map.shifts, found[0].map.shifts)
    assert torch.equal(images, kept)
    others = Sample(chosen - 1, labels[chosen - 1], carried[chosen])  # control: of other images
    assert effect_of(probe_batches(ways[0], seed=0), others).map is None


def test_images_of_bfloat16_show_it() -> None:
    images, labels, carried = drawn()
    half = marked(images, carried).bfloat16()
    effect = seen(half, labels, carried)
    assert effect.map is not None
    assert torch.equal(effect.map.carried(half), carried)


@pytest.mark.parametrize("hostile", [math.nan, math.inf])
def test_images_that_are_no_numbers_show_nothing(hostile: float) -> None:
    images, labels, carried = drawn()
    images = marked(images, carried)
    assert seen(images, labels, carried).map is not None  # control
    images[7, 1, 4, 4] = hostile
    assert refused(seen(images, labels, carried), NOTHING)
