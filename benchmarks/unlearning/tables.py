"""Rows, tables and the figure of the unlearning benchmark. Nothing here computes a score."""

import csv
import statistics
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from scipy.stats import t

FIELDS = ("task", "seed", "method", "measure", "value", "note", "seconds", "commit", "date")


def commit() -> str:
    """Return the commit of this checkout, `-dirty` behind it where files differ; "" without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        here = Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


class Rows:
    """One CSV, a line per task, seed, method and measure; lines are written as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commit = commit()
        self.read: list[dict[str, str]] = []
        if path.is_file():
            with path.open(newline="", encoding="utf8") as file:
                self.read = list(csv.DictReader(file))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf8") as file:
                csv.writer(file).writerow(FIELDS)

    def has(self, task: str, seed: int, method: str) -> bool:
        """Return whether a method was measured already."""
        key = (task, str(seed), method)
        return any((row["task"], row["seed"], row["method"]) == key for row in self.read)

    def add(
        self,
        task: str,
        seed: int,
        method: str,
        scores: dict[str, float],
        note: str,
        seconds: float,
    ) -> None:
        """Write and print the scores of one run."""
        today = datetime.now(UTC).date().isoformat()
        rest = (note, f"{seconds:.1f}", self.commit, today)
        new = [
            dict(zip(FIELDS, (task, str(seed), method, k, f"{v:.4f}", *rest), strict=True))
            for k, v in scores.items()
        ]
        with self.path.open("a", newline="", encoding="utf8") as file:
            csv.DictWriter(file, FIELDS).writerows(new)
        self.read += new
        shown = "  ".join(f"{k} {v:.3f}" for k, v in scores.items())
        print(f"{task:18} {seed} {method:20} {shown}  {note}  {seconds:.0f} s", flush=True)


def of(rows: list[dict[str, str]], task: str, method: str, measure: str) -> dict[str, float]:
    """Return seed to value."""
    key = (task, method, measure)
    return {
        row["seed"]: float(row["value"])
        for row in rows
        if (row["task"], row["method"], row["measure"]) == key
    }


def mean(values: list[float]) -> str:
    """Return a mean with the half-width of its 95 % interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ±{half:.3f}"


def headline(measures: list[str]) -> str:
    """Return the measure that a task is about: the last one that is no worst group."""
    return [m for m in measures if m != "worst group"][-1]


def print_tables(rows: list[dict[str, str]]) -> None:
    """Print for every task the measures of all methods, and their paired gain on plain longer."""
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        measures = list(dict.fromkeys(row["measure"] for row in mine))
        main = headline(measures)
        print(f"\n{task}: mean over seeds, 95 % interval; last: paired gain on plain longer")
        print(f"{'':30}" + "".join(f"{m:>18}" for m in measures) + f"{'gain ' + main:>28}")
        for method in dict.fromkeys(row["method"] for row in mine):
            cells = [list(of(rows, task, method, m).values()) for m in measures]
            longer, own = of(rows, task, "plain longer", main), of(rows, task, method, main)
            gains = [own[s] - longer[s] for s in own if s in longer]
            line = "".join(f"{mean(c):>18}" for c in cells)
            print(f"{method:30}{line}{mean(gains):>24} ({len(own)})")


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Draw, for every task with a shortcut, its main measure of every method, seeds as dots."""
    import matplotlib.pyplot as plt

    tasks = [t for t in dict.fromkeys(row["task"] for row in rows) if not t.endswith("clean")]
    if not tasks:
        return
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 4 * lines), squeeze=False)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        mine = [row for row in rows if row["task"] == task]
        measure = headline(list(dict.fromkeys(row["measure"] for row in mine)))
        order = dict.fromkeys(row["method"] for row in mine)
        methods = [m for m in order if not m.startswith("guard")]
        methods += [m for m in order if m.startswith("guard")]
        for n, method in enumerate(methods):
            values = list(of(rows, task, method, measure).values())
            colour = "tab:blue" if method.startswith("guard") else "tab:grey"
            axis.plot(values, [n] * len(values), ".", color=colour, alpha=0.5)
            axis.plot(statistics.mean(values), n, "|", color=colour, markersize=14)
        axis.axvline(statistics.mean(of(rows, task, "plain longer", measure).values()), ls=":")
        axis.set_yticks(range(len(methods)), methods, fontsize=8)
        axis.set(title=task, xlabel=f"right, {measure}")
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
