"""Whether a probe is held out, where a library shows what is trained on as well."""

import warnings
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler


def warn_if_trained_on(probe: Any, loader: Any) -> None:
    """Warn if a probe certainly has the images that a loader trains on.

    Args:
        probe: Batches, best a loader.
        loader: Of the training images.
    """
    ours, theirs = (getattr(batches, "dataset", None) for batches in (probe, loader))
    if ours is None or theirs is None:
        return
    files = _files(ours)
    is_whole = all(
        isinstance(getattr(batches, "sampler", None), RandomSampler | SequentialSampler)
        for batches in (probe, loader)
    )
    if (ours is theirs and is_whole) or (files is not None and files == _files(theirs)):
        warnings.warn(
            f"probe: its {type(ours).__name__} holds the images that are trained on, expected "
            "held-out ones, as a network makes few errors on images that it has learnt; split "
            "some off: train, probe = torch.utils.data.random_split(dataset, [0.9, 0.1])",
            stacklevel=3,
        )


def _files(dataset: Any) -> Any:
    """Return the files of a data set of timm or torchvision with their classes, if it has any."""
    return getattr(getattr(dataset, "reader", dataset), "samples", None)
