"""Stage 3d: why an image is predicted as it is, concept by concept, and what would change that.

Nothing here knows how concepts were found or which of them are flagged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from concept_guard.changes import Change, Levels, Logits, amounts_of, smallest_changes
from concept_guard.directions import DirectionPairs
from concept_guard.localisation import location_maps
from concept_guard.probe import Batches
from concept_guard.reading import check_counts
from concept_guard.taps import Tap

BATCH = 64  # images explained at a time
POINTS = 16  # of the path from the undecided point; one is exact where the logits are linear
TRIED = 8  # concepts whose change is tried where the logits are not linear, strongest first


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why one image is predicted as it is.

    `undecided + to_predicted.sum() + remainder` is the logit of the predicted class, and likewise
    for the true class.

    Attributes:
        predicted: The predicted class.
        label: The true class, None if it is not known.
        logits: `(M,)` of the model as it is.
        concepts: Ids of the K concepts.
        factors: `(K,)` latent factors, where the image has most of each.
        present: `(K,)` bool, which concepts the image carries.
        to_predicted: `(K,)` contributions to the logit of the predicted class.
        to_label: `(K,)` contributions to that of the true class, None if it is not known.
        usual: Of each of the two, the `(K,)` contributions that usual amounts of the concepts
            would make. What sets the image apart is the difference: where concepts exclude each
            other no row is near the undecided point, and the way from there is the same for all.
        undecided: Logits of the predicted and, if known, of the true class at the point where no
            concept is told to be present or absent.
        remainder: What the contributions leave of these logits: 0 but for rounding where they are
            linear in the rows, else the error of the path integral.
        flip: The smallest change of one concept that changes the prediction, None if none does.
        repair: The smallest that makes a wrong prediction right, None if none does.
        maps: Concept id to an `(h, w)` map of where it is, between 0 and 1, for the concept that
            speaks most for the prediction; empty if no map was asked for.
    """

    predicted: int
    label: int | None
    logits: Tensor
    concepts: tuple[int, ...]
    factors: Tensor
    present: Tensor
    to_predicted: Tensor
    to_label: Tensor | None
    usual: tuple[Tensor, ...]
    undecided: tuple[float, ...]
    remainder: tuple[float, ...]
    flip: Change | None
    repair: Change | None
    maps: dict[int, Tensor] = field(default_factory=dict)

    @property
    def driving(self) -> int | None:
        """Id of the concept that, more than usual, speaks for the predicted class.

        Where the prediction is wrong, for it and against the true class.
        """
        evidence = self.to_predicted - self.usual[0]
        if not len(evidence):
            return None
        if self.to_label is not None and self.label != self.predicted:
            evidence = evidence - (self.to_label - self.usual[1])
        return self.concepts[int(evidence.argmax())]


class Explainer:
    """Explains images by a round's concepts; reads their usual levels from the probe once.

    Args:
        tap: Where the concepts are read.
        probe: The probe.
        max_rows: Rows of the probe that are kept.
    """

    def __init__(self, tap: Tap, probe: Batches, max_rows: int) -> None:
        self._tap, self._probe, self._max_rows = tap, probe, max_rows
        self._levels: tuple[DirectionPairs, Levels] | None = None

    def explain(
        self,
        images: Tensor,
        labels: Tensor | None,
        pairs: DirectionPairs,
        ids: Sequence[int],
        *,
        maps: bool,
    ) -> list[Explanation]:
        """Explain what the model says about images.

        Args:
            images: `(N, ...)` images as the model takes them.
            labels: `(N,)` classes, or None; a `ProbeError` names labels that are no class.
            pairs: Direction pairs at the tap.
            ids: Ids of the pairs, in order.
            maps: Whether to find the place of the concept that speaks most for each prediction.

        Returns:
            One explanation per image.

        Raises:
            ValueError: If labels and images do not belong together.
        """
        if labels is not None:
            if labels.shape != images.shape[:1]:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}, images {tuple(images.shape)}; "
                    "expected one class per image"
                )
            check_counts([labels], self._tap.num_classes)
        levels = self._levels_of(pairs)
        return explain_images(self._tap, images, labels, pairs, ids, levels, maps=maps)

    def _levels_of(self, pairs: DirectionPairs) -> Levels:
        if self._levels is None or self._levels[0] is not pairs:
            rows = self._tap.read(self._probe, max_rows=self._max_rows, seed=0).rows
            self._levels = (pairs, Levels.of(pairs.factors(rows), pairs))
        return self._levels[1]


def explain_images(
    tap: Tap,
    images: Tensor,
    labels: Tensor | None,
    pairs: DirectionPairs,
    ids: Sequence[int],
    levels: Levels,
    *,
    maps: bool,
) -> list[Explanation]:
    """Explain what the model behind a tap says about images, with the tap's current edit.

    Args:
        tap: Where the concepts are read.
        images: `(N, ...)` images as the model takes them.
        labels: `(N,)` classes, or None.
        pairs: Direction pairs at the tap.
        ids: Ids of the pairs, in order.
        levels: Of these pairs, on the probe.
        maps: Whether to find the place of the concept that speaks most for each prediction.

    Returns:
        One explanation per image.
    """
    result: list[Explanation] = []
    for at in range(0, len(images), BATCH):
        some = images[at : at + BATCH]
        known = None if labels is None else labels[at : at + BATCH].to(tap.device)
        rows = tap.read(iter([(some, torch.zeros(len(some)).long())]), max_rows=2**62, seed=0).rows
        logits_of = behind(tap, some)
        linear = tap.classifier is not None
        told = explain(rows, known, pairs, ids, levels, logits_of, linear=linear)
        result += _located(tap, some, told, pairs) if maps else told
    return result


