"""Configuration of the guard: what may be set, which values are possible, when things are due.

Nothing here knows what the settings do: the stages read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, field_serializer

from concept_guard.errors import ConfigError
from concept_guard.strict import StrictModel, read_yaml, validated

__all__ = ["GuardConfig", "read_yaml", "validated"]

_ACTIONS = ("project", "penalize", "rebalance", "augment", "refit")
_DEFAULT = ("project", "rebalance", "augment", "refit")
TRACKED = 25  # updates between re-estimations, the fewest of `auto`
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)ep")
_TAP = re.compile(r"(pre_logits|stage:-?\d+|module:[^@\s]+)(@(NCHW|NHWC|NLC))?")


# The parsers below run before pydantic's own checks; pydantic turns their ValueError into a
# message with key, value and line.


def _parse_action(value: object) -> object:
    # `observe`, one name, or a list of names become a tuple of actions in a fixed order.
    if value == "observe" or (isinstance(value, list | tuple) and list(value) == ["observe"]):
        return ()
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected observe, or a list out of {', '.join(_ACTIONS)}")
    wrong = [name for name in names if name not in _ACTIONS or names.count(name) > 1]
    if wrong:
        raise ValueError(
            f"{', '.join(sorted(set(wrong)))} cannot be used here: expected observe alone, "
            f"or a list out of {', '.join(_ACTIONS)} that names each once"
        )
    return tuple(name for name in _ACTIONS if name in names)


def _parse_schedule(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    epochs = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
    if epochs and float(epochs[1]) > 0:
        return value
    raise ValueError('expected a whole number of updates, at least 1, or epochs such as "1ep"')


def _parse_track_every(value: object) -> object:
    if value == "auto":
        return value
    try:
        return _parse_schedule(value)
    except ValueError as error:
        raise ValueError(f"{error}; or auto") from None


def _parse_ramp(value: object) -> object:
    if value == 0 and isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return _parse_schedule(value)
    except ValueError as error:
        raise ValueError(f"{error}; or 0 for none") from None


def _parse_concepts(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 2):
        return value
    raise ValueError("expected auto, or a whole number of concepts, at least 2")


def _parse_budget(value: object) -> object:
    share = value  # "5%" becomes 0.05
    if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?\s*%", value):
        share = float(value.rstrip("% ")) / 100
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if value is None or (number and 0 < float(str(share)) < 1):
        return share
    raise ValueError('expected a share of the wall time such as "5%" or 0.05, or null')


def _parse_tap(value: object) -> object:
    if isinstance(value, str) and not _TAP.fullmatch(value):
        raise ValueError(
            "expected pre_logits, stage:<number> such as stage:-1, or module:<path> such as "
            "module:layer4.1; @NCHW, @NHWC or @NLC may follow"
        )
    return value


_Schedule = Annotated[int | str, BeforeValidator(_parse_schedule)]


Interval = Literal["start", "every", "track_every", "ramp"]
INTERVALS: tuple[Interval, ...] = get_args(Interval)


class GuardConfig(StrictModel):
    """Settings of one `ConceptGuard`; frozen, strict, unknown keys are refused.

    Attributes:
        tap: Where activations are read and corrected: `pre_logits`, `stage:-1` or
            `module:layer4.1`, with an optional layout such as `@NHWC`.
        concepts: Direction pairs per round; `auto` chooses from the data.
        start: Updates before the first round, or epochs such as `1ep`.
        every: Updates between rounds, or epochs.
        track_every: Updates between re-estimations of the tracked pairs while they move, or
            epochs; up to four times as many while they do not. `auto` is 25, more where batches
            are small: seven training images for every reference image.
        action: What is done about a flagged concept: any of `project`, `penalize`, `rebalance`
            and `augment`, always in this order; and whether baking may `refit` the classifier to
            the probe. Empty means observe only.
        max_erased: Concepts that may be erased at the same time.
        alpha: False-discovery level of the flags; smaller flags less.
        approve: `auto` corrects what is flagged, `manual` waits for `guard.approve`
            or the command `concept-guard approve`.
        strength: Share of a concept's influence to take away, in (0, 1], on every model: of its
            excess factor (`project`), of its pull on the logits, as their standard deviation
            shows it (`penalize`), of the log ratio of the groups' sizes (`rebalance`), of the
            training images that are edited (`augment`).
        gate: Whether only rows in which a concept is read are projected, softly. Such a correction
            cannot be baked.
        ramp: Updates over which the strength grows from 0 to its value, or epochs; 0 for none.
            It begins when the first concept comes under correction, for all that follow too,
            until none is left.
        budget: Share of the wall time the guard may use, stretching its intervals; `None`
            keeps the schedule as it is, which makes runs reproducible.
        max_rows: Rows of the probe that are kept for finding directions.
        reference_images: Probe images that tracking reads again.
        steps_per_epoch: Updates per epoch, needed for schedules in epochs.
        seed: Seed of the guard's own generator.
    """

    tap: Annotated[str, BeforeValidator(_parse_tap)] = "pre_logits"
    concepts: Annotated[int | Literal["auto"], BeforeValidator(_parse_concepts)] = "auto"
    start: _Schedule = 100
    every: _Schedule = 200
    track_every: Annotated[int | str, BeforeValidator(_parse_track_every)] = "auto"
    action: Annotated[tuple[str, ...], BeforeValidator(_parse_action)] = _DEFAULT
    max_erased: int = Field(default=16, ge=1)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    approve: Literal["auto", "manual"] = "auto"
    strength: float = Field(default=1.0, gt=0, le=1)
    gate: bool = False
    ramp: Annotated[int | str, BeforeValidator(_parse_ramp)] = 0
    budget: Annotated[float | None, BeforeValidator(_parse_budget)] = None
    max_rows: int = Field(default=200_000, ge=1)
    reference_images: int = Field(default=320, ge=1)
    steps_per_epoch: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)

    @field_serializer("action")
    def _write_action(self, action: tuple[str, ...]) -> str | list[str]:
        return list(action) or "observe"

    def updates(self, name: Interval) -> int:
        """Return a schedule as a number of optimizer updates.

        Args:
            name: Which schedule.

        Returns:
            At least 1, but for a ramp of 0; epochs are rounded to whole updates. For `auto` the
            fewest.

        Raises:
            ConfigError: If the schedule is in epochs and `steps_per_epoch` is not set.
        """
        value = getattr(self, name)
        if value == "auto":
            return TRACKED
        if isinstance(value, int):
            return value
        if self.steps_per_epoch is None:
            raise ConfigError(
                f"{name} = {value!r} is in epochs, but steps_per_epoch is not set. "
                "Set steps_per_epoch=len(loader), or give the number of updates."
            )
        return max(1, round(float(value.removesuffix("ep")) * self.steps_per_epoch))

    def check_schedules(self) -> None:
        """Raise the `ConfigError` of a schedule that is no number of updates, if there is one."""
        for name in INTERVALS:
            self.updates(name)

    @classmethod
    def load(cls, source: GuardConfig | Mapping[str, object] | str | Path | None) -> GuardConfig:
        """Return the configuration described by `source`.

        Args:
            source: A configuration (returned as it is), a mapping, the path of a YAML file, or
                `None` for the defaults.

        Returns:
            The checked configuration.
        """
        if isinstance(source, GuardConfig):
            return source
        if source is None or isinstance(source, Mapping):
            return validated(cls, source or {}, {}, cls.__name__)
        data, lines = read_yaml(source)
        return validated(cls, data, lines, str(source))
