"""Stage 4b: what is projected out of the rows now, and how it is kept true and baked.

Nothing here knows why concepts are corrected, or whether they should be.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from concept_guard.config import GuardConfig
from concept_guard.correction import (
    LARGEST_WEIGHT,
    Gate,
    Projection,
    bake_into,
    calibrated,
    check_bakeable,
    grouped,
    losses_without,
    projection,
    weight_table,
)
from concept_guard.directions import Subspace, joint_subspace
from concept_guard.probe import Batches
from concept_guard.reading import Reading
from concept_guard.refit import refit
from concept_guard.taps import Tap
from concept_guard.tracking import Tracked


class Erasure:
    """Keeps the tap's edit in step with what the presence of concepts changes in rows.

    Args:
        tap: Where rows are read and edited.
        probe: The probe, from which the subspace is estimated.
        config: Settings of the guard; nothing is edited unless `project` is among its actions.

    Attributes:
        subspace: Of all concepts under correction, together.
        settled: Whether the network is as it was when that was estimated; who trains the network
            says otherwise.
    """

    def __init__(self, tap: Tap, probe: Batches, config: GuardConfig) -> None:
        self._tap, self._probe, self._config = tap, probe, config
        self.subspace: Subspace | None = None
        self._strength = config.strength
        self.settled = False

    @property
    def acting(self) -> bool:
        """Whether something is projected out now."""
        return self._tap.edit is not None

    @property
    def adapting(self) -> bool:
        """Whether the classifier learns now to do without what is projected out."""
        return self._tap.edit is not None and self._tap.classifier is not None

    def losses_without(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the losses of training samples with the concepts projected out.

        Args:
            rows: `(B, Q, C)` activations of the batch, before any correction.
            labels: `(B,)` classes.

        Returns:
            `(B,)` losses, see `correction.losses_without`.

        Raises:
            ValueError: If nothing is projected out in front of a linear map.
        """
        head, edit = self._tap.classifier, self._tap.edit
        if head is None or edit is None:
            raise ValueError("nothing is projected out in front of a linear map")
        return losses_without(rows, labels, head, edit)

    def take_out(self, concepts: Sequence[Tracked], reading: Reading | None) -> None:
        """Project these concepts out from now on, and no other.

        If activations are not finite, a `ValueError` says so and nothing is changed.

        Args:
            concepts: With their carriers among the images of the probe.
            reading: Of the probe; None reads it anew if there are concepts.
        """
        subspace = None
        if concepts:
            reading = self._read() if reading is None else reading
            subspace = self._estimated(reading, [carriers_in(t, reading) for t in concepts])
        self.put_back(subspace, concepts)
        self.settled = True

    def seen_in(
        self, concepts: Sequence[Tracked], reading: Reading, at: Tensor
    ) -> Projection | None:
        """Return what would be projected out if the probe were only some of its images.

        Args:
            concepts: With their carriers among the images of the probe.
            reading: Of the probe.
            at: `(n,)` positions of these images in the reading.

        Returns:
            The projection, None if there is nothing to take out; it does not act.
        """
        present = [carriers_in(t, reading)[at.to(t.carriers.device)] for t in concepts]
        subspace = self._estimated(reading.part(at), present)
        gate = self._gate(concepts)
        return None if subspace is None else projection(subspace, self._strength, gate)

    def put_back(self, subspace: Subspace | None, concepts: Sequence[Tracked]) -> None:
        """Project a subspace out as it was estimated before.

        Args:
            subspace: Or None for nothing.
            concepts: Whose subspace it is.
        """
        self.subspace = subspace
        if subspace is None or "project" not in self._config.action:
            self._tap.edit = None
        else:
            self._tap.edit = projection(subspace, self._strength, self._gate(concepts))

    def follow(self, concepts: Sequence[Tracked]) -> None:
        """Have a gate read rows by the pairs of concepts as they are now.

        Args:
            concepts: Those that are projected out, in the same order.
        """
        edit, gate = self._tap.edit, self._gate(concepts)
        if isinstance(edit, Projection) and edit.gate is not None and gate is not None:
            for name in ("filters", "thresholds", "widths"):  # in place: nothing recompiles
                getattr(edit.gate, name).copy_(getattr(gate, name))

    def _gate(self, concepts: Sequence[Tracked]) -> Gate | None:
        return Gate(concepts) if self._config.gate and concepts else None

    def strengthen(self, strength: float) -> None:
        """Take another share of the excess factors away from now on.

        Args:
            strength: In [0, 1].
        """
        if strength == self._strength:
            return
        self._strength, edit = strength, self._tap.edit
        if self.subspace is not None and isinstance(edit, Projection):
            edit.moves.copy_(strength * self.subspace.signals)  # in place: nothing recompiles

    def settle(self, concepts: Sequence[Tracked]) -> None:
        """Estimate anew what is projected out, if the network moved since it was estimated.

        If activations are not finite, a `ValueError` says so and nothing is changed.

        Args:
            concepts: Those that are projected out.
        """
        _ = self._tap.classifier  # says so if it was replaced
        if concepts and not self.settled and "project" in self._config.action:
            self.take_out(concepts, None)

    def of(self, reading: Reading, concepts: Sequence[Tracked]) -> Projection | None:
        """Return the projection that takes concepts out, without acting on it.

        Args:
            reading: Rows and labels of the probe.
            concepts: With the rows that carry them.

        Returns:
            The projection, None if there is nothing to take out.
        """
        subspace = _subspace(reading, [t.carriers for t in concepts])
        gate = self._gate(concepts)
        return None if subspace is None else projection(subspace, self._config.strength, gate)

    def _estimated(self, reading: Reading, present: Sequence[Tensor]) -> Subspace | None:
        """Return the subspace of concepts as a reading shows it, at the level that fits it."""
        subspace, classifier = _subspace(reading, present), self._tap.classifier
        if subspace is None or classifier is None or self._config.gate:
            return subspace  # a gate leaves rows without a concept where they are
        carried = torch.stack(list(present)).any(dim=0)[:, 0].to(reading.rows.device)
        rows, labels = reading.rows[:, 0], reading.labels
        return calibrated(subspace, rows, labels, carried, classifier)

    def bake(self, concepts: Sequence[Tracked]) -> str:
        """Fit the linear map behind the tap again and fold the projection into it.

        Copies of the model, whose maps are not touched, keep the projection in their hooks.
        Where folding cannot be exact, a `BakeError` says why and nothing is changed.

        Args:
            concepts: Those under correction.

        Returns:
            What was done about the map, as a clause; empty if `refit` is not among the actions.
        """
        edit, done = self._tap.edit, ""
        if not isinstance(edit, Projection):
            return self._refit(concepts, None) if "refit" in self._config.action else done
        classifier = check_bakeable(self._tap.classifier, self._config.tap, edit)
        if "refit" in self._config.action:
            done = self._refit(concepts, edit)
        bake_into(classifier, edit)
        self._tap.leave_edit_to_copies()
        return done

    def _refit(self, concepts: Sequence[Tracked], edit: Projection | None) -> str:
        """Return what became of the attempt to fit the classifier to the probe."""
        classifier = self._tap.classifier
        if classifier is None or classifier.bias is None:
            return "classifier not refitted: no plain linear map with a bias follows the tap"
        try:
            reading = self._read()
        except ValueError as error:
            return f"classifier not refitted: {error}"
        rows = (reading.rows if edit is None else edit(reading.rows))[:, 0]
        for weights in _weightings(reading, concepts):
            found = refit(rows, reading.labels, weights, classifier, seed=self._config.seed)
            if concepts or found.broken <= found.mended:
                break
        if not found.supported:
            return f"classifier not refitted: {found}"
        with torch.no_grad():
            classifier.weight.copy_(found.weight)
            classifier.bias.copy_(found.bias)
        return f"classifier refitted to the probe: {found}"

    def _read(self) -> Reading:
        """Return a reading of the whole probe as the network is now.

        Raises:
            ValueError: If its activations are not finite.
        """
        reading = self._tap.read(
            self._probe, max_rows=self._config.max_rows, seed=self._config.seed
        )
        if not bool(torch.isfinite(reading.rows).all()):
            raise ValueError(
                f"activations at tap {self._config.tap!r} hold NaN or infinite values on the "
                "probe, expected finite ones; lower the learning rate"
            )
        return reading


