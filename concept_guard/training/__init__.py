"""The command line's own training: a plain timm loop, a user of the public API like any other.

Nothing in the rest of the package knows about it.
"""

from concept_guard.training.interrupts import Interrupted
from concept_guard.training.recipe import Recipe, load_recipe
from concept_guard.training.runs import RunResult, run

__all__ = ["Interrupted", "Recipe", "RunResult", "load_recipe", "run"]
