"""Does the guard work on every family of timm's classifiers, and what does it refuse?

Question: for each family, does attaching leave the logits as they are and observing the weights, to
the last bit; does training under the guard work, does erasing change the logits, does baking keep
them as corrected, and is nothing left? Where is the model read, how do the rows lie there, and what
is refused?
Data: noise with an orange tint on a fifth of the images of each of 4 classes; for each family a
network of `families_list.py` with random weights.
Command: python benchmarks/families.py [--write] [MODEL ...]
Expected: the table of recipes/README.md, which `--write` replaces. Run time: see there.

Every check is an `assert` that says what failed. A refusal passes if it is a `TapError` or a
`BakeError`, nothing stays on the model, and the tap that its message names works.
"""

import argparse
import copy
import math
import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
from families_list import FAMILIES, IMAGES, TINTED, Architecture, Batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from concept_guard import BakeError, ConceptGuard, TapError

QUIET = {"start": 10**9, "every": 10**9, "track_every": 10**9, "concepts": 4}
KEPT = ("project", "rebalance")  # actions with which baking keeps the logits
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


PAGE = Path(__file__).parents[1] / "recipes" / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
HEADING = (
    "| family | model, image size | rows enter, width | baked | feature map | refused -> instead |"
)
REASONS = {  # what a refusal says -> its words in the table
    r"its classifier is (\w+) and \1": "several heads",
    r"its classifier is (\w+)": r"head is a \1",
    r"calls its children": "is never called itself",
    r"changing its rows changes no logit": "no logit depends on it",
    r"returns a (list|tuple)": r"returns a \1",
    r"calls it '([^']+)', which is no module": r"timm calls it `\1`, which does not exist",
}


def hooks_on(model: nn.Module) -> int:
    """Return how many hooks the modules of a model carry."""
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in HOOKS)


