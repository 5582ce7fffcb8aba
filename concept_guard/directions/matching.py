"""Stage 2, find: keep concept k the same concept from one round to the next.

Nothing here knows about models or flags.
"""

import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor

from concept_guard.directions.pairs import DirectionPairs


def agreement(last: Tensor, new: Tensor) -> Tensor:
    """Return how alike the concepts of two rounds read the same rows.

    Args:
        last: `(P, K)` factors of the last round.
        new: `(P, L)` factors of this round.

    Returns:
        `(K, L)` correlations between -1 and 1; 0 for a factor that does not vary.
    """
    a, b = (z.to(torch.float64) - z.to(torch.float64).mean(dim=0) for z in (last, new))
    scale = torch.outer(torch.linalg.vector_norm(a, dim=0), torch.linalg.vector_norm(b, dim=0))
    return torch.where(scale > 0, (a.T @ b) / scale.clamp_min(1e-300), 0.0)


def match(last: Tensor, new: Tensor, *, least: float = 0.5) -> dict[int, int]:
    """Pair the concepts of this round one to one with those of the last.

    Args:
        last: `(P, K)` factors of the last round's concepts.
        new: `(P, L)` factors of this round's concepts, over the same rows.
        least: Least agreement of a pair; below it a concept counts as new.

    Returns:
        Position in this round to position in the last round, for the matched ones.
    """
    alike = agreement(last, new)
    old, now = scipy.optimize.linear_sum_assignment(alike.cpu().numpy(), maximize=True)
    pairs = zip(now.tolist(), old.tolist(), strict=True)
    return {n: o for n, o in pairs if float(alike[o, n]) >= least}


def cosines(last: DirectionPairs, new: DirectionPairs, matched: dict[int, int]) -> dict[int, float]:
    """Return how far each matched filter kept its direction.

    Args:
        last: Pairs of the last round.
        new: Pairs of this round.
        matched: Position in `new` to position in `last`.

    Returns:
        Position in `new` to the cosine of its filter with the one it is matched to.
    """
    now = new.filters[list(matched.keys())]
    then = last.filters[list(matched.values())].to(now)
    alike = torch.nn.functional.cosine_similarity(now, then, dim=1)
    return dict(zip(matched, alike.tolist(), strict=True))
