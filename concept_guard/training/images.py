"""Image folders: finds splits, holds a share out, and leaves unreadable images out.

Nothing here knows about models, recipes or the guard.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from concept_guard.errors import ConfigError

Transform = Callable[[Image.Image], Tensor]

_SYNONYMS = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation"))
# What PIL raises on damaged files; UnidentifiedImageError is an OSError.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def split_folder(data_dir: str, split: str) -> Path | None:
    """Return the folder of a split under the name or the synonyms that timm accepts.

    Args:
        data_dir: Image folder with one sub-folder per split.
        split: Name of the sub-folder; `val` also finds `validation` and so on.

    Returns:
        The first that exists, or None.
    """
    names = [split, *next((group for group in _SYNONYMS if split in group), ())]
    return next((Path(data_dir, name) for name in names if Path(data_dir, name).is_dir()), None)


def held_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions in two, class by class, so that both parts hold every class.

    Args:
        labels: `(B,)` int64 classes, each with at least two members.
        share: Share that is held out, in (0, 1); rounded to whole images over all classes
            first, then spread over the classes by largest remainder.
        seed: Decides which members are held out.

    Returns:
        `(B - N,)` kept and `(N,)` held positions, both ascending.
    """
    counts = labels.bincount()
    quota = counts.double() * share
    take = quota.floor().long()
    left = round(len(labels) * share) - int(take.sum())
    take[(quota - take).argsort(descending=True, stable=True)[: max(left, 0)]] += 1
    take = torch.minimum(take.clamp(min=1), counts - 1)
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros_like(labels, dtype=torch.bool)
    for label in counts.nonzero().flatten():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        held[members[order[: int(take[label])]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


class Images(Dataset[tuple[Tensor, int]]):
    """One split of an image folder, in a fixed order, where damage is noted and not fatal.

    In place of an unreadable image its next readable neighbour in the split is returned, and
    `broken` remembers the position, also when a worker process met it. `check` tells.

    Random transforms draw from (seed, epoch, position) alone, so that an epoch can be entered
    in the middle, with any number of workers, and the training's own random state never moves.

    Args:
        reader: timm's image reader: file and class by index.
        positions: `(B,)` int64 indices of the reader that belong to this split.
        transform: Turns an RGB image into a tensor.
        seed: Seed of random transforms.
        on_unreadable: What `check` does about unreadable images: warn or raise.
    """

    def __init__(
        self,
        reader: Any,
        positions: Tensor,
        transform: Transform,
        *,
        seed: int,
        on_unreadable: Literal["skip", "stop"],
    ) -> None:
        self._reader, self._positions, self._transform = reader, positions.tolist(), transform
        self._seed, self._on_unreadable = seed, on_unreadable
        self.epoch = 0
        self.broken = torch.zeros(len(positions), dtype=torch.bool).share_memory_()
        self._told = torch.zeros_like(self.broken)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for step in range(len(self)):
            at = (index + step) % len(self)
            try:
                image, label = self._decode(at)
            except _UNREADABLE:
                self.broken[at] = True
                continue
            with _seeded(self._seed, self.epoch, index):
                return self._transform(image), label
        raise ConfigError(f"{self.name(index)}: no image of its split can be read; check the files")

    def _decode(self, at: int) -> tuple[Image.Image, int]:
        file, label = self._reader[self._positions[at]]
        with file:
            return Image.open(file).convert("RGB"), int(label)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self._reader.filename(self._positions[index], absolute=True))

    def unreadable(self) -> list[str]:
        """Return the paths of the images that could not be read so far."""
        return [self.name(int(at)) for at in self.broken.nonzero()]

    def check(self) -> None:
        """Tell once about every unreadable image met since the last call.

        Raises:
            ConfigError: If the run should stop, with all of them.
        """
        fresh = (self.broken & ~self._told).nonzero().flatten().tolist()
        if not fresh:
            return
        self._told[fresh] = True
        said = [f"{self.name(at)}: unreadable image ({self._reason(at)})" for at in fresh]
        if self._on_unreadable == "stop":
            raise ConfigError(
                "\n".join(said) + "\nReplace or delete it, or leave it out: on_unreadable=skip"
            )
        for text in said:
            warnings.warn(f"{text}; it is left out", stacklevel=2)

    def _reason(self, at: int) -> str:
        try:
            self._decode(at)
        except _UNREADABLE as error:
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return "readable now"


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Seed python's and torch's generators for the block and put them back afterwards."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])
    python, cpu = random.getstate(), torch.get_rng_state()
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for the GPU's too
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)


def check_all(splits: Sequence[Dataset[tuple[Tensor, int]]]) -> None:
    """Tell about new unreadable images in those of the data sets that read files."""
    for split in splits:
        if isinstance(split, Images):
            split.check()
