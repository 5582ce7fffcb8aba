"""Speed section of the recovery benchmark: seconds, exponents, peak memory, matrix products.

Rows come from a world with correlated concepts and distractors, which only the engine solves; those
on which it is compared with NMF and the sparse autoencoder from a non-negative one, which suits
both. Every quantity is one row of the CSV, so an interrupted run goes on where it stopped. Run it
on idle cores.
"""

import math
import multiprocessing
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recovery_autoencoder import top_k_autoencoder
from recovery_report import OURS, Results, Row
from recovery_scores import matched, paired_cosines
from recovery_worlds import Cell, World, drifted, world
from sklearn.decomposition import NMF
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from concept_guard import fit_pairs

FIELDS = ("rows", "channels", "concepts", "seconds", "encoder", "value")
NEAR = 0.01
COMPARED, TURNS = "cold, non-negative", 3
PRODUCTS = {
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::addbmm",
    "aten::matmul",
    "aten::linear",
    "aten::mv",
    "aten::addmv",
    "aten::dot",
}


@dataclass(frozen=True)
class Sizes:
    """How large the rows are; the defaults are the benchmark's.

    Attributes:
        rows: P of the main fit.
        channels: C.
        concepts: K of the main fit.
        row_steps: P of the fits that the exponent in rows comes from.
        concept_steps: K of the fits that the exponent in concepts comes from.
        wide: P, C and K of the wide fit.
    """

    rows: int = 200_000
    channels: int = 512
    concepts: int = 64
    row_steps: tuple[int, ...] = (50_000, 100_000, 200_000, 400_000)
    concept_steps: tuple[int, ...] = (32, 64, 128, 256)
    wide: tuple[int, int, int] = (50_000, 2048, 512)

    def world(self, count: int, concepts: int) -> World:
        """Draw a world of these channels."""
        return world(Cell(self.channels, concepts, "correlated", distractors=True), 0, count)

    def easy(self) -> World:
        """Draw the world of the comparison: independent concepts, nothing negative."""
        return world(
            Cell(self.channels, self.concepts, "independent", nonnegative=True), 0, self.rows
        )


SMOKE = Sizes(2000, 32, 8, (500, 1000, 2000), (4, 8, 16), (500, 64, 32))


def encoder_score(truth: World, encoders: Tensor) -> float:
    """Return the mean matched |cosine| of encoders."""
    a, b, signs = matched(truth.signals, encoders, signed=False)
    return float((paired_cosines(truth.signals[a], encoders[b]) * signs).sum()) / len(truth.signals)


def shape(rows: Tensor, concepts: int) -> dict[str, float]:
    """Return the columns that say how large a fit was."""
    return {"rows": len(rows), "channels": rows.shape[1], "concepts": concepts}


def timed_fit(truth: World, concepts: int, **options: Any) -> tuple[dict[str, float], Any]:
    """Fit the engine; return the columns of its row, and the pairs."""
    began = time.perf_counter()
    pairs = fit_pairs(truth.rows, concepts=concepts, seed=0, **options)
    seconds = time.perf_counter() - began
    score = encoder_score(truth, pairs.signals)
    return {**shape(truth.rows, concepts), "seconds": seconds, "encoder": score}, pairs


def cold_and_warm(results: Results, sizes: Sizes) -> None:
    """Time the engine from nothing, and from the pairs of rows that drifted a little since."""
    if results.has("warm", 0, OURS):
        return
    truth = sizes.world(sizes.rows, sizes.concepts)
    row, pairs = timed_fit(truth, sizes.concepts)
    if not results.has("cold", 0, OURS):
        results.add("cold", 0, OURS, row)
    rows, signals = drifted(truth.rows, 1), drifted(truth.signals.float(), 1).double()
    later = World(rows, signals, truth.factors, truth.present)
    row, _ = timed_fit(later, len(pairs.filters), init=pairs)
    results.add("warm", 0, OURS, row)


def compare(results: Results, sizes: Sizes) -> None:
    """Time the engine, scikit-learn's NMF with its default settings, and the autoencoder, in turns.

    The autoencoder's seconds are those until its encoder cosine is within .01 of its last, of
    which the column `value` has the seconds; that of NMF has its iterations.
    """
    truth = sizes.easy()
    size = shape(truth.rows, sizes.concepts)
    timed = {
        OURS: lambda: timed_fit(truth, sizes.concepts)[0],
        "sparse autoencoder": lambda: time_autoencoder(truth, sizes.concepts),
        "NMF": lambda: time_nmf(truth, sizes.concepts),
    }
    for turn in range(TURNS):
        for name, measure in timed.items():
            if not results.has(COMPARED, turn, name):
                results.add(COMPARED, turn, name, size | measure())


