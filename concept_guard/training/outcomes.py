"""What a trained model gets right, and the table that compares two of them.

Nothing here knows how the models were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from concept_guard.training.digits import Planted
from concept_guard.training.images import Images
from concept_guard.training.splits import Batches

if TYPE_CHECKING:
    from concept_guard.flags import Flag
    from concept_guard.records import RoundReport


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said about the images of a split.

    Attributes:
        predictions: `(N,)` int64 classes.
        labels: `(N,)` int64 true classes.
        loss: Mean cross entropy.
    """

    predictions: Tensor
    labels: Tensor
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return float((self.predictions == self.labels).double().mean())


@dataclass(frozen=True)
class Measure:
    """One row of the table.

    Attributes:
        name: What was measured, in words.
        value: Share of right predictions.
        count: Images it was measured on.
        note: Which class or group this is, where that depends on the model.
    """

    name: str
    value: float
    count: int
    note: str = ""


@dataclass(frozen=True)
class Round:
    """What a round of the guard said about the model in training.

    Attributes:
        step: Optimizer updates when it ran.
        images: Probe images it read.
        accuracy: Share of right predictions.
        worst_class: Recall of the class that is recognised least.
        worst_group: Accuracy of the worst (class, concept present) group.
        flagged: Ids of the concepts held to drive errors, which define these groups.
    """

    step: int
    images: int
    accuracy: float
    worst_class: float
    worst_group: float
    flagged: tuple[int, ...]

    @classmethod
    def of(cls, report: RoundReport) -> Round:
        """Return what is kept of the record of a round."""
        return cls(
            step=report.step,
            images=report.images_seen,
            accuracy=report.accuracy,
            worst_class=report.worst_class_recall,
            worst_group=report.worst_group_accuracy,
            flagged=tuple(sorted(report.flagged)),
        )


def answer(model: nn.Module, batches: Batches, device: torch.device) -> Answers:
    """Return what a model says in evaluation mode, which it is left in.

    Args:
        model: A classifier of images.
        batches: All images of a split, in its order.
        device: Where the model is.

    Returns:
        Predictions, labels and loss on the CPU, without the images that could not be read.
    """
    model.eval()
    logits, labels = [], []
    with torch.no_grad():
        for images, targets in batches:
            logits.append(model(images.to(device)).float().cpu())
            labels.append(targets)
    scores, truth = torch.cat(logits), torch.cat(labels)
    if isinstance(batches.dataset, Images):
        batches.dataset.check()
        scores, truth = scores[~batches.dataset.broken], truth[~batches.dataset.broken]
    loss = float(F.cross_entropy(scores, truth))
    return Answers(scores.argmax(dim=1), truth, loss)


def measures(
    answers: Mapping[str, Answers], classes: Sequence[str], planted: Planted | None
) -> dict[str, Measure]:
    """Return the rows of the table for one model.

    Args:
        answers: What it said about each test split.
        classes: Names of the classes.
        planted: The shortcut that the split `marked` carries, if there is one.

    Returns:
        `clean`, `marked`, `unmarked` and `worst` with a planted shortcut, else `accuracy` and
        `worst_class`.
    """
    if planted is None:
        return _by_class(next(iter(answers.values())), classes)
    clean, marked = answers["clean"], answers["marked"]
    kind, own = planted.kind, classes[planted.label]
    others, mine = marked.labels != planted.label, clean.labels == planted.label
    rows = {
        "clean": _measure(f"all test images, no {kind}", clean, torch.ones_like(mine)),
        "marked": _measure(f"other classes, all with the {kind}", marked, others),
        "unmarked": _measure(f"class {own}, without the {kind}", clean, mine),
    }
    low = min("marked", "unmarked", key=lambda name: rows[name].value)
    worst = Measure("worst of these two", rows[low].value, rows[low].count, low)
    return {**rows, "worst": worst}


def _measure(name: str, answers: Answers, where: Tensor, note: str = "") -> Measure:
    right = (answers.predictions == answers.labels)[where]
    return Measure(name, float(right.double().mean()), int(where.sum()), note)


def _by_class(answers: Answers, classes: Sequence[str]) -> dict[str, Measure]:
    rows = [
        _measure("recall of the worst class", answers, answers.labels == label, classes[label])
        for label in answers.labels.unique().tolist()
    ]
    everywhere = torch.ones_like(answers.labels, dtype=torch.bool)
    return {
        "accuracy": _measure("all test images", answers, everywhere),
        "worst_class": min(rows, key=lambda row: row.value),
    }


def table(plain: Mapping[str, Measure] | None, guarded: Mapping[str, Measure]) -> str:
    """Return the measures as aligned text, without and with the guard.

    Args:
        plain: Measures of the run without the guard, if there was one.
        guarded: Measures of the run with the guard.

    Returns:
        One line per measure below a headline.
    """
    columns = ["without guard", "with guard", "gain"] if plain else ["with guard"]
    lines = [["share of right predictions", *columns]]
    for key, row in guarded.items():
        cells = [f"{row.name} ({row.count})" if not row.note else row.name]
        if plain:
            cells += [_cell(plain[key]), _cell(row), f"{row.value - plain[key].value:+.3f}"]
        else:
            cells += [_cell(row)]
        lines.append(cells)
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def _cell(row: Measure) -> str:
    return f"{row.value:.3f}{f' ({row.note})' if row.note else ''}"


def causes(flags: Sequence[Flag], classes: Sequence[str], probe_size: int, verdict: str) -> str:
    """Return what was flagged and why, or why nothing was.

    Args:
        flags: The flags of the last round.
        classes: Names of the classes.
        probe_size: Images in the probe.
        verdict: The guard's own sentence about that round.

    Returns:
        Per flag a line and, below it, the reason; then the verdict.
    """
    lines = [
        f"concept {flag.concept} -> class {classes[flag.class_index]}, {flag.status}: "
        f"risk difference {flag.risk_difference:+.2f} [{flag.interval[0]:+.2f}, "
        f"{flag.interval[1]:+.2f}], q = {flag.q_value:.1e}; present in "
        f"{flag.present} of {probe_size} probe images; erasing it there fixes {flag.fixed} "
        f"predictions and breaks {flag.broken}" + (f"\n    {flag.reason}" if flag.reason else "")
        for flag in flags
    ]
    return "\n".join([*lines, f"guard: {verdict}"])


def describe(planted: Planted) -> str:
    """Return the planted shortcut in words."""
    return (
        f"planted: a {planted.kind} of strength {planted.strength:g} on "
        f"{planted.share_in_class:.1%} of class {planted.label} and {planted.share_elsewhere:.1%} "
        "of the others, in training and probe images alike"
    )
