"""The guard's state as plain data and tensors, and back.

Nothing here decides anything; `torch.load(..., weights_only=True)` reads what this writes.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch

from concept_guard.directions import Concept, DirectionPairs, Subspace, WithinClassPair
from concept_guard.errors import StateError
from concept_guard.flags import Flag
from concept_guard.records import Group, RoundReport
from concept_guard.tracking import Tracked

SCHEMA_VERSION = 9
TENSORS = ("filters", "signals", "biases")  # of direction pairs


def check(saved: Mapping[str, Any], expected: Mapping[str, Any], known: set[str]) -> None:
    """Refuse a state of another schema or another model, naming every difference.

    Args:
        saved: A state read from a checkpoint.
        expected: What identifies the model and tap at hand.
        known: Keys that a complete state has.

    Raises:
        StateError: If the state does not belong here.
    """
    version = saved.get("schema_version")
    if version != SCHEMA_VERSION:
        raise StateError(
            f"guard state has schema_version {version!r}, expected {SCHEMA_VERSION}; load it with "
            "the concept_guard version that wrote it, or start the guard afresh"
        )
    missing = sorted(known - saved.keys())
    if missing:
        raise StateError(f"guard state lacks {', '.join(missing)}; the checkpoint is incomplete")
    there = saved["model"]
    wrong = [
        f"{name} is {there.get(name)!r} in the state, {value!r} here"
        for name, value in expected.items()
        if there.get(name) != value
    ]
    if wrong:
        raise StateError(
            f"guard state belongs to another model: {'; '.join(wrong)}. Build the model and the "
            "guard as in the run that saved it, or do not load this state"
        )


def from_pairs(pairs: DirectionPairs | None) -> dict[str, Any] | None:
    """Return the tensors of direction pairs.

    Args:
        pairs: Pairs or None.

    Returns:
        Plain data.
    """
    if pairs is None:
        return None
    return {name: getattr(pairs, name).cpu().clone() for name in TENSORS}


def to_pairs(saved: Mapping[str, Any] | None, device: torch.device) -> DirectionPairs | None:
    """Return the pairs that `from_pairs` wrote.

    Args:
        saved: Plain data.
        device: Where the pairs are to be.

    Returns:
        Pairs or None.
    """
    if saved is None:
        return None
    return DirectionPairs(**{name: tensor.to(device) for name, tensor in saved.items()})


def from_subspace(subspace: Subspace | None) -> dict[str, Any] | None:
    """Return the tensors of a subspace.

    Args:
        subspace: Subspace or None.

    Returns:
        Plain data.
    """
    if subspace is None:
        return None
    return {f.name: getattr(subspace, f.name).cpu().clone() for f in fields(subspace)}


def to_subspace(saved: Mapping[str, Any] | None, device: torch.device) -> Subspace | None:
    """Return the subspace that `from_subspace` wrote.

    Args:
        saved: Plain data.
        device: Where it is to be.

    Returns:
        Subspace or None.
    """
    if saved is None:
        return None
    return Subspace(**{name: tensor.to(device) for name, tensor in saved.items()})


def from_tracked(tracked: Tracked) -> dict[str, Any]:
    """Return a tracked concept as plain data.

    Args:
        tracked: A concept under correction.

    Returns:
        Plain data.
    """
    pair = {f.name: getattr(tracked.pair, f.name) for f in fields(tracked.pair)}
    pair["filter"], pair["signal"] = (pair[n].cpu().clone() for n in ("filter", "signal"))
    return {
        "concept": tracked.concept,
        "class_index": tracked.class_index,
        "pair": pair,
        "carriers": tracked.carriers.cpu().clone(),
        "separation": tracked.separation,
        "images": tracked.images.cpu().clone(),
        "present": tracked.present.cpu().clone(),
    }


def to_tracked(saved: Mapping[str, Any], device: torch.device) -> Tracked:
    """Return the tracked concept that `from_tracked` wrote.

    Args:
        saved: Plain data.
        device: Where its pair is to be.

    Returns:
        The concept.
    """
    pair = dict(saved["pair"])
    pair["filter"], pair["signal"] = (pair[n].to(device) for n in ("filter", "signal"))
    return Tracked(**{**saved, "pair": WithinClassPair(**pair)})


def from_report(report: RoundReport | None) -> dict[str, Any] | None:
    """Return a round's record as plain data.

    Args:
        report: The record or None.

    Returns:
        Plain data.
    """
    if report is None:
        return None
    plain = {f.name: getattr(report, f.name) for f in fields(report)}
    plain["flags"] = [asdict(flag) for flag in report.flags]
    plain["groups"] = [asdict(group) for group in report.groups]
    plain["concepts"] = [
        {f.name: getattr(concept, f.name) for f in fields(concept)} for concept in report.concepts
    ]
    return plain


def to_report(saved: Mapping[str, Any] | None) -> RoundReport | None:
    """Return the record that `from_report` wrote.

    Args:
        saved: Plain data.

    Returns:
        The record or None.
    """
    if saved is None:
        return None
    plain = dict(saved)
    plain["flags"] = tuple(Flag(**flag) for flag in saved["flags"])
    plain["groups"] = tuple(Group(**group) for group in saved["groups"])
    plain["concepts"] = tuple(Concept(**concept) for concept in saved["concepts"])
    return RoundReport(**plain)
