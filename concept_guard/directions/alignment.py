"""Stage 2, find: where no detector can decide, the network should not be able to decide either.

Nothing here knows how filters are sought or how signal vectors are estimated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from concept_guard.directions import losses

Head = Callable[[Tensor], Tensor]
RIDGE = 1e-6  # of the mean diagonal of what is inverted


def to_uncertainty(
    rows: Tensor, filters: Tensor, biases: Tensor, signals: Tensor | None = None
) -> Tensor:
    """Return the move `dx` that takes rows to where all detectors are undecided.

    `x - dx` reads `x . w = b` for every filter, up to the ridge, when the filters are at most C
    and independent; more filters meet nowhere in general, and the reads come as close to the
    biases as they can in the sense of least squares.

    - without signals the shortest such move, `dx = W' (W W')^-1 r` with `r = W x - b`;
    - with signals the one inside their span, `dx = S' (W S')^-1 r`.

    The move is affine in the row, so the mean of moved rows is the moved mean row.

    Source: arXiv 2509.23926, uncertainty region alignment, unconstrained and constrained.
    Departure: ridge solves of the size of the smaller side in place of a pseudo-inverse, whose
    gradient does not exist where singular values meet.

    Args:
        rows: `(..., C)` activations.
        filters: `(K, C)` decoding directions.
        biases: `(K,)` thresholds, in units of `x . w`.
        signals: `(K, C)` encoding directions, or None.

    Returns:
        `(..., C)` moves, to be subtracted.
    """
    undecided = rows @ filters.mT - biases
    return undecided @ _reach(filters, signals)


def _reach(filters: Tensor, signals: Tensor | None) -> Tensor:
    """Return `(K, C)`, what one unit of each detector's factor moves a row by."""
    concepts, channels = filters.shape
    reach: Tensor
    if signals is not None:
        coupling = filters @ signals.mT
        reach = coupling @ torch.linalg.solve(_ridged(coupling.mT @ coupling), signals)
    elif concepts <= channels:
        reach = torch.linalg.solve(_ridged(filters @ filters.mT), filters)
    else:
        reach = torch.linalg.solve(_ridged(filters.mT @ filters), filters.mT).mT
    return reach


def _ridged(moments: Tensor) -> Tensor:
    """Return moments with a share of their mean diagonal added to it."""
    ridge = RIDGE * moments.diagonal().mean()
    return moments + ridge * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)


def alignment(
    rows: Tensor,
    filters: Tensor,
    biases: Tensor,
    *,
    head: Head,
    share: Tensor,
    signals: Tensor | None = None,
    pooled: bool = True,
) -> Tensor:
    """Return how sure a network is of samples moved towards where all detectors are undecided.

    The negative mean entropy of the class probabilities at `x - kappa dx`; the lower, the better
    the undecided region of the detectors fits into that of the network.

    For a network that averages the rows of an image first (`pooled`), the mean row is moved in
    place of all rows. With one kappa per image this is the same value with the same gradients,
    at the cost of one row per image.

    Source: arXiv 2509.23926, eq. 7; entropies in nats, one kappa per image (it does not say).

    Args:
        rows: `(B, C)` activations, one row per image, or `(B, Q, C)`, Q rows per image.
        filters: `(K, C)` decoding directions.
        biases: `(K,)` thresholds, in units of `x . w`.
        head: The rest of the network, to `(B, M)` logits; from `(B, C)` mean rows if `pooled`,
            otherwise from what `rows` is.
        share: `(B,)` shares of the move that are made, kappa; 1 ends at the thresholds.
        signals: `(K, C)` encoding directions whose span the move keeps to, or None.
        pooled: Whether the head is what follows an average over the rows of an image.

    Returns:
        Scalar between `-ln M` and 0.
    """
    if pooled and rows.ndim == 3:
        rows = rows.mean(dim=1)
    kappa = share.reshape(-1, *[1] * (rows.ndim - 1))
    moved = rows - kappa * to_uncertainty(rows, filters, biases, signals)
    return losses.confidence(head(moved))
