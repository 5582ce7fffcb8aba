"""Checkup: examines what the command line names.

Nothing here knows how it is examined.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from concept_guard.checkup.cases import case_of
from concept_guard.examination import SECONDS, DoctorReport, doctor, settled, timing

_logger = logging.getLogger(__name__)


def checkup(source: str, words: Sequence[str] = (), *, seconds: float = SECONDS) -> DoctorReport:
    """Examine a model with its settings and its training loop.

    Args:
        source: A timm model, a recipe, a YAML of timm's train.py, or that script.
        words: `key=value`; behind a script its own arguments.
        seconds: About how long the cost of an update is measured; 0 leaves the cost out.

    Returns:
        The report.
    """
    case = case_of(source, words)
    if case.model is None or case.sample is None:
        config, problems = settled(case.config)
        problems += timing(config, case.loop)
        subject, facts, cost = f"{case.name}, tap {config.tap!r}", case.facts, None
    else:
        _logger.info("%s with %s: a minute or so", case.name, case.loop.switches)
        found = doctor(case.model, case.sample, case.config, loop=case.loop, seconds=seconds)
        problems = list(found.problems)
        subject, facts, cost = (
            f"{case.name}: {found.subject}",
            [*found.facts, *case.facts],
            found.cost,
        )
    both = sorted([*case.problems, *problems], key=lambda problem: not problem.stops)
    return DoctorReport(subject, tuple(both), tuple(facts), cost)
