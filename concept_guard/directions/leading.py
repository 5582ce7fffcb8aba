"""Stage 2, find: rows in fewer axes, so that presence in wide networks is sharpened in seconds.

Nothing here knows what the rows are read for.
"""

import torch
from scipy.linalg import eigh
from torch import Tensor

from concept_guard.directions.threads import few_threads

MOST_AXES = 256


def leading(rows: Tensor, labels: Tensor, most: int = MOST_AXES) -> Tensor:
    """Turn rows so that the axes along which they vary most within classes come first, and cut.

    Sharpening presence solves a dozen systems of as many equations as there are channels: with
    2,048 it took 17 s per concept. Rotated rows give the same answers; what is cut is the rest of
    the variance, in which some thousand images show nothing that is not noise: of 512 channels,
    512, 256 and 128 axes found the same concepts in four networks (CIFAR-10 patch, digits), with
    the patch's images at a precision of .995, .997 and .992 and a recall of 1.

    Args:
        rows: `(P, C)` activations.
        labels: `(P,)` classes.
        most: Axes to keep; rows with fewer channels are returned as they are.

    Returns:
        `(P, min(C, most))` rows.
    """
    channels = rows.shape[1]
    if channels <= most:
        return rows
    with few_threads(rows.numel()):
        count = torch.bincount(labels).clamp_min(1)
        means = torch.zeros((len(count), channels), dtype=rows.dtype, device=rows.device)
        means.index_add_(0, labels, rows)
        residual = rows - (means / count[:, None])[labels]
        covariance = (residual.T @ residual / len(rows)).cpu().numpy()
        top = (channels - most, channels - 1)
        _, axes = eigh(covariance, subset_by_index=top, check_finite=False, overwrite_a=True)
        return rows @ torch.from_numpy(axes).to(rows)
