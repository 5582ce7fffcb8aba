"""Stage 4c: draw training samples by class and presence of concepts, in place of weighing losses.

Nothing here knows why concepts are corrected.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils.data import RandomSampler, Sampler

from concept_guard.correction import LARGEST_WEIGHT, grouped, weight_table
from concept_guard.corrector import Corrector
from concept_guard.errors import StateError

UNKNOWN = -1  # class or presence of a sample that no batch has shown


class Samples:
    """What each training sample carries, as far as passing batches have shown, and its weight.

    Args:
        corrector: Knows which concepts are rebalanced.
        seed: Of the sampler's generator, if it gets no other.

    Attributes:
        size: Training samples; None until a sampler is made.
        ranks: The processes that train.
    """

    def __init__(self, corrector: Corrector, seed: int) -> None:
        self._corrector, self.ranks = corrector, corrector.ranks
        self.size: int | None = None
        self._labels = torch.empty(0, dtype=torch.long)
        self._carried: dict[int, Tensor] = {}  # by concept, int8
        self._own = Generator().manual_seed(seed)

    def sampler(self, size: int, generator: Generator | None) -> "GroupSampler":
        """Return a sampler of so many training samples.

        Args:
            size: Of the training set.
            generator: Draws; None for an own one.

        Returns:
            The sampler.

        Raises:
            ValueError: If the size is no positive number, or another than before.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"sampler got {size!r}, expected the length of the training set")
        if self.size is None:
            self.size = size
            self._labels = torch.full((size,), UNKNOWN)
            self._corrector.augmentation.remembers = True
        elif self.size != size:
            raise ValueError(
                f"sampler got a length of {size}, expected {self.size} as before: a guard knows "
                "one training set; build a new guard for another"
            )
        return GroupSampler(self, self._own if generator is None else generator)

    def checked(self, indices: Tensor | None, targets: Tensor | None) -> Tensor | None:
        """Return the indices of a batch, if they can be.

        Args:
            indices: `(B,)` positions in the training set, or None.
            targets: `(B,)` classes, or None.

        Returns:
            The indices on the CPU.

        Raises:
            ValueError: If there is no sampler, or they are no such positions.
        """
        if indices is None:
            return None
        if self.size is None:
            raise ValueError(
                "guard.loss got indices, but there is no sampler to learn from them; make one with "
                "guard.sampler(len(dataset)) before the loop, or leave them out"
            )
        at = torch.as_tensor(indices).cpu()
        if at.is_floating_point() or at.dtype == torch.bool or at.ndim != 1:
            raise ValueError(
                f"indices are {at.dtype} of shape {tuple(at.shape)}, expected one whole number per "
                "sample: its position in the training set"
            )
        if targets is not None and len(at) != len(targets):
            raise ValueError(f"{len(at)} indices for {len(targets)} targets, expected one each")
        wrong = sorted({i for i in at.tolist() if not 0 <= i < self.size})
        if wrong:
            raise ValueError(
                f"indices {wrong[:10]} are outside [0, {self.size}), the length that guard.sampler "
                "got; let the data set return the index that it is asked for"
            )
        return at.long()

    def see(self, indices: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Remember what the samples of a batch carry, and those of the other processes' batches.

        Args:
            indices: `(B,)` positions in the training set.
            labels: `(B,)` their classes.
            rows: `(B, Q, C)` their activations, before any correction.
        """
        unknown = torch.full_like(self._labels, UNKNOWN, dtype=torch.int8)
        ids = [concept.concept for concept in self._corrector.tracked]
        self._carried = {i: self._carried.get(i, unknown.clone()) for i in ids}
        carried = [present.to("cpu", torch.int8) for present in self._corrector.carried(rows)]
        for at, y, present in self.ranks.gathered((indices, labels.cpu(), carried)):
            self._labels[at] = y
            for i, there in zip(ids, present, strict=True):
                self._carried[i][at] = there

    @property
    def weights(self) -> Tensor | None:
        """`(size,)` weights of the samples, None where all are alike.

        Within a class the rarer group weighs more, up to five times; samples that no batch has
        shown weigh 1, which is the mean of the others. Several concepts multiply.
        """
        corrected = self._corrector.tracked if self._corrector.rebalancing else ()
        known = [self._carried[t.concept] for t in corrected if t.concept in self._carried]
        if not known:
            return None
        weights = torch.ones(len(self._labels), dtype=torch.float64)
        for carried in known:
            seen = (carried != UNKNOWN).nonzero().flatten()
            labels, present = self._labels[seen], carried[seen] == 1
            table = weight_table(grouped(labels, present, int(labels.max()) + 1), LARGEST_WEIGHT)
            weights[seen] *= table[labels, present.long()]
        return weights.clamp(1 / LARGEST_WEIGHT, LARGEST_WEIGHT)

    def state_dict(self) -> dict[str, Any]:
        """Return what is known, and where the own generator stands.

        Returns:
            Tensors and plain data.
        """
        return {
            "size": self.size,
            "labels": self._labels.clone(),
            "carried": {i: carried.clone() for i, carried in self._carried.items()},
            "generator": self._own.get_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state, whether a sampler was made before or is made after.

        Args:
            saved: Result of `state_dict`.

        Raises:
            StateError: If it is of a training set of another size.
        """
        if self.size is not None and saved["size"] not in {None, self.size}:
            raise StateError(
                f"guard state is of a sampler over {saved['size']} training samples, there are "
                f"{self.size} here; resume on the same training set"
            )
        size = self.size if saved["size"] is None else saved["size"]
        self.size = size
        fresh = torch.full((size or 0,), UNKNOWN)
        self._labels = fresh if saved["size"] is None else saved["labels"].clone()
        self._carried = {i: carried.clone() for i, carried in saved["carried"].items()}
        self._own.set_state(saved["generator"])


class GroupSampler(Sampler[int]):
    """Draws the indices of an epoch: plainly shuffled, or with replacement by what samples carry.

    While no concept is rebalanced it is `torch.utils.data.RandomSampler`, in the same order for the
    same generator. What counts is what is known when an epoch begins. Of several processes, whose
    generators have to agree, each takes its part of the epoch, all of the same length.

    Args:
        samples: Knows what training samples carry.
        generator: Draws; the global random state is never touched.
    """

    def __init__(self, samples: Samples, generator: Generator) -> None:
        self._samples, self._generator = samples, generator

    def __len__(self) -> int:
        return -(-(self._samples.size or 0) // self._samples.ranks.size)

    def __iter__(self) -> Iterator[int]:
        weights, size, ranks = self._samples.weights, self._samples.size or 0, self._samples.ranks
        if weights is None:
            drawn = [*RandomSampler(range(size), generator=self._generator)]
        else:
            drawn = torch.multinomial(weights, size, True, generator=self._generator).tolist()
        drawn += drawn[: len(self) * ranks.size - size]
        yield from drawn[ranks.rank :: ranks.size]
