"""Audit: which errors a trained model makes on held-out images, and which concepts drive them.

Nothing here knows where model and images come from or how the result is written.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn

from concept_guard.cards import Card
from concept_guard.changes import Levels
from concept_guard.config import GuardConfig
from concept_guard.corrector import Corrector
from concept_guard.errors import ProbeError
from concept_guard.explanation import Explanation, behind, explain_images
from concept_guard.influence import GlobalInfluence, global_influence
from concept_guard.measures import Group, not_finite, pseudo_groups
from concept_guard.probe import Batches, Reading, checked_pair, images_at
from concept_guard.records import RoundReport
from concept_guard.reporting import HELD, cards, report
from concept_guard.rounds import Findings, look
from concept_guard.taps import Tap

INFLUENCED, PASSED = 512, 32  # images on which influence is measured; where each takes passes
CHUNK = 256  # errors that are explained at a time


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
class Analysis:
    """What an audit found.

    Attributes:
        report: The record of the round, with flags and verdict.
        findings: Direction pairs, candidates and their ids.
        errors: All misclassified images that were read, those of confirmed concepts first, most
            certain first.
        groups: Size and accuracy by class and presence of each flagged concept.
        influence: What inserting each concept does to each class, in the order of the pairs.
        cards: Concept id to card, for candidates.
        unreadable: Positions of the images that were left out.
        seconds: Duration without the forward pass over the probe.
    """

    report: RoundReport
    findings: Findings
    errors: tuple[Error, ...]
    groups: tuple[Group, ...]
    influence: GlobalInfluence
    cards: dict[int, Card]
    unreadable: tuple[int, ...]
    seconds: float


def analyse(
    model: nn.Module, probe: Batches, config: GuardConfig, *, broken: Tensor | None = None
) -> Analysis:
    """Find concepts in a trained model, flag those that drive errors, explain every error.

    Nothing is trained, and the model is left as it is.

    Args:
        model: Image classifier.
        probe: Held-out images and labels; classes may be missing.
        config: Tap, number of concepts, level and seed; nothing is corrected.
        broken: `(N,)` bool that tells, once the images have been read, which could not be.

    Returns:
        The analysis.

    Raises:
        ProbeError: If no image can be read, or the activations or logits are not finite.
    """
    config = config.model_copy(update={"action": ()})
    sample = next(iter(probe), None)
    if sample is None:
        raise ProbeError("audit: there is no image; expected <data>/<class>/<image>")
    with ExitStack() as stack:
        tap = Tap(model, config.tap, checked_pair(sample, 0)[0][:2])
        stack.callback(tap.close)
        reading = tap.read(probe, max_rows=config.max_rows, seed=config.seed)
        began = perf_counter()
        reading, unreadable = _readable(reading, broken)
        _refuse_not_finite(reading, config.tap)
        corrector = Corrector(tap, probe, config)
        tail = corrector.tail(reading)
        found = look(
            reading,
            tail,
            config=config,
            seed=config.seed,
            last=None,
            last_ids=(),
            next_id=0,
            tracked=(),
        )
        record = report(
            reading,
            found,
            corrector,
            None,
            step=0,
            alpha=config.alpha,
            seconds=perf_counter() - began,
            overhead=0.0,
        )
        carried = {i: c.present.any(dim=1) for i, c in found.candidates.items()}
        levels = Levels.of(found.pairs.factors(reading.rows), found.pairs)
        held = {f.concept: f.class_index for f in record.flags if f.status in HELD}
        return Analysis(
            report=record,
            findings=found,
            errors=_errors(tap, probe, reading, found, levels, held, carried),
            groups=pseudo_groups(reading.logits, reading.labels, {i: carried[i] for i in held}),
            influence=_influence(tap, probe, reading, found, levels, config.seed),
            cards=cards(tap, probe, reading, found, list(found.candidates)),
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
        raise ProbeError(f"audit: none of the {len(keep)} images can be read; check the files")
    kept = {n: getattr(reading, n)[keep] for n in ("rows", "logits", "labels", "indices")}
    return replace(reading, **kept), tuple(broken.nonzero().flatten().tolist())


def _refuse_not_finite(reading: Reading, tap: str) -> None:
    """Refuse a model whose activations or logits are not finite.

    Raises:
        ProbeError: Naming them.
    """
    if wrong := not_finite(reading, None, tap):
        raise ProbeError(
            f"audit: {' and '.join(wrong)} hold NaN or infinite values, expected finite ones; "
            "check the weights and how the images are normalised"
        )


def _influence(
    tap: Tap, probe: Batches, reading: Reading, found: Findings, levels: Levels, seed: int
) -> GlobalInfluence:
    """Return the influence of every concept on every class, on some of the images."""
    count = INFLUENCED if tap.classifier is not None else PASSED
    order = torch.randperm(len(reading.rows), generator=torch.Generator().manual_seed(seed))
    some = order[:count].sort().values.to(reading.rows.device)
    rows = reading.rows[some]
    images, _ = images_at(probe, reading.indices[some])
    steps = levels.present - levels.absent
    return global_influence(rows, found.pairs.signals, steps, behind(tap, images), seed=seed)


def _errors(
    tap: Tap,
    probe: Batches,
    reading: Reading,
    found: Findings,
    levels: Levels,
    held: Mapping[int, int],
    carried: Mapping[int, Tensor],
) -> tuple[Error, ...]:
    """Return all errors with the concept that drives each, confirmed ones and sure ones first."""
    chance, predicted = reading.logits.softmax(dim=1).max(dim=1)
    wrong = (predicted != reading.labels).nonzero().flatten()
    wrong = wrong[chance[wrong].argsort(descending=True)]
    if not len(wrong):
        return ()
    errors = []
    for at in wrong.split(CHUNK):
        images, labels = images_at(probe, reading.indices[at])
        told = explain_images(tap, images, labels, found.pairs, found.ids, levels, maps=False)
        for n, explanation in zip(at.tolist(), told, strict=True):
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
    return tuple(sorted(errors, key=lambda error: not error.confirmed))
