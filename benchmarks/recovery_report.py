"""Results of the recovery benchmark on disk, as tables and as a figure.

One CSV per section; a row that is there is never computed again. Nothing here computes a score.
"""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

OURS = "concept_guard"
MEASURES = ("encoder", "decoder", "auc")
KEY = ("cell", "seed", "method")
TIE = 0.001

Row = dict[str, str]


class Results:
    """The rows of one section, kept in a CSV that survives interruption.

    Args:
        path: CSV file, made at the first row.
        fields: Columns after cell, seed and method.
        refit: Drop the engine's rows, to compute them again.
    """

    def __init__(self, path: Path, fields: Iterable[str], *, refit: bool = False) -> None:
        self.path, self.fields = path, [*KEY, *fields]
        self.rows: list[Row] = []
        if path.is_file():
            with path.open(newline="", encoding="utf8") as file:
                self.rows = list(csv.DictReader(file))
        if refit and self.rows:
            self.rows = [r for r in self.rows if not r["method"].startswith(OURS)]
            self.write(self.rows, "w")
        self.keys = {tuple(r[k] for k in KEY) for r in self.rows}

    def has(self, cell: object, seed: int, method: str) -> bool:
        """Return whether this row is there already."""
        return (str(cell), str(seed), method) in self.keys

    def add(self, cell: object, seed: int, method: str, values: dict[str, float]) -> None:
        """Append a row to the file and print it."""
        row = dict.fromkeys(self.fields, "")
        row |= {"cell": str(cell), "seed": str(seed), "method": method}
        row |= {name: f"{value:.4f}" for name, value in values.items()}
        self.write([row], "a")
        self.rows.append(row)
        self.keys.add((str(cell), str(seed), method))
        shown = "  ".join(f"{n} {v:.3f}" for n, v in values.items())
        print(f"{cell}  seed {seed}  {method:20} {shown}", flush=True)

    def write(self, rows: list[Row], mode: str) -> None:
        """Write rows to the file, anew (`w`) or at its end (`a`)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = mode == "w" or not self.path.is_file()
        with self.path.open(mode, newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, self.fields)
            if fresh:
                writer.writeheader()
            writer.writerows(rows)


def values_of(rows: list[Row], cell: str, method: str, column: str) -> list[float]:
    """Return the values of a column over the seeds; cells left empty are skipped."""
    chosen = [r[column] for r in rows if r["cell"] == cell and r["method"] == method]
    return [float(v) for v in chosen if v not in {"", "nan"}]


def print_table(title: str, rows: list[Row], columns: Iterable[str], lower: Iterable[str]) -> None:
    """Print mean and worst over the seeds per cell and method.

    Args:
        title: Printed above.
        rows: Rows of a section.
        columns: Columns to print.
        lower: Those of them in which less is better, so that the worst is the largest.
    """
    columns, lower = list(columns), set(lower)
    print(f"\n{title}: mean / worst over the seeds")
    for cell in dict.fromkeys(r["cell"] for r in rows):
        print(cell)
        for method in dict.fromkeys(r["method"] for r in rows if r["cell"] == cell):
            parts = []
            for column in columns:
                numbers = values_of(rows, cell, method, column)
                if numbers:
                    worst = max(numbers) if column in lower else min(numbers)
                    parts.append(f"{column} {statistics.mean(numbers):.3f}/{worst:.3f}")
            count = sum(r["cell"] == cell and r["method"] == method for r in rows)
            print(f"  {method:28} n={count:<3} {'  '.join(parts)}")


def cell_means(rows: list[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Return measure by measure the means over the seeds, per cell and method."""
    out: dict[str, dict[str, dict[str, float]]] = {}
    for cell in dict.fromkeys(r["cell"] for r in rows):
        methods = dict.fromkeys(r["method"] for r in rows if r["cell"] == cell)
        if OURS not in methods or len(methods) < 2:
            continue
        out[cell] = {}
        for method in methods:
            means = {
                m: statistics.mean(values_of(rows, cell, method, m) or [0.0]) for m in MEASURES
            }
            out[cell][method] = means | {"mean": statistics.mean(means.values())}
    return out


def print_duels(rows: list[Row]) -> None:
    """Print in how many cells ours leads every rival, ties one, falls behind, and how far."""
    means = cell_means(rows)
    if not means:
        return
    print(f"\nours against the best rival of each cell, {len(means)} cells (tie: within {TIE})")
    for measure in (*MEASURES, "mean"):
        gaps = {}
        for cell, methods in means.items():
            best = max((m for m in methods if m != OURS), key=lambda m: methods[m][measure])
            gaps[cell] = (methods[OURS][measure] - methods[best][measure], best)
        ahead = sum(gap > TIE for gap, _ in gaps.values())
        behind = sum(gap < -TIE for gap, _ in gaps.values())
        worst = min(gaps, key=lambda cell: gaps[cell][0])
        print(
            f"  {measure:8} ahead {ahead}, tied {len(gaps) - ahead - behind}, behind {behind}; "
            f"worst gap {gaps[worst][0]:+.3f} ({gaps[worst][1]}, {worst})"
        )


def draw(rows: list[Row], path: Path) -> None:
    """Draw ours and the best rival of each cell, one panel per measure, as a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    means = cell_means(rows)
    if not means:
        return
    names = list(means)
    figure, panels = plt.subplots(
        1, len(MEASURES), sharey=True, figsize=(12, 1.5 + 0.2 * len(names)), squeeze=False
    )
    for panel, measure in zip(panels[0], MEASURES, strict=True):
        ours = [means[c][OURS][measure] for c in names]
        best = [max(v[measure] for m, v in means[c].items() if m != OURS) for c in names]
        places = range(len(names))
        panel.hlines(places, ours, best, color="lightgrey", zorder=1)
        panel.scatter(best, places, s=16, color="tab:orange", label="best rival", zorder=2)
        panel.scatter(ours, places, s=16, color="tab:blue", label="concept_guard", zorder=3)
        panel.set_title({"auc": "AUC of presence"}.get(measure, f"matched cosine of {measure}s"))
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(names)), names, fontsize=6)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"figure: {path}")
