"""One round: from a reading of the probe to concepts, flags and what a correction needs.

Nothing here changes the model, keeps state or writes logs: the guard decides what to do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from concept_guard.association import associate, risk_differences
from concept_guard.config import GuardConfig
from concept_guard.directions import (
    Concept,
    DirectionPairs,
    WithinClassPair,
    cosines,
    fit_pairs,
    match,
    refine_membership,
    within_class_pair,
)
from concept_guard.flags import Candidate
from concept_guard.influence import Tail
from concept_guard.reading import Reading
from concept_guard.styles import Style
from concept_guard.tracking import Tracked
from concept_guard.trial import Trial, correlation, twin

SAME_CARRIERS = 0.8  # correlation of presence from which a concept still is what it was
TOP_EXAMPLES = 8
FACTOR = 8.0  # between rows with a concept and without, as in `fit_pairs`


@dataclass(frozen=True, eq=False)
class Findings:
    """What one round found.

    Attributes:
        trial: What they were tested on.
        pairs: Direction pairs of this round.
        ids: Their stable ids, in order.
        next_id: First id that no concept has had.
        concepts: The same pairs with ids, rates and examples.
        candidates: Tested concepts by id, strongest evidence first.
        tracked: The concepts under correction, their pairs read anew.
        pull: Concept under correction to the risk difference, and the lower end of its interval,
            with which the network came into the round, corrected as the last round left it.
        drift: Id of a concept that was there in the last round to the cosine of its filter with
            the last round's.
        new: Ids of the concepts that the last round did not have; empty in the first round.
        vanished: Ids of the last round that no concept has now; those under correction stay.
        cosine_to_last: Mean of `drift`; 1 in the first round, 0 if no concept was found again.
    """

    trial: Trial
    pairs: DirectionPairs
    ids: tuple[int, ...]
    next_id: int
    concepts: tuple[Concept, ...]
    candidates: dict[int, Candidate]
    tracked: tuple[Tracked, ...]
    pull: dict[int, tuple[float, float]]
    drift: dict[int, float]
    new: tuple[int, ...]
    vanished: tuple[int, ...]
    cosine_to_last: float


def number_of_concepts(wanted: int | str, num_classes: int, rows: int, channels: int) -> int:
    """Return how many pairs a round looks for.

    Departure: the source tunes this number by hand. With 16, 20 and 32 concepts the planted patch
    of a CIFAR-10 network was found alike (precision and recall of presence .99 after sharpening),
    so `auto` takes somewhat more than there are classes.

    Args:
        wanted: The configured number or `auto`.
        num_classes: M.
        rows: Rows at hand.
        channels: C.

    Returns:
        The number; `auto` never asks for more than an eighth of the rows or half the channels.
    """
    if not isinstance(wanted, str):
        return wanted
    return max(2, min(max(16, num_classes + 8), 64, rows // 8, channels // 2))


def look(
    reading: Reading,
    tail: Tail,
    *,
    config: GuardConfig,
    seed: int,
    last: DirectionPairs | None,
    last_ids: Sequence[int],
    next_id: int,
    tracked: Sequence[Tracked],
    styles: Sequence[Style] = (),
) -> Findings:
    """Find concepts in a reading, name them, test them, and read tracked ones anew.

    Every round searches afresh and from the last round's directions: a shortcut that one round
    missed is not missed for good.

    Args:
        reading: Rows, logits and labels of the probe.
        tail: Maps an edit of the rows to the logits of the reading's images.
        config: Settings of the guard.
        seed: Of everything random in this round.
        last: Pairs of the last round.
        last_ids: Their ids.
        next_id: First id that no concept has had.
        tracked: Concepts under correction.
        styles: What was found in the images themselves.

    Returns:
        What was found.
    """
    rows, num_classes = reading.rows, reading.logits.shape[1]
    flat = rows.flatten(0, 1)
    size = number_of_concepts(config.concepts, num_classes, len(flat), flat.shape[1])
    pairs = fit_pairs(flat, concepts=size, init=last, seed=seed)
    trial = Trial(reading, tail, config, seed)
    again = tuple(_read_anew(t, trial) for t in tracked)
    erased = {t.concept: t.carriers for t in again}
    pairs, told = _with_styles(pairs, styles, trial, erased)
    factors = pairs.factors(rows)  # (N, Q, K)
    ids, matched, next_id = _identities(again, pairs, last, last_ids, next_id, flat)
    present = factors > 0
    for i, (style, _) in told.items():
        present[:, :, i] = style.present.to(present.device)[:, None]
    carried = present.any(dim=1)  # (N, K)
    predicted = reading.logits.argmax(dim=1)
    found = associate(carried, predicted, reading.labels, num_classes)
    tested = trial.of_all(found, present, ids, erased)
    for i, (style, pair) in told.items():
        others = {c: t.present for c, t in tested.items() if t.flag.status == "found"}
        if ids[i] in others or not _is_known(present[:, :, i], others):
            at = i, style.class_index
            tested[ids[i]] = trial.of_style(style, pair, found, present[:, :, i], at, ids[i])
    peaks = factors.amax(dim=1)
    concepts = tuple(
        Concept(
            id=ids[i],
            filter=pairs.filters[i].cpu(),
            signal=pairs.signals[i].cpu(),
            bias=float(pairs.biases[i]),
            presence_rate=float(carried[:, i].float().mean()),
            top_examples=tuple(
                reading.indices[peaks[:, i].argsort(descending=True)[:TOP_EXAMPLES]].tolist()
            ),
        )
        for i in range(len(ids))
    )
    pull = {t.concept: _pull(t, predicted, reading.labels, num_classes) for t in again}
    alike = {} if last is None else cosines(last, pairs, matched)
    return Findings(
        trial,
        pairs,
        ids,
        next_id,
        concepts,
        tested,
        again,
        pull,
        drift={ids[i]: cosine for i, cosine in alike.items()},
        new=() if last is None else tuple(i for i in ids if i not in last_ids),
        vanished=tuple(sorted({*last_ids} - {*ids} - {t.concept for t in again})),
        cosine_to_last=1.0 if last is None else sum(alike.values()) / max(1, len(alike)),
    )


def _with_styles(
    pairs: DirectionPairs, styles: Sequence[Style], trial: Trial, erased: Mapping[int, Tensor]
) -> tuple[DirectionPairs, dict[int, tuple[Style, WithinClassPair]]]:
    """Return the pairs with those of styles added, and the styles with their own by position.

    A style under correction, or one that rows do not show, is left out.
    """
    told: dict[int, tuple[Style, WithinClassPair]] = {}
    for style in styles:
        present = style.present.to(trial.whole.rows.device)[:, None]
        present = present.expand(trial.reading.rows.shape[:2])
        pair = within_class_pair(trial.whole, present.flatten())
        if pair is None or pair.gain <= 0 or _is_known(present, erased):
            continue
        scale = FACTOR / pair.gain
        told[len(pairs.filters)] = style, pair
        pairs = replace(
            pairs,
            filters=torch.cat([pairs.filters, scale * pair.filter.to(pairs.filters)[None]]),
            signals=torch.cat([pairs.signals, pair.signal.to(pairs.signals)[None] / scale]),
            biases=torch.cat([pairs.biases, pairs.biases.new_tensor([scale * pair.threshold])]),
        )
    return pairs, told


def _is_known(present: Tensor, known: Mapping[int, Tensor]) -> bool:
    """Return whether a concept parts the images as a style does, or as its opposite."""
    return any(twin(side, known) is not None for side in (present, ~present))


def _read_anew(tracked: Tracked, trial: Trial) -> Tracked:
    """Return a tracked concept with its pair from the whole probe.

    Its carriers change only if they can be told apart more clearly now and stay nearly the same.
    """
    reading, flat = trial.reading, trial.whole.rows
    carriers = tracked.carriers.to(flat.device)
    if carriers.shape != reading.rows.shape[:2]:
        read = flat @ tracked.pair.filter.to(flat) > tracked.pair.threshold
        carriers = read.view(reading.rows.shape[:2])
    sharp = refine_membership(trial.narrow, carriers.flatten(), tracked.class_index)
    if sharp is not None and sharp.separation > tracked.separation:
        present = sharp.present.view_as(carriers)
        if correlation(present, carriers) >= SAME_CARRIERS:
            carriers = present
            tracked = replace(tracked, separation=sharp.separation)
    pair = within_class_pair(trial.whole, carriers.flatten())
    return replace(tracked, carriers=carriers, pair=tracked.pair if pair is None else pair)


def _identities(
    again: Sequence[Tracked],
    pairs: DirectionPairs,
    last: DirectionPairs | None,
    last_ids: Sequence[int],
    next_id: int,
    flat: Tensor,
) -> tuple[tuple[int, ...], dict[int, int], int]:
    """Return ids: a tracked concept's, the pair's own of the last round, or new ones."""
    factors = pairs.factors(flat)
    names: dict[int, int] = {}
    if again:
        filters = torch.stack([t.pair.filter for t in again]).to(flat)
        of_tracked = match(flat @ filters.T, factors)
        names = {i: again[j].concept for i, j in of_tracked.items()}
    matched = {} if last is None else match(last.factors(flat), factors)
    taken = {t.concept for t in again}
    for position, before in matched.items():
        if position not in names and last_ids[before] not in taken:
            names[position] = last_ids[before]
    for position in range(len(pairs.filters)):
        if position not in names:
            names[position] = next_id
            next_id += 1
    return tuple(names[i] for i in range(len(pairs.filters))), matched, next_id


def as_tracked(concept: int, class_index: int, pair: WithinClassPair) -> Tracked:
    """Return a concept that is corrected once, without carriers or reference images.

    Args:
        concept: Id of the concept.
        class_index: The class it pulls towards.
        pair: Its pair.

    Returns:
        A `Tracked` that cannot be tracked.
    """
    none = torch.zeros((0, 1), dtype=torch.bool)
    return Tracked(concept, class_index, pair, none, -1.0, none[:, 0].long(), none)


def _pull(
    tracked: Tracked, predicted: Tensor, labels: Tensor, num_classes: int
) -> tuple[float, float]:
    carried = tracked.carriers.any(dim=1, keepdim=True)
    found = risk_differences(carried, predicted, labels, num_classes)
    at = (0, tracked.class_index)
    return float(found.difference[at]), float(found.low[at])
