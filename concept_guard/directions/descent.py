"""Stage 2, find: direction pairs by descending the published objective, step by step.

Nothing here knows the closed-form engine, which is measured against this.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions import losses
from concept_guard.directions.alignment import Head, alignment
from concept_guard.directions.checks import faults
from concept_guard.directions.detectors import Free, Space, Tied, held, orthonormal
from concept_guard.directions.encoding import Estimator, signal_vectors
from concept_guard.directions.pairs import DirectionPairs
from concept_guard.directions.threads import few_threads

Start = Literal["orthonormal", "random"]
LARGEST = 0.99  # of all rows that a ceiling may allow one concept
BETAS = (0.9, 0.99)
MINIMISED = {"sparsity", "bound", "alignment"}  # other terms have limits
LEAST_SHARE, MOST_SHARE = 0.5, 0.9  # of the move to where all detectors are undecided


@dataclass(frozen=True)
class Schedule:
    """Weights, limits and lengths of the three descents: orthonormal, free, joint.

    Terms with a weight are minimised; terms with a limit only have to stay below it, by an
    augmented Lagrangian. Tuples hold one entry per descent.

    Source: arXiv 2509.23926, appendix: the augmented Lagrangian and the limits of its toy.
    Departure: its weighted sum (table 7, meant for 500 concepts) is not offered: after 3,000
    updates it had all three concepts of the toy at IoU > .9 in 2 of 5 seeds; the Lagrangian,
    after 2,000, in 10 of 10.
    Departure: the inactive classifier term is limited to .02, not .1, which lets every concept
    miss a tenth of its rows (IoU .84-.97 on the toy; .98-.99 with .02).
    Departure: 2,000 updates on batches of 1,000 images, not 20,000 epochs: 8 s on one core, with
    IoU .984 at least, RMSE of signal values .194 at most and cosine of encoders .986 at least.

    Attributes:
        sparsity: Weight of the sparsity term.
        bound: Weight of the sparsity bound, from the free descent on.
        alignment: Weight of the uncertainty region alignment, which needs a head.
        max_activation: Limit of the maximum activation term, in bits.
        margin: Limit of the mean length of filters, for rows of unit mean channel variance.
        inactive: Limit of the inactive classifier term.
        excessive: Limit of the excessively active classifier term, from the free descent on.
        cross_reading: Limit of the filter-signal orthogonality term, in the joint descent.
        tau: Share of all rows that is spread over the concepts as least support; 1 where every
            row carries a concept (the toy), .9, .9 and .2 with 500 concepts.
        crowd: Largest support as a multiple of the least.
        updates: Numbers of updates.
        rates: Adam's learning rates; each falls to a tenth over the second half of its descent.
        penalty: Stiffness of the limits. On the toy 10 ends in filters that cancel the other
            concepts instead of not reading them (cosine of encoders .5) in 2 of 3 seeds, 1 in 1
            of 10, .3 in none.
        patience: Updates over which a violated limit gains its penalty once more as weight.
        refresh: Updates between two estimates of the signal vectors in the joint descent.
        batch: Images per update.
    """

    sparsity: float = 1.0
    bound: float = 1.0
    alignment: float = 1.0
    max_activation: float = 0.8
    margin: float = 8.0
    inactive: float = 0.02
    excessive: float = 0.1
    cross_reading: float = 0.1
    tau: tuple[float, float, float] = (1.0, 1.0, 1.0)
    crowd: float = 1.5
    updates: tuple[int, int, int] = (600, 0, 1400)
    rates: tuple[float, float, float] = (0.01, 0.005, 0.005)
    penalty: float = 0.3
    patience: int = 50
    refresh: int = 10
    batch: int = 1000


def descend_pairs(
    rows: Tensor,
    *,
    concepts: int,
    head: Head | None = None,
    seed: int = 0,
    schedule: Schedule | None = None,
    start: Start | DirectionPairs = "orthonormal",
    aligned: bool = True,
    free_signals: bool = False,
    estimator: Estimator = "positives",
    pooled: bool = True,
) -> DirectionPairs:
    """Find direction pairs by gradient descent, as published.

    1. Orthonormal filters of standardised rows with one margin and one threshold for all.
    2. Free filters with own margins and thresholds; the sparsity bound and a ceiling of support.
    3. Signal vectors in closed form, from the rows where a concept is present.
    4. Filters and signal vectors together: filters must not read others' signals, and where all
       detectors are undecided, reached along the signals, the network must be undecided.

    The same arguments on the same device give the same bits. The head is left as it is: no
    gradient is gathered on its parameters.

    Source: arXiv 2509.23926, section 4 and appendices D to F.
    Departure: signal vectors are re-estimated in closed form every few updates of step 4, not
    trained, as the source does not say what ties trained ones to the rows. On its toy, 10 seeds,
    trained ones end at cosines to the encoders of .36-.74, re-estimated ones at .986-.999.
    Without alignment all three concepts are found in 4 of the 10 seeds, with it in 10.
    Departure: rows are divided by one number, the root of their mean channel variance, after
    step 1 too, so that weights and limits do not depend on the scale of a network.

    Args:
        rows: `(P, C)` activations, each row an image, or `(N, Q, C)`, Q rows per image.
        concepts: Number of pairs, K; at least 2. More than C cannot start orthonormal and start
            as unit filters.
        head: The rest of the network, to `(B, M)` logits: from `(B, C)` mean rows of images if
            `pooled` or there is one row per image, otherwise from `(B, Q, C)`. None leaves the
            alignment out.
        seed: Draws the first filters, the batches, and how far rows are moved.
        schedule: Weights, limits and lengths; those that suit the source's toy if not given.
        start: `random` skips step 1: filters are random, of rows that are centred only, and its
            updates go to step 2. Pairs, such as those of `fit_pairs`, skip steps 1 and 2.
        aligned: False leaves the alignment out although there is a head.
        free_signals: True trains the signal vectors of step 4 as parameters, from the estimate.
        estimator: Of the signal vectors, see `signal_vectors`.
        pooled: Whether the head is what follows an average over the rows of an image.

    Returns:
        K pairs in the coordinates of the rows, in float32; factors have the margins that were
        found.

    Raises:
        ValueError: Rows are not finite, do not vary or have no such shape, or `concepts` is
            below 2 or above their number.
    """
    if rows.ndim not in {2, 3} or not rows.is_floating_point():
        kind = f"{tuple(rows.shape)} {rows.dtype}"
        raise ValueError(f"rows: got {kind}, expected floating (P, C) rows or (N, Q, C) images")
    wrong = faults(rows.flatten(0, -2), concepts)
    if wrong:
        raise ValueError("; ".join(wrong))
    images = (rows[:, None] if rows.ndim == 2 else rows).detach().float()
    task = _Task(
        images,
        head=head if aligned else None,
        pooled=pooled or rows.ndim == 2,
        plan=schedule or Schedule(),
        estimator=estimator,
        generator=torch.Generator().manual_seed(seed),
    )
    own_precision = torch.autocast(rows.device.type, enabled=False)
    with few_threads(rows.numel()), own_precision, torch.enable_grad():
        return _run(task, concepts, start, free_signals)


@dataclass(frozen=True, eq=False)
class _Task:
    """What all descents have in common."""

    images: Tensor
    head: Head | None
    pooled: bool
    plan: Schedule
    estimator: Estimator
    generator: torch.Generator

    def batch(self) -> Tensor:
        """Return all images, or a random batch when there are more than fit one."""
        count, size = len(self.images), self.plan.batch
        if count <= size:
            return self.images
        pick = torch.randint(count, (size,), generator=self.generator)
        return self.images[pick.to(self.images.device)]

    def drawn(self, concepts: int) -> Tensor:
        drawn = torch.randn(concepts, self.images.shape[-1], generator=self.generator)
        return drawn.to(self.images.device)


def _run(
    task: _Task, concepts: int, start: Start | DirectionPairs, free_signals: bool
) -> DirectionPairs:
    """Return the result of all steps."""
    space = Space.of(task.images)
    first, second, third = task.plan.updates
    if isinstance(start, DirectionPairs):
        filters, biases = space.own(start.filters.to(space.mean), start.biases.to(space.mean))
        second = 0
    elif start == "orthonormal":
        filters, biases = space.own(*_orthonormal_step(task, concepts))
    else:
        filters = normalize(task.drawn(concepts), dim=1)
        biases, second = torch.zeros_like(filters[:, 0]), first + second
    filters, biases = _Step(task, space, 1).descend(Free(filters, biases), second)
    joint = _Step(task, space, 2, refreshed=not free_signals)
    signals = joint.signals(task.images, filters, biases)
    filters, biases = joint.descend(Free(filters, biases), third, signals)
    if not free_signals:
        signals = joint.signals(task.images, filters, biases)
    filters, biases = space.raw(filters, biases)
    return DirectionPairs(filters, signals * space.size, biases)


def _orthonormal_step(task: _Task, concepts: int) -> tuple[Tensor, Tensor]:
    """Return filters and biases of step 1, for rows as they came."""
    space = Space.of(task.images, each=True)
    filters = orthonormal(task.drawn(concepts))
    factors = (space.inward(task.batch()).flatten(0, 1) @ filters.mT).flatten()
    absent = 1 - min(task.plan.tau[0] / concepts, 1.0)
    threshold = factors.sort().values[int(absent * (len(factors) - 1))]
    return space.raw(*_Step(task, space, 0).descend(Tied(filters, threshold), task.plan.updates[0]))


@dataclass(frozen=True, eq=False)
class _Step:
    """One descent: orthonormal (0), free (1) or joint (2)."""

    task: _Task
    space: Space
    number: int
    refreshed: bool = False

    def descend(
        self, detectors: Tied | Free, updates: int, signals: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return filters and biases after the descent; signals not refreshed are trained."""
        plan, rate = self.task.plan, self.task.plan.rates[self.number]
        trained = [] if signals is None or self.refreshed else [signals]
        parameters = [p.requires_grad_() for p in detectors.parameters + trained]
        optimizer = torch.optim.Adam(parameters, lr=rate, betas=BETAS)
        multipliers: dict[str, Tensor] = {}
        for update in range(updates):
            images = self.task.batch()
            if self.refreshed and update % plan.refresh == 0:
                signals = self.signals(images, *held(detectors))
            terms = self.terms(images, *detectors.read(), signals)
            loss = self.weighed(terms) + self.limited(terms, multipliers)
            slopes = torch.autograd.grad(loss, parameters)  # leaves the head's parameters alone
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            optimizer.param_groups[0]["lr"] = rate * min(1.0, 1.9 - 1.8 * update / updates)
            optimizer.step()
            with torch.no_grad():
                detectors.settle()
        for parameter in parameters:
            parameter.requires_grad_(False)
        return held(detectors)

    def signals(self, images: Tensor, filters: Tensor, biases: Tensor) -> Tensor:
        rows = self.space.inward(images).flatten(0, 1)
        return signal_vectors(rows, filters, biases, self.task.estimator)

    def terms(
        self, images: Tensor, filters: Tensor, biases: Tensor, signals: Tensor | None
    ) -> dict[str, Tensor]:
        """Return every term that the step weighs or limits."""
        plan, batch = self.task.plan, self.space.inward(images)
        factors = batch.flatten(0, 1) @ filters.mT - biases
        least = plan.tau[self.number] / len(filters)
        terms = {
            "sparsity": losses.sparsity(factors).mean(),
            "max_activation": losses.max_activation(factors).mean(),
            "inactive": losses.inactive(factors, least),
            "margin": losses.margin(filters),
        }
        if self.number > 0:
            terms["bound"] = losses.sparsity_bound(factors)
            terms["excessive"] = losses.excessive(factors, min(plan.crowd * least, LARGEST))
        if signals is not None:
            terms["cross_reading"] = losses.cross_reading(filters, signals)
        if self.task.head is not None:
            moves = (filters, biases, signals)
            terms["alignment"] = self.alignment(batch, self.task.head, *moves)
        return terms

    def alignment(
        self, batch: Tensor, head: Head, filters: Tensor, biases: Tensor, signals: Tensor | None
    ) -> Tensor:
        drawn = torch.rand(len(batch), generator=self.task.generator).to(batch)
        return alignment(
            batch,
            filters,
            biases,
            head=lambda moved: head(self.space.outward(moved)),
            share=LEAST_SHARE + (MOST_SHARE - LEAST_SHARE) * drawn,
            signals=signals,
            pooled=self.task.pooled,
        )

    def weighed(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms that are minimised."""
        weights = [
            (getattr(self.task.plan, name), name) for name in sorted(MINIMISED) if name in terms
        ]
        return torch.stack([weight * terms[name] for weight, name in weights]).sum()

    def limited(self, terms: dict[str, Tensor], multipliers: dict[str, Tensor]) -> Tensor:
        """Return what the limits add to the objective, and move their multipliers."""
        plan = self.task.plan
        added = []
        for name in sorted(terms.keys() - MINIMISED):
            violation = terms[name] / getattr(plan, name) - 1
            multiplier = multipliers.get(name, torch.zeros_like(violation))
            added.append(losses.limited(violation, multiplier, plan.penalty))
            gain = plan.penalty / plan.patience * violation.detach()
            multipliers[name] = torch.relu(multiplier + gain)
        return torch.stack(added).sum()
