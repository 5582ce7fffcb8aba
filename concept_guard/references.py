"""Stage 4a: the probe images on which tracked pairs are estimated again between rounds.

Nothing here knows how the pairs are used, or when they are due.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from concept_guard.config import GuardConfig
from concept_guard.probe import Batches, images_at
from concept_guard.reading import Reading
from concept_guard.taps import Tap
from concept_guard.tracking import Tracked, reference_images


class References:
    """Chooses reference images, keeps them while they are needed, and reads them anew.

    Args:
        tap: Where rows are read.
        probe: The probe, from which the images come.
        config: How many images, and the seed that chooses them.

    Attributes:
        held: Indices, images and labels of all reference images; None until they are needed.
    """

    def __init__(self, tap: Tap, probe: Batches, config: GuardConfig) -> None:
        self._tap, self._probe, self._config = tap, probe, config
        self.held: tuple[Tensor, Tensor, Tensor] | None = None

    def drawn(self, concepts: Sequence[Tracked], reading: Reading) -> tuple[Tracked, ...]:
        """Give every concept its share of the reference images, chosen anew from its carriers.

        Args:
            concepts: With their carriers among the images of the probe.
            reading: Of the probe.

        Returns:
            The same concepts.
        """
        drawn = []
        room = self._config.reference_images // max(1, len(concepts))
        for concept in concepts:
            carried = concept.carriers.any(dim=1).to(reading.labels.device)
            k, seed = concept.class_index, self._config.seed
            at = reference_images(carried, reading.labels, k, room, seed=seed)
            images, present = reading.indices.cpu()[at], concept.carriers.cpu()[at]
            drawn.append(replace(concept, images=images, present=present))
        return tuple(drawn)

    def estimated(self, concepts: Sequence[Tracked]) -> tuple[tuple[Tracked, ...], float]:
        """Estimate the pairs of concepts again from their reference images as they are now.

        Args:
            concepts: With reference images.

        Returns:
            The concepts with new pairs; and the share of the reference rows that the pairs of
            before read otherwise than the new ones, of the concept where it is largest.

        Raises:
            ValueError: If activations are not finite.
        """
        if self.held is None:  # read from the probe once
            wanted = torch.cat([t.images for t in concepts]).unique()
            self.held = (wanted, *images_at(self._probe, wanted))
        indices, images, labels = self.held
        reading = self._tap.read(iter(_cut(images, labels)), max_rows=2**62, seed=0)
        if not bool(torch.isfinite(reading.rows).all()):
            raise ValueError(
                f"activations at tap {self._config.tap!r} hold NaN or infinite values on the "
                "reference images, expected finite ones; lower the learning rate"
            )
        moved, misread = [], 0.0
        for tracked in concepts:
            at = torch.searchsorted(indices, tracked.images).to(reading.rows.device)
            rows = reading.rows[at]
            moved.append(tracked.moved_to(rows, reading.labels[at]))
            otherwise = tracked.read(rows) != moved[-1].read(rows)
            misread = max(misread, float(otherwise.float().mean()))
        return tuple(moved), misread

    def forget(self) -> None:
        """Let go of the images; they are read again when they are needed."""
        self.held = None


def _cut(images: Tensor, labels: Tensor, size: int = 64) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(images.split(size), labels.split(size), strict=True)
