"""Probes of the flags benchmark: rows with a known number of conflicting images, and the guard.

What enters the classifier of a trained network is computed once per image; a probe is then a
choice of rows, and the model that the guard watches is the classifier alone. Nothing here trains.
"""

from dataclasses import dataclass

import torch
from flags_networks import DRAWN, IN_CLASS, SHORTCUTS, rows_of
from torch import Tensor, nn

from concept_guard import ConceptGuard, Flag, RoundReport

PROBE, CONFLICTS = 4_000, (10, 20, 40, 80)


class Classifier(nn.Module):
    """A linear classifier whose images are rows."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.rows, self.head = nn.Identity(), head

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.rows(x))


class Shifted(nn.Module):
    """The same with something added to the logits: the last columns of its images."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.rows, self.head = nn.Identity(), head

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        channels = self.head.in_features
        return self.head(self.rows(x[:, :channels])) + x[:, channels:]


@dataclass(frozen=True, eq=False)
class Marked:
    """Rows of one probe's images, clean and with shortcuts.

    Attributes:
        labels: `(N,)` classes.
        rows: `(N, C)` with every shortcut on 90 % of its class and nowhere else.
        clean: `(N, C)` without any.
        order: Shortcut to the 80 images of other classes that may conflict, in their order.
        conflicting: Shortcut to the `(80, C)` rows of these images with the shortcut.
    """

    labels: Tensor
    rows: Tensor
    clean: Tensor
    order: dict[str, Tensor]
    conflicting: dict[str, Tensor]

    def probe(self, shortcut: str, count: int) -> tuple[Tensor, Tensor]:
        """Return rows in which so many images conflict, and which ones: `(N,)` bool."""
        at = self.order[shortcut][:count]
        rows, conflicts = self.rows.clone(), torch.zeros(len(self.labels), dtype=torch.bool)
        rows[at], conflicts[at] = self.conflicting[shortcut][:count], True
        return rows, conflicts


def marked(net: nn.Module, images: Tensor, labels: Tensor, seed: int) -> Marked:
    """Return the rows of a probe; the images that conflict are drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    clean = rows_of(net, images)
    rows, order, conflicting = clean.clone(), {}, {}
    for k, name in enumerate(DRAWN):
        label = list(SHORTCUTS).index(name)
        own = (labels == label) & (torch.rand(len(labels), generator=generator) < IN_CLASS)
        rows[own] = rows_of(net, SHORTCUTS[name](images[own]))
        others = (labels != label).nonzero().flatten()
        generator_k = torch.Generator().manual_seed(1000 * seed + k)
        order[name] = others[torch.randperm(len(others), generator=generator_k)[: CONFLICTS[-1]]]
        conflicting[name] = rows_of(net, SHORTCUTS[name](images[order[name]]))
    return Marked(labels, rows, clean, order, conflicting)


def watched(model: nn.Module, rows: Tensor, labels: Tensor, action: str, seed: int) -> ConceptGuard:
    """Return a guard on a classifier of rows that has run one round."""
    config = {"action": action, "seed": seed}
    guard = ConceptGuard(model, probe=[(rows, labels)], config=config)
    guard.round()
    return guard


def shuffled(head: nn.Linear, rows: Tensor, labels: Tensor, seed: int) -> RoundReport:
    """Return the round on rows whose logits were permuted within classes: nothing goes together."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(labels))
    for k in labels.unique():
        at = (labels == k).nonzero().flatten()
        order[at] = at[torch.randperm(len(at), generator=generator)]
    with torch.no_grad():
        logits = head(rows)
        images = torch.cat([rows, logits[order] - logits], dim=1)
    config = {"action": "observe", "seed": seed, "tap": "module:rows"}
    with ConceptGuard(Shifted(head), probe=[(images, labels)], config=config) as guard:
        report = guard.round()
    assert report is not None
    return report


def is_planted(flag: Flag, label: int, conflicts: Tensor) -> bool:
    """Return whether a flag is the planted shortcut: its class, and most of its errors conflict."""
    hits = sum(bool(conflicts[i]) for i in flag.examples)
    return flag.class_index == label and 2 * hits > len(flag.examples)
