"""Rows whose concepts are known: the source's toy and the harder worlds of the recovery benchmark.

Every world is rows = factors x signals (+ distractors) + noise + offset, with known presence. What
a method may know of it besides the rows is the number of concepts and the mean number of concepts
present per row. Nothing here knows about methods or scores.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

ACTIVE, MOST_OFTEN, NOISE, GROUP = 6, 0.25, 0.02, 8
DISTRACTOR_SD, DISTRACTOR_SHARE = 3.0, 8
DEPENDENCES = ("independent", "correlated", "exclusive")
TOY_CHANNELS, TOY_CONCEPTS, TOY_DISTRACTORS, TOY_IMAGES = 16, 3, 2, 1000
TOY_CLASSES = ((0, 1), (0, 2), (1, 2))


@dataclass(frozen=True, eq=False)
class World:
    """Rows and the truth about them.

    Attributes:
        rows: `(P, C)` float32 activations.
        signals: `(K, C)` float64 true encoding directions, unit length.
        factors: `(P, K)` float32 true signal values.
        present: `(P, K)` bool.
        nonnegative: Whether no row has a negative entry.
        distractors: Number of directions without a concept.
    """

    rows: Tensor
    signals: Tensor
    factors: Tensor
    present: Tensor
    nonnegative: bool = False
    distractors: int = 0

    @property
    def active(self) -> float:
        """Return the mean number of concepts present in a row."""
        return float(self.present.sum() / len(self.present))

    @cached_property
    def filters(self) -> Tensor:
        """Return the `(K, C)` best linear decoders: least squares from rows to signal values."""
        return least_squares(self.rows, self.factors)


@dataclass(frozen=True, eq=False)
class Toy(World):
    """The toy of the source, with its images.

    Attributes:
        decoders: `(K, C)` rows of the pseudo-inverse of signals and distractors together: they read
            their concept and nothing else, whatever its variance.
        labels: `(P / 2,)` classes; image `i` owns rows `2 i` and `2 i + 1`.
    """

    decoders: Tensor = torch.empty(0)
    labels: Tensor = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class Cell:
    """One kind of world.

    Attributes:
        channels: C.
        concepts: K.
        dependence: How presences hang together, one of `DEPENDENCES`.
        distractors: Whether C / 8 distractors of standard deviation 3 are added.
        nonnegative: Whether signals are sparse and non-negative, rows too, without offset.
    """

    channels: int
    concepts: int
    dependence: str
    distractors: bool = False
    nonnegative: bool = False

    def __str__(self) -> str:
        """Return the name under which results are stored."""
        kind = (
            "non-negative" if self.nonnegative else "distractors" if self.distractors else "plain"
        )
        return f"C={self.channels} K={self.concepts} {self.dependence} {kind}"


def cells(sizes: list[int]) -> list[Cell]:
    """Return all cells of the benchmark with the given numbers of channels."""
    out = []
    for c in sizes:
        for k in (c // 4, c, c * 3 // 2):
            for dependence in DEPENDENCES:
                out += [Cell(c, k, dependence, distractors) for distractors in (False, True)]
        for k in (c // 4, c):
            out += [Cell(c, k, d, nonnegative=True) for d in ("independent", "exclusive")]
    return out


def least_squares(rows: Tensor, targets: Tensor, ridge: float = 1e-9) -> Tensor:
    """Return the linear map from rows to targets, both centred.

    Args:
        rows: `(P, C)` activations.
        targets: `(P, K)` values to predict.
        ridge: Added to the covariance, as a share of the mean channel variance.

    Returns:
        `(K, C)` float64 filters.
    """
    mean, target_mean = rows.double().mean(0), targets.double().mean(0)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    cross = torch.zeros(rows.shape[1], targets.shape[1], dtype=torch.float64)
    for x, y in zip(rows.split(20_000), targets.split(20_000), strict=True):
        centred = x.double() - mean
        covariance += centred.T @ centred
        cross += centred.T @ (y.double() - target_mean)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-30)
    solved: Tensor = torch.linalg.solve(covariance, cross)
    return solved.T


def presence(cell: Cell, count: int, generator: torch.Generator) -> Tensor:
    """Draw which concepts are present.

    About 6 concepts are present per row, none of them in more than a quarter of the rows.
    Independent: a coin each. Correlated: thresholded Gaussians that share half of their variance
    within K / 4 groups. Exclusive: groups of 8 with at most one member present.

    Returns:
        `(count, K)` bool.
    """
    k, chance = cell.concepts, min(ACTIVE / cell.concepts, MOST_OFTEN)
    if cell.dependence == "independent":
        return torch.rand(count, k, generator=generator) < chance
    if cell.dependence == "correlated":
        group = torch.arange(k) % max(1, k // 4)
        shared = torch.randn(count, max(1, k // 4), generator=generator)[:, group]
        level = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * chance)).item()
        own = torch.randn(count, k, generator=generator)
        return math.sqrt(0.5) * (shared + own) > level
    groups = math.ceil(k / GROUP)
    some = torch.rand(count, groups, generator=generator) < min(GROUP * chance, 0.9)
    member = torch.randint(GROUP, (count, groups), generator=generator)
    chosen = one_hot(member, GROUP).bool() & some[:, :, None]
    return chosen.reshape(count, -1)[:, :k]


def world(cell: Cell, seed: int, count: int = 20_000) -> World:
    """Draw a world.

    Present concepts have signal values U(1, 2), absent ones 0; noise has standard deviation .02.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + cell.channels + cell.concepts)
    signals = torch.randn(cell.concepts, cell.channels, generator=generator)
    if cell.nonnegative:
        kept = torch.rand(signals.shape, generator=generator) < max(0.15, 6 / cell.channels)
        kept[torch.arange(cell.concepts), torch.arange(cell.concepts) % cell.channels] = True
        signals = signals.abs() * kept
    signals = normalize(signals, dim=1)
    present = presence(cell, count, generator)
    factors = (1 + torch.rand(present.shape, generator=generator)).mul_(present)
    rows = factors @ signals
    number = max(2, cell.channels // DISTRACTOR_SHARE) if cell.distractors else 0
    if number:
        written = normalize(torch.randn(number, cell.channels, generator=generator), dim=1)
        rows += DISTRACTOR_SD * torch.randn(count, number, generator=generator) @ written
    rows += NOISE * torch.randn(rows.shape, generator=generator)
    if cell.nonnegative:
        rows.clamp_(min=0)
    else:
        rows += torch.randn(cell.channels, generator=generator)
    return World(rows, signals.double(), factors, present, cell.nonnegative, number)


def toy(seed: int) -> Toy:
    """Draw the toy of the source: 16 channels, 3 concepts, 2 distractors, an offset of 10.

    Unit columns with pairwise |cosine| at most .5, drawn again until so; signal values U(2.5, 5)
    if present, U(0, 2.5) if absent; distractors U(0, 5); images of two rows with one concept each.

    Source: arXiv 2509.23926, section on synthetic data.
    """
    generator = torch.Generator().manual_seed(seed)
    number = TOY_CONCEPTS + TOY_DISTRACTORS
    while True:
        written = torch.randn(number, TOY_CHANNELS, generator=generator, dtype=torch.float64)
        written = normalize(written, dim=1)
        if (written @ written.T - torch.eye(number)).abs().max() <= 0.5:
            break
    labels = torch.arange(len(TOY_CLASSES)).repeat_interleave(TOY_IMAGES)
    present = one_hot(torch.tensor(TOY_CLASSES)[labels].flatten(), TOY_CONCEPTS).bool()
    factors = 2.5 * torch.rand(present.shape, generator=generator, dtype=torch.float64)
    factors += 2.5 * present
    beside = 5 * torch.rand(len(present), TOY_DISTRACTORS, generator=generator, dtype=torch.float64)
    rows = torch.cat([factors, beside], 1) @ written + 10
    decoders: Tensor = torch.linalg.pinv(written).T[:TOY_CONCEPTS]
    return Toy(
        rows.float(),
        written[:TOY_CONCEPTS],
        factors.float(),
        present,
        decoders=decoders,
        labels=labels,
    )


def drifted(rows: Tensor, seed: int, angle: float = 0.05) -> Tensor:
    """Return the rows after a small random rotation of their space, as a few updates cause.

    Args:
        rows: `(P, C)` activations.
        seed: Chooses the rotation.
        angle: Norm by which each axis moves, about; in radian.
    """
    generator = torch.Generator().manual_seed(seed)
    c = rows.shape[1]
    skew = torch.randn(c, c, generator=generator, dtype=torch.float64) / math.sqrt(2 * c)
    turn = torch.linalg.matrix_exp(angle * (skew - skew.T)).float()
    return rows @ turn
