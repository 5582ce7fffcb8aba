"""Stage 1: pass over the held-out probe set in a fixed order and leave no trace of it.

Nothing here knows where a model is read: no hooks, no layouts, no concepts.
"""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from concept_guard.errors import ProbeError
from concept_guard.ranks import ALONE, Ranks
from concept_guard.reading import checked_pair

Opening = list[tuple[Tensor, Tensor]]  # the first batches
OPENING = 32  # images that are read twice: fewer may be alike by chance, flipped as often as not


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Let the block run `model` without changing training by a single bit.

    Inside: every module in eval mode, no gradients, no autocast, eager execution. Afterwards,
    whether the block returns or raises: the `training` flag of every module and the random
    states of python, numpy, torch and CUDA are what they were.

    Args:
        model: Any module. Flags are set one by one, because `model.train()` would thaw frozen
            parts and may be overridden.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.callback(_set_modes, modes)
        stack.enter_context(torch.inference_mode(False))  # no fit can use inference tensors
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            # Without it a model compiled in place would be compiled again for the probe.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        _set_modes([(module, False) for module, _ in modes])
        yield


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """Restore the global random states afterwards, whether the block returns or raises.

    Args:
        seed: From which python, numpy and torch start inside; None for the states as they are.

    Yields:
        Nothing.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - the user's own global state
    # Asking an idle CUDA for its state would initialise it; nothing can have drawn from it.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)  # noqa: NPY002 - undone below
                torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002 - the user's own global state


class Batches:
    """Batches of a probe, the same on every pass; a pass changes neither probe nor random state.

    Attributes:
        ranks: The processes among which the batches are dealt out.
    """

    def __init__(
        self, source: Iterable[Any], seed: int, *, own: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self._source = source
        self._seed = seed
        self._own = own
        self.ranks = ranks

    @property
    def alone(self) -> "Batches":
        """The same batches, all of them for this process."""
        return Batches(self._source, self._seed, own=self._own)

    @property
    def places(self) -> tuple[Any, list[int]] | None:
        """The dataset behind the batches and the places in it, in their order; None if unknown."""
        dataset = getattr(self._source, "dataset", None)
        order = getattr(self._source, "sampler", None)
        if dataset is None or not (self._own or isinstance(order, SequentialSampler)):
            return None
        return dataset, [int(index) for index in order or ()]

    def __iter__(self) -> Iterator[Any]:
        generators = _generators(self._source)
        states = [generator.get_state() for generator in generators]
        iterator: Iterator[Any] | None = None
        try:
            for number in count(self._seed):
                with random_state_kept(number):
                    iterator = iter(self._source) if iterator is None else iterator
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                yield batch
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def dealt(self) -> Iterator[tuple[int, Any]]:
        """Yield this process's share of the batches: every so many-th, from its rank on.

        A loader in the order of its dataset loads just these; anything else is passed over in full.

        Yields:
            The probe index of the first image of a batch, and the batch.
        """
        rank, size = self.ranks.rank, self.ranks.size
        if isinstance(self._source, DataLoader) and self._own and size > 1:
            order, each = list(self._source.sampler), self._source.batch_size or 1
            starts = range(rank * each, len(order), size * each)
            mine = [index for start in starts for index in order[start : start + each]]
            share = Batches(reordered(self._source, mine, self._seed), self._seed)
            yield from zip(starts, share, strict=True)
            return
        for number, (start, batch) in enumerate(counted(self)):
            if number % size == rank:
                yield start, batch

    def opening(self, *, shift: int = 0) -> Opening:
        """Return the first batches, as they are if other random numbers are drawn for them.

        Args:
            shift: Of the seed; 0 gives what every pass gives, if passes are alike.

        Returns:
            `(b, ...)` images and `(b,)` labels, `OPENING` or more of them if there are as many.
        """
        source, seed = self._source, self._seed + shift
        if isinstance(source, DataLoader) and self._own:
            source = reordered(source, list(islice(source.sampler, OPENING)), seed)
        found: Opening = []
        for batch in Batches(source, seed):
            found.append(checked_pair(batch, sum(len(labels) for _, labels in found)))
            if sum(len(labels) for _, labels in found) >= OPENING:
                break
        return found

    def in_order(self) -> "Batches | None":
        """Return the images in the order of their dataset, if there is a loader inside."""
        node: Any = self._source
        while node is not None and not isinstance(node, DataLoader):
            node = getattr(node, "loader", None)
        if node is None or node.batch_size is None or not hasattr(node.dataset, "__getitem__"):
            return None
        loader = reordered(node, range(len(node.dataset)), self._seed)  # type: ignore[arg-type]
        return Batches(loader, self._seed, own=True)

    def only(self, indices: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images of the given ascending positions, in batches.

        A loader in the order of its dataset loads just these images; anything else is passed over
        in full.

        Yields:
            `(b, ...)` images and `(b,)` labels.
        """
        if isinstance(self._source, DataLoader) and self._own:
            order = list(self._source.sampler)
            chosen = [order[index] for index in indices]
            yield from Batches(reordered(self._source, chosen, self._seed), self._seed)
            return
        wanted, start = torch.tensor(indices), 0
        for batch in self:
            images, labels = checked_pair(batch, start)
            here = wanted[(wanted >= start) & (wanted < start + len(labels))] - start
            if len(here):
                yield images[here.to(images.device)], labels[here.to(labels.device)]
            start += len(labels)


