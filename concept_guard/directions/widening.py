"""Stage 2, find: what filters have in the axes of the rows that were not searched.

Nothing here knows how the filters were found.
"""

import torch
from torch import Tensor

from concept_guard.directions.candidates import Candidates
from concept_guard.directions.clarity import excess

RIDGE = 1e-6  # of unit variance, so that rows of few different values can be inverted
ROWS_PER_AXIS = 10  # fewer rows say more about noise than about filters


def widened(white: Tensor, others: Tensor, found: Candidates) -> Tensor:
    """Return what belongs to filters beyond the searched axes.

    That of the regression of a filter's gated factor on all axes, in the unit of the filter, and
    shrunk along every axis by the share of the coefficients there that is noise.

    Source: James and Stein (1961), positive part, with the concepts as the repeated measurement.
    Departure: the filters of the source have all channels from the start. Searching some axes
    finds concepts better (see `fit_pairs`), but true decoders have parts in the others: mean cosine
    to these with and without what is added here, on 64 of 256 and 128 of 512 non-negative concepts
    .998 and .961, .997 and .970; with large distractors .999 and .988. From 4,000 rows of 512
    channels, features of ten networks, it made presence read slightly worse (least AUC of a
    planted mark outside its class .968 for .991), hence the least number of rows.

    Args:
        white: `(P, R)` rows in the searched axes.
        others: `(P, Q)` the same rows in the other axes.
        found: K directions in the searched axes.

    Returns:
        `(K, Q)` further coordinates of the directions; zeros where rows are fewer than ten times
        the axes, or concepts fewer than three.
    """
    count, axes, concepts = len(white), white.shape[1] + others.shape[1], len(found)
    if concepts < 3 or not others.shape[1] or count < ROWS_PER_AXIS * axes:
        return torch.zeros(concepts, others.shape[1]).to(white)
    gated = excess(found.factors, found.present)
    gated = gated - gated.mean(dim=0)
    every = torch.cat([white, others], dim=1)
    every = every - every.mean(dim=0)
    gram = (every.T @ every).to(torch.float64)
    gram.diagonal().add_(RIDGE * count)
    inverse = torch.linalg.inv(gram)
    cross = (gated.T @ every).to(torch.float64)
    slopes = cross @ inverse
    left = gated.square().sum(dim=0, dtype=torch.float64) - (slopes * cross).sum(dim=1)
    variance = left.clamp_min(0)[:, None] / (count - axes) * inverse.diagonal()
    along, apart = slopes[:, : white.shape[1]], slopes[:, white.shape[1] :]
    square = (apart.square() / variance[:, white.shape[1] :].clamp_min(1e-300)).sum(dim=0)
    kept = (1 - (concepts - 2) / square.clamp_min(1e-300)).clamp_min(0)
    unit = (along * found.directions).sum(dim=1, keepdim=True)
    usable = unit > 0
    return torch.where(usable, apart * kept / torch.where(usable, unit, 1.0), 0.0).to(white)
