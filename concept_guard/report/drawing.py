"""Stage 5: what all pages share: templates that escape every text, one style, pictures inside.

Nothing here knows what a page shows.
"""

import base64
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

_KINDS = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}

# Control characters, and those that turn the direction of the text around them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def environment(filters: Mapping[str, Callable[..., Any]]) -> Environment:
    """Return what renders the templates of this folder.

    Texts are plain text: whatever looks like HTML in them is escaped, and characters that are
    not seen but change how others are read are spelled out.

    Args:
        filters: Of the templates, by name.

    Returns:
        The environment; a variable that is missing is an error.
    """
    made = Environment(
        loader=PackageLoader("concept_guard.report", "."),
        autoescape=True,
        finalize=_spelled_out,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters
    return made


def style() -> str:
    """Return the CSS of all pages; it follows the reader's choice of dark or light.

    Returns:
        The text of a style sheet that asks for no other file.
    """
    return files("concept_guard.report").joinpath("style.css").read_text(encoding="utf8")


def picture_kind(picture: bytes) -> str | None:
    """Tell the media type of a picture by its first bytes.

    Args:
        picture: Bytes of a file.

    Returns:
        `image/png` or `image/jpeg`; None for anything else.
    """
    return next((kind for magic, kind in _KINDS.items() if picture.startswith(magic)), None)


def data_uri(picture: bytes) -> str:
    """Return a picture as text that stands where its address would.

    Args:
        picture: Bytes of a file.

    Returns:
        A data URI.

    Raises:
        ValueError: If it is neither PNG nor JPEG.
    """
    kind = picture_kind(picture)
    if kind is None:
        raise ValueError(
            f"picture of {len(picture)} bytes begins with {picture[:8]!r}, expected the bytes of "
            "a PNG or JPEG file; encode it with png or jpeg of concept_guard.report.pictures"
        )
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def _spelled_out(value: object) -> object:
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), value)