def counted(batches: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield batches, each with the position of its first image.

    Args:
        batches: `(images, labels)` pairs.

    Yields:
        Position and batch.
    """
    start = 0
    for batch in batches:
        yield start, batch
        start += len(checked_pair(batch, start)[1])


def probe_batches(probe: Iterable[Any], seed: int, ranks: Ranks = ALONE) -> Batches:
    """Return the batches of `probe`, the same on every pass, without side effects.

    A plain map-style `DataLoader` is read through an own loader in the order of its dataset, so
    that a probe index is a position in that order. Anything else is iterated as it is.

    Args:
        probe: Held-out `(images, labels)` batches that can be iterated many times.
        seed: Of the random numbers that dataset, workers or sampler draw during a pass.
        ranks: The processes among which the batches are dealt out.

    Returns:
        An iterable; passes over it change neither `probe` nor the global random state.

    Raises:
        ProbeError: If the probe can be iterated only once, or not at all.
    """
    if isinstance(probe, Batches):
        return probe
    if not isinstance(probe, Iterable):
        raise ProbeError(
            f"probe is a {type(probe).__name__}, expected an iterable of (images, labels) "
            "batches; wrap a dataset: DataLoader(dataset, batch_size=64)"
        )
    if isinstance(probe, Iterator) and iter(probe) is probe:
        raise ProbeError(
            f"probe is a one-shot iterator ({type(probe).__name__}) but is read many times; "
            "pass the DataLoader itself, or list(probe) if it fits in memory"
        )
    own = _own_loader(probe, seed)
    in_order = own is not None and own.batch_size is not None
    return Batches(probe if own is None else own, seed, own=in_order, ranks=ranks)


def images_at(batches: Batches, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return chosen images of a probe.

    Args:
        batches: The probe, as `probe_batches` returns it.
        indices: `(n,)` positions in the probe, in any order.

    Returns:
        `(n, ...)` images and `(n,)` labels on the CPU, in the order asked for.
    """
    ascending, back = indices.cpu().unique(return_inverse=True)
    images, labels, start = [], [], 0
    for batch in batches.only(ascending.tolist()):
        x, y = checked_pair(batch, start)
        images.append(x.cpu())
        labels.append(y.cpu().long())
        start += len(y)
    return torch.cat(images)[back], torch.cat(labels)[back]


def is_share(sampler: object) -> bool:
    """Return whether a sampler gives this process its share of a dataset, as in torch and timm."""
    return hasattr(sampler, "num_replicas") and hasattr(sampler, "dataset")


def _own_loader(probe: Iterable[Any], seed: int) -> DataLoader[Any] | None:
    """Return a loader over the dataset of `probe` in its order; None if there is no such order."""
    if type(probe) is not DataLoader or isinstance(probe.dataset, IterableDataset):
        return None
    if probe.batch_size is None and probe.batch_sampler is not None:
        return None  # a batch sampler of the user's own
    order: Iterable[int]
    if type(probe.sampler) is SubsetRandomSampler:
        order = sorted(int(index) for index in probe.sampler.indices)
    elif type(probe.sampler) is RandomSampler:
        order = SequentialSampler(probe.sampler.data_source)
    elif type(probe.sampler) is SequentialSampler:
        order = probe.sampler
    elif is_share(probe.sampler):
        order = range(len(probe.dataset))  # type: ignore[arg-type]
    else:
        return None
    return reordered(probe, order, seed)


def reordered(loader: DataLoader[Any], order: Iterable[int], seed: int) -> DataLoader[Any]:
    """Return a loader like another one that takes the items of its dataset in a given order.

    Args:
        loader: Over a map-style dataset.
        order: Of positions in it.
        seed: Of its own generator.

    Returns:
        A new loader.
    """
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=order,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
    )


def _generators(source: object) -> list[torch.Generator]:
    """Return the generators of a loader, of the loader it wraps, and of their samplers."""
    visited: dict[int, object] = {}
    todo = [source]
    while todo:
        node = todo.pop()
        if node is not None and id(node) not in visited:
            visited[id(node)] = node
            names = ("generator", "sampler", "batch_sampler", "loader")
            todo += [getattr(node, name, None) for name in names]
    return [node for node in visited.values() if isinstance(node, torch.Generator)]
