"""Stage 2, find: products of rows within classes, taken once for the presence of any concept.

Nothing here knows about concepts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from concept_guard.directions.threads import few_threads

FOLDS = 4


@dataclass(frozen=True, eq=False)
class Scatter:
    """Rows of which covariances within groups of each class follow without another product.

    The rows are centred in their classes before products are taken, so that little is lost by
    the difference between these and what the means of groups account for.

    Attributes:
        rows: `(P, C)` activations.
        labels: `(P,)` classes.
        strata: `(P,)` groups to be spread over all folds; None takes the classes.
        seed: Chooses the folds.
    """

    rows: Tensor
    labels: Tensor
    strata: Tensor | None = None
    seed: int = 0

    @cached_property
    def centred(self) -> Tensor:
        """The `(P, C)` rows less the mean of their class."""
        count, total = group_sums(self.rows, self.labels, int(self.labels.max()) + 1)
        means = (total / count.clamp_min(1)[:, None]).to(self.rows.dtype)
        return self.rows - means[self.labels]

    @cached_property
    def square(self) -> float:
        """Sum of the squares of the centred rows, the trace of their product."""
        return float(self.centred.to(torch.float64).square().sum())

    @cached_property
    def product(self) -> Tensor:
        """`(C, C)` sum of the products of centred rows, float64."""
        with few_threads(self.rows.numel()):
            return (self.centred.T @ self.centred).to(torch.float64)

    @cached_property
    def pieces(self) -> Sequence["Piece"]:
        """The rows fold by fold."""
        fold = folds(self.labels if self.strata is None else self.strata, self.seed)
        with few_threads(self.rows.numel()):
            return [self._piece((fold == k).nonzero().flatten()) for k in range(FOLDS)]

    def _piece(self, at: Tensor) -> "Piece":
        centred = self.centred[at]
        product = (centred.T @ centred).to(torch.float64)
        return Piece(at, self.rows[at], centred.to(torch.float64), product)


class Piece(NamedTuple):
    """The rows of one fold.

    Attributes:
        at: `(n,)` their positions.
        rows: `(n, C)` as they are.
        centred: `(n, C)` less the mean of their class, float64.
        product: `(C, C)` sum of the products of these, float64.
    """

    at: Tensor
    rows: Tensor
    centred: Tensor
    product: Tensor


def group_sums(rows: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Add up rows by group.

    Args:
        rows: `(P, C)` activations.
        group: `(P,)` group of each row.
        groups: Their number, G.

    Returns:
        `(G,)` counts and `(G, C)` sums, both float64.
    """
    count = torch.bincount(group, minlength=groups).to(torch.float64)
    total = torch.zeros((groups, rows.shape[1]), dtype=torch.float64, device=rows.device)
    total.index_add_(0, group, rows.to(torch.float64))
    return count, total


def folds(group: Tensor, seed: int) -> Tensor:
    """Spread every group over all folds.

    Args:
        group: `(P,)` group of each row or image.
        seed: Chooses among the members of a group.

    Returns:
        `(P,)` the fold of each.
    """
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    order = order[group.cpu()[order].argsort(stable=True)]
    fold = torch.empty(len(group), dtype=torch.long)
    fold[order] = torch.arange(len(group)) % FOLDS
    return fold.to(group.device)
