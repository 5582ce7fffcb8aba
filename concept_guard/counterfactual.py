"""Stage 4a: what a concept does to the values of images, and images with it and without it.

Nothing here knows which concepts are corrected, or when images are edited.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

COVERED = 1 / 3  # of a value's spread: what is left below it is no trace of what was there
DENSE = 0.5  # share of the values from which all are worked with, which saves picking them out


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """An affine map of image values that puts a concept into images, its inverse, and a reading.

    What was covered by the concept is not to be had back: another image's values stand in there.

    Attributes:
        at: `(n,)` positions of the values it works with, in an image laid out flat; all if None.
        centre: `(n,)` mean without the concept.
        gains: `(3, n)` factors that leave a value as it is, put the concept in, take it out.
        shifts: `(3, n)` what is added then.
        covered: `(n,)` bool, where the concept covers what was there; None for nowhere.
        squares: `(n,)` weights of the squared values in the reading.
        linear: `(n,)` weights of the values.
        threshold: Above it an image is read as one with the concept.
        changed: How many values the concept changes.
        lost: Share of the variance of images within classes that lies where it covers them.
    """

    at: Tensor | None
    centre: Tensor
    gains: Tensor
    shifts: Tensor
    covered: Tensor | None
    squares: Tensor
    linear: Tensor
    threshold: float
    changed: int
    lost: float

    def scores(self, values: Tensor) -> Tensor:
        """Return how much more likely images are with the concept than without.

        Args:
            values: `(B, n)` picked from images.

        Returns:
            `(B,)` log likelihood ratios per value, up to a constant.
        """
        return values.square() @ self.squares + values @ self.linear

    def picked(self, images: Tensor) -> Tensor:
        """Return the values it works with.

        Args:
            images: `(B, ...)` of the shape it was estimated from.

        Returns:
            `(B, n)` float32.
        """
        values = images.flatten(1).float()
        return values if self.at is None else values.index_select(1, self.at)

    def carried(self, images: Tensor) -> Tensor:
        """Return which images have the concept, by their values.

        Args:
            images: `(B, ...)` of the shape it was estimated from.

        Returns:
            `(B,)` bool.
        """
        return self.scores(self.picked(images)) > self.threshold

    def edited(self, images: Tensor, act: Tensor, wanted: Tensor, donors: Tensor) -> Tensor:
        """Return images with the concept or without it, as is wanted.

        Args:
            images: `(B, ...)` of the shape it was estimated from.
            act: `(B,)` bool, which images to edit at all.
            wanted: `(B,)` bool, which of them are to have the concept.
            donors: `(B,)` positions of images whose values stand in for what it covers.

        Returns:
            `(B, ...)` in the dtype of the images; what has the concept and is to have it, or lacks
            it and is to lack it, keeps its own values, as float32 has them, where nothing is
            covered.
        """
        values = self.picked(images)
        has = self.scores(values) > self.threshold
        kind = torch.where(act, (wanted & ~has) + 2 * (has & ~wanted).long(), 0)
        gains, shifts = (of.index_select(0, kind) for of in (self.gains, self.shifts))
        new = shifts.addcmul_(values, gains)
        if self.covered is not None:
            given = values.index_select(0, donors)
            other = torch.where(has[donors, None], self.centre, given)
            new = torch.where((act & ~wanted)[:, None] & self.covered, other, new)
        new = new.to(images.dtype)
        if self.at is not None:
            new = images.flatten(1).index_copy(1, self.at, new)
        return new.view_as(images)

    def to(self, device: torch.device) -> "Counterfactual":
        """Return the same on another device.

        Args:
            device: Where images are edited.

        Returns:
            A new object.
        """
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


def mapped(centre: Tensor, level: Tensor, ratio: Tensor, variance: Tensor) -> Counterfactual | None:
    """Return the map that changes level and spread of values.

    Args:
        centre: `(n,)` means without the concept.
        level: `(n,)` what the concept adds to them.
        ratio: `(n,)` the factor of the spread around them.
        variance: `(n,)` without the concept.

    Returns:
        Its threshold is 0; None if it changes nothing.
    """
    changed = (level != 0) | (ratio != 1)
    number = int(changed.sum())
    if not number:
        return None
    covered = ratio < COVERED
    lost = float(variance[covered].sum() / variance.sum())
    into = torch.where(covered, ratio, ratio.clamp(max=1 / COVERED))
    back = 1 / into.clamp_min(COVERED)
    there = centre + level
    gains = torch.stack([torch.ones_like(into), into, back])
    shifts = torch.stack([torch.zeros_like(into), there - into * centre, centre - back * there])
    narrowed = ratio.square() * variance  # with the concept
    squares = 0.5 * (1 / variance - 1 / narrowed) / number  # 0 where nothing changes
    linear = (there / narrowed - centre / variance) / number
    at = changed.nonzero()[:, 0] if number < DENSE * len(changed) else None
    picked = slice(None) if at is None else at
    return Counterfactual(
        at=at,
        centre=centre[picked].float(),
        gains=gains[:, picked].float(),
        shifts=shifts[:, picked].float(),
        covered=covered[picked] if bool(covered.any()) else None,
        squares=squares[picked].float(),
        linear=linear[picked].float(),
        threshold=0.0,
        changed=number,
        lost=lost,
    )
