"""What `key=value` words of a command line change in settings that were read from a file.

Nothing here knows which settings there are.
"""

from collections.abc import Iterable
from typing import Any

from concept_guard.errors import ConfigError
from concept_guard.strict import Location, listed, parse_yaml


def override_all(
    data: dict[str, object], places: dict[Location, int | str], words: Iterable[str]
) -> None:
    """Set every `key=value` in `data`, and write down that it comes from the command line.

    Args:
        data: Settings as read from a file; changed in place.
        places: Where each came from; changed likewise.
        words: For example `epochs=3` and `guard.alpha=0.01`; values are read as YAML.

    Raises:
        ConfigError: With every word that is no `key=value`, or lies in what is no block.
    """
    wrong: list[str] = []
    for text in words:
        try:
            override(data, places, text)
        except (ConfigError, ValueError) as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError(listed("command line", wrong))


def override(data: dict[str, object], places: dict[Location, int | str], text: str) -> None:
    """Set one `key=value` in `data`, and write down that it comes from the command line.

    Args:
        data: Settings as read from a file; changed in place.
        places: Where each came from; changed likewise.
        text: For example `epochs=3` or `guard.alpha=0.01`; the value is read as YAML.

    Raises:
        ValueError: If the text is no `key=value`, or the key lies in what is no block.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{text!r}: expected key=value, for example epochs=3 or guard.alpha=0.01")
    source = f"command line {text}"
    *blocks, name = key.strip().split(".")
    block: Any = data
    for depth, part in enumerate(blocks):
        if block.get(part) is None:
            block[part] = {}
        block = block[part]
        if not isinstance(block, dict):
            above = ".".join(blocks[: depth + 1])
            raise ValueError(f"{source}: {above} = {block!r} is a value, it has no {name!r} in it")
    block[name], _ = parse_yaml(value, source)
    places[*blocks, name] = source
