"""Question: what do directions, flags and corrections look like? Draws the pictures of concepts.md.

Data: see tinted_digits.py. Needs: pip install ".[bench]"
Command: python recipes/pictures.py             (elsewhere: python recipes/pictures.py FOLDER)
Expected: directions.png, flag.png and corrections.png beside this file, and the figures printed.
Run time: about a minute of one CPU core.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from tinted_digits import GUARD, digits, drawn, network, tint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from concept_guard import Concept, ConceptGuard, RoundReport

mpl.use("Agg")
torch.set_num_threads(1)  # training is chaotic: as many threads, as many results
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
BLUE, ORANGE, GREY, GREEN = "#3b6ea5", "#e07b26", "#9a9a9a", "#4b8f4b"
THREE, EPOCHS = 3, 10
ACTIONS = {
    "no guard": "observe",
    "project": ["project"],
    "rebalance": ["rebalance"],
    "augment": ["augment"],
    "default: all\nthree, and refit": ["project", "rebalance", "augment", "refit"],
}


def trained(train: TensorDataset, probe: TensorDataset, action: object) -> nn.Module:
    """Return the network after ten epochs; one that is only watched is drawn at its first flag."""
    model, drawn_yet = network(), action != "observe"
    settings = {**GUARD, "action": action}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    with ConceptGuard(model, probe=DataLoader(probe, batch_size=256), config=settings) as guard:
        for _epoch in range(EPOCHS):
            for images, labels in DataLoader(train, batch_size=64, shuffle=True):
                model.train()
                losses = cross_entropy(model(images), labels, reduction="none")
                guard.loss(losses, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
                report = guard.step()
                if report is not None and report.flagged and not drawn_yet:
                    draw_concept(model.eval(), probe, report)
                    drawn_yet = True
        if action != "observe":
            guard.bake()
    return model.eval()


def draw_concept(model: nn.Module, probe: TensorDataset, report: RoundReport) -> None:
    """Draw the concept that a round flags first, as the network knows it now."""
    images, labels = probe.tensors
    (concept,) = (c for c in report.concepts if c.id == report.flagged[0])
    tinted = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2)) > 0.1
    rows = rows_of(model, images)
    print(f"update {report.step}: {report.verdict}")
    draw_directions(rows, tinted, concept)
    draw_flag(model, rows, labels, concept)


@torch.no_grad()
def rows_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return what enters the classifier: one row per image."""
    return model.forward_head(model.forward_features(images), pre_logits=True)


def draw_directions(rows: Tensor, tinted: Tensor, concept: Concept) -> None:
    """Draw the rows in the plane of a concept's filter and signal vector."""
    w, s = concept.filter, concept.signal
    across = w / w.norm()
    up = s - (s @ across) * across
    up = up / up.norm()
    plane = torch.stack([across, up], dim=1)
    points = rows @ plane
    centre = points[~tinted].mean(dim=0)
    points = points - centre
    figure, axes = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
    for where, colour, name in ((~tinted, BLUE, "without the tint"), (tinted, ORANGE, "with it")):
        axes.scatter(*points[where].T, s=9, c=colour, alpha=0.55, linewidths=0, label=name)
    size = float(points[tinted].norm(dim=1).median())
    for vector, colour, name in (
        (w, GREEN, "filter: reads"),
        (s, "black", "signal vector: writes"),
    ):
        x, y = (size * (vector @ plane) / vector.norm()).tolist()
        axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": colour, "lw": 2})
        axes.text(x, y, name, color=colour, weight="bold", va="bottom", ha="right")
    mean = points[tinted].mean(dim=0)
    axes.plot(*mean, "x", c="firebrick", ms=9, mew=2.5, label="mean of those with it")
    axes.set(xlabel="along the filter", ylabel="across the filter, in its plane with the signal")
    axes.legend(frameon=False, loc="lower right")
    axes.set_aspect("equal", adjustable="datalim")
    figure.savefig(FOLDER / "directions.png", dpi=110)
    shift = rows[tinted].mean(dim=0) - rows[~tinted].mean(dim=0)
    for name, vector in (("signal vector", s), ("filter", w)):
        print(f"cosine of the {name} with what the tint does to a row: {cosine(vector, shift):.2f}")


