"""Stage 2, find: directions along which rows are skewed, and those that these hide.

What is there or not, and mostly not, is skewed; a symmetric distractor is not, however large.
Nothing here knows about marks that split rows clearly.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.clarity import excess, split
from concept_guard.directions.reservoir import sampled
from concept_guard.directions.thinning import STILL, different

SAME = 0.7  # correlation of factors from which two directions are one concept
# Rows of the first turns. Of 128 concepts in 512 channels the climbs from 512 rows miss 6.4 % on
# these, 2.2 % on all of 20,000 in twice the time; what is missed shows in what is left.
GLANCE = 5_000
# Climbs of all directions, on how many rows, and the cosine from which they count as one after it.
SCHEDULE = ((4, GLANCE, 0.95), (6, GLANCE, 0.95), (20, None, 0.95), (300, None, SAME))
BEGUN = ((5, None, 0.95),)
# Climbs in what is left that go on after the first turns, per concept still missing. With one of 64
# missing 100 of 600 take 0.6 s rather than 3.6; on ten networks two seeds agree as without (.975).
# Ranked on the rows of the glance the missing one is often not among them.
FOLLOWED = 100
LAYERS = 4  # times that what is left is searched
RIDGE = 1e-4
CHANCES, MARGIN = 32, 1.05  # climbs in normal rows; with ten times as many up to 1.02 was reached
OUTSIDE = 0.6  # mixtures of correlated concepts have up to .5, new ones of features .9 or more
LEVEL = 1e-3  # share of the largest variance below which an axis of what is left is empty


def components(white: Tensor, count: int, starts: Tensor, generator: torch.Generator) -> Tensor:
    """Return directions of locally largest skewness, and those that show once these are known.

    A row of few concepts lies near the directions of these, so rows are climbed from, and more
    directions than axes can be found. Where concepts are correlated or many, some have no maximum
    of their own. They have one in what the known ones leave unexplained, made white again; their
    filter is the regression of the factor found there on the rows, or the maximum that it lies
    below, if that is new.

    Source: Hyvarinen and Oja (2000), Neural Networks 13:411-430, section 6 (fixed point for one
    unit, here with the square, one-sided, as nonlinearity).
    Departure: that source removes the span of what was found, which ends at as many components as
    axes. Of 96 correlated concepts in 64 channels 69 have a maximum of their own; all 96 are found
    after one search of what is left (with large distractors 53 and 95).

    Args:
        white: `(P, R)` rows with unit covariance.
        count: Directions to look for.
        starts: `(m, R)` unit directions to begin with, such as those of rows; as many rows are
            drawn when what is left is searched.
        generator: Draws them.

    Returns:
        `(n, R)` unit directions, n at most `count`, in order of search and then of skewness.
    """
    chance = _chance(white, generator)
    found = climbed(white, starts)
    skewness = _skewness(white, found)
    for _ in range(LAYERS):
        keep = skewness > chance
        found, skewness = found[keep], skewness[keep]
        if len(found) >= count or not bool(keep.any()):
            break
        left = unexplained(white, found)
        most = FOLLOWED * (count - len(found))
        seen = climbed(left, drawn(left, len(starts), generator), most=most)
        factors = left @ seen.T
        hidden = excess(factors, factors > split(factors))
        turned = normalize((hidden - hidden.mean(dim=0)).T @ white, dim=1)
        # Gates leave skewed noise behind, of which the rows themselves show nothing.
        new = torch.minimum(_skewness(left, seen), _skewness(white, turned)) > chance
        turned = turned[new & (_outside(turned, found) > OUTSIDE)]
        every = torch.cat([found, climbed(white, turned), turned])
        worth = _skewness(white, every)
        worth[: len(found)] += 1e6  # what was found stays
        worth[len(every) - len(turned) :] -= 1e6
        order = different(every, worth, SAME)
        if len(order) == len(found):
            break
        found = every[order]
        skewness = _skewness(white, found)
    return found[:count]


def drawn(rows: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Return unit directions of some rows; of all of them while they are few.

    Args:
        rows: `(P, R)` rows.
        wanted: How many.
        generator: Draws them.

    Returns:
        `(n, R)` unit vectors.
    """
    if len(rows) > 2 * wanted:
        rows = rows[torch.randperm(len(rows), generator=generator)[:wanted].to(rows.device)]
    return normalize(rows, dim=1)