def _weightings(reading: Reading, concepts: Sequence[Tracked]) -> Iterator[Tensor]:
    """Yield `(N,)` how much each image counts in a refit, mean 1; the first that serves is kept.

    In every class the images with and without a concept under correction weigh the same in all.
    Where there is none, an image that is predicted wrong counts up to five times as much as one
    that is right: what misleads the network is rare, or it would not have been learnt, and no
    concept may explain it. If that costs more held-out images than it mends, all count alike.

    Source: Liu et al. (2021), arXiv 2107.09044 (errors in place of groups that nobody knows).
    Departure: among held-out images, only for the classifier, and bounded. On glyphs with a
    watermark, five networks, .828 of the marked images were right with all images alike, .864 so
    and .858 with as much weight on the errors as on all others; .958, .949, .933 of the clean ones.
    Glyphs and digits without a shortcut: .973, .962, .933 and .988, .986, .977 (one network each),
    and there held-out images speak against it.
    """
    labels, classes = reading.labels, reading.logits.shape[1]
    if concepts:
        present = [carriers_in(t, reading).any(dim=1) for t in concepts]
        rare, most = torch.stack(present).any(dim=0).to(labels.device), math.inf
    else:
        rare, most = reading.logits.argmax(dim=1) != labels, LARGEST_WEIGHT
    table = weight_table(grouped(labels, rare, classes), most)
    yield table.to(labels.device)[labels, rare.long()]
    yield torch.ones_like(labels, dtype=table.dtype)


def _subspace(reading: Reading, present: Sequence[Tensor]) -> Subspace | None:
    positions = reading.rows.shape[1]
    carried = torch.stack([p.flatten() for p in present], dim=1).to(reading.rows.device)
    labels = reading.labels.repeat_interleave(positions)
    return joint_subspace(reading.rows.flatten(0, 1), labels, carried, positions=positions)


def carriers_in(tracked: Tracked, reading: Reading) -> Tensor:
    """Return which rows of a reading carry a concept: those it knows, or as its pair reads them.

    Args:
        tracked: The concept.
        reading: Of the probe.

    Returns:
        `(N, Q)` bool.
    """
    if tracked.carriers.shape == reading.rows.shape[:2]:
        return tracked.carriers
    return tracked.read(reading.rows)
