"""Stage 4b: what logits the images of a reading have when their rows are edited.

Nothing here knows what an edit is for.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from concept_guard.influence import Tail
from concept_guard.probe import Batches, images_at
from concept_guard.reading import Reading
from concept_guard.taps import Edit, Tap


def tail_of(tap: Tap, probe: Batches, reading: Reading, *, on_top: bool = True) -> Tail:
    """Return a function from an edit of the rows to the logits of the reading's images.

    Args:
        tap: Where rows are edited.
        probe: The images of the reading.
        reading: Rows of the probe images.
        on_top: Whether the edit comes on top of the tap's current one, or takes its place.

    Returns:
        Maps an edit of `(N, Q, C)` rows, and the `(n,)` positions of some of the images or None
        for all, to `(n, M)` logits. A linear map behind the tap is evaluated on the rows;
        otherwise the images are passed through the model again.
    """
    head, current = tap.classifier, tap.edit if on_top else None

    @cache
    def images_of(indices: tuple[int, ...]) -> Tensor:
        return images_at(probe, torch.tensor(indices))[0]

    def logits(edit: Edit | None, at: Tensor | None) -> Tensor:
        both = _Chain([e for e in (current, edit) if e is not None])
        if head is not None:
            with torch.no_grad():
                rows = reading.rows if at is None else reading.rows[at]
                rows = both(rows)[:, 0].to(head.weight.dtype)
                return functional.linear(rows, head.weight, head.bias).float()
        if at is not None:
            return tap.logits(images_of(tuple(reading.indices[at].tolist())), both)
        passes = [tap.logits(images, both) for images, _ in probe]
        return torch.cat(passes)[reading.indices.to(passes[0].device)]

    return logits


class _Chain:
    """One edit after another."""

    def __init__(self, edits: list[Edit]) -> None:
        self._edits = edits

    def __call__(self, rows: Tensor) -> Tensor:
        for edit in self._edits:
            rows = edit(rows)
        return rows