def cosine(one: Tensor, other: Tensor) -> float:
    """Return the cosine between two vectors."""
    return float(one @ other / one.norm() / other.norm())


def draw_flag(model: nn.Module, rows: Tensor, labels: Tensor, concept: Concept) -> None:
    """Draw the association and the cause that a flag needs."""
    head = model.get_classifier()
    with torch.no_grad():
        predicted = head(rows).argmax(dim=1)
    present = rows @ concept.filter > concept.bias
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    for shift, colour, where, name in (
        (-0.2, BLUE, ~present, "without the concept"),
        (0.2, ORANGE, present, "with it"),
    ):
        shares = []
        for label in range(10):
            others = (labels != label) & where
            shares.append(float((predicted[others] == label).double().mean()))
        left.bar([k + shift for k in range(10)], shares, 0.4, color=colour, label=name)
        print(f"images of other classes {name} that are taken for 3: {shares[THREE]:.2f}")
    left.set(xlabel="class", ylabel="share of other classes' images\npredicted as this class")
    left.set_xticks(range(10))
    left.legend(frameon=False)

    misled = present & (labels != THREE) & (predicted == THREE)
    amount = (rows[misled] @ concept.filter - concept.bias).clamp_min(0)[:, None]
    erased = -amount * concept.signal
    weight = head.weight.detach()[THREE]
    length = erased.norm(dim=1, keepdim=True)

    def moved(direction: Tensor) -> float:
        return float((length * direction / direction.norm() @ weight).mean())

    draw = torch.Generator().manual_seed(0)
    chance = [moved(torch.randn(len(weight), generator=draw)) for _ in range(99)]
    right.hist(chance, bins=20, color=GREY, label="99 random directions")
    for value, colour, name in (
        (float((erased @ weight).mean()), "black", "signal vector"),
        (moved(-concept.filter), GREEN, "filter"),
    ):
        right.axvline(value, color=colour, lw=2, label=name)
        print(f"change of the wrong logit on {int(misled.sum())} images, {name}: {value:.2f}")
    print(f"along 99 random directions: {min(chance):.2f} at most")
    right.set(xlabel='mean change of the logit of "3"\non the images that are taken for a 3')
    right.set_ylabel("directions")
    right.legend(frameon=False)
    figure.savefig(FOLDER / "flag.png", dpi=110)


@torch.no_grad()
def groups(model: nn.Module, test: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """Return what is right: all without the tint, others with it, 3s without it."""
    images, labels = test
    model.eval()
    plain = model(images).argmax(dim=1) == labels
    others = labels != THREE
    marked = model(tint(images[others])).argmax(dim=1) == labels[others]
    return tuple(float(x.double().mean()) for x in (plain, marked, plain[~others]))


def draw_corrections(found: dict[str, tuple[float, float, float]]) -> None:
    """Draw the groups by what was done."""
    figure, axes = plt.subplots(figsize=(8.4, 3.6), layout="constrained")
    names = ("all, no tint", "other digits, all with the tint", "3s without the tint")
    for n, (name, colour) in enumerate(zip(names, (BLUE, ORANGE, GREY), strict=True)):
        places = [at + (n - 1) * 0.27 for at in range(len(found))]
        bars = axes.bar(places, [shares[n] for shares in found.values()], 0.26, color=colour)
        bars.set_label(name)
        axes.bar_label(bars, fmt=lambda v: f"{v:.2f}".lstrip("0"), fontsize=8)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(ylabel="share of right predictions", ylim=(0, 1.25))
    axes.legend(frameon=False, ncols=3, loc="upper center")
    figure.savefig(FOLDER / "corrections.png", dpi=110)


def main() -> None:
    """Train, draw, and print the figures."""
    train, probe = drawn()
    test = tuple(part[1440:] for part in digits())
    found = {}
    for name, action in ACTIONS.items():
        model = trained(train, probe, action)
        found[name] = groups(model, test)
        print(name.replace("\n", " "), *(f"{share:.3f}" for share in found[name]))
    draw_corrections(found)


if __name__ == "__main__":
    main()
