"""Stage 2, find: the subspace in which several concepts show, estimated together within classes.

Nothing here knows how presence was found or what the subspace is used for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from concept_guard.directions.threads import few_threads
from concept_guard.directions.within_class import root_of, shrinkage_of

BEYOND_NOISE = 1.2  # times the largest singular value of noise, for what differs between classes
RANK_TOLERANCE = 1e-9  # of the largest singular value of a design in float64
LEAST_WITHOUT = 0.05  # share of the rows without any concept that sets the level to leave behind


@dataclass(frozen=True, eq=False)
class Subspace:
    """What the presence of concepts changes in rows whose class is held fixed.

    Attributes:
        filters: `(R, C)` decoding directions.
        signals: `(R, C)` encoding directions; `filters @ signals.T` is the identity.
        absent: `(R,)` mean of `x . filter` over the rows without any of the concepts; over all
            rows if nearly every row carries one.
    """

    filters: Tensor
    signals: Tensor
    absent: Tensor


def joint_subspace(
    rows: Tensor, labels: Tensor, present: Tensor, *, positions: int = 1
) -> Subspace | None:
    """Estimate the subspace of several concepts from their presence, of the rank that they have.

    With the class held fixed, rows are regressed on the presence of all concepts at once and, in
    every class, on its own; the effects are made white by the covariance that is left, and their
    singular values are compared with those of noise. Kept are the directions common to the
    classes, at least one, and those in which a class differs beyond noise. Concepts that exclude
    each other, or come in two copies, share directions and need no special case.

    Source: Belrose et al. (2023), arXiv 2306.03819, theorem 4.3 (least-squares erasure; here
    within classes); Marchenko and Pastur (1967), Math. USSR-Sbornik 1:457-483 (the edge
    `sqrt(C) + sqrt(Q)` of the singular values of noise).
    Departure: the source erases a concept whatever the class; on biased data its directions would
    contain the class. Directions in which single classes differ are ours: with true presence, a
    patch erased from a CIFAR-10 network along one direction left .556 of the patched images right,
    along six .566 (.359 with none), at .588 and .588 of the clean ones (one seed). Ten colours of
    digits, of which nine are independent, are of rank 9, and .35 became .61.

    Args:
        rows: `(P, C)` activations.
        labels: `(P,)` classes.
        present: `(P, K)` bool, which rows carry which concept.
        positions: Rows per image: so many rows may tell no more than one.

    Returns:
        The subspace in the dtype of the rows, or None when no class has rows both with and
        without a concept.
    """
    with few_threads(rows.numel()):
        return _estimate(rows, labels, present, positions)


def _estimate(rows: Tensor, labels: Tensor, present: Tensor, positions: int) -> Subspace | None:
    centred, design = torch.empty_like(rows), present.to(torch.float64)
    of_classes = []  # effects in each class, one row per independent contrast of it
    for k in labels.unique():
        at = (labels == k).nonzero().flatten()
        centred[at] = rows[at] - rows[at].mean(dim=0)
        design[at] -= design[at].mean(dim=0)
        basis = _basis(design[at]).to(rows.dtype)
        effects = basis.T @ centred[at]
        of_classes.append(effects.to(torch.float64))
        centred[at] -= basis @ effects  # what is left once the concepts are taken into account
    # The design is centred in every class, so that means of classes drop out.
    common = (_basis(design).to(rows.dtype).T @ rows).to(torch.float64)
    own = torch.cat(of_classes)
    covariance = (centred.T @ centred / len(rows)).to(torch.float64)
    level = covariance.diagonal().mean()
    if not len(common) or float(level) == 0.0:
        return None
    shrunk = shrinkage_of(centred, covariance)
    covariance *= 1 - shrunk
    covariance.diagonal().add_(max(shrunk, 1e-6) * level)
    root = root_of(covariance)
    white = _white(root, common)
    axes = _beyond(white, 1.0, positions, least=1)
    rest = _white(root, own)
    rest -= axes @ (axes.T @ rest)
    axes = torch.cat([axes, _beyond(rest, BEYOND_NOISE, positions, least=0)], dim=1)
    filters = torch.linalg.solve_triangular(root.T, axes, upper=True).T
    without = ~present.any(dim=1)
    if float(without.double().mean()) < LEAST_WITHOUT:
        without = torch.ones_like(without)
    absent = rows[without].to(torch.float64).mean(dim=0) @ filters.T
    return Subspace(*(t.to(rows.dtype) for t in (filters, (root @ axes).T, absent)))


def _basis(design: Tensor) -> Tensor:
    """Return orthonormal columns that span those of a design."""
    u, sizes, _ = torch.linalg.svd(design, full_matrices=False)
    spanned: Tensor = u[:, sizes > RANK_TOLERANCE * sizes.amax()]
    return spanned


def _white(root: Tensor, effects: Tensor) -> Tensor:
    """Return `(C, Q)` effects in units in which noise has variance 1 in every direction."""
    white: Tensor = torch.linalg.solve_triangular(root, effects.T, upper=False)
    return white


def _beyond(white: Tensor, times: float, positions: int, *, least: int) -> Tensor:
    """Return the `(C, R)` left singular vectors whose values noise does not reach."""
    u, sizes, _ = torch.linalg.svd(white, full_matrices=False)
    channels, contrasts = white.shape
    edge = times * positions**0.5 * (channels**0.5 + contrasts**0.5)
    axes: Tensor = u[:, : max(least, int((sizes > edge).sum()))]
    return axes
