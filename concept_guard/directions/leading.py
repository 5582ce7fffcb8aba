"""Stage 2, find: fewer axes for rows, so that presence in wide networks is sharpened in seconds.

Nothing here knows what the rows are read for.
"""

import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor

from concept_guard.directions.scatter import Scatter
from concept_guard.directions.threads import few_threads

MOST_AXES = 256


def leading(scatter: Scatter, most: int = MOST_AXES) -> Tensor:
    """Return the axes along which rows vary most within classes.

    Sharpening presence solves a dozen systems of as many equations as there are channels: with
    2,048 it took 17 s per concept. Rotated rows give the same answers; what is cut is the rest of
    the variance, in which some thousand images show nothing that is not noise: of 512 channels,
    512, 256 and 128 axes found the same concepts in four networks (CIFAR-10 patch, digits), with
    the patch's images at a precision of .995, .997 and .992 and a recall of 1.

    Args:
        scatter: Of `(P, C)` activations.
        most: Axes to keep, A.

    Returns:
        `(C, A)` orthonormal columns; the identity if there are no more channels than that.
    """
    rows, channels = scatter.rows, scatter.rows.shape[1]
    if channels <= most:
        return torch.eye(channels).to(rows)
    with few_threads(rows.numel()):
        covariance = (scatter.product / len(rows)).to(rows.dtype).cpu().numpy()
        top = (channels - most, channels - 1)
        _, axes = scipy.linalg.eigh(
            covariance, subset_by_index=top, check_finite=False, overwrite_a=True
        )
        return torch.from_numpy(axes).to(rows)
