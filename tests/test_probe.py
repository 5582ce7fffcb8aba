"""Stage 1: a pass over the probe is repeatable, fair, and leaves no trace."""

import gc
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from concept_guard.errors import ProbeError
from concept_guard.probe import OPENING, isolated, probe_batches
from concept_guard.reading import Reading, Reservoir, check_labels
from concept_guard.steadiness import steady_sample

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

CLASSES = 5


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def batch(count: int) -> tuple[Tensor, Tensor]:
    return images(count), torch.arange(count) % CLASSES


@pytest.mark.parametrize("leave", ["return", "raise"])
def test_isolation_restores_modes_and_every_random_state(untouched: Untouched, leave: str) -> None:
    model = timm.create_model("resnet10t", drop_rate=0.5).train()
    model.layer1.eval()
    before = random.random
    with untouched(model):
        try:
            with isolated(model), torch.no_grad():
                assert not any(module.training for module in model.modules())
                model(images())
                before(), np.random.rand(), torch.rand(1)  # noqa: NPY002, B018
                if leave == "raise":
                    raise RuntimeError
        except RuntimeError:
            pass
    assert model.training
    assert not model.layer1[0].bn1.training


def test_isolation_leaves_autocast_gradients_and_inference_mode() -> None:
    model = nn.Linear(2, 2)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), isolated(model):
        output = model(torch.ones(1, 2))
    assert output.dtype == torch.float32
    assert not output.is_inference()
    assert not output.requires_grad


def test_isolation_does_not_call_an_overridden_train() -> None:
    class Merging(nn.Linear):
        def train(self, _: bool = True) -> "Merging":
            raise AssertionError("a train() with side effects was called")

    with isolated(nn.Sequential(Merging(2, 2))):
        pass


