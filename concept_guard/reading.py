"""Stage 1: what one pass over the probe yields: batches that can be counted, then a reading.

Nothing here knows where batches come from or where a model is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from concept_guard.errors import ProbeError
from concept_guard.ranks import ALONE, Ranks

_LISTED = 10  # offenders spelled out in one message


def checked_pair(batch: object, start: int) -> tuple[Tensor, Tensor]:
    """Return a batch as images `(B, ...)` and integer labels `(B,)`, or say what it is instead.

    Raises:
        ProbeError: If the batch, whose first image has probe index `start`, is no such pair.
    """
    where = f"probe batch that starts at image {start}"
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ProbeError(f"{where}: got a {_not_a_pair(batch)}")
    images, labels = batch
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            mend = "collate them with torch.utils.data.default_collate"
            if isinstance(value, Mapping):
                mend = "give the probe a loader of plain images, as a NaFlex model takes them too"
            raise ProbeError(
                f"{where}: {name} are a {type(value).__name__}, expected a tensor; {mend}"
            )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ProbeError(
            f"{where}: labels are {labels.dtype}, expected integer class indices; "
            + (
                "have the dataset return int(label)"
                if _whole(labels)
                else "soft labels (Mixup, CutMix, smoothing) cannot be counted, so pass a clean, "
                "unmixed loader; one-hot ones have their classes in labels.argmax(dim=1)"
            )
        )
    if images.ndim < 2 or labels.shape != images.shape[:1]:
        one_hot = "; of one-hot labels take labels.argmax(dim=1)" if labels.ndim == 2 else ""
        raise ProbeError(
            f"{where}: labels have shape {tuple(labels.shape)}, images {tuple(images.shape)}; "
            f"expected one class index per image, labels (B,) with images (B, ...){one_hot}"
        )
    return images, labels


def mean_colours(images: Tensor) -> Tensor | None:
    """Return the mean of each channel over an image.

    Args:
        images: `(B, C, H, W)` floating.

    Returns:
        `(B, C)` float32; None for anything else.
    """
    if images.ndim != 4 or not images.is_floating_point():
        return None
    return images.detach().flatten(2).mean(dim=2, dtype=torch.float32)


def _whole(labels: Tensor) -> bool:
    """Return whether labels are one whole number per image, of another type than integers."""
    return labels.ndim == 1 and not labels.is_complex() and not bool((labels.double() % 1).any())


def _not_a_pair(batch: object) -> str:
    """Return what a batch is instead of a pair, with the loader that would yield pairs."""
    expected = "expected a pair (images, labels)"
    if isinstance(batch, Mapping):
        keys = [str(key) for key in batch]
        pair = next((k for k in keys if "label" in k or "target" in k), "label")
        image = next((k for k in keys if k != pair), "image")
        return (
            f"{type(batch).__name__} with the keys {keys}, {expected}; give the loader collate_fn="
            f"lambda items: default_collate([(i[{image!r}], i[{pair!r}]) for i in items])"
        )
    if isinstance(batch, tuple | list):
        return (
            f"{type(batch).__name__} of length {len(batch)}, {expected}; give the loader "
            "collate_fn=lambda items: default_collate([(i[0], i[1]) for i in items])"
        )
    return f"{type(batch).__name__}, {expected}; wrap the loader so that it yields just these two"


def check_labels(batches: Iterable[Any], num_classes: int, ranks: Ranks = ALONE) -> Tensor:
    """Refuse a probe that cannot be counted, in one pass over its labels.

    One `ProbeError` names every fault: no image, labels outside `[0, M)`, classes without image;
    another one that processes have different probes.

    Args:
        batches: The probe, best as `probe_batches` returns it.
        num_classes: Number of logits of the model, M.
        ranks: The processes that are to have the same probe.

    Returns:
        `(N,)` the labels of all images.
    """
    labels: list[Tensor] = []
    for batch in batches:
        labels.append(checked_pair(batch, sum(map(len, labels)))[1].cpu())
    ranks.check_alike(labels)
    check_counts(labels, num_classes, every_class=True)
    return torch.cat(labels)


def check_counts(labels: list[Tensor], num_classes: int, *, every_class: bool = False) -> None:
    """Raise one error that names every fault in the labels of a pass, given batch by batch.

    Raises:
        ProbeError: If there is no label, one outside `[0, M)`, or a class that must have one.
    """
    found = torch.cat([batch.long() for batch in labels]) if labels else torch.empty(0)
    if not len(found):
        raise ProbeError("probe is empty: it yielded no image; pass a loader over held-out data")
    outside = ((found < 0) | (found >= num_classes)).nonzero().flatten().tolist()
    absent = sorted(set(range(num_classes)) - set(found.tolist())) if every_class else []
    faults = []
    if outside:
        offenders = [f"image {index} has {int(found[index])}" for index in outside[:_LISTED]]
        faults.append(
            f"labels outside [0, {num_classes}), of {len(outside)} of {len(found)} images: "
            f"{_listed(offenders, len(outside))}; the model has {num_classes} logits, so use the "
            "class mapping that it is trained with and drop ignore labels"
        )
    if absent:
        faults.append(
            f"no image of {len(absent)} of {num_classes} classes: "
            f"{_listed([str(label) for label in absent[:_LISTED]], len(absent))}; take a held-out "
            "split with every class, or build the model with fewer classes"
        )
    if faults:
        raise ProbeError("\n".join(f"probe: {fault}" for fault in faults))


def _listed(items: list[str], total: int) -> str:
    more = f" and {total - len(items)} more" if total > len(items) else ""
    return ", ".join(items) + more


@dataclass(frozen=True, eq=False)
class Reading:
    """What one isolated pass over the probe found, images in probe order.

    Attributes:
        rows: `(N, Q, C)` float32, before any edit; all Q positions of an image stay together.
        logits: `(N, M)` float32, of the model as it is, with its current edit.
        labels: `(N,)` int64 class indices.
        indices: `(N,)` int64 positions in the probe, ascending.
        seen: Images in the whole pass, of which N were kept.
        grid: Rows and columns that the Q positions form.
    """

    rows: Tensor
    logits: Tensor
    labels: Tensor
    indices: Tensor
    seen: int
    grid: tuple[int, int]

    def part(self, at: Tensor) -> "Reading":
        """Return what was found of some of the images.

        Args:
            at: `(n,)` their positions in this reading.

        Returns:
            The reading of these images.
        """
        kept = (self.rows[at], self.logits[at], self.labels[at], self.indices[at])
        return Reading(*kept, self.seen, self.grid)


Parts = tuple[list[tuple[int, Tensor]], list[list[Tensor]]]


class Reservoir:
    """Collects a `Reading`: a uniform sample, without replacement, of a stream of images.

    Every image draws a key; those with the smallest keys stay, in the order of the stream. Which
    ones stay depends on the seed and the stream, not on how it is cut into batches, or dealt out
    to several reservoirs that are joined afterwards.

    Args:
        max_rows: Rows to keep. At least one image is kept, and always all of its rows.
        max_images: Images to keep at most, if given.
        seed: Of the keys.
    """

    def __init__(self, max_rows: int, max_images: int | None, seed: int) -> None:
        self.seen = 0
        self._max_rows = max_rows
        self._size = max_rows if max_images is None else max_images
        self._limit = 1.0  # images with larger keys can no longer stay
        self._generator = torch.Generator().manual_seed(seed)
        self._passed = 0  # images of the stream that have drawn a key
        self._labels: list[tuple[int, Tensor]] = []  # with the position of the first
        self._chunks: list[list[Tensor]] = []  # keys, indices, labels, logits, rows

    def add(self, rows: Tensor, logits: Tensor, labels: Tensor, start: int | None = None) -> None:
        """Offer the next images.

        Args:
            rows: `(B, Q, C)` activations.
            logits: `(B, M)` logits.
            labels: `(B,)` classes.
            start: Position of the first of them in the stream, not before the last ones; None if
                they follow the last ones.

        Raises:
            ProbeError: If Q is not what it was for the first images.
        """
        start = self._passed if start is None else start
        expected = self._chunks[0][-1].shape[1] if self._chunks else rows.shape[1]
        if rows.shape[1] != expected:
            raise ProbeError(
                f"probe batch that starts at image {start}: {rows.shape[1]} positions per "
                f"image, expected {expected} as in the first batch; give all images one size"
            )
        self._size = max(1, min(self._size, self._max_rows // expected))
        torch.rand(start - self._passed, generator=self._generator, dtype=torch.float64)
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        indices = torch.arange(start, start + len(rows), device=rows.device)
        columns = [keys, indices, labels.to(rows.device, torch.int64), logits, rows]
        self._chunks.append(_picked(columns, keys <= self._limit))
        self._labels.append((start, labels.cpu()))
        self._passed = start + len(rows)
        self.seen += len(rows)
        if sum(len(chunk[0]) for chunk in self._chunks) > self._size + self._size // 4:
            self._prune()  # seldom, so that the copying stays linear in what enters

    def _prune(self) -> None:
        keys = torch.cat([chunk[0] for chunk in self._chunks])
        if len(keys) > self._size:
            self._limit = keys.kthvalue(self._size).values.item()
            self._chunks = [_picked(chunk, chunk[0] <= self._limit) for chunk in self._chunks]

    def parts(self) -> Parts:
        """Return what it takes to join this reservoir to others, on the CPU."""
        return self._labels, [[column.cpu() for column in chunk] for chunk in self._chunks]

    def join(self, parts: Sequence[Parts], device: torch.device) -> None:
        """Hold what several reservoirs of one stream hold together, this one among them.

        Args:
            parts: Of all of them.
            device: Where the images that stay are to be.

        Raises:
            ProbeError: If Q is not the same in all of them.
        """
        self._labels = sorted((batch for labels, _ in parts for batch in labels), key=itemgetter(0))
        chunks = [chunk for _, chunks in parts for chunk in chunks if len(chunk[0])]
        positions = sorted({chunk[-1].shape[1] for chunk in chunks})
        if len(positions) > 1:
            raise ProbeError(
                f"probe batches have {' or '.join(map(str, positions))} positions per image, "
                "expected as many in all of them; give all images one size"
            )
        chunks.sort(key=lambda chunk: int(chunk[1][0]))
        self._chunks = [[column.to(device) for column in chunk] for chunk in chunks]
        self.seen = sum(len(labels) for _, labels in self._labels)
        if positions:
            self._size = max(1, min(self._size, self._max_rows // positions[0]))

    def reading(self, num_classes: int, grid: tuple[int, int]) -> Reading:
        """Return the images that stay, if no label of any image is wrong."""
        check_counts([labels for _, labels in self._labels], num_classes)
        self._prune()
        _, indices, labels, logits, rows = map(torch.cat, zip(*self._chunks, strict=True))
        return Reading(rows, logits, labels, indices, self.seen, grid)


def _picked(columns: list[Tensor], stays: Tensor) -> list[Tensor]:
    if bool(stays.all()):
        return columns
    positions = stays.nonzero().flatten()
    return [column[positions.to(column.device)] for column in columns]
