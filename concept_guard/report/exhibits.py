"""Stage 5: what is shown of a concept: its cards, evidence, curves, and its groups.

Nothing here knows how they are laid out, or where pictures are kept.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from concept_guard.entries import ConceptEntry, FlagEntry, GroupEntry, RoundEntry
from concept_guard.history import RunHistory
from concept_guard.report.charts import Chart, Domain
from concept_guard.report.curves import of_concept
from concept_guard.report.stories import Story, by_importance

MOST_GROUPS = 40  # of a concept
SMALL_GROUP = 5  # images; the accuracy of fewer says nothing


@dataclass(frozen=True)
class ShownCard:
    """A card, and what the round said of the concept that it shows."""

    step: int
    slot: int
    entry: ConceptEntry


@dataclass(frozen=True)
class GroupChange:
    """A group of probe images at two rounds; what is not known is None."""

    class_name: str
    carried: bool
    before: GroupEntry | None
    after: GroupEntry


@dataclass(frozen=True)
class Groups:
    """The groups of a concept at the first round that flagged it and at the last that had them.

    Attributes:
        before: Update of the first; None if there is no other than the last.
        after: Update of the last.
        rows: All other classes than the one it pulls towards, then each, least accurate first.
        left_out: How many more there are.
        worst: Least accuracy before, after, and after without the correction.
        corrected: Whether the accuracy without the correction is known.
    """

    before: int | None
    after: int
    rows: tuple[GroupChange, ...]
    left_out: int
    worst: tuple[float | None, float | None, float | None]
    corrected: bool


@dataclass(frozen=True, eq=False)
class Exhibit:
    """All that is shown of a concept.

    Attributes:
        story: What the rounds said of it.
        current: Its last card.
        earlier: Some of its earlier cards, in their order.
        cards: How many cards it has.
        evidence: The last round that had evidence on it, and the evidence by class.
        charts: Its curves.
        groups: Its groups; None if no round flagged it or none had groups.
    """

    story: Story
    current: ShownCard | None
    earlier: tuple[ShownCard, ...]
    cards: int
    evidence: tuple[int, tuple[FlagEntry, ...]] | None
    charts: tuple[Chart, ...]
    groups: Groups | None


def exhibits(run: RunHistory, told: Sequence[Story], axis: Domain) -> list[Exhibit]:
    """Return what is shown of concepts.

    Args:
        run: Whose concepts they are.
        told: What its rounds said of them.
        axis: First and last update of the curves.

    Returns:
        One exhibit per concept.
    """
    steps = [entry.step for entry in run.rounds]
    grouped: dict[int, list[RoundEntry]] = {}
    for entry in run.rounds:
        for concept in {group.concept for group in entry.groups}:
            grouped.setdefault(concept, []).append(entry)
    return [_exhibit(story, steps, grouped.get(story.id, []), axis) for story in told]


def _exhibit(
    story: Story, steps: Sequence[int], grouped: Sequence[RoundEntry], axis: Domain
) -> Exhibit:
    entries = {at.step: entry for at, entry in story.told}
    chosen = sorted(by_importance(story))
    cards = [ShownCard(step, story.cards[step], entries[step]) for step in chosen]
    evidence = next(
        ((at.step, entry.flags) for at, entry in reversed(story.told) if entry.flags), None
    )
    return Exhibit(
        story=story,
        current=cards[-1] if cards else None,
        earlier=tuple(cards[:-1]),
        cards=len(story.cards),
        evidence=evidence,
        charts=tuple(of_concept(story, steps, axis)),
        groups=_groups(story, grouped),
    )


def _groups(story: Story, grouped: Sequence[RoundEntry]) -> Groups | None:
    if story.raised is None or not grouped:
        return None
    since, last = story.raised.step, grouped[-1]
    first = next((entry for entry in grouped if entry.step >= since), last)
    before = {} if first is last else _named(first, story)
    rows = [GroupChange(*key[:2], before.get(key), g) for key, g in _named(last, story).items()]
    rows = [*rows[:2], *sorted(rows[2:], key=_least)]
    return Groups(
        before=None if first is last else first.step,
        after=last.step,
        rows=tuple(rows[:MOST_GROUPS]),
        left_out=max(0, len(rows) - MOST_GROUPS),
        worst=(
            _worst([row.before for row in rows if row.before]),
            _worst([row.after for row in rows]),
            _worst([row.after for row in rows], uncorrected=True),
        ),
        corrected=any(row.after.accuracy_uncorrected is not None for row in rows),
    )


def _named(entry: RoundEntry, story: Story) -> dict[tuple[str, bool, int], GroupEntry]:
    """Return the groups by class and presence; classes of the same name are told apart.

    The first two are those of all classes that the concept may mislead, taken together: of each
    alone too few images carry it, as a rule.
    """
    own = [group for group in entry.groups if group.concept == story.id]
    seen: Counter[tuple[str, bool]] = Counter()
    named = {}
    for group in (_others(own, story, True), _others(own, story, False), *own):
        key = (group.class_name, group.carried)
        named[*key, seen[key]] = group
        seen[key] += 1
    return named


def _others(groups: Sequence[GroupEntry], story: Story, carried: bool) -> GroupEntry:
    some = [g for g in groups if g.carried == carried and g.class_name != story.class_name]
    return GroupEntry(
        concept=story.id,
        class_name=f"all classes but {story.class_name}",
        carried=carried,
        images=sum(group.images for group in some),
        accuracy=_mean([(group.accuracy, group.images) for group in some]),
        accuracy_uncorrected=_mean([(g.accuracy_uncorrected, g.images) for g in some]),
    )


def _mean(shares: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(share, images) for share, images in shares if share is not None and images]
    count = sum(images for _, images in known)
    return sum(share * images for share, images in known) / count if count else None


def _least(row: GroupChange) -> tuple[float, str, bool]:
    shares = [g.accuracy for g in (row.before, row.after) if g is not None and counts(g)]
    return min((s for s in shares if s is not None), default=2.0), row.class_name, row.carried


def counts(group: GroupEntry) -> bool:
    """Tell whether a group has enough images for its accuracy to say something.

    Args:
        group: Which group.

    Returns:
        Whether it does.
    """
    return group.images >= SMALL_GROUP


def _worst(groups: Sequence[GroupEntry], *, uncorrected: bool = False) -> float | None:
    shares = [g.accuracy_uncorrected if uncorrected else g.accuracy for g in groups if counts(g)]
    return min((share for share in shares if share is not None and share < 1), default=None)
