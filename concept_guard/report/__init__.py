"""Stage 5: a page that shows which concepts drive errors, in one file that opens from disk."""

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
from concept_guard.report.pictures import jpeg, png

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
    "jpeg",
    "png",
    "render",
    "write_html",
]
