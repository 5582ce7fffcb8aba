"""Stage 2, find: encoding-decoding direction pairs in activations, without concept labels."""

from concept_guard.directions.descent import Schedule, descend_pairs
from concept_guard.directions.fit import fit_pairs
from concept_guard.directions.leading import leading
from concept_guard.directions.matching import cosines, match
from concept_guard.directions.membership import Membership, refine_membership
from concept_guard.directions.pairs import Concept, DirectionPairs
from concept_guard.directions.readability import readability
from concept_guard.directions.scatter import Scatter, folds
from concept_guard.directions.subspace import Subspace, joint_subspace
from concept_guard.directions.within_class import WithinClassPair, within_class_pair

__all__ = [
    "Concept",
    "DirectionPairs",
    "Membership",
    "Scatter",
    "Schedule",
    "Subspace",
    "WithinClassPair",
    "cosines",
    "descend_pairs",
    "fit_pairs",
    "folds",
    "joint_subspace",
    "leading",
    "match",
    "readability",
    "refine_membership",
    "within_class_pair",
]
