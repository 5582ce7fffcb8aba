"""Stage 5: numbers as words.

Nothing here knows what they are numbers of.
"""

import math


def signed(value: float | None) -> str:
    """Return a difference with its sign.

    Args:
        value: The difference; what is not known or not finite becomes a dash.

    Returns:
        Two decimals.
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f}"


def number(value: float | None) -> str:
    """Return a number of any size, such as a q-value.

    Args:
        value: The number; what is not known or not finite becomes a dash.

    Returns:
        Two digits.
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.2g}"


def sentence(text: str) -> str:
    """Return a text that begins with a capital and ends with a stop.

    Args:
        text: Without either, or with.

    Returns:
        The sentence; empty if the text is.
    """
    if not text:
        return ""
    stop = "" if text.endswith((".", "!", "?")) else "."
    return f"{text[:1].upper()}{text[1:]}{stop}"
