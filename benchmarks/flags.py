"""Are the flags right: false alarms, power, cause, and shortcuts told from core concepts?

Question: how often is something flagged where nothing was planted; from how many conflicting images
on is a planted shortcut flagged first; does erasing it repair the errors it drives, next to random
directions and the filter; and are natural concepts left alone?
Data: CIFAR-10 (Krizhevsky 2009) as one npz of JPEG bytes and MNIST's 10,000 test digits. 10,000
images are learnt by a resnet10t and a small vision transformer of timm; probes are drawn from the
20,000 others (digits: 5,000 and 5,000). See `flags_networks.py` and `flags_probes.py`.
Command: python benchmarks/flags.py [--only power,false] [--seeds 10]
Expected: see README.md beside this file. Run time on 2 cores: training 20 networks 70 minutes (they
are stored), power 25 minutes, false alarms 25 minutes.

The results go into one CSV per section in `--out` row by row, and what is there already is not
computed again.

Sections:
    power   planted patch, tint, frame and texture, 10 to 80 conflicting among 4,000 probe images;
            cause, core concepts and the agreement with captum's TCAV on the same networks
    false   nothing planted: resampled probe sets, as they are and with predictions permuted within
            classes
"""

import argparse
import time
from pathlib import Path

import torch
from flags_networks import MODELS, SHORTCUTS, Images, cifar, digits, network, rows_of
from flags_probes import CONFLICTS, PROBE, Classifier, marked, shuffled, watched
from flags_report import draw, print_cause, print_false, print_power
from flags_trials import CAUSE_FIELDS, POWER_FIELDS, cause, power
from recovery_report import OURS, Results

from concept_guard import RoundReport

SECTIONS = ("power", "false")
NETWORKS, RESAMPLED = 2, 50  # unplanted networks per kind, and probe sets of each
FALSE_FIELDS = ("flagged", "statistics", "errors")
DIGITS_PROBE = 2_500


def run_power(results: Results, causes: Results, args: argparse.Namespace) -> None:
    """Fill in the rows of the power section that are missing."""
    data, out = args.data, args.out
    for seed in range(args.seeds):
        images: Images | None = None
        for model in args.models:
            cells = [(name, n) for name in SHORTCUTS for n in CONFLICTS]
            if all(results.has(f"{model} {s} {n}", seed, OURS) for s, n in cells) and all(
                causes.has(f"{model} {s}", seed, OURS) for s in SHORTCUTS
            ):
                continue
            images = images or cifar(data / "cifar10_jpg_20k10k.npz", seed)
            net = network("planted", model, seed, images, out)
            probe = marked(net, images.held_out[:PROBE], images.held_out_labels[:PROBE], seed)
            head = net.get_classifier()
            for name, n in cells:
                if not results.has(f"{model} {name} {n}", seed, OURS):
                    results.add(
                        f"{model} {name} {n}", seed, OURS, power(head, probe, name, n, seed)
                    )
            for name in SHORTCUTS:
                if not causes.has(f"{model} {name}", seed, OURS):
                    causes.add(f"{model} {name}", seed, OURS, cause(head, probe, name, seed) or {})


def run_false(results: Results, data: Path, out: Path) -> None:
    """Fill in the rows of the section on false alarms that are missing."""
    for kind in ("cifar", "digits"):
        for model in MODELS:
            for seed in range(NETWORKS):
                cell = f"{kind} {model}"
                wanted = range(seed * RESAMPLED, (seed + 1) * RESAMPLED)
                names = ("as they are", "permuted")
                if all(results.has(cell, n, name) for n in wanted for name in names):
                    continue
                pack = "cifar10_jpg_20k10k.npz" if kind == "cifar" else "mnist_t10k.npz"
                images = (cifar if kind == "cifar" else digits)(data / pack, seed)
                net = network(kind, model, seed, images, out)
                rows, labels = rows_of(net, images.held_out), images.held_out_labels
                for n in wanted:
                    one_probe(results, cell, n, net.get_classifier(), rows, labels)


def one_probe(
    results: Results,
    cell: str,
    n: int,
    head: torch.nn.Linear,
    rows: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    """Draw one probe set; run a round on it as it is and with permuted predictions."""
    size = PROBE if cell.startswith("cifar") else DIGITS_PROBE
    part = torch.randperm(len(rows), generator=torch.Generator().manual_seed(n))[:size]
    x, y = rows[part], labels[part]
    if not results.has(cell, n, "as they are"):
        with watched(Classifier(head), x, y, "observe", n) as guard:
            results.add(cell, n, "as they are", alarms(guard.report))
    if not results.has(cell, n, "permuted"):
        results.add(cell, n, "permuted", alarms(shuffled(head, x, y, n)))


def alarms(report: RoundReport) -> dict[str, float]:
    """Return whether anything was flagged, and whether anything passed the statistics alone."""
    found = [flag for flag in report.flags if flag.status == "found"]
    return {
        "flagged": float(bool(found)),
        "statistics": float(bool(report.flags)),
        "errors": float(report.errors_seen),
    }


def arguments() -> argparse.Namespace:
    """Return the checked arguments of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, comma separated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--models", default=",".join(MODELS), help="of the section power")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("flags_results"))
    args = parser.parse_args()
    args.only, args.models = args.only.split(","), args.models.split(",")
    for option, given, there in (("only", args.only, SECTIONS), ("models", args.models, MODELS)):
        if unknown := sorted(set(given) - set(there)):
            parser.error(f"--{option}: {unknown} are not there, only {', '.join(there)}")
    for name in ("cifar10_jpg_20k10k.npz", "mnist_t10k.npz"):
        if not (args.data / name).is_file():
            parser.error(f"--data {args.data}: no {name}; expected the packs described above")
    return args


def main() -> None:
    """Run the sections, print their tables, draw the figure."""
    args, began = arguments(), time.perf_counter()
    results = {
        name: Results(args.out / f"{name}.csv", fields)
        for name, fields in (
            ("power", POWER_FIELDS),
            ("cause", CAUSE_FIELDS),
            ("false", FALSE_FIELDS),
        )
    }
    if "power" in args.only:
        run_power(results["power"], results["cause"], args)
    if "false" in args.only:
        run_false(results["false"], args.data, args.out)
    print_power(results["power"].rows)
    print_cause(results["cause"].rows)
    print_false(results["false"].rows)
    draw(results["power"].rows, results["cause"].rows, args.out / "flags.png")
    print(
        f"\n{time.perf_counter() - began:.0f} s, torch {torch.__version__} on "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
