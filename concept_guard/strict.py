"""Strict settings from YAML: reads a file, checks it, and names every offender with its line.

Nothing here knows which settings exist.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from yaml.nodes import MappingNode, Node, SequenceNode

from concept_guard.errors import ConfigError

Location = tuple[str | int, ...]
Lines = Mapping[Location, int | str]
ModelT = TypeVar("ModelT", bound=BaseModel)

_INT = re.compile(r"(0|[-+]?[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"([-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)
_REPLACED = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


class StrictModel(BaseModel):
    """A frozen model that converts no types, knows its keys, and raises `ConfigError`."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )

    if not TYPE_CHECKING:  # type checkers keep the signature that pydantic makes from the fields

        def __init__(self, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                name = type(self).__name__
                raise ConfigError(_offenders(type(self), {}, name, error)) from error


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, and neither dates nor 12:30 mean anything special."""

    yaml_implicit_resolvers = {
        letter: [rule for rule in rules if rule[0] not in _REPLACED]
        for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> tuple[object, dict[Location, int]]:
    """Return the value of one YAML document and the line on which each key stands.

    Args:
        text: The document.
        source: Its name in messages.

    Returns:
        The value, and a line number for the location of every key and list item.

    Raises:
        ConfigError: If the text is not YAML, or a mapping holds a key twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[Location, int] = {}
        doubles = list(_record(node, (), lines)) if node is not None else []
        value = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        reason = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            f"{where}: this is not readable YAML: {reason}. Expected lines such as `key: value`, "
            "indented with spaces."
        ) from error
    if doubles:
        raise ConfigError(listed(source, [f"{source}:{where}" for where in doubles]))
    return value, lines


def _record(node: Node, at: Location, lines: dict[Location, int]) -> Iterator[str]:
    # Writes the line of every key below `node` into `lines`, and yields the keys set twice.
    if isinstance(node, SequenceNode):
        for index, item in enumerate(node.value):
            lines[*at, index] = item.start_mark.line + 1
            yield from _record(item, (*at, index), lines)
    if isinstance(node, MappingNode):
        own: set[str] = set()
        for key, item in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in own:
                yield f"{line}: {name!r} is set a second time in the same block; keep one"
            own.add(name)
            lines[*at, name] = line
            yield from _record(item, (*at, name), lines)


def expand_path(path: str) -> str:
    """Return `path` with `~` and environment variables replaced.

    Args:
        path: A path as a user writes it.

    Returns:
        The expanded path, relative to the current directory if it was relative.

    Raises:
        ValueError: If an environment variable in it is not set.
    """
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.findall(r"\$\{?\w+\}?", expanded)
    if unset:
        raise ValueError(f"environment variable {', '.join(unset)} is not set; export it first")
    return expanded


def read_yaml(path: str | Path) -> tuple[dict[str, object], dict[Location, int]]:
    """Return the settings in a YAML file and the line on which each stands.

    Args:
        path: The file; `~` and environment variables are replaced.

    Returns:
        The top-level mapping (empty for an empty file) and the lines of `parse_yaml`.

    Raises:
        ConfigError: If the file cannot be read, is not YAML, or holds no mapping.
    """
    try:
        text = Path(expand_path(str(path))).read_text(encoding="utf8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{path}: cannot be read: {reason}. Give the path of a YAML file."
        ) from error
    value, lines = parse_yaml(text, str(path))
    if value is None:
        return {}, lines
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        kind = "keys that are not text" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise ConfigError(f"{path}: got {kind}, expected lines of the form `key: value`.")
    return value, lines


def validated(
    model_class: type[ModelT], data: Mapping[str, object], lines: Lines, source: str
) -> ModelT:
    """Return `data` as a checked model, or raise one error that names every offender.

    Args:
        model_class: The model that says which keys and values are possible.
        data: The settings.
        lines: Line of each location in `source`, or a text that says where it came from.
        source: Name of the file, used in messages.

    Returns:
        The model.

    Raises:
        ConfigError: With one line per offender: where, key, value, expectation, nearest key.
    """
    try:
        return model_class.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(_offenders(model_class, lines, source, error)) from error


def _offenders(
    model_class: type[BaseModel], lines: Lines, source: str, error: ValidationError
) -> str:
    """Return the message that names every offender, in the order of the file."""
    problems: list[tuple[float, str]] = []
    for at, entry in _flat(error, ()):
        place, dotted = lines.get(at), ".".join(str(part) for part in at)
        where = f"{source}:{place}" if isinstance(place, int) else place or source
        if entry["type"] == "extra_forbidden":
            text = f"unknown key {dotted!r}; {_nearest(model_class, at)}"
        elif entry["type"] == "missing":
            text = f"{dotted} is missing; this key is required"
        else:
            told = entry["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
            text = f"{dotted}: {told}"
            if entry["input"] is not None:
                text = f"{dotted} = {entry['input']!r}: {told}"
        problems.append((place if isinstance(place, int) else float("inf"), f"{where}: {text}"))
    return listed(source, [text for _, text in sorted(problems, key=itemgetter(0))])


def listed(source: str, problems: Sequence[str]) -> str:
    """Return the problems as one message: a single one alone, several under a headline."""
    if len(problems) == 1:
        return problems[0]
    return "\n  ".join([f"{source}: {len(problems)} problems", *problems])


def _flat(error: ValidationError, before: Location) -> Iterator[tuple[Location, ErrorDetails]]:
    """Yield location and details of each error, opening those that a nested model wrapped."""
    for entry in error.errors(include_url=False):
        at = before + entry["loc"]
        cause = getattr(entry.get("ctx", {}).get("error"), "__cause__", None)
        if isinstance(cause, ValidationError):
            yield from _flat(cause, at)
        else:
            yield at, entry


def _nearest(model_class: type[BaseModel], at: Location) -> str:
    """Return the known keys that an unknown one probably meant, or all keys of its block."""
    *block, name = (str(part) for part in at)
    known = [key.split(".") for key in _keys(model_class)]
    beside = [key[-1] for key in known if key[:-1] == block]
    elsewhere = [".".join(key) for key in known if key[-1] == name]
    close = get_close_matches(name.replace("-", "_"), beside, n=2)
    near = [".".join([*block, key]) for key in close] or elsewhere
    if near:
        return f"nearest: {' or '.join(repr(key) for key in near)}"
    return f"known here: {', '.join(sorted(beside))}"


def _keys(model_class: type[BaseModel]) -> Iterator[str]:
    """Yield the dotted name of every key of a model and of the models in it."""
    for name, field in model_class.model_fields.items():
        key = field.alias or name
        yield key
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from (f"{key}.{below}" for below in _keys(kind))