def logits(model: nn.Module, batches: list[Batch]) -> Tensor:
    """Return `(N, M)` logits in eval mode; flags and random state stay."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(images) for images, _ in batches])
    for module, mode in modes.items():
        module.training = mode
    return found


def train(model: nn.Module, batch: Batch, guard: ConceptGuard | None) -> None:
    """Do one update."""
    torch.manual_seed(2)  # of dropout and drop path
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    images, labels = batch
    losses = cross_entropy(model.train()(images), labels, reduction="none")
    (losses.mean() if guard is None else guard.loss(losses, labels)).backward()
    optimizer.step()
    model.zero_grad(set_to_none=True)
    if guard is not None:
        guard.step()


def erase_the_tint(guard: ConceptGuard, batches: list[Batch]) -> None:
    """Put the tint among the concepts of the last round, as the rows show it, and erase it."""
    rows = guard.tap.read(batches, max_rows=10**9, seed=0).rows
    means = rows.mean(dim=1)
    with_tint, without = means[TINTED].mean(dim=0), means[~TINTED].mean(dim=0)
    w = (with_tint - without) / (with_tint - without).norm()
    pairs = {
        "filters": w[None],
        "signals": w[None],
        "biases": ((with_tint + without) / 2 @ w)[None],
    }
    guard.load_state_dict({**guard.state_dict(), "pairs": pairs, "ids": [0]})
    guard.erase(0)


def rounding(guard: ConceptGuard, batches: list[Batch]) -> float:
    """Return what rounding may change in logits: four standard deviations of a sum of C terms.

    C products of the order of the largest one, each off by a unit in the last place, are summed
    in another order.
    """
    head = guard.tap.classifier
    assert head is not None
    rows = guard.tap.read(batches, max_rows=IMAGES, seed=0).rows[:, 0]
    weight, bias = head.weight.detach(), head.bias.detach()
    largest = float((rows.abs() @ weight.abs().T + bias.abs()).max())
    return 4 * torch.finfo(rows.dtype).eps * math.sqrt(guard.tap.channels) * largest


def attached(
    model: nn.Module, batches: list[Batch], tap: str, action: object
) -> tuple[ConceptGuard, str]:
    """Return a guard at a tap, or at the one that the refusal names; and the refusal in words."""
    config = {**QUIET, "tap": tap, "action": action}
    hooks, keys = hooks_on(model), list(model.state_dict())
    try:
        return ConceptGuard(model, probe=batches, config=config), ""
    except TapError as error:
        message = str(error)
    assert (hooks_on(model), list(model.state_dict())) == (hooks, keys), "left on the model"
    named = [
        t for t in re.findall(r"'(stage:[^' ]+|module:[^' ]+|pre_logits)'", message) if t != tap
    ]
    assert named, f"no way out in: {message}"
    guard = ConceptGuard(model, probe=batches, config={**config, "tap": named[0]})
    found = [match.expand(to) for of, to in REASONS.items() if (match := re.search(of, message))]
    return guard, f"`{tap}`: {found[0] if found else message} -> `{named[0]}`"


def corrected(model: nn.Module, batches: list[Batch], tap: str) -> tuple[str, str, str]:
    """Return where a model is read, how it is baked, and why another place was refused.

    Observe, train, erase, train, bake, close: with all checks.
    """
    plain, keys = logits(model, batches[:1]), list(model.state_dict())
    other = copy.deepcopy(model)
    guard, refusal = attached(model, batches, tap, KEPT)
    with guard:
        few = batches[:1]
        assert torch.equal(logits(model, few), plain), "attaching changed the logits"
        train(model, batches[0], guard)
        train(other, batches[0], None)
        for (name, a), b in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), f"observing changed {name}"
        before = logits(model, few)
        assert guard.round() is not None, "the round was skipped"
        erase_the_tint(guard, batches)
        moved = float((logits(model, few) - before).abs().max() / before.std(dim=0).max())
        assert moved > 1e-3, f"erasing moves the logits by {moved:.1e} of their spread"
        train(model, batches[1], guard)
        assert not torch.equal(logits(other, few), logits(model, few))
        guard.restore(0)
        erase_the_tint(guard, batches)  # as the network is now
        hooked = logits(model, few)
        assert bool(hooked.isfinite().all()), "corrected logits are not finite"
        place = f"`{guard.tap.path}`, {guard.tap.channels}"
        baked = "exactly"
        try:
            guard.bake()
        except BakeError:
            baked = "`BakeError`"
            assert torch.equal(logits(model, few), hooked), "a refused bake changed the logits"
        else:
            off = float((logits(model, few) - hooked).abs().max()) / rounding(guard, batches)
            assert off < 1, f"baking changes the logits by {off:.1f} of what rounding may"
            hooked = logits(model, few)
    assert hooks_on(model) == hooks_on(other), "hooks are left"
    assert list(model.state_dict()) == keys, "names of parameters changed"
    if baked == "exactly":
        assert torch.equal(logits(model, few), hooked), "closing changed the logits"
    return place, baked, refusal


def mapped(model: nn.Module, batches: list[Batch], tap: str) -> tuple[str, str]:
    """Return where a feature map is read and how it lies, and why another place was refused."""
    guard, refusal = attached(model, batches, tap, "observe")
    with guard:
        reading = guard.tap.read(batches, max_rows=10**9, seed=0)
        rows, columns = reading.grid
        found = reading.rows.transpose(1, 2).unflatten(2, (rows, columns))
        inside = guard.tap
        words = f"`{guard.config.tap}` `{inside.path}` {inside.layout}, {rows} x {columns}"
        words += f", {inside.num_prefix} prefix" if inside.num_prefix else ""
        maps = [m for m in intermediates(model, batches) if m.shape == found.shape]
        alike = any(torch.equal(found, m) for m in maps)
    where = guard.config.tap
    assert alike or not where.startswith("stage"), f"{where} is not as timm's own maps are"
    if where == "pre_logits":
        return "none", refusal
    return words + (", as timm's" if alike else ""), refusal


def intermediates(model: nn.Module, batches: list[Batch]) -> list[Tensor]:
    """Return the feature maps of the images as timm gives them, `(N, C, h, w)`."""
    model.eval()
    with torch.no_grad():
        parts = [model.forward_intermediates(x, intermediates_only=True) for x, _ in batches]
    return [torch.cat(maps) for maps in zip(*parts, strict=True) if isinstance(maps[0], Tensor)]


def examined(architecture: Architecture) -> str:
    """Return the row of the table, with all checks passed."""
    model, batches = architecture.built(), architecture.probe()
    place, baked, refusal = corrected(model, batches, "pre_logits")
    maps, refused = mapped(model, batches, "stage:-1")
    name = f"{architecture}, {architecture.size} px"
    refusals = "; ".join(filter(None, (refusal, refused)))
    return f"| {architecture.family} | {name} | {place} | {baked} | {maps} | {refusals} |"


def recorded(rows: list[str], seconds: float) -> str:
    """Return the part of the page: how the rows were made, and the rows."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    families = {architecture.family for architecture in FAMILIES}
    versions = f"torch {torch.__version__.split('+')[0]}, timm {timm.__version__}"
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), one thread"
    return f"""{BEGIN}
`python benchmarks/families.py --write`: {len(rows)} networks of {len(families)} families,
commit {commit}, {datetime.now(UTC):%Y-%m-%d}, {machine}, {versions},
{seconds / 60:.0f} minutes beside other work.

{HEADING}
|---|---|---|---|---|---|
{chr(10).join(rows)}
{END}"""


def main() -> None:
    """Examine all networks, or those named; print the rows, and write them if asked to.

    Raises:
        SystemExit: If a check failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="default: all of them")
    parser.add_argument("--write", action="store_true", help="replace the table of the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [a for a in FAMILIES if not args.models or a.name in args.models]
    rows, failed, began = [], [], time.perf_counter()
    for architecture in chosen:
        try:
            rows.append(examined(architecture))
            print(rows[-1], flush=True)
        except (AssertionError, RuntimeError, ValueError) as error:
            failed.append(architecture.name)
            print(f"FAILED {architecture}: {type(error).__name__}: {error}", flush=True)
    print(f"{len(rows)} of {len(chosen)} pass; failed: {', '.join(failed) or 'none'}")
    if args.write and len(rows) == len(FAMILIES):
        page = PAGE.read_text(encoding="utf8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        PAGE.write_text(
            before + recorded(rows, time.perf_counter() - began) + after, encoding="utf8"
        )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
