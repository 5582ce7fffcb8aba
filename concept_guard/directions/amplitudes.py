"""Stage 2, find: how much of a concept there is where it is there, as a guide for its filter.

Nothing here knows how presence was found.
"""

import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.candidates import Candidates

ROUNDS = 6  # presence and filters in turn
TURNS = 100  # of the fixed point
BOUNDED = -0.2  # excess kurtosis of a quantity with bounds; -1.2 if uniform, 0 if normal
SAME = 0.8  # correlation of presence from which a turned filter still reads its concept


def by_amplitudes(white: Tensor, candidates: Candidates) -> Candidates:
    """Turn filters of bounded amplitude to where amplitudes are independent of each other.

    Concepts that exclude each other are correlated, so no filter that only tells presence apart
    is that of one concept: any sum of all filters can be added. With presence held fixed, signal
    values are independent, and so are distractors: they are the independent components of what
    presence leaves of the rows. Each filter is turned to the component that goes most with its
    presence.

    Source: arXiv 2509.23926, appendix B, for independence with presence held fixed; Hyvarinen and
    Oja (2000), Neural Networks 13:411-430, section 6, for the fixed point.
    Departure: the source descends its losses. On its toy, 10 seeds, splits alone end at cosines
    .73 to .90 of the encoders, RMSE .44 to .81; turned, .997 to 1.0 and at most .07.

    Args:
        white: `(P, R)` rows with unit covariance.
        candidates: Directions with presence; those of unbounded amplitude stay as they are.

    Returns:
        Candidates in the same order. A filter is turned only if what it reads as present stays
        nearly the same.
    """
    if len(candidates) < 2:
        return candidates
    left, outward, _ = _left_by_presence(white, candidates.present)
    bounded = _kurtosis(left, candidates.directions @ outward) < BOUNDED
    at = bounded.nonzero().flatten()
    if not 2 <= len(at) <= left.shape[1]:
        return candidates
    some = candidates.select(at)
    for _ in range(ROUNDS):
        left, outward, inward = _left_by_presence(white, some.present)
        every = normalize(_independent(left, some.directions @ outward) @ inward.T, dim=1)
        directions = _that_read(white, every, some.present)
        factors = white @ directions.T
        some = Candidates(directions, factors, _threshold_of(factors, some.present))
    before, after = candidates.present[:, at].double(), some.present.double()
    centred = [p - p.mean(dim=0) for p in (before, after)]
    same = (normalize(centred[0], dim=0) * normalize(centred[1], dim=0)).sum(dim=0) > SAME
    if not bool(same.all()):
        return candidates
    return candidates.replaced(at, some)


def _left_by_presence(white: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows without their means per presence, made white, and the maps there and back."""
    gate = torch.cat([torch.ones_like(white[:, :1]), present.to(white)], dim=1).double()
    cross = gate.T @ gate / len(white)
    cross.diagonal().add_(1e-9)
    means = torch.linalg.solve(cross, gate.T @ white.double() / len(white))
    left = white.double() - gate @ means
    values, axes = torch.linalg.eigh(left.T @ left / len(left))
    keep = values > 1e-6 * values.max()
    values, axes = values[keep], axes[:, keep]
    inward, outward = axes / values.sqrt(), axes * values.sqrt()
    white_left = (left @ inward).to(white.dtype)
    return white_left, outward.to(white.dtype), inward.to(white.dtype)


def _kurtosis(left: Tensor, directions: Tensor) -> Tensor:
    return (left @ normalize(directions, dim=1).T).pow(4).mean(dim=0) - 3


def _independent(left: Tensor, directions: Tensor) -> Tensor:
    """Return all independent components of the rows, the first ones near given directions."""
    unit = normalize(directions, dim=1)
    u, _, v = torch.linalg.svd(unit, full_matrices=True)
    now = torch.cat([u @ v[: len(unit)], v[len(unit) :]])  # nearest orthonormal rows, and the rest
    for _ in range(TURNS):
        turned = _orthonormal(3 * now - (left @ now.T).pow(3).T @ left / len(left))
        settled = bool((turned * now).sum(dim=1).abs().min() > 1 - 1e-6)
        now = turned
        if settled:
            break
    return now


def _that_read(white: Tensor, directions: Tensor, present: Tensor) -> Tensor:
    """Return for each presence the direction that goes with it most, and no direction twice."""
    gate = present.to(white)
    alike = normalize(gate - gate.mean(dim=0), dim=0).T @ (white @ directions.T)
    _, which = scipy.optimize.linear_sum_assignment(alike.abs().cpu().numpy(), maximize=True)
    at = torch.as_tensor(which, device=alike.device)
    return directions[at] * alike.gather(1, at[:, None]).sign()


def _orthonormal(directions: Tensor) -> Tensor:
    """Return the nearest orthonormal rows."""
    u, _, v = torch.linalg.svd(directions, full_matrices=False)
    nearest: Tensor = u @ v
    return nearest


def _threshold_of(factors: Tensor, present: Tensor) -> Tensor:
    """Return the thresholds that agree with a presence on the most rows."""
    order = factors.argsort(dim=0, descending=True)
    ranked = factors.gather(0, order)
    gain = (2.0 * present.gather(0, order).double() - 1.0).cumsum(dim=0)
    last = gain[:-1].argmax(dim=0)[None]
    return 0.5 * (ranked.gather(0, last) + ranked.gather(0, last + 1))[0]
