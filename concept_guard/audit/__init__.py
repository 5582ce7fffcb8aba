"""Audit: debug the misclassifications of a model that is already trained."""

from concept_guard.audit.analysis import Analysis, Error, analyse
from concept_guard.audit.running import AuditResult, audit
from concept_guard.audit.settings import AuditSettings, load_settings

__all__ = [
    "Analysis",
    "AuditResult",
    "AuditSettings",
    "Error",
    "analyse",
    "audit",
    "load_settings",
]
