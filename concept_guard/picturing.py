"""Stage 5: which probe images a card shows; it is made anew when these change.

Nothing here knows how cards are drawn, or where they are shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from concept_guard.cards import TILES, Card, displayable
from concept_guard.localisation import location_maps
from concept_guard.probe import Batches, images_at
from concept_guard.reading import Reading
from concept_guard.rounds import Findings
from concept_guard.taps import Tap

STILL_SHOWN = 6  # of the eight images; a card of which fewer are still the best is made anew


def cards(
    tap: Tap,
    probe: Batches,
    reading: Reading,
    found: Findings,
    wanted: Sequence[int],
    *,
    driven: Mapping[int, Sequence[int]],
    before: Mapping[int, Card],
    renew: bool = True,
) -> dict[int, Card]:
    """Make the cards of the concepts that have a slot, or keep those that show what they did.

    Args:
        tap: Where the concepts are read.
        probe: Where the images come from.
        reading: The round's reading.
        found: What the round found.
        wanted: Ids of concepts; those that are neither tracked nor tested get none.
        driven: Concept id to probe indices of errors that it drives.
        before: Concept id to the card of the last round.
        renew: Whether there is time for new cards of concepts that have one.

    Returns:
        Concept id to card: the very one of before where its images are still the right ones, or
        there is no time.
    """
    tested = {t.concept for t in found.tracked}
    tested |= {i for i, c in found.candidates.items() if c.pair is not None}
    filters = filters_of(found)
    made = {}
    for i in wanted:
        errors = tuple(driven.get(i, ()))[:TILES]
        if i not in tested:
            continue
        if i in before and not (renew and _outdated(before[i], reading, filters[i], errors)):
            made[i] = before[i]
            continue
        for card in cards_of(tap, probe, reading, filters, [i]).values():
            made[i] = _with_errors(card, probe, errors)
    return made


def _outdated(card: Card, reading: Reading, direction: Tensor, errors: tuple[int, ...]) -> bool:
    best = _strongest(reading, direction)[: len(card.of)]
    same = {*card.of} & {*reading.indices[best].tolist()}
    return len(same) < min(STILL_SHOWN, len(card.of)) or card.of_errors != errors


def _with_errors(card: Card, probe: Batches, errors: tuple[int, ...]) -> Card:
    if not errors:
        return card
    images, _ = images_at(probe, torch.tensor(errors))
    return replace(card, errors=displayable(images), of_errors=errors)


def filters_of(found: Findings) -> dict[int, Tensor]:
    """Return the filter that reads each concept best: within classes where there is one.

    Args:
        found: What a round found.

    Returns:
        Concept id to `(C,)` filter.
    """
    filters = dict(zip(found.ids, found.pairs.filters, strict=True))
    filters |= {t.concept: t.pair.filter for t in found.tracked}
    filters |= {i: c.pair.filter for i, c in found.candidates.items() if c.pair is not None}
    return {i: f.to(found.pairs.filters) for i, f in filters.items()}


def cards_of(
    tap: Tap,
    probe: Batches,
    reading: Reading,
    filters: Mapping[int, Tensor],
    wanted: Iterable[int],
    *,
    tiles: int = TILES,
    foremost: Mapping[int, Tensor] | None = None,
) -> dict[int, Card]:
    """Make the cards of some concepts.

    Args:
        tap: Where the concepts are read.
        probe: Where the images come from.
        reading: Of that probe.
        filters: Concept id to `(C,)` filter.
        wanted: Ids of concepts.
        tiles: Images on a card.
        foremost: Concept id to positions in the reading of the images that come first.

    Returns:
        Concept id to card: the images that carry most of it, with its place marked. No card
        if the model takes something else than images.
    """
    result = {}
    wrong = reading.logits.argmax(dim=1) != reading.labels
    for concept in wanted:
        direction = filters[concept].to(reading.rows)
        best = _strongest(reading, direction)
        if foremost is not None and concept in foremost:
            first = foremost[concept].to(best)
            best = torch.cat([first, best[~torch.isin(best, first)]])
        top = best[:tiles]
        images, _ = images_at(probe, reading.indices[top])
        if images.ndim == 4:
            maps = location_maps(tap, images, direction).cpu()
            marks = tuple(bool(w) for w in wrong[top])
            indices = tuple(reading.indices[top].tolist())
            result[concept] = Card(displayable(images), maps, marks, of=indices)
    return result


def _strongest(reading: Reading, direction: Tensor) -> Tensor:
    """Return positions in the reading, those that carry most of a direction first."""
    level = (reading.rows @ direction.to(reading.rows)).amax(dim=1)
    return level.argsort(descending=True)
