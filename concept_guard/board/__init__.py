"""Stage 5: the tab of TensorBoard: `plugin` answers its requests, `runs` finds the histories."""

from concept_guard.board.plugin import ConceptGuardPlugin

__all__ = ["ConceptGuardPlugin"]
