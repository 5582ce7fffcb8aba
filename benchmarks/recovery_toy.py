"""Toy section of the recovery benchmark: engine, ablations and rivals on the source's toy."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from recovery_report import OURS, Results
from recovery_rivals import RIVALS, Facts, Found, Rival, sparse_autoencoder
from recovery_scores import toy_scores
from recovery_worlds import TOY_CLASSES, TOY_CONCEPTS, TOY_DISTRACTORS, Toy, toy
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from concept_guard import DirectionPairs, descend_pairs, fit_pairs

FIELDS = (
    "found",
    "iou",
    "iou_worst",
    "rmse",
    "rmse_worst",
    "encoder",
    "encoder_worst",
    "decoder",
    "decoder_worst",
    "head_accuracy",
    "seconds",
)
LOWER = ("rmse", "rmse_worst", "seconds")
BATCH, EPOCHS, RATE, ENOUGH = 1024, 2000, 0.005, 0.98

Method = Callable[[Tensor, nn.Module, int], DirectionPairs]


def engine(rows: Tensor, _: nn.Module, seed: int) -> DirectionPairs:
    """Fit the pairs in closed form."""
    return fit_pairs(rows, concepts=TOY_CONCEPTS, seed=seed)


def aligned(rows: Tensor, head: nn.Module, seed: int) -> DirectionPairs:
    """Fit the pairs in closed form, then descend the joint objective with the model's own head."""
    return fit_pairs(rows, concepts=TOY_CONCEPTS, seed=seed, head=head)


def pattern_cav(rows: Tensor, head: nn.Module, seed: int) -> DirectionPairs:
    """Replace the signal vectors by the mean of present minus the mean of absent rows.

    Source: Pahde et al., Navigating Neural Space, ICLR 2025 (pattern-CAV).
    """
    pairs = engine(rows, head, seed)
    present = pairs.present(rows).to(rows)
    absent = 1 - present
    on = present.T @ rows / present.sum(0).clamp_min(1)[:, None]
    off = absent.T @ rows / absent.sum(0).clamp_min(1)[:, None]
    return dataclasses.replace(pairs, signals=(on - off).to(pairs.signals))


def filters_as_encoders(rows: Tensor, head: nn.Module, seed: int) -> DirectionPairs:
    """Replace the signal vectors by the filters."""
    pairs = engine(rows, head, seed)
    return dataclasses.replace(pairs, signals=pairs.filters)


def published(**options: Any) -> Method:
    """Return the published descent with these options of `descend_pairs`."""

    def descend(rows: Tensor, head: nn.Module, seed: int) -> DirectionPairs:
        images = rows.unflatten(0, (-1, 2))
        return descend_pairs(images, concepts=TOY_CONCEPTS, head=head, seed=seed, **options)

    return descend


# Each entry is one more row of the toy's table, called as `ABLATIONS[name](rows, head, seed)`.
ABLATIONS: dict[str, Method] = {
    "then joint descent": aligned,
    "pattern-CAV": pattern_cav,
    "filters as encoders": filters_as_encoders,
    "published descent": published(),
    "published descent, no alignment": published(aligned=False),
    "published descent, free signals": published(free_signals=True),
    "published descent, random start": published(start="random"),
    "published descent, pattern-CAV": published(estimator="pattern"),
}


def dense_autoencoder(rows: Tensor, concepts: int, seed: int, _: Facts) -> Found:
    """Train the sparse autoencoder with all latents kept: no row of the toy has a value of 0.

    It is the nearest to the source's autoencoder without sparsity penalty, its second best.
    """
    return sparse_autoencoder(rows, concepts, seed, Facts(concepts))


TOY_RIVALS: dict[str, Rival] = RIVALS | {"autoencoder, all latents": dense_autoencoder}


def trained_head(world: Toy, seed: int) -> tuple[nn.Module, float]:
    """Train pooling and a linear head on the toy's images; return the head and its accuracy.

    Adam, rate .005, batches of 1,024, until 98 % of the images are right, at most 2,000 epochs.
    """
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(world.rows.shape[1], len(TOY_CLASSES))
    with torch.no_grad():
        head.weight.copy_(0.1 * torch.randn(head.weight.shape, generator=generator))
        head.bias.zero_()
    images = world.rows.reshape(len(world.labels), 2, -1).mean(1)
    adam = torch.optim.Adam(head.parameters(), lr=RATE)
    accuracy = 0.0
    for _ in range(EPOCHS):
        for pick in torch.randperm(len(images), generator=generator).split(BATCH):
            adam.zero_grad()
            cross_entropy(head(images[pick]), world.labels[pick]).backward()
            adam.step()
        with torch.no_grad():
            accuracy = float((head(images).argmax(1) == world.labels).float().mean())
        if accuracy >= ENOUGH:
            break
    return head.requires_grad_(False), accuracy


def run_toy(results: Results, seeds: int) -> None:
    """Fill in the toy's rows that are missing."""
    for seed in range(seeds):
        names = [OURS, *(f"{OURS}: {name}" for name in ABLATIONS), *TOY_RIVALS]
        missing = [name for name in names if not results.has("toy", seed, name)]
        if missing:
            run_seed(results, seed, missing)


def run_seed(results: Results, seed: int, missing: list[str]) -> None:
    """Draw the toy, train its head, and score the methods of these names."""
    world = toy(seed)
    head, accuracy = trained_head(world, seed)
    facts = Facts(world.active, directions=TOY_CONCEPTS + TOY_DISTRACTORS)
    ours = {OURS: engine} | {f"{OURS}: {name}": method for name, method in ABLATIONS.items()}
    for name in missing:
        began = time.perf_counter()
        if name in ours:
            found = Found.of_pairs(ours[name](world.rows, head, seed))
        else:
            found = TOY_RIVALS[name](world.rows, TOY_CONCEPTS, seed, facts)
        seconds = time.perf_counter() - began
        scores = toy_scores(world, found) | {"head_accuracy": accuracy, "seconds": seconds}
        results.add("toy", seed, name, scores)
