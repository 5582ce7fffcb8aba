"""Stage 4b: whether a correction helps the images that it is meant for.

Nothing here knows what the correction is; it is given which predictions are right.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_GROUP = 5  # images; fewer say nothing
CLEARLY = 2.0  # standard errors by which a correction must be at fault


@dataclass(frozen=True)
class Benefit:
    """How the accuracy changes in the groups (class, concept present or not), each counting alike.

    Attributes:
        gain: Mean change over the groups, between -1 and 1; 0 if no group is large enough.
        error: Its standard error.
        groups: How many groups there are.
    """

    gain: float
    error: float
    groups: int

    @property
    def harms(self) -> bool:
        """Whether the groups are clearly worse off."""
        return self.gain < -CLEARLY * self.error

    def __str__(self) -> str:
        return f"{self.gain:+.3f} (standard error {self.error:.3f}) over {self.groups} groups"


def benefit(before: Tensor, after: Tensor, labels: Tensor, carried: Tensor) -> Benefit:
    """Compare right predictions, image by image, without and with a correction.

    A group that a shortcut misleads is small, the rest is large: over all images together, what
    is done for the first would not be seen.

    Args:
        before: `(N,)` bool, which images are right without the correction.
        after: `(N,)` bool, which are with it.
        labels: `(N,)` classes.
        carried: `(N,)` bool, which images carry the concept, or any of several.

    Returns:
        The change; groups of fewer than five images do not count.
    """
    change = after.double() - before.double()
    group = groups(labels, carried)
    gains, variances = [], []
    for g in group.unique():
        of_group = change[group == g]
        if len(of_group) >= SMALLEST_GROUP:
            gains.append(of_group.mean())
            variances.append(of_group.var() / len(of_group))
    if not gains:
        return Benefit(0.0, 0.0, 0)
    error = float(torch.stack(variances).sum()) ** 0.5 / len(gains)
    return Benefit(float(torch.stack(gains).mean()), error, len(gains))


def groups(labels: Tensor, carried: Tensor) -> Tensor:
    """Return the group of each image as one number.

    Args:
        labels: `(N,)` classes.
        carried: `(N,)` bool.

    Returns:
        `(N,)` whole numbers.
    """
    return labels * 2 + carried.to(labels)


def half(labels: Tensor, carried: Tensor, seed: int) -> Tensor:
    """Choose every other image of each group, so that two halves have the same groups.

    Args:
        labels: `(N,)` classes.
        carried: `(N,)` bool.
        seed: Of the order within groups.

    Returns:
        `(N,)` bool on the CPU.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    ranked = groups(labels, carried).cpu()[order].sort(stable=True).indices
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[order[ranked[::2]]] = True
    return chosen