class Noisy(Dataset[tuple[Tensor, int]]):
    """Draws from every global random state, as augmentations do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand()  # noqa: NPY002
        return torch.rand(3, 32, 32) + noise + index, index % CLASSES


def numbered(count: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(count).float()[:, None], torch.arange(count) % CLASSES)


def order(batches: Iterable[tuple[Tensor, Tensor]]) -> list[int]:
    return [int(value) for values, _ in batches for value in values[:, 0]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_is_read_in_the_order_of_its_dataset(shuffle: bool) -> None:
    loader = DataLoader(numbered(), batch_size=4, shuffle=shuffle, drop_last=True)
    batches = probe_batches(loader, seed=0)
    assert order(batches) == order(batches) == list(range(10))
    assert [len(values) for values, _ in batches] == [4, 4, 2]


def test_a_random_subset_is_read_in_ascending_order() -> None:
    loader = DataLoader(numbered(), 2, sampler=SubsetRandomSampler([7, 1, 4]))
    assert order(probe_batches(loader, seed=0)) == [1, 4, 7]


def test_a_loader_without_automatic_batches_is_read_in_order() -> None:
    loader = DataLoader([(torch.full((2, 1), float(i)), torch.zeros(2)) for i in range(3)], None)
    assert order(probe_batches(loader, seed=0)) == [0, 0, 1, 1, 2, 2]


class Wrapped:
    """A loader around a loader, as timm's prefetcher is one."""

    def __init__(self, loader: DataLoader[object]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[object]:
        return iter(self.loader)


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("kind", ["weighted", "batch_sampler", "wrapped", "subclass"])
def test_any_other_loader_repeats_itself_and_is_left_as_it_was(
    untouched: Untouched, kind: str, own_generator: bool
) -> None:
    generator = torch.Generator().manual_seed(5) if own_generator else None
    sampler = WeightedRandomSampler([1.0] * 10, 10, generator=generator)
    batched = BatchSampler(sampler, 4, drop_last=False)
    shuffled = DataLoader(numbered(), 4, shuffle=True, generator=generator)
    probe: Iterable[object] = {
        "weighted": DataLoader(numbered(), 4, sampler=sampler),
        "batch_sampler": DataLoader(numbered(), batch_sampler=batched),
        "wrapped": Wrapped(shuffled),
        "subclass": type("Own", (DataLoader,), {})(
            numbered(), 4, shuffle=True, generator=generator
        ),
    }[kind]
    batches = probe_batches(probe, seed=0)
    state = None if generator is None else generator.get_state()
    with untouched(nn.Linear(1, 1)):
        first, second = order(batches), order(batches)
        next(iter(batches))  # an abandoned pass counts as well
        gc.collect()
    assert first == second
    assert first != list(range(10))
    if generator is not None:
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_random_dataset_gives_the_same_images_on_every_pass(
    untouched: Untouched, workers: int
) -> None:
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
    batches = probe_batches(loader, seed=0)
    with untouched(nn.Linear(1, 1)):
        first, second = ([values for values, _ in batches] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for one, other in pairwise(first):  # each batch has noise of its own
        assert not torch.allclose(one + 4, other)
    other_seed = next(iter(probe_batches(loader, seed=1)))[0]
    assert not torch.equal(first[0], other_seed)


class Flipped(Dataset[tuple[Tensor, int]]):
    """Flips images at random, by its own random numbers or by those of torch."""

    def __init__(self, own: bool) -> None:
        self._own = torch.Generator().manual_seed(0) if own else None

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.arange(12.0).view(3, 2, 2) + index
        flip = torch.rand(1, generator=self._own) < 0.5
        return image.flip(-1) if flip else image, index % CLASSES


# With own random numbers all workers start from the same ones, and every pass is alike.
@pytest.mark.parametrize(("own", "workers"), [(False, 0), (False, 1), (True, 0)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_augmentation_is_found_in_the_first_images(
    untouched: Untouched, own: bool, wrapped: bool, workers: int
) -> None:
    loader = DataLoader(Flipped(own), batch_size=8, num_workers=workers)
    probe = probe_batches(Wrapped(loader) if wrapped else loader, seed=0)
    message = r"depend on random numbers.*without augmentation.*create_transform\(size, is_training"
    with untouched(nn.Linear(1, 1)), pytest.warns(UserWarning, match=message):
        assert steady_sample(probe).shape == (2, 3, 2, 2)


class Shuffled:
    """An iterable in another order on each pass, by random numbers of its own or of torch."""

    def __init__(self, own: bool) -> None:
        self._own = torch.Generator().manual_seed(0) if own else None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(40, generator=self._own)
        values, labels = numbered(40).tensors
        yield from zip(values[order].split(4), labels[order].split(4), strict=True)


def test_another_order_on_every_pass_is_refused_unless_the_seed_fixes_it() -> None:
    with pytest.raises(ProbeError, match=r"two passes yield other labels.*DataLoader\(dataset"):
        steady_sample(probe_batches(Shuffled(own=True), seed=0))
    probe = probe_batches(Shuffled(own=False), seed=0)
    steady_sample(probe)
    assert order(probe) == order(probe)  # control: the guard may rely on it


class Loaded(Dataset[tuple[Tensor, int]]):
    """Counts how many images were read."""

    def __init__(self) -> None:
        self.count = 0

    def __len__(self) -> int:
        return 500

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.count += 1
        return torch.full((3,), torch.nan if index == 1 else float(index)), index % CLASSES


def test_a_steady_probe_is_read_a_little_and_hears_nothing() -> None:
    data = Loaded()
    loader = DataLoader(data, batch_size=250, shuffle=True)
    sample = steady_sample(probe_batches(loader, seed=0))
    assert data.count == 2 * OPENING
    assert sample[0].tolist() == [0, 0, 0]
    assert sample.untyped_storage().nbytes() == sample.nbytes  # not a view of a batch
    assert len(steady_sample(probe_batches([batch(1)], seed=0))) == 1
    with pytest.raises(ProbeError, match="probe is empty"):
        steady_sample(probe_batches([], seed=0))


def test_a_one_shot_probe_is_refused_with_a_way_out() -> None:
    with pytest.raises(ProbeError, match=r"one-shot iterator \(generator\).*or list\(probe\)"):
        probe_batches((batch() for _ in range(2)), seed=0)
    with pytest.raises(ProbeError, match=r"probe is a TensorDataset, .* DataLoader\(dataset"):
        probe_batches(numbered(), seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((images(), torch.rand(2, CLASSES)), "image 0: labels are torch.float32, .* soft labels"),
        (
            (images(), torch.zeros(2, CLASSES, dtype=torch.int64)),
            r"labels have shape \(2, 5\).*of one-hot labels take labels\.argmax\(dim=1\)",
        ),
        (
            (images(), torch.eye(CLASSES)[:2]),
            r"labels are torch.float32.*soft labels.*clean, unmixed loader.*labels\.argmax\(dim=1",
        ),
        ((images(), torch.tensor([0.0, 3.0])), r"torch.float32, .*dataset return int\(label\)"),
        ((images(), torch.tensor([0.1, 0.9])), r"torch.float32, .*soft labels \(Mixup"),
        ((images(), torch.tensor([1j, 2])), r"torch.complex64, .*soft labels"),
        ((images(), torch.zeros(3, dtype=torch.int64)), r"labels have shape \(3,\), images \(2, 3"),
        (
            (images(), torch.tensor([True, False])),
            r"labels are torch.bool, .*have the dataset return int\(label\)",
        ),
        ((images(), [0, 1]), "labels are a list, expected a tensor; collate them"),
        (({"patches": images()}, torch.zeros(2)), "images are a dict.*loader of plain images"),
        (
            (images(), torch.zeros(2), "name"),
            r"tuple of length 3, expected a pair.*collate_fn=lambda .*\(i\[0\], i\[1\]\) for",
        ),
        (
            {"pixel_values": images(), "labels": torch.zeros(2)},
            r"dict with the keys \['pixel_values', 'labels'\], expected a pair \(images, labels\); "
            r".*collate_fn=lambda .*default_collate\(\[\(i\['pixel_values'\], i\['labels'\]\) for",
        ),
        (images(), "got a Tensor, expected a pair"),
    ],
)
def test_a_batch_that_is_no_pair_of_images_and_classes_is_refused(
    item: object, message: str
) -> None:
    with pytest.raises(ProbeError, match=message):
        check_labels([item], CLASSES)


def test_all_label_faults_are_told_in_one_message() -> None:
    labels = torch.tensor([0, 6, 1, -1, 2, 3])
    probe = [(torch.zeros(3, 1), labels[:3]), (torch.zeros(3, 1), labels[3:])]
    with pytest.raises(
        ProbeError,
        match=r"outside \[0, 6\), of 2 of 6 images: image 1 has 6, image 3 has -1; the model has 6"
        r"(.|\n)*no image of 2 of 6 classes: 4, 5; take a held-out split with every class",
    ):
        check_labels(probe, 6)
    with pytest.raises(ProbeError, match="no image of 995 of 1000 classes: .*, 14 and 985 more"):
        check_labels([batch(5)], 1000)
    for empty in ([], [(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))]):
        with pytest.raises(ProbeError, match="probe is empty"):
            check_labels(empty, 5)
    assert len(check_labels([batch(4), batch(5)], CLASSES)) == 9


def sampled(cuts: Iterable[int], seed: int, max_rows: int, positions: int = 1) -> Reading:
    """Offer images 0, 1, 2 ... whose rows are their number, in batches of the given sizes."""
    reservoir = Reservoir(max_rows, None, seed)
    for size in cuts:
        number = torch.arange(reservoir.seen, reservoir.seen + size)
        rows = number[:, None, None].expand(-1, positions, 2).float()
        reservoir.add(rows, rows[:, 0], number % CLASSES)
    return reservoir.reading(CLASSES, (1, positions))


def test_every_image_is_kept_equally_often() -> None:
    trials, stream, kept = 2000, 24, 6
    counts = torch.zeros(stream)
    for seed in range(trials):
        counts[sampled([5, 5, 5, 5, 4], seed, kept).indices] += 1
    rate = kept / stream
    spread = (rate * (1 - rate) / trials) ** 0.5  # of one frequency, binomial
    deviation = (counts / trials - rate) / spread
    assert deviation.abs().max() < 4  # 24 normal draws exceed this once in 600 repetitions
    assert deviation.square().mean() < 2
    # Control: keeping the first six, or the last, fails by far.
    assert ((torch.arange(stream) < kept).float() - rate).abs().max() / spread > 40


def test_a_sample_does_not_depend_on_the_cut_but_on_the_seed() -> None:
    whole = sampled([100], 0, 20)
    parts = sampled([1, 30, 7, 50, 12], 0, 20)
    assert torch.equal(whole.indices, parts.indices)
    assert torch.equal(whole.rows, parts.rows)
    assert not torch.equal(whole.indices, sampled([100], 1, 20).indices)


def test_a_long_stream_takes_no_more_memory_than_the_sample() -> None:
    reservoir = Reservoir(20, None, seed=0)
    for _ in range(50):
        reservoir.add(torch.zeros(10, 1, 2), torch.zeros(10, CLASSES), torch.zeros(10).long())
        assert sum(len(rows) for *_, rows in reservoir._chunks) <= 25


def test_all_positions_of_a_kept_image_stay_together() -> None:
    reading = sampled([50, 50], 0, 31, positions=4)
    assert (len(reading.indices), reading.seen, reading.grid) == (7, 100, (1, 4))
    assert (reading.indices.diff() > 0).all()
    number = reading.indices.float()
    assert torch.equal(reading.rows, number[:, None, None].expand(-1, 4, 2))
    assert torch.equal(reading.logits[:, 0], number)
    assert torch.equal(reading.labels, reading.indices % CLASSES)
    assert len(sampled([3], 0, 2, positions=4).indices) == 1
