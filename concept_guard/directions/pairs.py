"""Stage 2, find: the result of the stage, encoding-decoding direction pairs.

Nothing here knows how the pairs were found or what they are used for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Concept:
    """One direction pair of a round, with the identity it keeps across rounds.

    Attributes:
        id: Stable across rounds.
        filter: `(C,)` decoding direction.
        signal: `(C,)` encoding direction.
        bias: Threshold in units of `x . filter`; the concept is present beyond it.
        presence_rate: Share of the probe images that carry the concept.
        top_examples: Probe indices of the images that carry most of it.
    """

    id: int
    filter: Tensor
    signal: Tensor
    bias: float
    presence_rate: float
    top_examples: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DirectionPairs:
    """Filters, biases and signal vectors of K concepts at one tap.

    Attributes:
        filters: `(K, C)` decoding directions: how a concept is read out of a row.
        signals: `(K, C)` encoding directions: how the network writes it into a row.
        biases: `(K,)` thresholds in units of `x . w`.
        notes: What a fit has to say, such as why there are fewer pairs than were asked for.
    """

    filters: Tensor
    signals: Tensor
    biases: Tensor
    notes: tuple[str, ...] = ()

    def factors(self, rows: Tensor) -> Tensor:
        """Return how much of each concept is in each row.

        Args:
            rows: `(..., C)` activations.

        Returns:
            `(..., K)` latent factors `x . w - b`; positive where the concept is present.
        """
        return rows.to(self.filters.dtype) @ self.filters.T - self.biases

    def present(self, rows: Tensor) -> Tensor:
        """Return which concepts are present in each row.

        Args:
            rows: `(..., C)` activations.

        Returns:
            `(..., K)` bool, true where the factor is positive.
        """
        return self.factors(rows) > 0

    def select(self, concepts: list[int]) -> "DirectionPairs":
        """Return the pairs of the given concepts, in the given order.

        Args:
            concepts: Positions between 0 and K - 1.

        Returns:
            The chosen pairs.
        """
        keep = torch.as_tensor(concepts, dtype=torch.long, device=self.filters.device)
        return DirectionPairs(self.filters[keep], self.signals[keep], self.biases[keep])

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the pairs as a safetensors file.

        Args:
            path: File to write.
            metadata: Texts kept in the file's header.
        """
        tensors = {"filters": self.filters, "signals": self.signals, "biases": self.biases}
        plain = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}
        save_file(plain, str(path), metadata=None if metadata is None else dict(metadata))

    @classmethod
    def load(cls, path: str | Path) -> "DirectionPairs":
        """Read pairs that `save` wrote.

        Args:
            path: A safetensors file.

        Returns:
            The pairs, on the CPU.
        """
        tensors = load_file(str(path))
        return cls(tensors["filters"], tensors["signals"], tensors["biases"])