def behind(tap: Tap, images: Tensor) -> Logits:
    """Return a differentiable function from rows of images to logits, with the tap's current edit.

    Args:
        tap: Where the rows are read.
        images: `(N, ...)` the images, for taps that no linear map follows.

    Returns:
        Maps `(N, Q, C)` rows to `(N, M)` float32 logits.
    """
    head = tap.classifier
    if head is None:
        return lambda rows: tap.through(images, rows)

    def logits(rows: Tensor) -> Tensor:
        edited = rows if tap.edit is None else tap.edit(rows)
        flat = edited[:, 0].to(head.weight.dtype)
        return functional.linear(flat, head.weight, head.bias).float()

    return logits


def _located(
    tap: Tap, images: Tensor, told: list[Explanation], pairs: DirectionPairs
) -> list[Explanation]:
    """Return the explanations with the place of the concept that drives each prediction."""
    placed = list(told)
    for concept in {e.driving for e in told if e.driving is not None}:
        mine = [n for n, e in enumerate(told) if e.driving == concept]
        direction = pairs.filters[told[0].concepts.index(concept)]
        found = location_maps(tap, images[mine], direction)
        for n, where in zip(mine, found, strict=True):
            placed[n] = replace(told[n], maps={concept: where})
    return placed


def explain(
    rows: Tensor,
    labels: Tensor | None,
    pairs: DirectionPairs,
    ids: Sequence[int],
    levels: Levels,
    logits_of: Logits,
    *,
    linear: bool,
) -> list[Explanation]:
    """Explain the predictions of some images.

    With `v = (S W')^-1 (x W' - b)` a row is `x = u + v S`, where the undecided point u lies on
    all thresholds. A concept's contribution to a logit is the integral of the logit's slope along
    `v_i s_i` on the straight path from u to x, so that all contributions together are the
    difference of the logits at x and at u.

    Source: arXiv 2509.23926, section 3 (the uncertainty region), for u; Sundararajan, Taly and
    Yan (2017), ICML, section 3 (path integrals, completeness).

    Args:
        rows: `(N, Q, C)` activations of the images.
        labels: `(N,)` classes, or None.
        pairs: Direction pairs.
        ids: Ids of the pairs, in order.
        levels: Of these pairs, on the probe.
        logits_of: Maps `(N, Q, C)` rows to `(N, M)` logits; differentiable.
        linear: Whether it is linear, so that one point of the path is enough and the changes of
            all concepts can be tried.

    Returns:
        One explanation per image, without maps.
    """
    factors = pairs.factors(rows)
    amounts = amounts_of(factors, pairs)
    shift = amounts @ pairs.signals.to(amounts)
    undecided = (rows - shift).to(rows.dtype)
    with torch.no_grad():
        logits, middle = logits_of(rows), logits_of(undecided)
    predicted = logits.argmax(dim=1)
    asked = [predicted] if labels is None else [predicted, labels]
    points = 1 if linear else POINTS
    slopes = [_slopes(undecided, shift, k, logits_of, points) for k in asked]
    along = [slope.double() @ pairs.signals.double().T for slope in slopes]  # (N, Q, K)
    usual = [levels.amounts.double() * a.sum(dim=1) for a in along]
    given = [(amounts * a).sum(dim=1) for a in along]
    worth = given[0] - usual[0]
    if labels is not None:
        worth = worth - (given[1] - usual[1])
    order = worth.abs().sum(dim=0).argsort(descending=True).tolist()
    search = (pairs, ids, levels, logits_of, order if linear else order[:TRIED])
    flips = smallest_changes(rows, torch.full_like(predicted, -1), *search, linear=linear)
    repairs: list[Change | None] = [None] * len(rows)
    if labels is not None:
        repairs = smallest_changes(rows, labels, *search, linear=linear)
    begins, ends = (
        torch.stack([t.gather(1, k[:, None])[:, 0] for k in asked], 1) for t in (middle, logits)
    )
    left = ends - begins - torch.stack([c.sum(dim=1) for c in given], dim=1)
    return [
        Explanation(
            predicted=int(predicted[n]),
            label=None if labels is None else int(labels[n]),
            logits=logits[n].cpu(),
            concepts=tuple(ids),
            factors=factors[n].amax(dim=0).cpu(),
            present=(factors[n] > 0).any(dim=0).cpu(),
            to_predicted=given[0][n].float().cpu(),
            to_label=None if labels is None else given[1][n].float().cpu(),
            usual=tuple(u[n].float().cpu() for u in usual),
            undecided=tuple(begins[n].tolist()),
            remainder=tuple(left[n].tolist()),
            flip=flips[n],
            repair=repairs[n],
        )
        for n in range(len(rows))
    ]


def _slopes(
    undecided: Tensor, shift: Tensor, classes: Tensor, logits_of: Logits, points: int
) -> Tensor:
    """Return `(N, Q, C)` mean slopes of one logit per image on the path, by the midpoint rule."""
    slopes = torch.zeros_like(undecided)
    for point in range(points):
        share = (point + 0.5) / points
        at = (undecided + share * shift.to(undecided.dtype)).detach().requires_grad_()
        with torch.enable_grad():
            chosen = logits_of(at).gather(1, classes[:, None]).sum()
            slopes += torch.autograd.grad(chosen, at)[0] / points
    return slopes
