"""Stage 2, find: of directions that are nearly the same keep one.

Nothing here knows how directions were found.
"""

import torch
from torch import Tensor

STILL = 1 - 1e-6  # cosine from which two directions are one up to rounding


def different(directions: Tensor, worth: Tensor, same: float) -> Tensor:
    """Return which directions to keep so that no two of them are alike.

    Args:
        directions: `(n, R)` unit vectors.
        worth: `(n,)` the better of two alike ones is kept.
        same: Cosine from which two directions are alike.

    Returns:
        Positions, best first.
    """
    order = worth.argsort(descending=True)
    ranked = directions[order]
    close = (ranked @ ranked.T > same).cpu().numpy()
    kept: list[int] = []
    for at in range(len(order)):
        if not close[at, kept].any():
            kept.append(at)
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]
