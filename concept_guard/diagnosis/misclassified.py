"""Diagnosis: the misclassified images, and the concept that drives each.

Nothing here knows which concepts are held to drive errors in general, or how that was found.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from concept_guard.cards import displayable
from concept_guard.changes import Levels
from concept_guard.explanation import Explanation, behind, explain
from concept_guard.localisation import location_maps
from concept_guard.probe import Batches, images_at
from concept_guard.reading import Reading
from concept_guard.rounds import Findings
from concept_guard.taps import Tap

CHUNK = 256  # errors that are explained at a time
LOCATED = 32  # images in which a concept is looked for at a time
SUSPECTS = 12  # concepts without a flag that get a card, those with most errors first
FEW = 4  # errors of a held concept that come first on its card


@dataclass(frozen=True, eq=False)
class Error:
    """A misclassified image.

    Attributes:
        index: Its position in the probe.
        label: Its true class.
        predicted: The predicted class.
        confidence: Probability of the predicted class.
        concept: Id of the concept that drives it; None if there is no concept at all.
        confirmed: Whether that concept is flagged for the predicted class and the image carries
            it; otherwise it is the one that speaks most for this prediction.
        explanation: The whole account.
    """

    index: int
    label: int
    predicted: int
    confidence: float
    concept: int | None
    confirmed: bool
    explanation: Explanation


@dataclass(frozen=True, eq=False)
class Shown:
    """An error that is shown with its picture.

    Attributes:
        error: The error.
        image: `(3, H, W)` the image in `[0, 1]`.
        place: `(h, w)` where the driving concept is, between 0 and 1; None if it has no place.
    """

    error: Error
    image: Tensor
    place: Tensor | None


def misclassified(
    tap: Tap,
    probe: Batches,
    reading: Reading,
    found: Findings,
    levels: Levels,
    held: Mapping[int, int],
    carried: Mapping[int, Tensor],
) -> tuple[Error, ...]:
    """Return all misclassified images with the concept that drives each.

    Args:
        tap: Where the concepts are read.
        probe: Where the images come from.
        reading: Of that probe.
        found: What a round found in the reading.
        levels: Of its pairs.
        held: Id of each concept that is held to drive errors, to the class it pulls towards.
        carried: Concept id to `(N,)` bool, the images that carry it.

    Returns:
        The errors, those of held concepts first, most certain first.
    """
    chance, predicted = reading.logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != reading.labels).nonzero().flatten()
    errors = []
    for n, explanation in _explained(tap, probe, reading, wrong, found, levels):
        k = int(predicted[n])
        guilty = [i for i, pulls in held.items() if pulls == k and bool(carried[i][n])]
        errors.append(
            Error(
                index=int(reading.indices[n]),
                label=int(reading.labels[n]),
                predicted=k,
                confidence=float(chance[n]),
                concept=guilty[0] if guilty else explanation.driving,
                confirmed=bool(guilty),
                explanation=explanation,
            )
        )
    return tuple(sorted(errors, key=lambda error: (not error.confirmed, -error.confidence)))


def _explained(
    tap: Tap, probe: Batches, reading: Reading, at: Tensor, found: Findings, levels: Levels
) -> Iterator[tuple[int, Explanation]]:
    """Yield positions in the reading with their explanations; images only where they count."""
    linear = tap.classifier is not None
    for some in at.split(CHUNK) if len(at) else ():
        images = torch.empty(0) if linear else images_at(probe, reading.indices[some])[0]
        told = explain(
            reading.rows[some],
            reading.labels[some],
            found.pairs,
            found.ids,
            levels,
            behind(tap, images),
            linear=linear,
        )
        yield from zip(some.tolist(), told, strict=True)


def misled(errors: Sequence[Error], reading: Reading, held: Iterable[int]) -> dict[int, Tensor]:
    """Return the images on which each concept misleads the model most.

    Args:
        errors: All errors, most certain first.
        reading: That they are from.
        held: Ids of the concepts.

    Returns:
        Concept id to a few positions in the reading.
    """
    at = {index: n for n, index in enumerate(reading.indices.tolist())}
    of = {i: [at[e.index] for e in errors if e.confirmed and e.concept == i] for i in held}
    return {i: torch.tensor(some[:FEW], dtype=torch.long) for i, some in of.items()}


def suspects_of(errors: Sequence[Error], found: Findings) -> tuple[int, ...]:
    """Return the concepts without a flag that speak most for errors.

    Args:
        errors: All errors.
        found: Tells which concepts are flagged.

    Returns:
        Ids, most errors first; at most twelve.
    """
    counted = Counter(e.concept for e in errors if e.concept not in found.candidates)
    return tuple(i for i, _ in counted.most_common() if i is not None)[:SUSPECTS]


def in_turn(errors: Sequence[Error]) -> list[Error]:
    """Return the errors in turn: the first of each concept, then the second of each, and so on.

    Args:
        errors: In any order.

    Returns:
        The same errors.
    """
    turn: Counter[int | None] = Counter()
    turns = []
    for error in errors:
        turns.append(turn[error.concept])
        turn[error.concept] += 1
    order = sorted(range(len(errors)), key=lambda n: (turns[n], not errors[n].confirmed))
    return [errors[n] for n in order]


def shown_with_places(
    tap: Tap, probe: Batches, errors: Sequence[Error], filters: Mapping[int, Tensor]
) -> tuple[Shown, ...]:
    """Return errors with their pictures and the place of the concept that drives each.

    Args:
        tap: Where the concepts are read.
        probe: Where the images come from.
        errors: Those to show.
        filters: Concept id to `(C,)` filter.

    Returns:
        One entry per error that a concept drives; none if the model takes something else than
        images.
    """
    driven = [error for error in errors if error.concept is not None]
    if not driven:
        return ()
    images, _ = images_at(probe, torch.tensor([error.index for error in driven]))
    if images.ndim != 4:
        return ()
    directions = torch.stack([filters[e.concept] for e in driven if e.concept is not None])
    parts = zip(images.split(LOCATED), directions.split(LOCATED), strict=True)
    places = torch.cat([location_maps(tap, *part) for part in parts])
    return tuple(
        Shown(error, image, place if place.numel() > 1 and bool(place.any()) else None)
        for error, image, place in zip(driven, displayable(images), places, strict=True)
    )
