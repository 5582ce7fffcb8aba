"""Diagnosis: a model and the held-out images it is examined on.

Nothing here knows what is looked for, or where model and images come from.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the held-out images it is examined on.

    Attributes:
        model: Image classifier; it is left as it is.
        images: Batches of images and labels, the same on every pass; classes may be missing.
        name: Of the model, as timm calls it.
        weights: Where its weights come from, in words.
        classes: Names in the order of the logits.
        source: Where the images come from, in words.
        file: Position of an image to its name.
        broken: `(N,)` bool that tells, once the images have been read, which could not be.
    """

    model: nn.Module
    images: Iterable[Any]
    name: str
    weights: str
    classes: tuple[str, ...]
    source: str
    file: Callable[[int], str]
    broken: Tensor | None = None
