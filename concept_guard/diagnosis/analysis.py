"""Diagnosis: which errors a trained model makes on held-out images, and which concepts drive them.

Nothing here knows where model and images come from or how the result is written.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor

from concept_guard.cards import Card
from concept_guard.changes import Levels
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.diagnosis.misclassified import (
    Error,
    Shown,
    in_turn,
    misclassified,
    misled,
    shown_with_places,
    suspects_of,
)
from concept_guard.diagnosis.subject import Subject
from concept_guard.errors import ProbeError
from concept_guard.explanation import behind
from concept_guard.influence import GlobalInfluence, global_influence
from concept_guard.leaks import Leaks
from concept_guard.measures import not_finite, pseudo_groups
from concept_guard.picturing import cards_of, filters_of
from concept_guard.probe import Batches, images_at, probe_batches
from concept_guard.reading import Reading, checked_pair
from concept_guard.records import Group, RoundReport
from concept_guard.reporting import HELD, report
from concept_guard.rounds import Findings, look
from concept_guard.taps import Tap

INFLUENCED, PASSED = 512, 32  # images on which influence is measured; where each takes passes
FEW_TILES = 4  # images on the card of a concept that is not held: a place can take 64 passes


@dataclass(frozen=True, eq=False)
class Analysis:
    """What was found in a model.

    Attributes:
        tap: Where its activations were read.
        report: The record of the round, with flags and verdict.
        findings: Direction pairs, candidates and their ids.
        reading: What the model said about each image.
        errors: All misclassified images that were read, those of confirmed concepts first, most
            certain first.
        shown: Some of them with their pictures, those of each concept in turn.
        suspects: Ids of concepts without a flag that speak most for errors, most errors first.
        groups: Size and accuracy by class and presence of each flagged concept.
        influence: What inserting each concept does to each class, in the order of the pairs.
        cards: Concept id to card, for flagged concepts and suspects.
        unreadable: Positions of the images that were left out.
        seconds: Duration without the forward pass over the probe.
    """

    tap: str
    report: RoundReport
    findings: Findings
    reading: Reading
    errors: tuple[Error, ...]
    shown: tuple[Shown, ...]
    suspects: tuple[int, ...]
    groups: tuple[Group, ...]
    influence: GlobalInfluence
    cards: dict[int, Card]
    unreadable: tuple[int, ...]
    seconds: float


def analyse(
    subject: Subject, config: GuardConfig, *, explained: int = 24, next_id: int = 0
) -> Analysis:
    """Find concepts in a trained model, flag those that drive errors, explain every error.

    Nothing is trained, and the model is left as it is.

    Args:
        subject: The model and the images; classes may be missing.
        config: Tap, number of concepts, level and seed; nothing is corrected.
        explained: Errors that are shown with their pictures.
        next_id: Id of the first concept.

    Returns:
        The analysis.

    Raises:
        ProbeError: If no image can be read, or the activations or logits are not finite.
    """
    config = config.model_copy(update={"action": ()})
    probe = probe_batches(subject.images, config.seed)
    sample = next(iter(probe), None)
    if sample is None:
        raise ProbeError("there is no image to examine; expected <folder>/<class>/<image>")
    with ExitStack() as stack:
        tap = Tap(subject.model, config.tap, checked_pair(sample, 0)[0][:2])
        stack.callback(tap.close)
        reading = tap.read(probe, max_rows=config.max_rows, seed=config.seed)
        began = perf_counter()
        reading, unreadable = _readable(reading, subject.broken)
        _refuse_not_finite(reading, config.tap)
        found, record = _round(tap, probe, reading, config, next_id, began)
        held = {f.concept: f.class_index for f in record.flags if f.status in HELD}
        carried = {i: c.present.any(dim=1) for i, c in found.candidates.items()}
        levels = Levels.of(found.pairs.factors(reading.rows), found.pairs)
        errors = misclassified(tap, probe, reading, found, levels, held, carried)
        suspects = suspects_of(errors, found)
        filters = filters_of(found)
        others = [*(i for i in found.candidates if i not in held), *suspects]
        foremost = misled(errors, reading, held)
        cards = cards_of(tap, probe, reading, filters, held, foremost=foremost)
        cards |= cards_of(tap, probe, reading, filters, others, tiles=FEW_TILES)
        chosen = in_turn(errors)[:explained]
        return Analysis(
            tap=config.tap,
            report=record,
            findings=found,
            reading=reading,
            errors=errors,
            shown=shown_with_places(tap, probe, chosen, filters),
            suspects=suspects,
            groups=pseudo_groups(reading.logits, reading.labels, {i: carried[i] for i in held}),
            influence=_influence(tap, probe, reading, found, levels, config.seed),
            cards=cards,
            unreadable=unreadable,
            seconds=perf_counter() - began,
        )


def _readable(reading: Reading, broken: Tensor | None) -> tuple[Reading, tuple[int, ...]]:
    """Return the reading without images that could not be read, and their positions.

    Raises:
        ProbeError: If none could be.
    """
    if broken is None or not bool(broken.any()):
        return reading, ()
    keep = ~broken[reading.indices.cpu()].to(reading.labels.device)
    if not bool(keep.any()):
        raise ProbeError(f"none of the {len(keep)} images can be read; check the files")
    kept = {n: getattr(reading, n)[keep] for n in ("rows", "logits", "labels", "indices")}
    return replace(reading, **kept), tuple(broken.nonzero().flatten().tolist())


def _refuse_not_finite(reading: Reading, tap: str) -> None:
    """Refuse a model whose activations or logits are not finite.

    Raises:
        ProbeError: Naming them.
    """
    if wrong := not_finite(reading, None, tap):
        raise ProbeError(
            f"{' and '.join(wrong)} hold NaN or infinite values, expected finite ones; "
            "check the weights and how the images are normalised"
        )


def _round(
    tap: Tap, probe: Batches, reading: Reading, config: GuardConfig, next_id: int, began: float
) -> tuple[Findings, RoundReport]:
    """Return what one round finds, without a correction, and its record."""
    corrector = Corrector(tap, probe, config)
    found = look(
        reading,
        corrector.tail(reading),
        config=config,
        seed=config.seed,
        last=None,
        last_ids=(),
        next_id=next_id,
        tracked=(),
    )
    record = report(
        reading,
        found,
        corrector,
        None,
        Leaks(),
        step=0,
        alpha=config.alpha,
        seconds=perf_counter() - began,
        overhead=0.0,
    )
    return found, record


def _influence(
    tap: Tap, probe: Batches, reading: Reading, found: Findings, levels: Levels, seed: int
) -> GlobalInfluence:
    """Return the influence of every concept on every class, on some of the images."""
    count = INFLUENCED if tap.classifier is not None else PASSED
    order = torch.randperm(len(reading.rows), generator=torch.Generator().manual_seed(seed))
    some = order[:count].sort().values.to(reading.rows.device)
    rows = reading.rows[some]
    linear = tap.classifier is not None
    images = torch.empty(0) if linear else images_at(probe, reading.indices[some])[0]
    steps = levels.present - levels.absent
    return global_influence(rows, found.pairs.signals, steps, behind(tap, images), seed=seed)
