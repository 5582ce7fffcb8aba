"""What the flags benchmark measures on one probe: power, cause, core concepts, agreement with TCAV.

Nothing here trains or prints.
"""

import tempfile
import time

import torch
from captum.attr import LayerGradientXActivation
from captum.concept import TCAV
from captum.concept import Concept as CaptumConcept
from flags_networks import SHORTCUTS
from flags_probes import CONFLICTS, Classifier, Marked, is_planted, watched
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from concept_guard import Concept, Flag

DIRECTIONS = 50  # random ones per network and shortcut
POWER_FIELDS = ("first", "found", "driven", "look_alikes", "core", "seconds")
MOVES = ("repaired", "shift", "filter", "isotropic", "within")
CAUSE_FIELDS = (*MOVES, "errors", "share", "repaired_of_all", "tcav", "tcav_all")


def power(
    head: nn.Linear, marked: Marked, shortcut: str, count: int, seed: int
) -> dict[str, float]:
    """Return what one round flags in a probe with so many conflicting images.

    `first` and `found` say whether the planted shortcut leads the flags, and is among them;
    `driven` how many conflicting images are called its class. Other flags are `look_alikes` if
    they pull towards a class with a planted shortcut and the class's images carry that one
    (natural images that resemble it), else `core`.
    """
    label = list(SHORTCUTS).index(shortcut)
    rows, conflicts = marked.probe(shortcut, count)
    began = time.perf_counter()
    with watched(Classifier(head), rows, marked.labels, "observe", seed) as guard:
        report = guard.report
    seconds = time.perf_counter() - began
    assert report is not None
    found = [flag for flag in report.flags if flag.status == "found"]
    right = [is_planted(flag, label, conflicts) for flag in found]
    others = [flag for flag, hit in zip(found, right, strict=True) if not hit]
    alike = [reads_shortcut(flag, report.concepts, rows, marked) for flag in others]
    with torch.no_grad():
        called = head(rows).argmax(dim=1) == label
    return {
        "first": float(bool(right) and right[0]),
        "found": float(any(right)),
        "driven": float((called & conflicts).sum()),
        "look_alikes": float(sum(alike)),
        "core": float(len(others) - sum(alike)),
        "seconds": seconds,
    }


def reads_shortcut(flag: Flag, concepts: tuple[Concept, ...], rows: Tensor, marked: Marked) -> bool:
    """Return whether a concept tells the marked images of its class from the unmarked ones."""
    if flag.class_index >= len(SHORTCUTS):
        return False
    concept = next(c for c in concepts if c.id == flag.concept)
    own = marked.labels == flag.class_index
    has = (rows != marked.clean).any(dim=1)[own]
    return bool(roc_auc_score(has, rows[own] @ concept.filter) > 0.95)


def cause(head: nn.Linear, marked: Marked, shortcut: str, seed: int) -> dict[str, float] | None:
    """Return how many of the errors that a flagged shortcut drives its erasure repairs, and others.

    The errors it drives are those of the conflicting images that are called its class, and are
    right without the shortcut: `errors` of them, a `share` of all that are called its class.
    `repaired` is what the guard's own projection makes right; `shift` what taking away the mean
    difference that the shortcut makes to these images does, which nobody knows in practice;
    `filter` a move of the same length as the projection's along the decoding direction; `isotropic`
    and `within` along random directions (those of `within` vary as images of one class do).
    `repaired_of_all` counts all that are called its class. None if the shortcut was not flagged.
    """
    label = list(SHORTCUTS).index(shortcut)
    rows, conflicts = marked.probe(shortcut, CONFLICTS[-1])
    model = Classifier(head)
    with watched(model, rows, marked.labels, "project", seed) as guard:
        flags = [f for f in guard.report.flags if f.status == "erased"]
        mine = [f for f in flags if is_planted(f, label, conflicts)]
        if not mine:
            return None
        others = [f.concept for f in flags if f is not mine[0]]
        if others:
            guard.restore(others)
        moved = edited(model, rows)
        concept = next(c for c in guard.report.concepts if c.id == mine[0].concept)
    at = marked.order[shortcut]
    with torch.no_grad():
        called = head(rows[at]).argmax(dim=1) == label
        right_before = head(marked.clean[at]).argmax(dim=1) == marked.labels[at]
    everything, driven = at[called], at[called & right_before]
    shift = (rows - marked.clean)[at].mean(dim=0)
    length = (rows - moved)[driven].norm(dim=1, keepdim=True)
    generator = torch.Generator().manual_seed(seed)

    def right(where: Tensor, x: Tensor) -> float:
        with torch.no_grad():
            return float((head(x).argmax(dim=1) == marked.labels[where]).float().mean())

    def along(directions: Tensor) -> float:
        moves = (length * d for d in normalize(directions, dim=1))
        return sum(right(driven, rows[driven] - move) for move in moves) / len(directions)

    def at_random(spread: Tensor) -> Tensor:
        return torch.randn(DIRECTIONS, len(spread), generator=generator) @ spread

    means = torch.stack([rows[marked.labels == k].mean(dim=0) for k in range(10)])
    return {
        "repaired": right(driven, moved[driven]),
        "shift": right(driven, rows[driven] - shift),
        "filter": along(concept.filter[None]),
        "isotropic": along(at_random(torch.eye(rows.shape[1]))),
        "within": along(at_random(rows - means[marked.labels])),
        "errors": float(len(driven)),
        "share": len(driven) / max(1, len(everything)),
        "repaired_of_all": right(everything, moved[everything]),
        **tcav_agreement(head, marked, shortcut, concept.signal),
    }


def edited(model: Classifier, rows: Tensor) -> Tensor:
    """Return the rows as the classifier gets them, after the guard's correction."""
    seen = []
    handle = model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model.eval()(rows)
    handle.remove()
    return seen[0]


def tcav_agreement(
    head: nn.Linear, marked: Marked, shortcut: str, signal: Tensor
) -> dict[str, float]:
    """Return whether captum's TCAV and the signal vector agree on the sign of the influence.

    `tcav` is for the planted class, `tcav_all` the share of all ten classes. TCAV is given what
    the guard is not: 80 images with the shortcut and the same 80 without.
    """
    model = Classifier(head).eval()
    on, off = marked.conflicting[shortcut], marked.clean[marked.order[shortcut]]
    pair = [
        CaptumConcept(n, name, DataLoader(x, batch_size=len(x)))
        for n, (name, x) in enumerate({"with": on, "without": off}.items())
    ]
    gradient = LayerGradientXActivation(model, None, multiply_by_inputs=False)
    agree = []
    with tempfile.TemporaryDirectory() as folder:
        tcav = TCAV(model, ["rows"], layer_attr_method=gradient, save_path=folder)
        for label in range(head.out_features):
            scores = tcav.interpret(marked.clean[:64], [pair], target=label)
            positive = float(next(iter(scores.values()))["rows"]["sign_count"][0]) > 0.5
            agree.append(positive == bool(head.weight[label].detach() @ signal > 0))
    return {
        "tcav": float(agree[list(SHORTCUTS).index(shortcut)]),
        "tcav_all": sum(agree) / len(agree),
    }
