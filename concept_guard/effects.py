"""Stage 4a: on which probe images is seen what a concept does to images, and whether that serves.

Nothing here knows when images are edited.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concept_guard.contrasts import Sums
from concept_guard.counterfactual import Counterfactual
from concept_guard.probe import Batches
from concept_guard.reading import Reading
from concept_guard.thresholds import balanced_accuracy, threshold_of

CLASSES, EACH = 8, 128  # in which images are compared, and of each group in them, at most
LEAST = 0.9  # balanced accuracy with which images that were left out are to be read
MOST_LOST = 0.1  # of the variance of images: what is covered must leave the class to be seen
STALE = 0.02  # share of the images from which carriers are other ones
LEFT = "training images are left as they are: "


@dataclass(frozen=True, eq=False)
class Sample:
    """Probe images on which is seen what a concept does to images.

    Attributes:
        images: `(n,)` probe indices, ascending.
        classes: `(n,)` their classes, counted from 0 without gaps.
        carried: `(n,)` bool, which carry the concept.
    """

    images: Tensor
    classes: Tensor
    carried: Tensor

    @property
    def halves(self) -> Tensor:
        """`(n,)` 0 or 1, by turns among the images of a class with the concept, and without."""
        group = self.classes * 2 + self.carried.long()
        halves = torch.zeros_like(group)
        for g in group.unique():
            at = (group == g).nonzero()[:, 0]
            halves[at] = torch.arange(len(at)) % 2
        return halves

    def is_stale(self, indices: Tensor, carried: Tensor) -> bool:
        """Return whether other images carry the concept by now.

        Args:
            indices: `(N,)` probe indices of a reading.
            carried: `(N,)` bool, which of them carry it.

        Returns:
            True if more than 2 % of these images are not there, or carry it no longer as they did;
            and if there are none, so that they are looked for again.
        """
        now = dict(zip(indices.tolist(), carried.tolist(), strict=True))
        then = zip(self.images.tolist(), self.carried.tolist(), strict=True)
        other = [i for i, present in then if now.get(i) != present]
        return not len(self.images) or len(other) > STALE * len(self.images)

    def is_same(self, other: "Sample") -> bool:
        """Return whether images, classes and carriers are those of another sample."""
        others = other.as_dict()
        return all(bool(torch.equal(own, others[k])) for k, own in self.as_dict().items())

    def as_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {"images": self.images, "classes": self.classes, "carried": self.carried}


@dataclass(frozen=True, eq=False)
class Effect:
    """What a concept does to images, or why that is of no use.

    Attributes:
        sample: The images on which it was seen.
        said: What it comes to, as a clause for people.
        map: How to edit images; None if they are to be left alone.
        shape: Of an image.
    """

    sample: Sample
    said: str
    map: Counterfactual | None = None
    shape: torch.Size = torch.Size()  # noqa: RUF009 - immutable

    def to(self, device: torch.device) -> "Effect":
        """Return the same with its map on another device."""
        return self if self.map is None else replace(self, map=self.map.to(device))


def sampled(reading: Reading, carried: Tensor, seed: int) -> Sample:
    """Choose probe images on which to see what a concept does to images.

    They are of the eight classes that say most about it, at most 128 of each with it and without.

    Args:
        reading: Of the probe.
        carried: `(N,)` bool, which of its images carry the concept.
        seed: Chooses among the images of a group.

    Returns:
        The images; none if no class has images of both kinds.
    """
    labels, indices = reading.labels.cpu(), reading.indices.cpu()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    told: list[tuple[float, Tensor]] = []
    for k in labels.unique():
        own = order[labels[order] == k]
        without, with_it = (own[carried[own] == present][:EACH] for present in (False, True))
        if len(without) and len(with_it):
            weight = len(without) * len(with_it) / (len(without) + len(with_it))
            told.append((weight, torch.cat([without, with_it])))
    told = sorted(told, key=lambda group: -group[0])[:CLASSES]
    none = order[:0]
    at = torch.cat([none, *(images for _, images in told)])
    classes = torch.cat([none, *(torch.full_like(g[1], n) for n, g in enumerate(told))])
    ascending = indices[at].argsort()
    at = at[ascending]
    return Sample(indices[at], classes[ascending], carried[at])


def effect_of(probe: Batches, sample: Sample) -> Effect:
    """Estimate what a concept does to images, and whether that serves to edit them.

    It does if images of one half of the sample are read by what the other half shows, and if
    little of an image is covered. The images are loaded twice.

    Args:
        probe: The probe.
        sample: Images of it, which carry the concept or not.

    Returns:
        The effect; its map is None where it does not serve, and it says why.
    """
    nothing = Effect(sample, f"{LEFT}none of their values certainly changes with it")
    if not len(sample.images):
        return nothing
    sums, shape, halves = None, torch.Size(), sample.halves
    for at, images in _loaded(probe, sample):
        shape = images.shape[1:] if sums is None else shape
        if images.shape[1:] != shape or not images.is_floating_point():
            return replace(nothing, said=f"{LEFT}the probe's are of several shapes, or no floats")
        sums = Sums(int(sample.classes.max()) + 1, shape) if sums is None else sums
        sums.add(images, halves[at], sample.classes[at], sample.carried[at])
    parts = () if sums is None else (sums.map(0), sums.map(1), sums.map(0, 1))
    maps = [found for found in parts if found is not None]
    if len(maps) < 3:
        return nothing
    told = [
        torch.stack([m.scores(m.picked(x)) for m in maps], 1) for _, x in _loaded(probe, sample)
    ]
    scores = torch.cat(told)
    whole = replace(maps[2], threshold=threshold_of(scores[:, 2], sample.carried))
    rate = _held_out(scores, halves, sample.carried)
    said = f"{whole.changed:,} of {shape.numel():,} values of images change with it"
    if whole.lost > MOST_LOST:
        lost = f"which covers {whole.lost:.0%} of what varies in them, more than {MOST_LOST:.0%}"
        return replace(nothing, said=f"{LEFT}{said}, {lost}")
    if rate < LEAST:
        read = f"and tell it with a balanced accuracy of {rate:.2f} only, expected {LEAST}"
        return replace(nothing, said=f"{LEFT}{said}, {read}")
    said = f"training images get it and lose it at random; {said} (balanced accuracy {rate:.2f})"
    return Effect(sample, said, whole, shape)


def _loaded(probe: Batches, sample: Sample) -> Iterator[tuple[slice, Tensor]]:
    """Yield the images of a sample on the CPU, and which of its places they have."""
    start = 0
    for images, _ in probe.only(sample.images.tolist()):
        yield slice(start, start + len(images)), images.cpu()
        start += len(images)


def _held_out(scores: Tensor, halves: Tensor, carried: Tensor) -> float:
    """Return how well images are read by what the other half shows.

    Args:
        scores: `(n, 2)` or wider, by the maps of half 0 and half 1.
        halves: `(n,)` which half an image is in.
        carried: `(n,)` bool, which carry the concept.

    Returns:
        The balanced accuracy, mean of both halves; 0 where a half lacks one kind.
    """
    rates = []
    for half in (0, 1):
        own, other = halves == half, halves != half
        if any(carried[part].all() or not carried[part].any() for part in (own, other)):
            return 0.0
        threshold = threshold_of(scores[own, half], carried[own])
        rates.append(balanced_accuracy(scores[other, half] > threshold, carried[other]))
    return sum(rates) / 2
