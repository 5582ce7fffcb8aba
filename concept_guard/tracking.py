"""Stage 4a: keep a flagged pair true while the network moves.

Nothing here knows how the pair is used; the rows come from the guard.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concept_guard.directions import Scatter, WithinClassPair, within_class_pair


@dataclass(frozen=True, eq=False)
class Tracked:
    """A concept under correction, with the reference images that keep its pair true.

    Attributes:
        concept: Id of the concept.
        class_index: The class it pulls towards.
        pair: The pair as last estimated.
        carriers: `(N, Q)` bool, which rows of the probe's reading carry the concept. Whether an
            image carries a mark does not change while the network trains.
        separation: How clearly they stood apart when they were told.
        images: `(R,)` probe indices of its reference images, ascending.
        present: `(R, Q)` bool, which of their rows carry the concept.
    """

    concept: int
    class_index: int
    pair: WithinClassPair
    carriers: Tensor
    separation: float
    images: Tensor
    present: Tensor

    def read(self, rows: Tensor) -> Tensor:
        """Return which rows carry the concept, as its pair reads them.

        Args:
            rows: `(N, Q, C)` activations, before any correction.

        Returns:
            `(N, Q)` bool.
        """
        with torch.autocast(rows.device.type, enabled=False):
            return rows @ self.pair.filter.to(rows) > self.pair.threshold

    def moved_to(self, rows: Tensor, labels: Tensor) -> "Tracked":
        """Estimate the pair again from the current rows of the reference images.

        A pair fixed once is undone by training; one that is re-estimated holds. The shrinkage of
        its covariance stays that of the last round: to estimate it took a third of the time.

        Args:
            rows: `(R, Q, C)` current activations of the reference images.
            labels: `(R,)` their classes.

        Returns:
            The same concept with a new pair; with the old pair if the rows do not determine one.
        """
        repeated = labels.repeat_interleave(rows.shape[1])
        present = self.present.flatten().to(rows.device)
        scatter = Scatter(rows.flatten(0, 1), repeated)
        pair = within_class_pair(scatter, present, shrinkage=self.pair.shrinkage)
        return self if pair is None else replace(self, pair=pair)


def images_with(concepts: Sequence[Tracked], rows: Tensor) -> Tensor:
    """Return which images carry each of some concepts in any of their rows, as their pairs read.

    Args:
        concepts: K of them, at least one.
        rows: `(N, Q, C)` activations, before any correction.

    Returns:
        `(K, N)` bool.
    """
    filters = torch.stack([t.pair.filter for t in concepts]).to(rows)
    thresholds = filters.new_tensor([t.pair.threshold for t in concepts])
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ filters.T > thresholds).any(dim=1).T


def reference_images(
    carried: Tensor, labels: Tensor, class_index: int, limit: int, *, seed: int
) -> Tensor:
    """Choose the probe images on which a pair is re-estimated.

    The four groups (in the class or not, with the concept or without) get equal room; what a
    small group leaves over goes to the others.

    Args:
        carried: `(N,)` bool, which images carry the concept.
        labels: `(N,)` classes.
        class_index: The class the concept pulls towards.
        limit: Images to choose at most.
        seed: Chooses among the images of a group.

    Returns:
        Ascending positions, at most `limit`.
    """
    group = (labels == class_index).long().cpu() * 2 + carried.long().cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    members = [order[group[order] == g] for g in range(4)]
    chosen: list[Tensor] = []
    room = limit
    for done, images in enumerate(sorted(members, key=len)):
        share = room // (4 - done)
        chosen.append(images[:share])
        room -= len(chosen[-1])
    return torch.cat(chosen).sort().values
