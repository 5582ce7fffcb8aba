"""Stage 4b: whether a correction helps the images that it is meant for, and when it is withdrawn.

Nothing here knows what the correction is; it is given which predictions are right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_GROUP = 5  # images; fewer say nothing
PATIENCE = 4  # rounds in a row in which a correction does not help


@dataclass(frozen=True)
class Benefit:
    """How the accuracy changes in groups of images, each group counting alike.

    Attributes:
        gain: Mean change over the groups, between -1 and 1; 0 if no group is large enough.
        error: Its standard error.
        groups: How many groups there are.
    """

    gain: float
    error: float
    groups: int

    def __str__(self) -> str:
        return f"{self.gain:+.3f} (standard error {self.error:.3f}, {self.groups} groups)"


def benefit(before: Tensor, after: Tensor, own: Tensor, carried: Tensor) -> Benefit:
    """Compare right predictions, image by image, without and with a correction.

    The groups are the images of the class that a concept pulls towards and those of the other
    classes, with the concept and without. Those of other classes with it, which it misleads, are
    few: over all images together, what is done for them would not be seen, and in every single
    class there may be one or two.

    Args:
        before: `(N,)` bool, which images are right without the correction.
        after: `(N,)` bool, which are with it.
        own: `(N,)` bool, which images are of the class that the concept pulls towards.
        carried: `(N,)` bool, which images carry the concept.

    Returns:
        The change; groups of fewer than five images do not count.
    """
    change = after.double() - before.double()
    group = own.long() * 2 + carried.long()
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


class Probation:
    """Corrections on probation: what was right before them, and for how long they have not helped.

    Attributes:
        right: Concept id to `(N,)` bool, which probe images were right when its correction began.
        idle: Concept id to the number of rounds in a row in which its groups were worse off.
    """

    def __init__(self) -> None:
        self.right: dict[int, Tensor] = {}
        self.idle: dict[int, int] = {}

    def begin(self, concept: int, right: Tensor) -> None:
        """Put a correction on probation.

        Args:
            concept: Id of the concept.
            right: `(N,)` bool, which probe images are right without it.
        """
        self.right[concept], self.idle[concept] = right.cpu(), 0

    def end(self, concept: int) -> None:
        """Forget a correction, or exempt it because a person wants it.

        Args:
            concept: Id of the concept; nothing happens if it is not on probation.
        """
        self.right.pop(concept, None)
        self.idle.pop(concept, None)

    def verdicts(self, groups: Mapping[int, tuple[Tensor, Tensor]], now: Tensor) -> dict[int, str]:
        """Return which corrections do not help, after another round.

        What counts is how the groups fare since a correction began, training included. On tinted
        digits the groups are worse off in the first one or two rounds (-.14 and -.02 on one seed,
        while the class that leaned on the tint learns its digit again) and then better by .2 to .3
        in every round, on four seeds. To switch the projection off and on says less: estimated
        from one half of 540 images and tried on the other, it seemed to cost .2 to .3 at first.
        Where fewer than five images of either kind are misled, nothing is said: the others are
        those on which the concept was right.

        Args:
            groups: Concept id to twice `(N,)` bool: which images are of its class, which carry it.
            now: `(N,)` bool, which are right with them.

        Returns:
            Concept id to the reason why its correction is to be withdrawn.
        """
        reasons = {}
        for concept, (own, carried) in groups.items():
            before = self.right.get(concept)
            if before is None or len(before) != len(now):
                continue
            misled = max(int((carried & ~own).sum()), int((own & ~carried).sum()))
            if misled < SMALLEST_GROUP:  # all that can be seen is what is lost where it was right
                continue
            found = benefit(*(t.to(now.device) for t in (before, now, own, carried)))
            self.idle[concept] = self.idle[concept] + 1 if found.gain < 0 else 0
            if self.idle[concept] >= PATIENCE:
                reasons[concept] = (
                    f"concept {concept} is not corrected any more: since its correction began, the "
                    f"accuracy of its groups changed by {found}"
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
