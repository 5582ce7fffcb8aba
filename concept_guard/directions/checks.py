"""Stage 2, find: what makes rows unfit for a search of direction pairs.

Nothing here knows how pairs are found.
"""

import torch
from torch import Tensor

from concept_guard.directions.basis import CHUNK


def faults(rows: Tensor, concepts: int) -> list[str]:
    """Return everything that is wrong with rows and the number of concepts asked for.

    Args:
        rows: `(P, C)` floating activations.
        concepts: Number of pairs to look for.

    Returns:
        One sentence per fault; empty if there is none.
    """
    found = []
    bad = sum(_not_finite(part) for part in rows.split(CHUNK))
    if bad:
        found.append(f"rows: {bad} of {len(rows)} hold NaN or infinite values; leave them out")
    elif len(rows) < 2 or torch.equal(rows.amax(dim=0), rows.amin(dim=0)):
        found.append(f"rows: {len(rows)} rows without any variation; collect more activations")
    if not 2 <= concepts <= max(2, len(rows)):
        found.append(f"concepts: got {concepts}, expected 2 to {len(rows)}, the number of rows")
    return found


def _not_finite(rows: Tensor) -> int:
    """Return how many rows hold NaN or infinite values; their sum tells at once if none does."""
    if bool(rows.sum().isfinite()):
        return 0
    return int((~rows.isfinite().all(dim=1)).sum())
