"""Stage 4b: what is under correction now: tracked concepts, their references, human decisions.

Nothing here decides which concepts drive errors.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from concept_guard import state
from concept_guard.augmentation import Augmentation
from concept_guard.baking import bake, baked_copy
from concept_guard.benefit import Probation
from concept_guard.config import GuardConfig
from concept_guard.correction import GroupCounts
from concept_guard.directions import DirectionPairs
from concept_guard.erasure import Erasure, carriers_in
from concept_guard.flags import Candidate, Flag
from concept_guard.influence import Tail
from concept_guard.penalty import Penalty
from concept_guard.probe import Batches
from concept_guard.reading import Reading
from concept_guard.references import References
from concept_guard.rounds import Findings, as_tracked
from concept_guard.tail import tail_of
from concept_guard.taps import Tap
from concept_guard.tracking import Tracked
from concept_guard.trial import Trial, twin


class Corrector:
    """Holds the tracked concepts and keeps the tap's edit in step with them.

    Args:
        tap: Where rows are read and corrected.
        probe: The probe, for reference images.
        config: Settings of the guard.
        ramp: Updates over which the strength of the correction grows; 0 for none.

    Attributes:
        tracked: Concepts under correction, in the order in which they came.
        flags: Concept id to the flag for which it is corrected.
        vetoed: Ids that are never corrected.
        approved: Ids that are corrected when flagged, also under `approve: manual`.
        ranks: The processes that train.
        erasure: What is projected out of rows for them.
        penalty: What is added to the loss for them.
        augmentation: What is done to training images for them.
    """

    def __init__(self, tap: Tap, probe: Batches, config: GuardConfig, ramp: int = 0) -> None:
        self._tap, self._probe, self._config = tap, probe, config
        self.tracked: tuple[Tracked, ...] = ()
        self.flags: dict[int, Flag] = {}
        self.vetoed: set[int] = set()
        self.approved: set[int] = set()
        self.ranks = probe.ranks
        self.erasure = Erasure(tap, probe, config)
        self.penalty = Penalty(tap, self.erasure, config, probe.ranks)
        self.augmentation = Augmentation(probe, config)
        self._ramp, self._updates = ramp, 0  # since the first of them came
        self._counts = GroupCounts(probe.ranks)
        self._probation = Probation()
        self._references = References(tap, probe, config)

    @property
    def rebalancing(self) -> bool:
        """Whether losses per sample are weighed now."""
        return bool(self.tracked) and "rebalance" in self._config.action

    @property
    def strength(self) -> float:
        """Share of the concepts' influence that is to be taken away by now."""
        ramped = self._updates / self._ramp if self._ramp else 1.0
        return self._config.strength * min(1.0, ramped)

    def updated(self) -> None:
        """Take note that the network was trained by one update."""
        self._updates = self._updates + 1 if self.tracked else 0
        self.erasure.settled = False
        self.erasure.strengthen(self.strength)
        self.augmentation.draw(self.strength)

    def weights(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the weight of each training sample by class and presence of tracked concepts.

        Args:
            rows: `(B, Q, C)` activations of the batch, before any correction.
            labels: `(B,)` classes.

        Returns:
            `(B,)` positive weights.
        """
        return self._counts.weights(self.tracked, rows, labels, self.strength)

    def carried(self, rows: Tensor) -> list[Tensor]:
        """Return which samples carry each concept under correction of themselves.

        Args:
            rows: `(B, Q, C)` activations of a training batch, before any correction.

        Returns:
            `(B,)` bool per concept: by the values of its images before they were edited, if they
            were, else by its rows.
        """
        before, read = self.augmentation.carried, [t.read(rows).any(dim=1) for t in self.tracked]
        return [before.get(t.concept, r) for t, r in zip(self.tracked, read, strict=True)]

    def tail(self, reading: Reading) -> Tail:
        """Return a function from an edit, on top of the current one, to the reading's logits.

        Args:
            reading: Rows of the probe images.

        Returns:
            See `tail_of`.
        """
        return tail_of(self._tap, self._probe, reading)

    def status(self, flag: Flag) -> str:
        """Return what people and settings make of a flag.

        Args:
            flag: As tested, `found` or `unconfirmed`.

        Returns:
            `erased`, `unconfirmed`, `vetoed`, `waiting` or `found`.
        """
        if any(t.concept == flag.concept for t in self.tracked):
            return "erased"
        if flag.status != "found":
            return flag.status
        if flag.concept in self.vetoed:
            return "vetoed"
        waits = self._config.approve == "manual" and flag.concept not in self.approved
        return "waiting" if waits and self._config.action else "found"

    def act_on(self, found: Findings, reading: Reading) -> Tensor | None:
        """Correct what a round found, as far as settings and people allow.

        Args:
            found: Result of the round.
            reading: The reading it is based on.

        Returns:
            `(N, M)` logits with everything new that may be erased out of the way; None if there
            is nothing new.
        """
        new = {i: c for i, c in found.candidates.items() if self.status(c.flag) == "found"}
        if_erased = None
        if new:
            together = self.erasure.of(reading, [*map(_begun, new.values())])
            if together is not None:
                if_erased = self.tail(reading)(together, None)
        room = max(0, self._config.max_erased - len(self.tracked)) if self._config.action else 0
        self._set([*found.tracked, *map(_begun, list(new.values())[:room])], reading)
        self.flags |= {i: c.flag for i, c in list(new.items())[:room]}
        for i in list(new)[:room]:
            self._probation.begin(i, reading.logits.argmax(dim=1) == reading.labels)
        return if_erased

    def uncorrected(self, reading: Reading) -> Tensor | None:
        """Return the logits of the probe without what is projected out.

        Args:
            reading: Its reading.

        Returns:
            `(N, M)` logits; None if nothing is projected out, or no linear map follows the tap and
            they would cost another pass over the probe.
        """
        if self._tap.edit is None or self._tap.classifier is None:
            return None
        return tail_of(self._tap, self._probe, reading, on_top=False)(None, None)

    def withdraw(self, reading: Reading) -> dict[int, str]:
        """Stop correcting concepts whose groups are no better off for it, and veto them.

        What a person erased stays.

        Args:
            reading: The reading of the probe.

        Returns:
            Concept id to the reason, in a sentence.
        """
        if not self.tracked:
            return {}
        groups = {
            t.concept: (reading.labels == t.class_index, carriers_in(t, reading).any(dim=1))
            for t in self.tracked
        }
        instead = tail_of(self._tap, self._probe, reading, on_top=False)
        now = instead(self._tap.edit, None).argmax(dim=1).to(reading.labels) == reading.labels
        reasons = self._probation.verdicts(groups, now)
        if reasons:
            self._change_to([t for t in self.tracked if t.concept not in reasons], reading)
            self.vetoed |= set(reasons)
        return reasons

    def erase(
        self, ids: Iterable[int], known: Sequence[int], pairs: DirectionPairs, reading: Reading
    ) -> None:
        """Correct concepts because a person says so, whatever the statistics say.

        Args:
            ids: Concepts; those under correction already are passed over.
            known: Ids of the pairs, in order.
            pairs: Pairs of the last round.
            reading: A reading of the probe.

        Raises:
            ValueError: If a concept has no pair within classes, or the images of one that is
                erased already; none is corrected then.
        """
        under_way = {t.concept for t in self.tracked}
        trial = Trial(reading, self.tail(reading), self._config, self._config.seed)
        chosen = [trial.of_one(i, known, pairs) for i in ids if i not in under_way]
        hopeless = [f"concept {c.flag.concept}: {c.flag.reason}" for c in chosen if c.pair is None]
        if hopeless:
            raise ValueError(
                f"cannot be erased: {'; '.join(hopeless)}. Collect a larger probe set."
            )
        carriers, twins = {t.concept: t.carriers for t in self.tracked}, []
        for candidate in chosen:
            if (same := twin(candidate.present, carriers)) is not None:
                twins.append(f"concept {candidate.flag.concept} has the images of concept {same}")
            carriers[candidate.flag.concept] = candidate.present
        if twins:
            raise ValueError(f"cannot be erased together: {'; '.join(twins)}. Erase one of them.")
        self.add(chosen, reading)
        for i in ids:
            self._probation.end(i)
        self.vetoed -= set(ids)

    def add(self, candidates: Iterable[Candidate], reading: Reading) -> None:
        """Correct concepts on top of those under correction.

        Args:
            candidates: Concepts with a pair.
            reading: A reading of the probe.

        Raises:
            ValueError: If there would be more than `max_erased`.
        """
        new = list(candidates)
        most = self._config.max_erased
        if len(self.tracked) + len(new) > most:
            raise ValueError(
                f"cannot erase {[c.flag.concept for c in new]} as well: {len(self.tracked)} are "
                f"erased and max_erased is {most}; restore one or raise max_erased"
            )
        self._set([*self.tracked, *map(_begun, new)], reading)
        self.flags |= {c.flag.concept: c.flag for c in new}

    def drop(self, ids: Iterable[int]) -> None:
        """Stop correcting concepts; what is projected out for the others is estimated again.

        If activations are not finite, a `ValueError` says so and nothing is changed.

        Args:
            ids: Concepts; those not under correction are passed over.
        """
        left = [t for t in self.tracked if t.concept not in set(ids)]
        if len(left) < len(self.tracked):
            self._change_to(left, None)

    def track(self) -> float:
        """Re-estimate the tracked pairs, which weigh samples, from the reference images.

        What is projected out is estimated from the whole probe, at rounds and at baking: nine
        colours of digits erased as 320 reference images show them left .57 of the images right,
        as 1,000 show them .73. If activations are not finite, a `ValueError` says so and the pairs
        stay as they are.

        Returns:
            Share of the reference rows that the pairs of before read otherwise than the new ones,
            of the concept where it is largest.
        """
        self.tracked, misread = self._references.estimated(self.tracked)
        self.erasure.follow(self.tracked)
        return misread

    def bake(self, reading: Reading | None) -> str:
        """Fit the classifier again, fold the projection into it and stop correcting.

        Where folding cannot be exact, a `BakeError` says why and nothing is changed.

        Args:
            reading: Of the probe, as the network is now; None reads it if it is needed.

        Returns:
            What was done about the classifier, as a clause; empty if nothing was to be done.
        """
        done = bake(self._tap, self._probe, self._config, self.tracked, reading)
        self._change_to((), None)
        return done

    def baked_copy(self, model: nn.Module | None, sample: Tensor) -> nn.Module:
        """Return a copy of a model with the correction folded in; see `baking.baked_copy`.

        Args:
            model: None for the guarded one.
            sample: `(N, ...)` a few images.

        Returns:
            The copy.
        """
        model = self._tap.model if model is None else model
        probe = self._probe.alone  # a checkpoint may be the business of one process
        return baked_copy(model, probe, self._config, self.tracked, self.strength, sample)

    def close(self) -> None:
        """Let go of reference images and tracked concepts."""
        self.tracked = ()
        self._references.forget()

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the guard's state that is kept here.

        Returns:
            Tensors and plain data.
        """
        return {
            "tracked": [state.from_tracked(t) for t in self.tracked],
            "flags": {i: asdict(flag) for i, flag in self.flags.items()},
            "vetoed": sorted(self.vetoed),
            "approved": sorted(self.approved),
            "subspace": state.from_subspace(self.erasure.subspace),
            "counts": {i: counts.clone() for i, counts in self._counts.counts.items()},
            "probation": self._probation.state_dict(),
            "updates": self._updates,
            "penalty": self.penalty.state_dict(),
            "augmentation": self.augmentation.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            saved: Holds the keys of `state_dict`, and possibly more.
        """
        self.tracked = tuple(state.to_tracked(t, self._tap.device) for t in saved["tracked"])
        self.flags = {i: Flag(**flag) for i, flag in saved["flags"].items()}
        self.vetoed, self.approved = set(saved["vetoed"]), set(saved["approved"])
        self._counts.counts = {i: counts.clone() for i, counts in saved["counts"].items()}
        self._probation.load_state_dict(saved["probation"])
        self._updates = saved["updates"]
        self.penalty.load_state_dict(saved["penalty"])
        self.erasure.strengthen(self.strength)
        subspace = state.to_subspace(saved["subspace"], self._tap.device)
        self.erasure.put_back(subspace, self.tracked)
        self.augmentation.load_state_dict(saved["augmentation"], self._tap.device)
        self._references.forget()
        self._listen()

    def _set(self, concepts: list[Tracked], reading: Reading) -> None:
        """Track these concepts, each with references drawn anew from its carriers."""
        for concept in concepts:
            if concept.concept not in self._counts.counts:
                carried = concept.carriers.any(dim=1).to(reading.labels.device)
                num_classes = reading.logits.shape[1]
                self._counts.start(concept.concept, reading.labels, carried, num_classes)
        self._change_to(self._references.drawn(concepts, reading), reading)

    def _change_to(self, concepts: Sequence[Tracked], reading: Reading | None) -> None:
        """Correct these concepts and no other; None reads the probe anew, if it is needed."""
        if not self.tracked:
            self._updates = 0
        self.erasure.strengthen(self.strength)
        self.erasure.take_out(concepts, reading)
        self.augmentation.follow(concepts, reading, self._tap.device)
        self.penalty.follow(t.concept for t in concepts)
        self.tracked = tuple(concepts)
        self._references.forget()
        self._listen()

    def _listen(self) -> None:
        """Have training images edited, and their activations kept, while something needs that."""
        for concept in self._probation.right.keys() - {t.concept for t in self.tracked}:
            self._probation.end(concept)
        self._tap.augment = self.augmentation if self.augmentation.acting else None
        self._tap.listening = self.rebalancing or self.erasure.adapting or self.penalty.active


def _once(candidate: Candidate) -> Tracked:
    """Return a candidate for one evaluation of its erasure.

    Raises:
        ValueError: If it has no pair.
    """
    if candidate.pair is None:
        raise ValueError(f"concept {candidate.flag.concept} has no pair: {candidate.flag.reason}")
    return as_tracked(candidate.flag.concept, candidate.flag.class_index, candidate.pair)


def _begun(candidate: Candidate) -> Tracked:
    """Return a candidate with its carriers, without reference images yet."""
    return replace(_once(candidate), carriers=candidate.present, separation=candidate.separation)
