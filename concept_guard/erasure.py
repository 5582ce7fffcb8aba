"""Stage 4b: what is projected out of the rows now, and how it is kept true.

Nothing here knows why concepts are corrected, or whether they should be.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from concept_guard.config import GuardConfig
from concept_guard.correction import (
    Gate,
    Projection,
    calibrated,
    losses_without,
    projection,
)
from concept_guard.directions import Subspace, joint_subspace
from concept_guard.probe import Batches
from concept_guard.reading import Reading
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
            reading = whole(self._tap, self._probe, self._config) if reading is None else reading
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

    def settle(self, concepts: Sequence[Tracked]) -> Reading | None:
        """Estimate anew what is projected out, if the network moved since it was estimated.

        If activations are not finite, a `ValueError` says so and nothing is changed.

        Args:
            concepts: Those that are projected out.

        Returns:
            The reading of the probe from which it was estimated; None if there was no need.
        """
        _ = self._tap.classifier  # says so if it was replaced
        if not concepts or self.settled or "project" not in self._config.action:
            return None
        reading = whole(self._tap, self._probe, self._config)
        self.take_out(concepts, reading)
        return reading

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


def whole(tap: Tap, probe: Batches, config: GuardConfig) -> Reading:
    """Return a reading of the whole probe as the network is now.

    Args:
        tap: Where the network is read.
        probe: The probe.
        config: Settings of the guard.

    Returns:
        The reading.

    Raises:
        ValueError: If its activations are not finite.
    """
    reading = tap.read(probe, max_rows=config.max_rows, seed=config.seed)
    if not bool(torch.isfinite(reading.rows).all()):
        raise ValueError(
            f"activations at tap {config.tap!r} hold NaN or infinite values on the probe, expected "
            "finite ones; lower the learning rate"
        )
    return reading


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
