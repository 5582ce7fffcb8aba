"""Worlds whose concepts, marks and errors are known; nothing here imports the code under test."""

import math
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize, one_hot

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


@dataclass(frozen=True, eq=False)
class MixtureWorld:
    """Unlabelled rows `x = a S + offset + what no concept writes` of concepts that may overlap.

    Attributes:
        rows: `(P, C)` float64.
        present: `(P, K)` bool, which concepts each row carries.
        amounts: `(P, K)` how much of each it carries, a.
        signals: `(K, C)` unit directions that write them, S.
    """

    rows: Tensor
    present: Tensor
    amounts: Tensor
    signals: Tensor


def toy_world(seed: int, *, count: int = 1000) -> MixtureWorld:
    """Plant the toy of the source: one of three concepts in every row, and two distractors.

    An absent concept has an amount of 0 to 2.5, a present one 2.5 to 5, a distractor 0 to 5, all
    uniform. No two of the five unit directions have an absolute cosine above .5. Images have two
    rows, of two different concepts.

    Source: arXiv 2509.23926, experiment on synthetic data.

    Args:
        seed: Of everything random.
        count: Images of each of the three pairs of concepts.

    Returns:
        The world, of 6 `count` rows and 16 channels.
    """
    rng = torch.Generator().manual_seed(seed)
    near = 1.0
    while near > 0.5:
        axes = normalize(normal(rng, 5, 16), dim=1)
        near = float((axes @ axes.T).fill_diagonal_(0).abs().max())
    pairs = torch.tensor([(0, 1), (0, 2), (1, 2)]).repeat_interleave(count, dim=0)
    present = one_hot(pairs.flatten(), 3).bool()
    spread = torch.rand(len(present), 3, generator=rng, dtype=torch.float64)
    amounts = 2.5 * spread + 2.5 * present
    beside = 5 * torch.rand(len(present), 2, generator=rng, dtype=torch.float64)
    return MixtureWorld(amounts @ axes[:3] + beside @ axes[3:] + 10, present, amounts, axes[:3])


def sparse_world(
    seed: int,
    *,
    count: int = 8000,
    channels: int = 24,
    concepts: int = 24,
    active: float = 3.0,
    correlated: bool = False,
    distractors: int = 0,
    noise: float = 0.02,
) -> MixtureWorld:
    """Plant concepts that few rows carry, in an amount of 1 to 2, beside normal distractors.

    Args:
        seed: Of everything random.
        count: Rows, P.
        channels: C.
        concepts: K; may be more than C.
        active: Concepts that a row carries on average.
        correlated: Whether four concepts at a time share half the variance that decides presence.
        distractors: Normal quantities of standard deviation 3, along directions of unit length.
        noise: Standard deviation of what is left in every channel.

    Returns:
        The world.
    """
    rng = torch.Generator().manual_seed(seed)
    signals = normalize(normal(rng, concepts, channels), dim=1)
    drive = normal(rng, count, concepts)
    if correlated:
        groups = max(1, concepts // 4)
        shared = normal(rng, count, groups)[:, torch.arange(concepts) % groups]
        drive = math.sqrt(0.5) * (drive + shared)
    rate = torch.tensor(active / concepts, dtype=torch.float64)
    present = drive > torch.special.ndtri(1 - rate)
    amounts = present * (1 + torch.rand(count, concepts, generator=rng, dtype=torch.float64))
    rows = amounts @ signals + normal(rng, channels) + noise * normal(rng, count, channels)
    if distractors:
        beside = normalize(normal(rng, distractors, channels), dim=1)
        rows += 3 * normal(rng, count, distractors) @ beside
    return MixtureWorld(rows, present, amounts, signals)


def whitened(rows: Tensor) -> Tensor:
    """Return rows centred and with unit covariance, in float64; empty axes are left out.

    Args:
        rows: `(P, C)`.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    keep = values > 1e-9 * values.max()
    return centred @ (axes[:, keep] / values[keep].sqrt())


def true_directions(white: Tensor, amounts: Tensor) -> Tensor:
    """Return `(K, R)` unit directions along which white rows tell most of each amount.

    Args:
        white: `(P, R)`.
        amounts: `(P, K)`.
    """
    centred = amounts.double() - amounts.double().mean(dim=0)
    return normalize(centred.T @ white.double(), dim=1)  # the covariance of the rows is one


def matched(truth: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Pair directions one to one; return the cosine and the position found of each true one.

    Args:
        truth: `(K, C)`.
        found: `(n, C)`, n at least K.
    """
    alike = normalize(truth.double(), dim=1) @ normalize(found.double(), dim=1).T
    at, to = linear_sum_assignment(alike.numpy(), maximize=True)
    return alike[at, to], torch.as_tensor(to)


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
