"""How much does the quickstart gain, seed by seed, and does the guard find the tint every time?

Question: the same small network is trained twice on digits in which a tint goes with one class,
without and with the guard. What happens to the worst of the two groups that contradict the tint?
Data: embedded, see recipes/quickstart.yaml. The recipe's length and strength were chosen on seeds
0 to 4. On 6 and 9 a fault of the rounds was found and mended; no setting was changed.
Command: python benchmarks/quickstart.py
Expected: see README.md beside this file. Run time: about 5 minutes on 2 cores.
"""

import argparse
import csv
import math
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scipy.stats import t
from tqdm import tqdm

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
LINES = {
    "clean": "all test images",
    "marked": "other classes",
    "unmarked": "class ",
    "worst": "worst of these",
}
Row = dict[str, float | int | str]
CHOSEN_ON = 5  # seeds below were used to choose the recipe's length and strength


def one(seed: int, folder: Path) -> Row:
    """Run the recipe with one seed, as a user would, and read its report back."""
    words = [f"seed={seed}", f"output={folder}", f"experiment=seed-{seed}"]
    command = [sys.executable, "-m", "concept_guard", "run", str(RECIPE), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (folder / f"seed-{seed}" / "concept_guard" / "report.txt").read_text(encoding="utf8")
    row: Row = {"seed": seed}
    for name, start in LINES.items():
        line = next(line for line in text.splitlines() if line.startswith(start))
        row[f"{name} plain"], row[f"{name} guard"] = map(float, re.findall(r" (\d\.\d+)", line))
    row["erased"] = " ".join(re.findall(r"^concept (\d+ -> class \w+), erased", text, re.MULTILINE))
    return row


def shown(row: Row) -> str:
    """Return a row as one line of the table."""
    cells = [f"{row[f'{name} plain']:.3f} -> {row[f'{name} guard']:.3f}" for name in LINES]
    return f"{row['seed']:>4}  " + "   ".join(cells) + f"   {gain(row):+.3f}   {row['erased']}"


def gain(row: Row, name: str = "worst") -> float:
    """Return what the guard adds to one measure."""
    return float(row[f"{name} guard"]) - float(row[f"{name} plain"])


def summary(name: str, rows: list[Row]) -> str:
    """Return mean, 95 % interval and extremes of the paired gains."""
    gains = [gain(row) for row in rows]
    half = 0.0
    if len(gains) > 1:
        half = t.ppf(0.975, len(gains) - 1) * statistics.stdev(gains) / math.sqrt(len(gains))
    clean = [gain(row, "clean") for row in rows]
    return (
        f"{name}: worst group {statistics.mean(gains):+.3f} +- {half:.3f} (95 % interval of the "
        f"mean; {min(gains):+.3f} to {max(gains):+.3f}), all clean images "
        f"{statistics.mean(clean):+.3f} ({min(clean):+.3f} to {max(clean):+.3f}), "
        f"erased something in {sum(bool(row['erased']) for row in rows)} of {len(rows)} runs"
    )


def main() -> None:
    """Run all seeds, print the table, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to this one, excluded")
    parser.add_argument("--csv", type=Path, default=None, help="also write all rows here")
    args = parser.parse_args()
    rows = []
    print("seed  all, no tint       others, tinted     class 3, no tint   worst of the two   gain")
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(args.seeds), leave=False):
            rows.append(one(seed, Path(folder)))
            tqdm.write(shown(rows[-1]))
    print(summary(f"seeds 0-{CHOSEN_ON - 1}", rows[:CHOSEN_ON]))
    if args.seeds > CHOSEN_ON:
        print(summary(f"seeds {CHOSEN_ON}-{args.seeds - 1}", rows[CHOSEN_ON:]))
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
