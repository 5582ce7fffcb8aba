"""Ids of concepts as people pass them: one or many, checked before anything is done.

Nothing here knows what a concept is.
"""

from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any


def listed(ids: int | Iterable[int]) -> list[int]:
    """Return ids without repetition.

    Args:
        ids: One or many whole numbers of any integer type.

    Returns:
        Plain integers in the given order.

    Raises:
        TypeError: If something is no whole number.
    """
    many: list[Any] = list(ids) if isinstance(ids, Iterable) else [ids]
    wrong = [i for i in many if isinstance(i, bool) or not isinstance(i, Integral)]
    if wrong:
        raise TypeError(f"concept ids: got {wrong}, expected whole numbers, as in guard.report")
    return list(dict.fromkeys(map(int, many)))


def known(ids: int | Iterable[int], there: Collection[int], which: str) -> list[int]:
    """Return ids without repetition, all of which are there.

    Args:
        ids: One or many.
        there: Ids that are allowed.
        which: Which ones these are, for the message.

    Returns:
        Plain integers in the given order.

    Raises:
        ValueError: If some are not there.
    """
    wanted = listed(ids)
    wrong = sorted(set(wanted) - set(there))
    if wrong:
        raise ValueError(f"concepts {wrong} are not {which}, which are {sorted(there)}")
    return wanted
