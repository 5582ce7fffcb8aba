"""Stage 2, find: directions along which rows fall into two groups: a mark that is there or not.

Nothing here knows about concepts that are a matter of degree.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.candidates import Candidates
from concept_guard.directions.clarity import clarity, split, two_means
from concept_guard.directions.thinning import STILL, different

# Turns of all directions, and the cosine from which they count as one before that.
SCHEDULE = ((3, 0.97), (5, 0.95), (10, 0.95), (20, 0.95))


def splits(white: Tensor, starts: Tensor) -> Candidates:
    """Return self-consistent splits: the rows a direction reads as present define the direction.

    Alternately rows are split at the threshold half-way between the two means of their factor,
    and the direction becomes the linear discriminant of the two groups, which in white
    coordinates is the difference of their means. Directions that have become the same are kept
    once.

    Source: Ding and Li (2007), ICML, Adaptive dimension reduction using discriminant analysis and
    K-means clustering; here with two groups, many times at once, and a threshold in place of two
    centres.
    Departure: the source of the method (arXiv 2509.23926) descends its losses from random
    orthonormal directions. On 18 networks with a planted mark (CIFAR-10 patch, tinted digits) this
    climb has the mark as its clearest split in all 36 fits with presence AUC .999-1.0, precision
    .95-1.0 and recall .84-1.0 but for three of the digits' (.5-.75), in a tenth of the time;
    descents had AUC 1.0 as well, but recall .17-1.0 at their own thresholds.

    Args:
        white: `(P, R)` rows with unit covariance.
        starts: `(n, R)` unit directions to begin with.

    Returns:
        Different splits, clearest first.
    """
    lengths = white.square().sum(dim=1)
    directions = starts
    thresholds = split(white @ directions.T)
    for turns, same in SCHEDULE:
        factors = white @ directions.T
        keep = different(directions, clarity(factors, factors > thresholds), same)
        directions, thresholds = directions[keep], thresholds[keep]
        moving = torch.arange(len(directions), device=directions.device)
        for _ in range(turns):
            before = directions[moving]
            factors = white @ before.T
            halfway = two_means(factors, thresholds[moving], rounds=2)
            after = _discriminants(white, factors > halfway)
            directions[moving] = after
            thresholds[moving] = two_means(white @ after.T, halfway, rounds=1)
            moving = moving[(after * before).sum(dim=1) < STILL]
            if not len(moving):
                break
    factors = white @ directions.T
    thresholds = two_means(factors, thresholds)
    clear = clarity(factors, factors > thresholds, lengths)
    keep = different(directions, clear, SCHEDULE[-1][1])
    return Candidates(directions[keep], factors[:, keep], thresholds[keep])


def _discriminants(white: Tensor, present: Tensor) -> Tensor:
    """Return `(n, R)` unit differences of means; total sums of white rows are zero."""
    gate = present.to(white)
    return normalize(gate.T @ white - gate.mean(dim=0)[:, None] * white.sum(dim=0), dim=1)
