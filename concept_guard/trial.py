"""Stage 3c: the concepts that go with errors are tested by erasing, one after another.

Nothing here knows how concepts were found or named, or what will be done about them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from concept_guard.association import Association, associate
from concept_guard.config import GuardConfig
from concept_guard.directions import DirectionPairs, Scatter, WithinClassPair, leading
from concept_guard.flags import EXAMPLES, Candidate, Flag, candidates, confirm
from concept_guard.influence import Tail, effect, moved
from concept_guard.reading import Reading
from concept_guard.styles import Style

SAME_IMAGES = 0.5  # correlation of presence from which two concepts count as one
# Concepts that are tested by erasing in one round, strongest first. With 8 of them, natural ones
# crowded out a planted patch on 20 conflicting images, which came ninth.
CONFIRMED_AT_MOST = 16


@dataclass(frozen=True, eq=False)
class Trial:
    """What concepts are tested on.

    Attributes:
        reading: Rows, logits and labels of the probe.
        tail: Maps an edit of the rows to the logits of the reading's images.
        config: Settings of the guard.
        seed: Of everything random.
    """

    reading: Reading
    tail: Tail
    config: GuardConfig
    seed: int

    @cached_property
    def whole(self) -> Scatter:
        """Of all `(P, C)` rows, from which pairs are estimated."""
        rows = self.reading.rows
        return Scatter(rows.flatten(0, 1), self.reading.labels.repeat_interleave(rows.shape[1]))

    @cached_property
    def axes(self) -> Tensor:
        """The `(C, A)` axes along which rows vary most within classes."""
        return leading(self.whole)

    @cached_property
    def narrow(self) -> Scatter:
        """Of the `(P, A)` rows in fewer axes, in which presence is sharpened."""
        logits, labels = self.reading.logits, self.whole.labels
        predicted = logits.argmax(dim=1).repeat_interleave(self.reading.rows.shape[1])
        outcomes = labels * logits.shape[1] + predicted
        rows = self.whole.rows @ self.axes
        return Scatter(rows, labels, outcomes, self.seed)

    def of_all(
        self,
        found: Association,
        present: Tensor,
        ids: Sequence[int],
        erased: Mapping[int, Tensor],
    ) -> dict[int, Candidate]:
        """Test the strongest associations; what has the images of another concept is left out.

        Args:
            found: Associations of all concepts and classes.
            present: `(N, Q, K)` bool, which rows carry which concept.
            ids: Ids of the K concepts.
            erased: Id of a concept under correction to the `(N, Q)` rows that carry it; such a
                concept is not tested again.

        Returns:
            Concept id to candidate, largest risk difference first.
        """
        result: dict[int, Candidate] = {}
        for i, k in candidates(found, self.config.alpha, CONFIRMED_AT_MOST):
            if ids[i] in erased:
                continue
            candidate = self._of(found, present[:, :, i], (i, k), ids[i])
            before = {c: r.present for c, r in result.items() if r.flag.status == "found"}
            same = twin(candidate.present, {**erased, **before})
            if candidate.flag.status == "found" and same is not None:
                reason = f"its images are those of concept {same}"
                flag = replace(candidate.flag, status="unconfirmed", reason=reason)
                candidate = replace(candidate, flag=flag)
            result[ids[i]] = candidate
        strongest = sorted(result.items(), key=lambda item: -item[1].flag.risk_difference)
        return dict(strongest)

    def of_one(self, concept: int, ids: Sequence[int], pairs: DirectionPairs) -> Candidate:
        """Test one concept whatever its statistics.

        Args:
            concept: Its id.
            ids: Ids of the pairs.
            pairs: Pairs of the last round.

        Returns:
            The candidate, for the class with the largest risk difference.
        """
        reading, position = self.reading, list(ids).index(concept)
        present = pairs.present(reading.rows)
        predicted = reading.logits.argmax(dim=1)
        found = associate(present.any(dim=1), predicted, reading.labels, reading.logits.shape[1])
        k = int(found.difference[position].argmax())
        return self._of(found, present[:, :, position], (position, k), concept)

    def of_style(
        self,
        style: Style,
        pair: WithinClassPair,
        found: Association,
        present: Tensor,
        at: tuple[int, int],
        concept: int,
    ) -> Candidate:
        """Return a style as a flag; it was tested in the images already.

        Args:
            style: What was found.
            pair: How rows show it.
            found: Associations of all concepts and classes.
            present: `(N, Q)` bool, which rows are of images that have it.
            at: Its cell of the associations.
            concept: Its id.

        Returns:
            The candidate.
        """
        reading = self.reading
        carried, predicted = present.any(dim=1), reading.logits.argmax(dim=1)
        erased = self.tail(moved(pair, pair.signal, self.config.strength), None)
        caused = effect(reading.logits, erased, reading.labels, carried, style.class_index)
        others = carried & (reading.labels != style.class_index)
        driven = others & (predicted == style.class_index)
        flag = Flag(
            concept=concept,
            class_index=style.class_index,
            risk_difference=float(found.difference[at]),
            interval=(float(found.low[at]), float(found.high[at])),
            p_value=style.p_value,
            q_value=min(1.0, style.p_value * reading.logits.shape[1]),
            fixed=caused.fixed,
            broken=caused.broken,
            present=int(others.sum()),
            examples=tuple(reading.indices[driven][:EXAMPLES].tolist()),
            status="found",
            reason=style.reason,
        )
        return Candidate(flag, pair, present, separation=1.0)

    def _of(
        self, found: Association, present: Tensor, at: tuple[int, int], concept: int
    ) -> Candidate:
        """Return one (concept, class) cell of the tables as a flag that was tested by erasing."""
        flag = Flag(
            concept=concept,
            class_index=at[1],
            risk_difference=float(found.difference[at]),
            interval=(float(found.low[at]), float(found.high[at])),
            p_value=float(found.p_value[at]),
            q_value=float(found.q_value[at]),
            fixed=0,
            broken=0,
            present=int(found.present[at]),
            examples=(),
            status="found",
        )
        return confirm(
            flag,
            self.reading,
            present,
            self.tail,
            whole=self.whole,
            narrow=self.narrow,
            strength=self.config.strength,
            seed=self.seed,
        )


def correlation(a: Tensor, b: Tensor) -> float:
    """Return how alike two presences are.

    Args:
        a: `(N, Q)` bool.
        b: `(N, Q)` bool, over the same rows.

    Returns:
        Correlation over images, between -1 and 1; 0 if one of them does not vary.
    """
    x, y = (p.any(dim=1).double() for p in (a, b))
    spread = float((x.var() * y.var()).sqrt())
    covariance = float(((x - x.mean()) * (y - y.mean())).sum()) / max(1, len(x) - 1)
    return covariance / spread if spread else 0.0


def twin(present: Tensor, known: Mapping[int, Tensor]) -> int | None:
    """Return the concept that has nearly the same images, if there is one.

    Args:
        present: `(N, Q)` bool, which rows carry a concept.
        known: Concept id to the same of other concepts.

    Returns:
        Its id or None.
    """
    alike = (i for i, other in known.items() if correlation(present, other) >= SAME_IMAGES)
    return next(alike, None)
