"""Stage 2, find: encoding-decoding direction pairs in activations, without concept labels."""

from concept_guard.directions.fit import fit_pairs
from concept_guard.directions.matching import match, mean_cosine
from concept_guard.directions.pairs import Concept, DirectionPairs
from concept_guard.directions.within_class import (
    Membership,
    WithinClassPair,
    refine_membership,
    within_class_pair,
)

__all__ = [
    "Concept",
    "DirectionPairs",
    "Membership",
    "WithinClassPair",
    "fit_pairs",
    "match",
    "mean_cosine",
    "refine_membership",
    "within_class_pair",
]