def time_nmf(truth: World, concepts: int) -> dict[str, float]:
    """Return seconds, encoder cosine and iterations."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = NMF(concepts, random_state=0).fit(truth.rows.numpy())
    seconds = time.perf_counter() - began
    score = encoder_score(truth, torch.from_numpy(model.components_))
    return {"seconds": seconds, "encoder": score, "value": float(model.n_iter_)}


def time_autoencoder(truth: World, concepts: int) -> dict[str, float]:
    """Return the seconds until nearly its last encoder cosine, that cosine, and all seconds."""
    history: list[tuple[float, float]] = []
    began = time.perf_counter()

    def watch(write: Tensor) -> None:
        history.append((time.perf_counter() - began, encoder_score(truth, write)))

    write, _ = top_k_autoencoder(truth.rows, concepts, 0, max(1, round(truth.active)), watch)
    total, last = time.perf_counter() - began, encoder_score(truth, write)
    seconds = next(at for at, score in history if score >= last - NEAR)
    return {"seconds": seconds, "encoder": last, "value": total}


def scale(results: Results, sizes: Sizes) -> None:
    """Time the engine over growing rows and over growing concepts."""
    missing = [p for p in sizes.row_steps if not results.has(f"rows {p}", 0, OURS)]
    if missing:
        whole = sizes.world(max(sizes.row_steps), sizes.concepts)
        for p in missing:
            part = World(whole.rows[:p], whole.signals, whole.factors[:p], whole.present[:p])
            results.add(f"rows {p}", 0, OURS, timed_fit(part, sizes.concepts)[0])
    for k in sizes.concept_steps:
        if not results.has(f"concepts {k}", 0, OURS):
            results.add(f"concepts {k}", 0, OURS, timed_fit(sizes.world(sizes.rows, k), k)[0])


def wide(results: Results, sizes: Sizes) -> None:
    """Fit rows of many channels for many concepts, to see that it ends."""
    if results.has("wide", 0, OURS):
        return
    count, channels, concepts = sizes.wide
    truth = world(Cell(channels, concepts, "correlated", distractors=True), 0, count)
    results.add("wide", 0, OURS, timed_fit(truth, concepts)[0])


def peak_bytes() -> int:
    """Return the most memory this process ever held.

    Where the system tells (`VmHWM`), it is that of this program alone; `ru_maxrss` of a child would
    begin at what its parent held.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of_fit(path: str, concepts: int, answer: Any) -> None:
    """Load rows, fit, and put how far the peak rose above the loaded rows; runs in a child."""
    generator = torch.Generator().manual_seed(0)
    fit_pairs(torch.rand(256, 8, generator=generator), concepts=2, seed=0)  # loads what it needs
    rows = torch.from_numpy(np.load(path))
    before = peak_bytes()
    fit_pairs(rows, concepts=concepts, seed=0)
    answer.put(peak_bytes() - before)


def memory(results: Results, sizes: Sizes, out: Path) -> None:
    """Measure the peak memory of a cold fit, the rows included, in sizes of the rows.

    Raises:
        RuntimeError: If the child that fits fails.
    """
    if results.has("peak memory", 0, OURS):
        return
    path = out / "speed_rows.npy"
    rows = sizes.world(sizes.rows, sizes.concepts).rows
    np.save(path, rows.numpy())
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    child = context.Process(target=peak_of_fit, args=(str(path), sizes.concepts, answer))
    child.start()
    child.join()
    path.unlink()
    if child.exitcode:
        raise RuntimeError(f"peak memory: the fit in a child process ended with {child.exitcode}")
    own = rows.numel() * rows.element_size()
    ratio = 1 + float(answer.get()) / own
    results.add("peak memory", 0, OURS, {**shape(rows, sizes.concepts), "value": ratio})


def products(results: Results, sizes: Sizes) -> None:
    """Measure the share of a cold fit's time that is spent in matrix products.

    Two rows: the share of the time in torch's own operations, and that of the seconds on the clock,
    which also hold what the profiler does not see, and the profiler itself.
    """
    if results.has("matrix products, share of clock", 0, OURS):
        return
    rows = sizes.world(sizes.rows, sizes.concepts).rows
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        fit_pairs(rows, concepts=sizes.concepts, seed=0)
    clock = (time.perf_counter() - began) * 1e6
    events = watched.key_averages()
    total = sum(e.self_cpu_time_total for e in events)
    inside = sum(e.self_cpu_time_total for e in events if e.key in PRODUCTS)
    size = shape(rows, sizes.concepts)
    for name, whole in (("operations", total), ("clock", clock)):
        cell = f"matrix products, share of {name}"
        if not results.has(cell, 0, OURS):
            results.add(cell, 0, OURS, {**size, "value": inside / whole})


def run_speed(results: Results, out: Path, *, smoke: bool = False) -> None:
    """Measure what is missing."""
    sizes = SMOKE if smoke else Sizes()
    out.mkdir(parents=True, exist_ok=True)
    cold_and_warm(results, sizes)
    compare(results, sizes)
    scale(results, sizes)
    wide(results, sizes)
    memory(results, sizes, out)
    products(results, sizes)


def exponent(rows: list[Row], kind: str) -> float:
    """Return the slope of log seconds over log size of the cells named `kind size`."""
    points = [
        (math.log(float(r["cell"].split()[1])), math.log(float(r["seconds"])))
        for r in rows
        if r["cell"].startswith(f"{kind} ")
    ]
    return float(np.polyfit(*zip(*points, strict=True), 1)[0]) if len(points) > 1 else math.nan


def ratios(rows: list[Row], name: str) -> str:
    """Return the quotients of a rival's and the engine's seconds, turn by turn."""
    seconds = {(r["method"], r["seed"]): float(r["seconds"]) for r in rows if r["cell"] == COMPARED}
    turns = [seed for method, seed in seconds if method == name]
    return ", ".join(f"{seconds[name, t] / seconds[OURS, t]:.1f}" for t in turns)


def print_speed(rows: list[Row]) -> None:
    """Print every measurement and the exponents."""
    print("\nspeed")
    for r in rows:
        size = f"{float(r['rows']):.0f} x {float(r['channels']):.0f}, K={float(r['concepts']):.0f}"
        named = [f"{n} {float(r[n]):.3f}" for n in ("seconds", "encoder", "value") if r[n]]
        print(f"  {r['cell']:38} {r['method']:20} {size:26} {'  '.join(named)}")
    for name in ("sparse autoencoder", "NMF"):
        print(f"  {name}, times the engine's seconds on the same rows: {ratios(rows, name)}")
    for kind in ("rows", "concepts"):
        print(f"  exponent of the seconds in {kind}: {exponent(rows, kind):.2f}")
