"""Stage 5: the tags under which a round and an act stand in TensorBoard, and their values.

The only place where a tag is spelled; recipes/tags.md says what each means. Step = optimizer
updates. Nothing here knows how events are written.
"""

from collections.abc import Callable, Iterator, Mapping

from concept_guard.entries import CARD_TAG, TAG
from concept_guard.records import RoundReport, evidence

PREFIX = "concept_guard/"
TOP1 = "concept_guard/probe/top1"
WORST_GROUP = "concept_guard/probe/worst_group"
MISREAD = "concept_guard/stability/misread"
REPORT = "concept_guard/report"
CARD, HISTORY = CARD_TAG, TAG
ACTS = {
    act: f"concept_guard/acts/{act}"
    for act in ("flag", "erase", "restore", "veto", "approve", "withdraw", "re_estimate", "bake")
}
ROUND: tuple[tuple[str, Callable[[RoundReport], float | None]], ...] = (
    ("concept_guard/summary/n_concepts", lambda r: len(r.concepts)),
    ("concept_guard/summary/n_flagged", lambda r: len(r.flagged)),
    ("concept_guard/summary/n_erased", lambda r: len(r.erased)),
    ("concept_guard/summary/penalty", lambda r: r.penalty),
    (TOP1, lambda r: r.accuracy),
    ("concept_guard/probe/top1_if_erased", lambda r: r.accuracy_if_erased),
    ("concept_guard/probe/top1_uncorrected", lambda r: r.accuracy_uncorrected),
    (WORST_GROUP, lambda r: r.worst_group_accuracy),
    ("concept_guard/probe/worst_group_if_erased", lambda r: r.worst_group_accuracy_if_erased),
    ("concept_guard/probe/worst_group_uncorrected", lambda r: r.worst_group_uncorrected),
    ("concept_guard/probe/worst_class_recall", lambda r: r.worst_class_recall),
    ("concept_guard/probe/error_share_explained", lambda r: r.error_share_explained),
    ("concept_guard/stability/cosine_to_last", lambda r: r.cosine_to_last),
    ("concept_guard/cost/round_s", lambda r: r.seconds),
    ("concept_guard/cost/overhead_pct", lambda r: 100.0 * r.overhead),
)
SLOT: dict[str, str] = {
    name: f"concept_guard/slot_{{}}/{name}"
    for name in ("risk_difference", "q_value", "leak", "readable", "drift")
}


def round_values(report: RoundReport) -> dict[str, float | None]:
    """Return the scalars of a round by tag; None leaves a gap in its curve.

    Args:
        report: The round.

    Returns:
        All tags of the table, in its order.
    """
    return {tag: read(report) for tag, read in ROUND}


def slot_values(
    report: RoundReport, slots: Mapping[int, int]
) -> Iterator[tuple[str, float | None]]:
    """Return the values of each slot; a concept flagged for two classes shows the stronger one.

    Args:
        report: The round.
        slots: Concept id to slot.

    Yields:
        Tag and value.
    """
    for concept, slot in slots.items():
        mine = sorted((flag for flag in report.flags if flag.concept == concept), key=evidence)
        for flag in mine[:1]:
            yield SLOT["risk_difference"].format(slot), flag.risk_difference
            yield SLOT["q_value"].format(slot), flag.q_value
        for name in ("leak", "readable", "drift"):
            values: Mapping[int, float] = getattr(report, name)
            yield SLOT[name].format(slot), values.get(concept)
