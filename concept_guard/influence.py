"""Stage 3a: what moving along an encoding direction does to rows, logits and predictions.

Nothing here knows how a concept was found or whether it will be corrected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions import WithinClassPair
from concept_guard.reading import Reading
from concept_guard.taps import Edit

NULLS = 199  # random directions; the smallest p-value is 1 / 200
CONTROLS, AS_LOW = 99, 4  # random directions, and how many may do as much: p <= .05
CONTROLLED = 8  # driven errors on which they are tried

# Maps an edit of the rows to the logits of the images at the given positions; None means all.
Tail = Callable[[Edit | None, Tensor | None], Tensor]


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


def random_directions(rows: Tensor, count: int, seed: int) -> Tensor:
    """Draw directions in which rows vary: what chance makes of an encoding direction.

    They are what the pattern of presence becomes when presence is shuffled over the rows: normal
    with their covariance.

    Args:
        rows: `(P, C)` activations.
        count: How many to draw.
        seed: Of the draw.

    Returns:
        `(count, C)` unit vectors in the dtype of `rows`.
    """
    weights = torch.randn(count, len(rows), generator=torch.Generator().manual_seed(seed))
    return normalize(weights.to(rows) @ (rows - rows.mean(dim=0)), dim=1)


def moved(pair: WithinClassPair, direction: Tensor, strength: float) -> Edit:
    """Return the edit that moves rows along a direction by their excess over absence.

    Args:
        pair: Reads the excess.
        direction: `(C,)` what is taken away per unit of it; the signal vector erases the concept.
        strength: Share of the way to go, in (0, 1].

    Returns:
        A function of `(..., C)` rows.
    """

    def edit(rows: Tensor) -> Tensor:
        x = rows.to(pair.filter.dtype)
        excess = x @ pair.filter - pair.absent
        return (x - strength * excess[..., None] * direction).to(rows.dtype)

    return edit


@dataclass(frozen=True)
class Control:
    """How the wrong logit moves on some driven errors, erased and moved as far elsewhere.

    Attributes:
        erased: Mean change along the signal vector.
        random: The same along random directions.
        filter: The same along the filter.
    """

    erased: float
    random: tuple[float, ...]
    filter: float

    @property
    def objection(self) -> str:
        """Why the concept is not held to cause the errors, or nothing."""
        as_low = sum(change <= self.erased for change in self.random)
        if as_low <= AS_LOW:
            return ""
        return (
            f"{as_low} of {len(self.random)} random directions of the same length move the wrong "
            f"logit down as far ({self.erased:+.2f})"
        )

    @property
    def grounds(self) -> str:
        """What speaks for the concept."""
        return (
            f"as far in {len(self.random)} random directions moves it by "
            f"{median(self.random):+.2f} (median) and {min(self.random):+.2f} at most, along the "
            f"filter by {self.filter:+.2f}"
        )


def control(
    reading: Reading,
    present: Tensor,
    driven: Tensor,
    pair: WithinClassPair,
    tail: Tail,
    class_index: int,
    strength: float,
    seed: int,
) -> Control:
    """Move some driven errors as far as erasing does: in random directions, and in the filter's.

    The random directions are those in which rows vary that have the same class and presence.

    Args:
        reading: Rows and labels of the probe.
        present: `(N, Q)` bool, which rows carry the concept.
        driven: `(N,)` bool, the errors it drives.
        pair: Its pair.
        tail: Maps an edit of the rows to logits.
        class_index: The class it pulls towards.
        strength: Share of the excess factor that is erased, in (0, 1].
        seed: Of the random directions.

    Returns:
        Changes of the logit of that class.
    """
    flat = reading.rows.flatten(0, 1)
    labels = reading.labels.repeat_interleave(reading.rows.shape[1])
    beside = flat - _group_means(flat, 2 * labels + present.flatten())
    at = driven.nonzero().flatten()[:CONTROLLED]
    length = pair.signal.norm()
    before = tail(None, at)

    def change(direction: Tensor) -> float:
        after = tail(moved(pair, length * direction, strength), at)
        return float((after - before)[:, class_index].mean())

    return Control(
        change(pair.signal / length),
        tuple(map(change, random_directions(beside, CONTROLS, seed))),
        change(normalize(pair.filter, dim=0)),
    )


def _group_means(rows: Tensor, group: Tensor) -> Tensor:
    """Return for every row the mean of its group."""
    count = torch.bincount(group)
    total = torch.zeros((len(count), rows.shape[1]), dtype=rows.dtype, device=rows.device)
    total.index_add_(0, group, rows)
    return (total / count.clamp_min(1)[:, None])[group]


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
    concepts: the median of their steps. The controls are `random_directions`.

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
    random = random_directions(rows.flatten(0, 1), NULLS, seed)
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
