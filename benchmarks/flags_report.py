"""Tables and the figure of the flags benchmark. Nothing here computes a score."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flags_networks import MODELS, SHORTCUTS
from flags_probes import CONFLICTS
from flags_trials import CAUSE_FIELDS, MOVES
from recovery_report import Row
from scipy.stats import binomtest, bootstrap


def chosen(rows: list[Row], prefix: str, column: str, method: str | None = None) -> list[float]:
    """Return the values of a column in the cells that begin with some words; empty are skipped."""
    words = prefix.split()
    return [
        float(row[column])
        for row in rows
        if row["cell"].split()[: len(words)] == words
        and method in {None, row["method"]}
        and row[column] != ""
    ]


def share(values: Sequence[float]) -> str:
    """Return a share of runs with its exact 95 % interval."""
    hits = round(sum(values))
    test = binomtest(hits, len(values)).proportion_ci()
    return f"{hits:3d} of {len(values):3d} [{test.low:.2f}, {test.high:.2f}]"


def mean(values: Sequence[float]) -> str:
    """Return a mean over runs with its bootstrapped 95 % interval."""
    if len(values) < 2 or len(set(values)) == 1:
        return f"{statistics.mean(values):.3f}" if values else "-"
    rng = np.random.default_rng(0)
    ends = bootstrap((np.array(values),), np.mean, rng=rng).confidence_interval
    return f"{statistics.mean(values):.3f} [{ends.low:.3f}, {ends.high:.3f}]"


def print_power(rows: list[Row]) -> None:
    """Print how often the planted shortcut is flagged first, by model, shortcut and images."""
    if not rows:
        return
    print("\nplanted shortcut flagged first, share of seeds [95 % interval]")
    print(f"{'':14}" + "".join(f"{f'{n} conflicting':>26}" for n in CONFLICTS))
    for model in MODELS:
        for name in SHORTCUTS:
            cells = [chosen(rows, f"{model} {name} {n}", "first") for n in CONFLICTS]
            line = "".join(f"{share(c) if c else '-':>26}" for c in cells)
            print(f"{model:4} {name:9}{line}")
    for n in CONFLICTS:
        values = [
            v for m in MODELS for s in SHORTCUTS for v in chosen(rows, f"{m} {s} {n}", "first")
        ]
        found = [
            v for m in MODELS for s in SHORTCUTS for v in chosen(rows, f"{m} {s} {n}", "found")
        ]
        if values:
            print(f"{n} conflicting: first {share(values)}, flagged at all {share(found)}")
    for model in MODELS:
        runs = chosen(rows, model, "core")
        if runs:
            seeds = {
                row["seed"] for row in rows if row["cell"].startswith(model) and float(row["core"])
            }
            alike = chosen(rows, model, "look_alikes")
            print(
                f"{model}: flags of core concepts {sum(runs):.0f} in {len(runs)} runs, in "
                f"{len(seeds)} seeds; of planted shortcuts by look-alikes {sum(alike):.0f}"
            )


def print_cause(rows: list[Row]) -> None:
    """Print which share of the errors is repaired by erasing, and by the controls."""
    flagged = [row for row in rows if row["repaired"] != ""]
    if not flagged:
        return
    print("\nshare of the errors driven by the planted shortcut that are right after a move along")
    print(f"{'':14}" + "".join(f"{c:>24}" for c in CAUSE_FIELDS))
    cells = [f"{m} {s}" for m in MODELS for s in SHORTCUTS]
    for cell in [*cells, *MODELS, ""]:
        if chosen(flagged, cell, "repaired"):
            line = "".join(f"{mean(chosen(flagged, cell, c)):>24}" for c in CAUSE_FIELDS)
            print(f"{cell or 'all':14}{line}")
    gains = [float(r["repaired"]) - float(r["filter"]) for r in flagged]
    print(f"encoding minus decoding direction, paired: {mean(gains)}")
    half = [float(float(r["repaired"]) >= 0.5) for r in flagged]
    print(f"at least half repaired in {share(half)} runs; flagged {len(flagged)} of {len(rows)}")


def print_false(rows: list[Row]) -> None:
    """Print how often anything is flagged where nothing was planted."""
    if not rows:
        return
    print("\nruns with any flag where nothing was planted, share [95 % interval]")
    for method in ("as they are", "permuted"):
        for cell in [*dict.fromkeys(row["cell"] for row in rows), ""]:
            flagged = chosen(rows, cell, "flagged", method)
            if flagged:
                passed = chosen(rows, cell, "statistics", method)
                print(
                    f"{cell or 'all':12} predictions {method:12} flagged {share(flagged)}   "
                    f"passed the statistics alone {share(passed)}"
                )


def draw(power: list[Row], cause: list[Row], path: Path) -> None:
    """Draw the curves of power and the bars of cause."""
    import matplotlib.pyplot as plt

    if not power:
        return
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), width_ratios=(1, 1, 0.9))
    for axis, model in zip(axes, MODELS, strict=False):
        for k, name in enumerate(SHORTCUTS):
            points = [chosen(power, f"{model} {name} {n}", "first") for n in CONFLICTS]
            if all(points):  # side by side, so that equal curves are all seen
                at = [n * 1.03 ** (k - 1.5) for n in CONFLICTS]
                style = {"marker": "osD^"[k], "alpha": 0.8, "label": name}
                axis.plot(at, [statistics.mean(p) for p in points], **style)
        axis.set(xscale="log", ylim=(-0.03, 1.03), title=f"{model}: flagged first")
        axis.set(xlabel="conflicting images of 4,000", ylabel="share of seeds")
        axis.set_xticks(CONFLICTS, [str(n) for n in CONFLICTS])
        axis.minorticks_off()
        axis.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
        axis.legend(frameon=False)
    names = ("guard's projection", "mean shift", "decoding direction", "random", "random in class")
    values = [chosen(cause, "", c) for c in MOVES]
    if all(values):
        axes[2].barh(names, [statistics.mean(v) for v in values], color="tab:blue")
        axes[2].set(xlim=(0, 1), title="driven errors repaired", xlabel="share")
        axes[2].invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
