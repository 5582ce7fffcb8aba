"""Stage 4b: whether a correction helps the images that it is meant for, and when it is withdrawn.

Nothing here knows what the correction is; it is given which predictions are right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_GROUP = 5  # images; fewer say nothing
CLEARLY = 2.0  # standard errors by which a correction does harm
PATIENCE = 2  # rounds in a row in which it does not help


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
        return f"{self.gain:+.3f} (standard error {self.error:.3f}, {self.groups} groups)"


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


class Trials:
    """Corrections on trial: what was right before them, and for how long they have not helped.

    Attributes:
        right: Concept id to `(N,)` bool, which probe images were right when its correction began.
        idle: Concept id to the number of rounds in a row in which its groups were worse off.
    """

    def __init__(self) -> None:
        self.right: dict[int, Tensor] = {}
        self.idle: dict[int, int] = {}

    def begin(self, concept: int, right: Tensor) -> None:
        """Put a correction on trial.

        Args:
            concept: Id of the concept.
            right: `(N,)` bool, which probe images are right without it.
        """
        self.right[concept], self.idle[concept] = right.cpu(), 0

    def end(self, concept: int) -> None:
        """Forget a correction, or exempt it because a person wants it.

        Args:
            concept: Id of the concept; nothing happens if it is not on trial.
        """
        self.right.pop(concept, None)
        self.idle.pop(concept, None)

    def verdicts(
        self, carried: Mapping[int, Tensor], without: Tensor | None, now: Tensor, labels: Tensor
    ) -> dict[int, str]:
        """Return which corrections do not help, after another round.

        Args:
            carried: Concept id to `(N,)` bool, which images carry it.
            without: `(N,)` bool, which images are right without the corrections; None where only
                training could show that, and what was right in the beginning is taken.
            now: `(N,)` bool, which are right with them.
            labels: `(N,)` classes.

        Returns:
            Concept id to the reason why its correction is to be withdrawn.
        """
        reasons = {}
        for concept, presence in carried.items():
            before = self.right.get(concept) if without is None else without
            if concept not in self.right or before is None or len(before) != len(now):
                continue
            found = benefit(before.to(now.device), now, labels, presence.to(now.device))
            self.idle[concept] = self.idle[concept] + 1 if found.gain < 0 else 0
            if found.harms or self.idle[concept] >= PATIENCE:
                reasons[concept] = (
                    f"concept {concept} is not corrected any more: the accuracy of its groups "
                    f"changes by {found}"
                )
        return reasons

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain data."""
        return {"right": {i: r.clone() for i, r in self.right.items()}, "idle": dict(self.idle)}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            saved: Result of `state_dict`.
        """
        self.right = {i: r.clone() for i, r in saved["right"].items()}
        self.idle = dict(saved["idle"])
