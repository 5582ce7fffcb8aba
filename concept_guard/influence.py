"""Stage 3a: what moving along an encoding direction does to rows, logits and predictions.

Nothing here knows how a concept was found or whether it will be corrected.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

NULLS = 199  # random directions; the smallest p-value is 1 / 200


def erase(
    rows: Tensor, filters: Tensor, signals: Tensor, reference: Tensor, *, strength: float = 1.0
) -> Tensor:
    """Set the latent factors of the given concepts to a reference value.

    Computes `x - strength (x W' - r) (S W')^-1 S`: the oblique projection that reads only
    through the filters and moves only along the signal vectors. At full strength the factors
    `x W'` equal the reference afterwards, and erasing twice changes nothing more.

    Source: P-ClArC and LEACE are the cases with one direction and with `w = C^-1 s`; the oblique
    form for direction pairs follows arXiv 2509.23926, constrained uncertainty region alignment.

    Args:
        rows: `(..., C)` activations, channels last.
        filters: `(K, C)` decoding directions W.
        signals: `(K, C)` encoding directions S, same order.
        reference: `(K,)` factor values `x . w` to leave behind.
        strength: Share of the way to go, in (0, 1].

    Returns:
        `(..., C)` activations in the dtype of `rows`.
    """
    step = steps(filters, signals)
    excess = rows.to(step.dtype) @ filters.to(step).T - reference.to(step)
    return (rows.to(step.dtype) - strength * (excess @ step)).to(rows.dtype)


def steps(filters: Tensor, signals: Tensor) -> Tensor:
    """Return how a row moves per unit of each factor: `(S W')^-1 S`.

    Args:
        filters: `(K, C)` decoding directions.
        signals: `(K, C)` encoding directions, same order.

    Returns:
        `(K, C)` float64 directions; the signal vectors themselves if they do not overlap.
    """
    w, s = filters.to(torch.float64), signals.to(torch.float64)
    moved: Tensor = torch.linalg.solve(s @ w.T, s)
    return moved


@dataclass(frozen=True)
class Effect:
    """What erasing one concept does on the probe.

    Attributes:
        fixed: Predictions that turn right.
        broken: Predictions that turn wrong.
        driven: Images of other classes with the concept that are predicted as its class.
        freed: Of these, the ones that are predicted otherwise.
        repaired: Of these, the ones that turn right.
        logit_change: Mean change of the wrong logit on them, 0 if there are none.
    """

    fixed: int
    broken: int
    driven: int
    freed: int
    repaired: int
    logit_change: float


def effect(
    before: Tensor, after: Tensor, labels: Tensor, present: Tensor, class_index: int
) -> Effect:
    """Compare predictions before and after erasing a concept.

    Args:
        before: `(N, M)` logits as they are.
        after: `(N, M)` logits with the concept erased.
        labels: `(N,)` classes.
        present: `(N,)` bool, which images carry the concept.
        class_index: The class the concept pulls towards.

    Returns:
        Counts of images and the change of the wrong logit.
    """
    was, now = before.argmax(dim=1), after.argmax(dim=1)
    driven = present & (labels != class_index) & (was == class_index)
    change = (after - before)[driven, class_index]
    return Effect(
        fixed=int(((was != labels) & (now == labels)).sum()),
        broken=int(((was == labels) & (now != labels)).sum()),
        driven=int(driven.sum()),
        freed=int((driven & (now != class_index)).sum()),
        repaired=int((driven & (now == labels)).sum()),
        logit_change=float(change.mean()) if len(change) else 0.0,
    )


@dataclass(frozen=True, eq=False)
class GlobalInfluence:
    """What inserting concepts does to the probabilities of the classes, over many images.

    Attributes:
        score: `(K, M)` share of the images on which the probability rises minus the share on which
            it falls, between -1 and 1.
        change: `(K, M)` mean change of the probability.
        p_value: `(K, M)` share of random directions that change it at least as much, two-sided.
    """

    score: Tensor
    change: Tensor
    p_value: Tensor


def global_influence(
    rows: Tensor,
    signals: Tensor,
    steps: Tensor,
    logits_of: Callable[[Tensor], Tensor],
    *,
    seed: int,
) -> GlobalInfluence:
    """Test which concepts move which class more than directions of the data at random do.

    Every position of every image is moved along the signal vector, by the same length for all
    concepts: the median of their steps. Random directions are what the pattern of presence
    becomes when presence is shuffled: normal with the covariance of the rows.

    Source: Pfau et al. (2021), RCAV (arXiv 2104.03782), section 3, and arXiv 2509.23926 for signal
    vectors in it.
    Departure: the test is about the mean change of the probability. That of the source, about the
    number of images on which it rises, says nothing behind a linear head, where one direction
    moves all images alike. P-values count the concept itself among the random directions, so that
    none is 0; the source needs 2.7e-7 and draws 100.

    Args:
        rows: `(N, Q, C)` activations.
        signals: `(K, C)` encoding directions.
        steps: `(K,)` multiples of them that lead from absence to presence.
        logits_of: Maps `(N, Q, C)` rows to `(N, M)` logits. Called K + 200 times.
        seed: Of the random directions.

    Returns:
        Scores and p-values.
    """
    lengths = steps.abs() * signals.norm(dim=1)
    length = lengths.median() if len(lengths) else steps.sum()
    flat = rows.flatten(0, 1)
    weights = torch.randn(NULLS, len(flat), generator=torch.Generator().manual_seed(seed))
    random = weights.to(flat) @ (flat - flat.mean(dim=0))
    before = logits_of(rows).softmax(dim=1)

    def changes(directions: Tensor) -> Tensor:
        moves = length * normalize(directions, dim=1)
        after = [logits_of(rows + move).softmax(dim=1) for move in moves.to(rows)]
        return torch.stack(after) - before if after else before[:0, None] * before

    with torch.no_grad():
        moved = changes(signals)
        change, by_chance = moved.mean(dim=1), changes(random).mean(dim=1).abs()
        beyond = (by_chance[None] >= change.abs()[:, None]).sum(dim=1)
        return GlobalInfluence(moved.sign().mean(dim=1), change, (beyond + 1) / (NULLS + 1))
