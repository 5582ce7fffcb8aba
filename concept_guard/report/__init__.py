"""Stage 5: pages on what drives errors, and on what the guard saw and did, without a server.

Only `pictures` imports torch: TensorBoard shows the view of a run too, and must start at once.
"""

from concept_guard.report.contents import (
    BeforeAfter,
    Comparison,
    ConceptEntry,
    Contribution,
    ErrorRow,
    GroupRow,
    ImageEntry,
    InfluenceRow,
    Picture,
    Report,
    SuspectEntry,
)
from concept_guard.report.page import render, write_html
from concept_guard.report.runs import fragment, run_page, style

__all__ = [
    "BeforeAfter",
    "Comparison",
    "ConceptEntry",
    "Contribution",
    "ErrorRow",
    "GroupRow",
    "ImageEntry",
    "InfluenceRow",
    "Picture",
    "Report",
    "SuspectEntry",
    "fragment",
    "render",
    "run_page",
    "style",
    "write_html",
]
