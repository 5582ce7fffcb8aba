"""Audit: debug the misclassifications of a model that is already trained."""

from concept_guard.audit.running import AuditResult, audit
from concept_guard.audit.settings import AuditSettings, load_settings

__all__ = ["AuditResult", "AuditSettings", "audit", "load_settings"]
