"""Doctor: the settings of the guard and of the loop around it, checked without a model.

Nothing here knows about models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from concept_guard.config import INTERVALS, GuardConfig, Interval, read_yaml
from concept_guard.errors import ConfigError
from concept_guard.examination.report import Problem


@dataclass(frozen=True)
class Loop:
    """The switches of a training loop that matter to a guard in it.

    Attributes:
        compile: Backend of `torch.compile`, such as `inductor`; None for eager training.
        compile_mode: Its mode.
        grad_checkpointing: Whether timm's gradient checkpointing is switched on.
        autocast: Type of mixed precision; None for none.
        channels_last: Whether model and images have that memory format.
        batch_size: Images per update; None for as many as the sample has.
        updates: Of the whole training; None if not known.
        probe_images: Held-out images; None if not known.
    """

    compile: str | None = None
    compile_mode: str | None = None
    grad_checkpointing: bool = False
    autocast: Literal["bfloat16", "float16"] | None = None
    channels_last: bool = False
    batch_size: int | None = None
    updates: int | None = None
    probe_images: int | None = None

    @property
    def switches(self) -> str:
        """What is switched on, in words."""
        named = {
            "gradient checkpointing": self.grad_checkpointing,
            "channels_last": self.channels_last,
            f"{self.autocast} autocast": self.autocast,
            f"torch.compile ({self.compile})": self.compile,
        }
        return ", ".join(name for name, on in named.items() if on) or "no switch"


def settled(
    config: GuardConfig | Mapping[str, object] | str | Path | None,
) -> tuple[GuardConfig, list[Problem]]:
    """Return settings with what is wrong in them left at its default, and what that is.

    Args:
        config: As `ConceptGuard` takes it.

    Returns:
        Settings that can be worked with, and one problem for each offender.
    """
    try:
        settings, problems = GuardConfig.load(config), []
    except ConfigError as error:
        problems = offenders("settings", error)
        settings = _what_is_right(config)
    for name in INTERVALS:
        try:
            settings.updates(name)
        except ConfigError as error:
            problems.append(Problem.of("settings", error))
    return settings, problems


def offenders(where: str, error: ConfigError) -> list[Problem]:
    """Return the problems that an error about settings lists.

    Args:
        where: Place of the problems.
        error: With one line per offender, under a headline if there are several.

    Returns:
        A problem per offender.
    """
    lines = str(error).split("\n  ")
    return [_offender(where, line) for line in (lines[1:] if len(lines) > 1 else lines)]


def _offender(where: str, line: str) -> Problem:
    line = line.removeprefix("GuardConfig: ")
    if place := re.match(rf"({re.escape(where)}(?::\d+)?|command line \S+): (?=\S)", line):
        where, line = place[1], line[place.end() :]
    found, _, nearest = line.partition("; nearest: ")
    if nearest:
        return Problem(where, found, "", f"did you mean {nearest}? Else remove it", stops=True)
    found, _, expected = found.partition(": expected ")
    if expected:
        return Problem(
            where, found, expected, "correct it, or remove it for the default", stops=True
        )
    return Problem.of(where, line)


def _what_is_right(config: object) -> GuardConfig:
    """Return the settings with every key that is wrong at its default."""
    given: Mapping[str, object] = config if isinstance(config, Mapping) else {}
    if isinstance(config, str | Path):
        try:
            given = read_yaml(config)[0]
        except ConfigError:
            given = {}
    kept: dict[str, object] = {}
    for key, value in given.items():
        try:
            GuardConfig.load({key: value})
        except ConfigError:
            continue
        kept[key] = value
    return GuardConfig.load(kept)


def timing(settings: GuardConfig, loop: Loop) -> Iterator[Problem]:
    """Yield what the length of the training says against the schedule.

    Args:
        settings: Of the guard; schedules that cannot be told are passed over.
        loop: Around it.

    Yields:
        Problems.
    """
    total = loop.updates
    if total is None:
        return
    start, ramp = in_updates(settings, "start"), in_updates(settings, "ramp")
    if start is not None and start > total:
        yield Problem(
            "settings",
            f"start = {settings.start!r}: the first round comes after {start} updates, and the "
            f"training ends after {total}, so that nothing is ever looked for",
            "a round within the training, better several",
            f"start: {max(1, total // 4)}, every: {max(1, total // 8)}",
            stops=True,
        )
    elif start is not None and ramp and start + ramp > total:
        yield Problem(
            "settings",
            f"ramp = {settings.ramp!r}: a correction that begins with the first round, after "
            f"{start} of {total} updates, never reaches its strength",
            "a ramp that ends within the training",
            f"ramp: {max(1, (total - start) // 4)}",
            stops=False,
        )


def in_updates(settings: GuardConfig, name: Interval) -> int | None:
    """Return a schedule in updates; None if it is in epochs of unknown length."""
    try:
        return settings.updates(name)
    except ConfigError:
        return None
