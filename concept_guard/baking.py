"""Stage 4e: what was corrected becomes the model's own weights, here or in a copy of it.

Nothing here knows why concepts are corrected.
"""

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from concept_guard.attached import stripped
from concept_guard.config import GuardConfig
from concept_guard.correction import (
    LARGEST_WEIGHT,
    Projection,
    bake_into,
    check_bakeable,
    grouped,
    weight_table,
)
from concept_guard.erasure import Erasure, carriers_in, whole
from concept_guard.errors import BakeError
from concept_guard.probe import Batches
from concept_guard.reading import Reading
from concept_guard.refit import refit
from concept_guard.sharding import is_sharded
from concept_guard.taps import Tap
from concept_guard.tracking import Tracked


def bake(
    tap: Tap,
    probe: Batches,
    config: GuardConfig,
    concepts: Sequence[Tracked],
    reading: Reading | None,
) -> str:
    """Fit the linear map behind a tap again and fold the tap's projection into it.

    Copies of the model, whose maps are not touched, keep the projection in their hooks.
    Where folding cannot be exact, a `BakeError` says why and nothing is changed.

    Args:
        tap: With what is projected out now.
        probe: To which the map is fitted.
        config: Settings of the guard.
        concepts: Those under correction.
        reading: Of the probe, as the network is now; None reads it if it is needed.

    Returns:
        What was done about the map, as a clause; empty if `refit` is not among the actions.
    """
    edit, refits = tap.edit, "refit" in config.action
    if not isinstance(edit, Projection):
        return _refitted(tap, probe, config, concepts, reading, None) if refits else ""
    classifier = check_bakeable(tap.classifier, config.tap, gated=edit.gate is not None)
    done = _refitted(tap, probe, config, concepts, reading, edit) if refits else ""
    bake_into(classifier, edit)
    tap.leave_edit_to_copies()
    return done


def baked_copy(
    model: nn.Module,
    probe: Batches,
    config: GuardConfig,
    concepts: Sequence[Tracked],
    strength: float,
    sample: Tensor,
) -> nn.Module:
    """Return a copy of a model, or of an average of it, into which its correction is folded.

    What is projected out is estimated from the copy's own rows; which images of the probe carry a
    concept is known.

    Args:
        model: With the hooks of a guard or without; it is not changed.
        probe: The probe.
        config: Settings of the guard.
        concepts: Those under correction.
        strength: Share of their influence to take away by now.
        sample: `(N, ...)` a few images.

    Returns:
        The copy, without hooks of a guard.

    Raises:
        BakeError: If folding cannot be exact, or the model is divided among processes.
    """
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise BakeError(
            "the model is divided among the processes and cannot be copied; call guard.bake() in "
            "all of them and gather the weights (get_model_state_dict, full_state_dict=True)"
        )
    new = stripped(copy.deepcopy(model))
    tap = Tap(new, config.tap, sample)
    try:
        erasure = Erasure(tap, probe, config)
        erasure.strengthen(strength)
        bake(tap, probe, config, concepts, erasure.settle(concepts))
    finally:
        tap.close()
    return new


def _refitted(
    tap: Tap,
    probe: Batches,
    config: GuardConfig,
    concepts: Sequence[Tracked],
    reading: Reading | None,
    edit: Projection | None,
) -> str:
    """Return what became of the attempt to fit the classifier to the probe."""
    classifier = tap.classifier
    if classifier is None or classifier.bias is None:
        return "classifier not refitted: no plain linear map with a bias follows the tap"
    try:
        reading = whole(tap, probe, config) if reading is None else reading
    except ValueError as error:
        return f"classifier not refitted: {error}"
    rows = (reading.rows if edit is None else edit(reading.rows))[:, 0]
    for weights in _weightings(reading, concepts):
        found = refit(rows, reading.labels, weights, classifier, seed=config.seed)
        if concepts or found.broken <= found.mended:
            break
    if not found.supported:
        return f"classifier not refitted: {found}"
    with torch.no_grad():
        classifier.weight.copy_(found.weight)
        classifier.bias.copy_(found.bias)
    return f"classifier refitted to the probe: {found}"


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
