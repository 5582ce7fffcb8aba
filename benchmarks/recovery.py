"""Are the direction pairs true where the truth is known, and how fast are they found?

Question: on rows whose concepts were planted, how near are filters, signal vectors and presence to
the truth, next to FastICA, NMF, PCA, k-means, a top-k sparse autoencoder and dictionary learning on
the same rows; and what does a fit cost?
Data: drawn on the spot (`recovery_worlds.py`), except for the section `real`: CIFAR-10 (Krizhevsky
2009) as one npz of JPEG bytes, with a patch, a tint and a texture planted.
Command: python benchmarks/recovery.py [--only toy,worlds,real,speed] [--seeds 10]
Expected: see README.md beside this file. Run time on 2 cores: toy minutes, the worlds of 64
channels an hour, those of 512 channels most of a day (nearly all of it the rivals), real about 10
minutes per seed, speed half an hour.

The results go into one CSV per section in `--out` row by row, and what is there already is not
computed again: an interrupted run goes on where it stopped, and `--refit` computes only the
engine's own rows anew.

Sections:
    toy     the source's toy: IoU, RMSE of signal values, cosines; with ablations
    worlds  channels x concepts x dependence x distractors, and non-negative worlds
    real    features of a small timm model with three planted shortcuts
    speed   seconds, exponents in rows and concepts, peak memory, share of matrix products
"""

import argparse
import platform
import time
from pathlib import Path

import recovery_real
import recovery_speed
import recovery_toy
import torch
from recovery_report import MEASURES, OURS, Results, draw, print_duels, print_table
from recovery_rivals import NONNEGATIVE_RIVALS, RIVALS, Facts, Found
from recovery_scores import world_scores
from recovery_worlds import Cell, World, cells, world

from concept_guard import fit_pairs

SECTIONS = ("toy", "worlds", "real", "speed")
ROWS = 20_000


def fit_world(name: str, drawn: World, seed: int) -> Found:
    """Fit one method, ours or a rival, to a world."""
    concepts = len(drawn.signals)
    if name == OURS:
        return Found.of_pairs(fit_pairs(drawn.rows, concepts=concepts, seed=seed))
    rival = (RIVALS | NONNEGATIVE_RIVALS)[name]
    facts = Facts(drawn.active, drawn.nonnegative, concepts + drawn.distractors)
    return rival(drawn.rows, concepts, seed, facts)


def run_worlds(
    results: Results, seeds: int, wanted: list[Cell], count: int, only: list[str] | None
) -> None:
    """Fill in the rows of the harder worlds that are missing."""
    for cell in wanted:
        names = [OURS, *RIVALS, *(NONNEGATIVE_RIVALS if cell.nonnegative else ())]
        names = [n for n in names if only is None or n in only]
        for seed in range(seeds):
            missing = [n for n in names if not results.has(cell, seed, n)]
            if not missing:
                continue
            drawn = world(cell, seed, count)
            for name in missing:
                began = time.perf_counter()
                found = fit_world(name, drawn, seed)
                seconds = time.perf_counter() - began
                results.add(cell, seed, name, {**world_scores(drawn, found), "seconds": seconds})


def arguments() -> argparse.Namespace:
    """Return the checked arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma separated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sizes", default="64,256,512", help="channels of the worlds")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each world")
    parser.add_argument("--methods", default=None, help="fit only these to the worlds")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/cifar10_jpg_20k10k.npz"))
    parser.add_argument("--out", type=Path, default=Path("recovery_results"))
    parser.add_argument("--refit", action="store_true", help="compute the engine's rows anew")
    parser.add_argument("--smoke", action="store_true", help="section speed on small rows")
    args = parser.parse_args()
    args.only = args.only.split(",")
    unknown = sorted(set(args.only) - set(SECTIONS))
    if unknown:
        parser.error(f"--only: no sections {unknown}; there are {', '.join(SECTIONS)}")
    args.sizes = [int(size) for size in args.sizes.split(",")]
    if args.methods is not None:
        args.methods = args.methods.split(",")
    if "real" in args.only and not args.data.is_file():
        parser.error(
            f"--data {args.data}: no such file; expected the CIFAR-10 pack described above"
        )
    return args


def main() -> None:
    """Run the sections, print their tables, draw the figure."""
    args = arguments()
    began = time.perf_counter()
    if "toy" in args.only:
        toy = Results(args.out / "toy.csv", recovery_toy.FIELDS, refit=args.refit)
        recovery_toy.run_toy(toy, args.seeds)
        print_table("toy", toy.rows, recovery_toy.FIELDS, recovery_toy.LOWER)
    if "worlds" in args.only:
        fields = (*MEASURES, "seconds")
        worlds = Results(args.out / "worlds.csv", fields, refit=args.refit)
        run_worlds(worlds, args.seeds, cells(args.sizes), args.rows, args.methods)
        print_table("worlds", worlds.rows, fields, ["seconds"])
        print_duels(worlds.rows)
        draw(worlds.rows, args.out / "recovery.png")
    if "real" in args.only:
        real = Results(args.out / "real.csv", recovery_real.FIELDS, refit=args.refit)
        recovery_real.run_real(real, args.seeds, args.data, args.out)
        print_table("real features", real.rows, recovery_real.FIELDS, ["position", "seconds"])
    if "speed" in args.only:
        speed = Results(args.out / "speed.csv", recovery_speed.FIELDS, refit=args.refit)
        recovery_speed.run_speed(speed, args.out, smoke=args.smoke)
        recovery_speed.print_speed(speed.rows)
    threads = torch.get_num_threads()
    print(
        f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__} on {threads} threads, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


if __name__ == "__main__":
    main()