def begun(white: Tensor, directions: Tensor) -> Tensor:
    """Return directions that have climbed a little; see `climbed`."""
    return climbed(white, directions, BEGUN)


def climbed(
    white: Tensor,
    directions: Tensor,
    schedule: Sequence[tuple[int, int | None, float]] = SCHEDULE,
    most: int | None = None,
) -> Tensor:
    """Climb to maxima of skewness, `b <- E[max(b.x, 0)^2 x]`, and keep each of them once.

    Args:
        white: `(P, R)` rows with unit covariance.
        directions: `(n, R)` unit vectors to begin with.
        schedule: Turns, rows they are taken on (None: all), and the cosine from which directions
            are the same after them.
        most: How many to go on with after the first turns, the most skewed ones; None: all.

    Returns:
        `(m, R)` unit vectors, most skewed first.
    """
    for turns, count, same in schedule:
        rows = white
        if count is not None:
            rows = sampled(white, count, torch.Generator().manual_seed(0))
        directions = directions.clone()
        moving = torch.arange(len(directions), device=directions.device)
        for _ in range(turns):
            before = directions[moving]
            lifted = (rows @ before.T).clamp_min_(0.0).square_()
            after = normalize(lifted.T @ rows, dim=1)
            directions[moving] = after
            moving = moving[(after * before).sum(dim=1) < STILL]
            if not len(moving):
                break
        keep = different(directions, _skewness(white, directions), same)
        directions = directions[keep[:most]]
    return directions


def unexplained(white: Tensor, found: Tensor) -> Tensor:
    """Return what the found concepts, each present or not, leave of the rows, made white again.

    Args:
        white: `(P, R)` rows with unit covariance.
        found: `(n, R)` their directions.

    Returns:
        `(P, Q)` rows with unit covariance, Q at most R.
    """
    factors = white @ found.T
    gated = excess(factors, factors > split(factors))
    gated = gated - gated.mean(dim=0)
    size = gated.square().mean(dim=0).sqrt().clamp_min(1e-12)
    gated = gated / size
    cross = (gated.T @ gated / len(white)).to(torch.float64)
    cross.diagonal().add_(RIDGE)
    signals = torch.linalg.solve(cross, (gated.T @ white / len(white)).to(torch.float64))
    left = white - gated @ signals.to(white.dtype)
    values, axes = torch.linalg.eigh((left.T @ left / len(left)).to(torch.float64))
    keep = values > LEVEL * values.max()
    again: Tensor = left @ (axes[:, keep] / values[keep].sqrt()).to(left.dtype)
    return again


def _outside(directions: Tensor, found: Tensor) -> Tensor:
    """Return the energy of directions outside the span of found ones; 1 for a random direction.

    Infinite where the span is more than half of the axes: concepts more than axes lie in it too.
    """
    axes = directions.shape[1]
    if 2 * len(found) > axes:
        return torch.full_like(directions[:, 0], torch.inf)
    within = (directions @ torch.linalg.qr(found.T).Q).square().sum(dim=1)
    outside: Tensor = (1 - within) * axes / (axes - len(found))
    return outside


def _skewness(white: Tensor, directions: Tensor) -> Tensor:
    factors = white @ directions.T
    return factors.square().mul_(factors).mean(dim=0)


def _chance(white: Tensor, generator: torch.Generator) -> float:
    """Return the largest skewness of climbs in as many normal rows of as many coordinates."""
    noise = torch.randn(white.shape, generator=generator).to(white)
    climb = normalize(noise[:CHANCES], dim=1)
    for _ in range(30):
        climb = normalize((noise @ climb.T).clamp_min_(0.0).square_().T @ noise, dim=1)
    return MARGIN * float(_skewness(noise, climb).max())
