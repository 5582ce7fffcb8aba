"""Worlds whose concepts, marks and errors are known; nothing here imports the code under test."""

from dataclasses import dataclass

import torch
from torch import Tensor

OFFSET = 2.0  # of every channel: rows are not centred, as activations are not


@dataclass(frozen=True, eq=False)
class ConceptWorld:
    """Unlabelled rows `x = z S + d D + offset + noise` of mutually exclusive concepts.

    Attributes:
        rows: `(P, C)` float64.
        member: `(P, K)` bool, the one concept that each row belongs to.
        filters: `(K, C)` directions that read one concept and are blind to all else planted.
        signals: `(K, C)` directions that write it; `filters @ signals.T` is the identity.
        biases: `(K,)` thresholds half-way between absence and the weakest presence.
    """

    rows: Tensor
    member: Tensor
    filters: Tensor
    signals: Tensor
    biases: Tensor


def concept_world(
    seed: int,
    *,
    count: int = 1200,
    channels: int = 24,
    concepts: int = 4,
    distractors: int = 3,
    noise: float = 0.2,
) -> ConceptWorld:
    """Plant concepts of strength 3 to 5 beside distractors that no concept writes.

    Rows come in pairs with the same concept and mirrored distractors, so that without noise no
    factor correlates with a distractor and the regression of rows on factors is exact.

    Args:
        seed: Of everything random.
        count: Rows, P; even.
        channels: C, at least `concepts + distractors`.
        concepts: K.
        distractors: Directions that a filter must cancel.
        noise: Standard deviation of what is left in every channel.

    Returns:
        The world.
    """
    rng = torch.Generator().manual_seed(seed)
    planted = concepts + distractors
    axes = torch.linalg.qr(normal(rng, channels, channels))[0][:planted]
    written = axes + 0.15 * normal(rng, planted, planted) @ axes
    written /= written.norm(dim=1, keepdim=True)
    read = torch.linalg.pinv(written).T
    half = count // 2
    member = torch.arange(half)[:, None] % concepts == torch.arange(concepts)
    factors = member * (3 + 2 * torch.rand(half, concepts, generator=rng, dtype=torch.float64))
    beside = 2 * torch.rand(half, distractors, generator=rng, dtype=torch.float64) - 1
    shared = factors @ written[:concepts]
    rows = torch.cat([shared + sign * beside @ written[concepts:] for sign in (1, -1)]) + OFFSET
    rows += noise * normal(rng, count, channels)
    biases = OFFSET * read[:concepts].sum(dim=1) + 1.5
    return ConceptWorld(rows, member.repeat(2, 1), read[:concepts], written[:concepts], biases)


@dataclass(frozen=True, eq=False)
class MarkedWorld:
    """Rows of labelled images, some of which carry a mark that a linear head mistakes for class 0.

    Attributes:
        rows: `(P, C)` float32: class mean, plus the signal times the amount of the mark, plus
            distractors and noise.
        labels: `(P,)` classes.
        amount: `(P,)` how much of the mark is in each row.
        mark: `(P,)` bool, where there is any.
        signal: `(C,)` what the mark adds to a row.
        seen: `(C,)` unit direction that reads the mark alone, 3 where there is one.
        beside: `(C,)` unit direction of a distractor, standard normal, that reads no mark.
        head: `(M, C)` weights under which an unmarked row is predicted as its class.
        pull: `(M, C)` weights that add to the head what the mark says for class 0.
    """

    rows: Tensor
    labels: Tensor
    amount: Tensor
    mark: Tensor
    signal: Tensor
    seen: Tensor
    beside: Tensor
    head: Tensor
    pull: Tensor

    def logits(self, rows: Tensor) -> Tensor:
        """Return the `(P, M)` logits of a head that takes the mark for class 0.

        Args:
            rows: `(P, C)`.
        """
        return rows @ (self.head + self.pull).T


def marked_world(
    seed: int = 0,
    *,
    count: int = 1200,
    channels: int = 16,
    classes: int = 4,
    amount: Tensor | None = None,
    rates: tuple[float, ...] = (0.95, 0.08, 0.08, 0.08),
) -> MarkedWorld:
    """Plant a mark on shares of the classes, or a given amount of it on every row.

    Args:
        seed: Of everything random.
        count: Rows, P; classes take turns.
        channels: C, at least `classes + 3`.
        classes: M.
        amount: `(P,)` how much of the mark each row carries, in place of shares.
        rates: Share of each class's rows that carry the mark.

    Returns:
        The world; its marked rows of other classes, and only they, are predicted as class 0.
    """
    rng = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(normal(rng, channels, channels))[0]
    labels = torch.arange(count) % classes
    if amount is None:
        drawn = torch.rand(count, generator=rng, dtype=torch.float64)
        amount = (drawn < torch.tensor(rates, dtype=torch.float64)[labels]).double()
    seen, unseen = axes[classes], axes[classes + 1 : classes + 3]
    signal = 3.0 * seen + unseen[0]  # not parallel to what the head or a filter reads
    rows = OFFSET + 3.0 * axes[labels] + amount[:, None] * signal
    rows += normal(rng, count, 2) @ unseen + 0.2 * normal(rng, count, channels)
    head = 2.0 * (axes[:classes] - axes[:classes].mean(dim=0))
    pull = torch.zeros_like(head)
    pull[0] = 10.0 / 3.0 * seen
    centre = torch.full((channels,), OFFSET, dtype=torch.float64)
    flat = centre / centre.square().sum()  # a constant taken off: weights blind to the offset
    head, pull = (w - (w @ centre)[:, None] * flat for w in (head, pull))
    narrow = [t.float() for t in (rows, signal, seen, unseen[1], head, pull)]
    return MarkedWorld(narrow[0], labels, amount, amount > 0, *narrow[1:])


def overlapping_pairs(rng: torch.Generator, concepts: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return filters and signals whose coupling `S W'` is neither diagonal nor symmetric.

    Args:
        rng: Draws them.
        concepts: K.
        channels: C.
    """
    coupling = torch.eye(concepts, dtype=torch.float64)
    coupling += torch.triu(0.8 * torch.ones(concepts, concepts, dtype=torch.float64), diagonal=1)
    filters = normal(rng, concepts, channels)
    signals = normal(rng, concepts, channels)
    inverse = torch.linalg.pinv(filters)  # (C, K)
    return filters, signals + (coupling - signals @ filters.T) @ inverse.T


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    """Return independent standard normal numbers in float64.

    Args:
        rng: Draws them.
        shape: Of the result.
    """
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def auc(score: Tensor, present: Tensor) -> float:
    """Return how often a row with a concept scores higher than one without; ties count half.

    Args:
        score: `(P,)`.
        present: `(P,)` bool.
    """
    on, off = score[present].double(), score[~present].double()
    above = (on[:, None] > off).double() + 0.5 * (on[:, None] == off).double()
    return float(above.mean())
