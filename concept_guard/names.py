"""Stage 1: what the files of the probe images are called, if its data set says so.

Nothing here reads an image.
"""

import os
from collections.abc import Callable
from typing import Any

from torch.utils.data import Subset

from concept_guard.probe import Batches


def file_names(probe: Batches, images: int) -> tuple[str, ...] | None:
    """Return the names of the files of the probe images, in its order.

    Data sets of timm tell them by `filename`, folders of torchvision by `samples`.

    Args:
        probe: The probe.
        images: How many there are; another number of names belongs to something else.

    Returns:
        Paths below the folder that all have in common; None if they are not known.
    """
    try:
        dataset, places = probe.places or (None, [])
        name = _naming(dataset)
        if name is None or len(places) != images:
            return None
        paths = [str(name(place)) for place in places]
        root = os.path.commonpath([os.path.dirname(path) for path in paths])
        return tuple(os.path.relpath(path, root) if root else path for path in paths)
    except Exception:  # whatever a data set does when it is asked, it is trained on all the same
        return None


def _naming(dataset: Any) -> Callable[[int], object] | None:
    """Return position to name, through subsets."""
    if isinstance(dataset, Subset):
        within, at = _naming(dataset.dataset), dataset.indices
        return None if within is None else lambda index: within(at[index])
    if callable(getattr(dataset, "filename", None)):
        return lambda index: dataset.filename(index)
    samples = getattr(dataset, "samples", None)
    return None if samples is None else lambda index: samples[index][0]
