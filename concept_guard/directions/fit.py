"""Stage 2, find: from rows to direction pairs; starts, restarts, warm start.

Nothing here knows about models, rounds or flags.
"""

import torch
from torch import Tensor

from concept_guard.directions.decoding import Basis, Head, Objective, Search
from concept_guard.directions.encoding import signal_vectors
from concept_guard.directions.pairs import DirectionPairs
from concept_guard.directions.threads import few_threads

AXES = 64  # axes of the reduced basis, unless more concepts need more


def fit_pairs(
    rows: Tensor,
    *,
    concepts: int,
    head: Head | None = None,
    init: DirectionPairs | None = None,
    seed: int = 0,
    restarts: int = 2,
    objective: Objective | None = None,
) -> DirectionPairs:
    """Find direction pairs in unlabelled rows.

    Filters and biases minimise sparsity, maximum activation, inactive classifier and margin
    losses (and uncertainty region alignment, if a head is given): first orthonormal on
    standardised rows, then free; the best of several random starts is kept. Signal vectors
    follow in closed form. The same rows and seed on the same device give the same bits. A
    `ValueError` names everything that is wrong with the arguments: rows that are no finite matrix
    with variation, a K that does not suit them.

    Source: arXiv 2509.23926, sections on the unsupervised learning of direction pairs.
    Departure: signal vectors are never free parameters (free ones drifted to cosine .4-.7 of the
    truth on the source's toy, closed form .97-.999).

    Args:
        rows: `(P, C)` activations, of any floating type; worked on in float32.
        concepts: Number of pairs, K; at least 2, at most P.
        head: Maps `(B, C)` activations to `(B, M)` logits; adds uncertainty region alignment.
            Only used while K is at most the number of axes kept.
        init: Earlier pairs of the same C to start from; restarts are then not needed.
        seed: Chooses starts and batches.
        restarts: Random starts tried without `init`; more find better pairs and take longer.
        objective: Weights and schedule; None takes the defaults.

    Returns:
        K pairs, on the device of the rows.
    """
    _check(rows.detach(), concepts, init)
    x = rows.detach().float()
    objective = objective or Objective()
    generator = torch.Generator().manual_seed(seed)
    work = len(x) * min(x.shape[1], AXES)
    with torch.enable_grad(), few_threads(work), torch.autocast(x.device.type, enabled=False):
        basis = Basis.of(x, rank=min(x.shape[1], max(2 * concepts, AXES)))
        reduced = (x - basis.mean) @ basis.inward
        search = Search(reduced, basis, head, objective, generator)
        if init is not None:
            filters = init.filters.to(x) @ basis.outward.T
            biases = init.biases.to(x) - init.filters.to(x) @ basis.mean
            found = search.refine(filters, biases)
        else:
            shape = (concepts, reduced.shape[1])
            starts = [torch.randn(shape, generator=generator).to(x) for _ in range(restarts)]
            tried = [search.from_start(start) for start in starts]
            found = min(tried, key=lambda result: result[2])
        filters = found[0] @ basis.inward.T
        biases = found[1] + filters @ basis.mean
        signals, _ = signal_vectors(x, filters, biases)
    return DirectionPairs(filters, signals, biases)


def _check(rows: Tensor, concepts: int, init: DirectionPairs | None) -> None:
    """Refuse arguments that cannot be fitted.

    Raises:
        ValueError: Naming everything that is wrong with them.
    """
    wrong = []
    if rows.ndim != 2 or not rows.is_floating_point():
        kind = f"{tuple(rows.shape)} {rows.dtype}"
        raise ValueError(f"rows: got {kind}, expected (P, C) floating activations")
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows).all(dim=1)).sum())
        wrong.append(f"rows: {bad} of {len(rows)} hold NaN or infinite values; leave them out")
    elif len(rows) < 2 or float(rows.float().std(dim=0).max()) == 0.0:
        wrong.append(f"rows: {len(rows)} rows without any variation; collect more activations")
    if not 2 <= concepts <= max(2, len(rows)):
        wrong.append(f"concepts: got {concepts}, expected 2 to {len(rows)}, the number of rows")
    if init is not None and init.filters.shape != (concepts, rows.shape[1]):
        wrong.append(
            f"init: its filters have shape {tuple(init.filters.shape)}, expected "
            f"({concepts}, {rows.shape[1]}); fit without init"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
