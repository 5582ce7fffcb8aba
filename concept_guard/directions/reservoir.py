"""Stage 2, find: a uniform sample of rows, of a tensor or of batches of unknown number.

Nothing here knows what rows are used for.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def sampled(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return all rows, or a random choice of them in their order if there are many.

    Args:
        rows: `(P, C)` rows.
        size: Rows to return at most.
        generator: Draws them.

    Returns:
        `(n, C)` rows.
    """
    if len(rows) <= size:
        return rows
    pick = torch.randperm(len(rows), generator=generator)[:size].sort().values
    return rows[pick.to(rows.device)]


def collected(batches: Iterable[Tensor], size: int, seed: int) -> Tensor:
    """Return a uniform sample of the rows of all batches, read once.

    Every row gets a random key, and the rows of the largest keys stay.

    Source: Efraimidis and Spirakis (2006), Information Processing Letters 97:181-185, with equal
    weights.

    Args:
        batches: `(B, C)` floating rows each, on one device.
        size: Rows to keep at most.
        seed: Of the keys.

    Returns:
        `(n, C)` rows in the order in which they came.

    Raises:
        ValueError: There is no batch, or a batch is no matrix of as many channels as the first.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: Tensor | None = None
    keys = torch.zeros(0)
    for number, batch in enumerate(batches):
        rows = batch.detach()
        if rows.ndim != 2 or (kept is not None and rows.shape[1] != kept.shape[1]):
            wanted = "(B, C)" if kept is None else f"(B, {kept.shape[1]})"
            raise ValueError(f"rows: batch {number} is {tuple(rows.shape)}, expected {wanted}")
        keys = torch.cat([keys, torch.rand(len(rows), generator=generator)])
        kept = rows if kept is None else torch.cat([kept, rows])
        if len(keys) > size:
            stay = keys.topk(size).indices.sort().values
            keys, kept = keys[stay], kept[stay.to(kept.device)]
    if kept is None:
        raise ValueError("rows: got no batch, expected at least one (B, C) tensor")
    return kept
