"""Stage 4d: what is left of the concepts under correction, and which of them come back.

Nothing here corrects anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from concept_guard.association import risk_differences
from concept_guard.directions import folds, readability
from concept_guard.erasure import Erasure, carriers_in
from concept_guard.influence import Tail
from concept_guard.tracking import Tracked
from concept_guard.trial import Trial


@dataclass(frozen=True)
class Leaks:
    """What is left of the concepts under correction, as a round leaves them.

    Attributes:
        difference: Concept id to the absolute risk difference that is left.
        readable: Concept id to how well a fresh linear probe reads it with the class held fixed,
            .5 if not at all; concepts with too few images are missing.
        returned: Sentences on the concepts that came back since the last round.
    """

    difference: dict[int, float] = field(default_factory=dict)
    readable: dict[int, float] = field(default_factory=dict)
    returned: tuple[str, ...] = ()


def leaks(
    concepts: Sequence[Tracked],
    trial: Trial,
    erasure: Erasure,
    instead: Tail,
    *,
    pull: Mapping[int, tuple[float, float]],
    before: Mapping[int, float],
    seed: int,
) -> Leaks:
    """Measure what is left of concepts, on images from which the projection was not estimated.

    What is projected out is estimated from either half of the probe and tried on the other, where
    the probe that reads the concept is fitted and tested as well, on different images.

    Departure: on the images from which it was estimated a projection leaves nothing, whatever it
    leaves elsewhere. In the ten rounds of a network that learns digits with 1 % conflicting
    colours, the colours that were erased had an AUC of .67 by this measure, of .74 on a thousand
    other images with known colours, and below .3 on the images of the estimate; risk differences
    of .06 by this measure and of .08 on the other images (means, one seed). To append what such a
    probe reads to the subspace helps nobody: .66 of the test images were right where both the
    probe and the predictions had to show the concept on held-out images, .67 where the probe had
    to, .70 without; on CIFAR-10 with a patch nothing was appended, or nothing gained.

    Args:
        concepts: Those under correction.
        trial: The reading of the probe, and the axes in which concepts are read.
        erasure: What is projected out for them.
        instead: Maps an edit, in place of the current one, to the logits of the reading's images.
        pull: Concept id to the risk difference, and the lower end of its 95 % interval, with which
            the network came into this round.
        before: Concept id to the risk difference that the last round left.
        seed: Chooses the halves.

    Returns:
        What is left, by concept.
    """
    reading = trial.reading
    rows, logits, labels = reading.rows, reading.logits, reading.labels
    present = [carriers_in(t, reading).to(rows.device) for t in concepts]
    if not present:
        return Leaks()
    carried = torch.stack([p.any(dim=1) for p in present], dim=1)  # (N, K)
    half = folds(labels * 2 + carried.any(dim=1).long(), seed) % 2
    readable: dict[int, list[float]] = {}
    for side in (0, 1):
        at, others = ((half == s).nonzero().flatten() for s in (side, 1 - side))
        edit = erasure.seen_in(concepts, reading, others) if erasure.acting else None
        here = rows[at]
        if edit is not None:
            here = edit(here)
            logits = logits.index_copy(0, at, instead(edit, at).to(logits))
        found = readability(
            here @ trial.axes, labels[at], torch.stack(present, dim=2)[at], seed=seed
        )
        for concept, auc in zip(concepts, found, strict=True):
            if auc is not None:
                readable.setdefault(concept.concept, []).append(auc)
    predicted = logits.argmax(dim=1)
    differences = risk_differences(carried, predicted, labels, logits.shape[1]).difference
    left = {t.concept: abs(float(differences[i, t.class_index])) for i, t in enumerate(concepts)}
    return Leaks(
        left,
        {i: sum(values) / len(values) for i, values in readable.items()},
        tuple(
            f"concept {t.concept} is coming back: {pull[t.concept][0]:+.2f} towards class "
            f"{t.class_index}, {before[t.concept]:.2f} after the last round; corrected again, "
            f"{left[t.concept]:.2f}"
            for t in concepts
            if t.concept in pull and t.concept in before and pull[t.concept][1] > before[t.concept]
        ),
    )
