"""Stage 1: whether a probe shows the same images in the same order on every pass.

Nothing here knows what is read from them.
"""

import warnings

import torch
from torch import Tensor

from concept_guard.errors import ProbeError
from concept_guard.probe import Batches, Opening
from concept_guard.reading import check_counts


def steady_sample(batches: Batches) -> Tensor:
    """Return a few images of a probe, once its first ones were seen to be the same on every pass.

    Images that depend on random numbers are a warning: the guard draws the same ones on every
    pass, but not where it reads chosen images only. Another order on every pass is an error, as
    what is known of an image would be taken for that of another.

    Args:
        batches: The probe, as `probe_batches` returns it.

    Returns:
        `(n, ...)` up to two images.

    Raises:
        ProbeError: If passes differ in their labels, or there is no image.
    """
    first = batches.opening()
    if not first:
        check_counts([], 0)
    one, other = first, batches.opening(shift=1)
    if not _alike(one, other, 1):  # the order is random: it may yet be the same on every pass
        if not _alike(first, batches.opening(), 1):
            raise ProbeError(
                "probe: two passes yield other labels, expected the same images in the same order "
                "every time, as the guard knows them by their position; pass "
                "DataLoader(dataset, batch_size=64) over held-out data, without shuffling of its "
                "own"
            )
        one, other = _in_order(batches)
    if _alike(one, other, 1) and not _alike(one, other, 0):
        warnings.warn(
            "probe: its images depend on random numbers, expected held-out images without "
            "augmentation, which show the same each time; give its dataset the transform of "
            "evaluation, such as timm.data.create_transform(size, is_training=False)",
            stacklevel=3,
        )
    return first[0][0][:2].clone()  # a view would keep the whole batch


def _in_order(batches: Batches) -> tuple[Opening, Opening]:
    """Return the first images of a dataset for two seeds; nothing if they cannot be had."""
    ordered = batches.in_order()
    try:
        return ([], []) if ordered is None else (ordered.opening(), ordered.opening(shift=1))
    except ProbeError:  # pairs are made of them further outside
        return [], []


def _alike(left: Opening, right: Opening, part: int) -> bool:
    """Return whether two openings have the same images, part 0, or labels, part 1."""
    pairs = [(a[part], b[part]) for a, b in zip(left, right, strict=False)]
    return len(left) == len(right) and all(
        a.shape == b.shape and bool(torch.isclose(a, b, equal_nan=True).all()) for a, b in pairs
    )
