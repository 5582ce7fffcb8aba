"""Doctor: the place where the model is tapped: its rows, and what becomes of a correction.

Nothing here changes a model or its tap.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from concept_guard.config import GuardConfig
from concept_guard.correction import check_bakeable
from concept_guard.errors import BakeError
from concept_guard.examination.cost import PROBE_IMAGES
from concept_guard.examination.report import Cost, Problem
from concept_guard.examination.settings import Loop, in_updates
from concept_guard.taps import Tap

_DEAR, _FAIR = 0.3, 0.1  # shares of the training time: to speak of, and to propose
_LONG = 300.0  # seconds of rounds in all that nobody minds
_LARGEST_SHARE = 0.25  # of the memory that rows of a reading may take


def rows(tap: Tap, settings: GuardConfig, images: Tensor, facts: list[str]) -> Iterator[Problem]:
    """Yield what is wrong with the rows of the sample, as the guard reads them.

    Args:
        tap: Where they are read.
        settings: Of the guard.
        images: `(N, ...)` the sample.
        facts: How the rows lie is added.

    Yields:
        Problems.
    """
    none = torch.zeros(len(images), dtype=torch.long)
    reading = tap.read([(images, none)], max_rows=2**31, seed=0)
    found, positions = reading.rows, reading.rows.shape[1]
    where = "input" if settings.tap == "pre_logits" else "output"
    layout = f"{tap.layout}, {tap.channels} channels"
    if tap.layout != "NC":
        layout += f", {tap.grid[0]} x {tap.grid[1]} positions"
    if tap.num_prefix:
        layout += f" behind {tap.num_prefix} prefix tokens, which are left alone"
    facts.append(f"rows: {where} of {tap.path} ({layout}); {tap.num_classes} classes")
    finite = {"activations": found, "logits": reading.logits}
    if broken := [name for name, t in finite.items() if not bool(torch.isfinite(t).all())]:
        yield Problem(
            f"tap {settings.tap!r}",
            f"{' and '.join(broken)} of the sample hold NaN or infinite values in eval mode, "
            "so that every round is skipped",
            "finite ones",
            "check the weights and the images, and lower the learning rate",
            stops=True,
        )
    elif bool((found == found[:1, :1]).all()) and len(found) * positions > 1:
        yield Problem(
            f"tap {settings.tap!r}",
            "all rows of the sample are the same, so that there is nothing to find in them",
            "rows that differ from image to image",
            "pass different images; else tap an earlier module, which is not dead",
            stops=True,
        )


def folding(tap: Tap, settings: GuardConfig, facts: list[str]) -> Iterator[Problem]:
    """Yield why a correction cannot become part of the weights.

    Args:
        tap: Where it acts.
        settings: Of the guard.
        facts: That it can is added.

    Yields:
        Problems.
    """
    head, action = tap.classifier, settings.action
    try:
        check_bakeable(head, settings.tap, gated=settings.gate)
    except BakeError as error:
        if "project" in action:
            yield Problem.of("guard.bake()", error, stops=False)
        elif "refit" in action and (head is None or head.bias is None):
            yield Problem(
                "guard.bake()",
                f"no Linear with bias follows tap {settings.tap!r}, so that nothing is refitted",
                "a plain linear classifier",
                "tap: pre_logits on a model with one, or leave refit out of action",
                stops=False,
            )
        return
    facts.append(f"a correction folds into {tap.path} exactly: a Linear with bias")
    trained = any(p.requires_grad for p in tap.model.parameters())
    if head is not None and trained and not head.weight.requires_grad and action:
        yield Problem(
            f"model.{tap.path}",
            "the classifier is frozen: it cannot learn to do without what is projected out, "
            "and guard.bake() writes to it nevertheless",
            "a classifier that is trained",
            f"{tap.path}.requires_grad_(True) on the model, or action: observe",
            stops=False,
        )


def size(tap: Tap, settings: GuardConfig, loop: Loop) -> Iterator[Problem]:
    """Yield whether the probe is too small, or a reading of it too large.

    Args:
        tap: Where it is read.
        settings: Of the guard.
        loop: Says how large it is, if that is known.

    Yields:
        Problems.
    """
    if loop.probe_images is not None and loop.probe_images < tap.num_classes:
        yield Problem(
            "probe",
            f"{loop.probe_images} images for {tap.num_classes} classes",
            "held-out images of every class",
            "hold out more images, or build the model with fewer classes",
            stops=True,
        )
    positions = tap.grid[0] * tap.grid[1]
    images = loop.probe_images or PROBE_IMAGES
    needed = 4 * tap.channels * min(images * positions, settings.max_rows)
    there = _total_memory(tap.device)
    if there and needed > _LARGEST_SHARE * there:
        fits = int(_LARGEST_SHARE * there / (4 * tap.channels))
        yield Problem(
            "settings",
            f"max_rows = {settings.max_rows}: a reading of {images} images takes "
            f"{needed / 2**30:.1f} of {there / 2**30:.1f} GiB on {tap.device.type}",
            "less than a quarter of it",
            f"max_rows: {fits}",
            stops=False,
        )


def dear(cost: Cost, settings: GuardConfig, loop: Loop) -> Iterator[Problem]:
    """Yield whether rounds take a large part of the training time, and long.

    Args:
        cost: What was measured.
        settings: Of the guard.
        loop: Around it; nothing is said while its sizes are not known.

    Yields:
        A problem, if no budget keeps it small.
    """
    share, every = cost.observing_share, in_updates(settings, "every") or 1
    known = loop.batch_size and loop.probe_images and loop.updates
    rounds = (loop.updates or 0) / every * cost.round_ratio.middle * cost.pass_seconds
    if not known or settings.budget is not None or share <= _DEAR or rounds <= _LONG:
        return
    rarer = math.ceil(every * share / (1 - share) * (1 - _FAIR) / _FAIR)
    yield Problem(
        "settings",
        f"every = {settings.every!r}: rounds would take about {share:.0%} of the training time",
        "rounds that are seldom next to what they cost, or a smaller probe",
        f"every: {rarer}, for about {_FAIR:.0%}; or budget: {_FAIR:.0%}, which stretches it",
        stops=False,
    )


def _total_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None  # Windows does not tell
