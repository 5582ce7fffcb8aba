"""Stage 5: a page that shows which concepts drive errors, in one file that opens from disk."""

from concept_guard.report.page import (
    BeforeAfter,
    ConceptEntry,
    Contribution,
    ErrorRow,
    GroupRow,
    ImageEntry,
    InfluenceRow,
    Picture,
    Report,
    render,
    write_html,
)
from concept_guard.report.pictures import jpeg, png

__all__ = [
    "BeforeAfter",
    "ConceptEntry",
    "Contribution",
    "ErrorRow",
    "GroupRow",
    "ImageEntry",
    "InfluenceRow",
    "Picture",
    "Report",
    "jpeg",
    "png",
    "render",
    "write_html",
]
