"""Diagnosis: what a trained model gets wrong on held-out images, why, and the page that says so."""

from concept_guard.diagnosis.analysis import Analysis, analyse
from concept_guard.diagnosis.history import Cards, History
from concept_guard.diagnosis.misclassified import Error, Shown
from concept_guard.diagnosis.subject import Subject
from concept_guard.diagnosis.words import headline
from concept_guard.diagnosis.writing import error_rows, write_report
from concept_guard.report import BeforeAfter, Comparison

__all__ = [
    "Analysis",
    "BeforeAfter",
    "Cards",
    "Comparison",
    "Error",
    "History",
    "Shown",
    "Subject",
    "analyse",
    "error_rows",
    "headline",
    "write_report",
]
