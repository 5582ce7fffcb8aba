"""Audit: debug the misclassifications of a model that is already trained."""

from concept_guard.audit.analysis import Analysis, Error, analyse

__all__ = ["Analysis", "Error", "analyse"]
