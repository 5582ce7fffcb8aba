"""Ceilings: methods that are told the spurious attribute of every image of the probe.

Each takes the network that was trained plainly. Nothing here knows the guard.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rivals import accuracy, groups
from sklearn.linear_model import LogisticRegression
from splits import Split, Splits
from tasks import Descent, Task, batches, normalised
from torch import Tensor, nn
from torch.nn import functional

DFR_DRAWS, DFR_STRENGTHS = 10, (0.03, 0.1, 0.3, 1.0)
PENALTIES = (0.1, 1.0, 10.0)
TRACK_EVERY = 25


def head_of(model: nn.Module) -> nn.Linear:
    """Return the last linear map of a network."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def rows_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the `(N, C)` rows that enter the classifier, in eval mode."""
    rows: list[Tensor] = []
    handle = head_of(model).register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    was = model.training
    model.eval()
    with torch.no_grad():
        for x in images.split(250):
            model(normalised(x))
    model.train(was)
    handle.remove()
    return torch.cat(rows)


def average_group(model: nn.Module, split: Split) -> float:
    """Return the accuracy averaged over groups, by which labelled methods choose."""
    right = []
    group = groups(split)
    for g in group.unique():
        right.append(accuracy(model, split.part((group == g).nonzero().flatten())))
    return float(np.mean(right))


def dfr(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Refit the classifier on group-balanced draws of the probe.

    Source: Kirichenko et al. (2023), arXiv 2204.02937, section 4: L1 logistic regression on
    standardised features, averaged over 10 draws; its strength is chosen on half of a draw.
    """
    del task
    return refitted(model, data.probe, groups(data.probe), seed)


def probe_refitted(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Refit the classifier on class-balanced draws of the probe; needs no attribute."""
    del task
    return refitted(model, data.probe, data.probe.labels, seed)


def refitted(model: nn.Module, probe: Split, group: Tensor, seed: int) -> nn.Module:
    """Return the network with its classifier fitted anew on balanced draws of the probe."""
    rows, labels = rows_of(model, probe.images).double().numpy(), probe.labels.numpy()
    draw = np.random.default_rng(seed)
    members = [np.flatnonzero((group == g).numpy()) for g in group.unique()]
    size = min(len(m) for m in members)

    def balanced() -> np.ndarray:
        return np.concatenate([draw.choice(m, size, replace=False) for m in members])

    def fitted(at: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        centre, spread = rows[at].mean(0), rows[at].std(0) + 1e-8
        regression = LogisticRegression(
            l1_ratio=1.0, C=strength, solver="liblinear" if two else "saga", max_iter=200
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            regression.fit((rows[at] - centre) / spread, labels[at])
        weight = regression.coef_ / spread
        return weight, regression.intercept_ - weight @ centre

    two = len(np.unique(labels)) == 2
    at = draw.permutation(balanced())
    half, rest = at[: len(at) // 2], at[len(at) // 2 :]
    scores = []
    for strength in DFR_STRENGTHS:
        weight, bias = fitted(half, strength) if len(np.unique(labels[half])) > 1 else (0, 0)
        z = rows[rest] @ np.asarray(weight).T + bias
        called = (z[:, 0] > 0).astype(int) if two else z.argmax(1)
        scores.append((called == labels[rest]).mean())
    strength = DFR_STRENGTHS[int(np.argmax(scores))]
    maps = [fitted(balanced(), strength) for _ in range(DFR_DRAWS)]
    weight, bias = (np.mean([m[k] for m in maps], axis=0) for k in (0, 1))
    if two:  # one row for the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    new = copy.deepcopy(model)
    with torch.no_grad():
        head_of(new).weight.copy_(torch.from_numpy(weight))
        head_of(new).bias.copy_(torch.from_numpy(bias))
    return new


def leace(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Erase the attribute linearly from what enters the classifier.

    Source: Belrose et al. (2023), arXiv 2306.03819, theorem 4.3, by the package concept-erasure.
    """
    from concept_erasure import LeaceFitter

    del task, seed
    rows = rows_of(model, data.probe.images).double()
    marks = functional.one_hot(data.probe.marks).double()
    eraser = LeaceFitter.fit(rows, marks).eraser
    new = copy.deepcopy(model)
    head = head_of(new)
    with torch.no_grad():  # the eraser is affine: x -> x A + a
        a = eraser(torch.zeros_like(rows[:1]))
        linear = eraser(torch.eye(rows.shape[1], dtype=torch.float64)) - a
        weight = head.weight.double()
        head.weight.copy_(weight @ linear.T)
        head.bias.add_((weight @ a[0]).float())
    return new


def activation_vector(rows: Tensor, marks: Tensor) -> Tensor:
    """Return the `(A, C)` orthonormal span of the pattern vectors of the attribute's values."""
    values = marks.unique()[1:]
    patterns = [rows[marks == v].mean(0) - rows[marks != v].mean(0) for v in values]
    return torch.linalg.qr(torch.stack(patterns).double().T).Q.T


def p_clarc(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Project the attribute's activation vectors out, at their mean over images without it.

    Source: Anders et al. (2022), Information Fusion 77, section 4.2.
    """
    del task, seed
    rows = rows_of(model, data.probe.images)
    u = activation_vector(rows, data.probe.marks)
    mean = rows[data.probe.marks == 0].double().mean(0)
    new = copy.deepcopy(model)
    head = head_of(new)
    with torch.no_grad():
        weight = head.weight.double()
        head.bias.add_((weight @ (u.T @ (u @ mean))).float())
        head.weight.copy_(weight - (weight @ u.T) @ u)
    return new


def rr_clarc(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Train on with a penalty on the gradient of the logits along the attribute's vectors.

    Source: Dreyer et al. (2024), arXiv 2308.09437, section 3.2, random signs per logit; before a
    linear classifier the expected penalty is the squared length of its reading of the vectors.
    The strength is the one with the highest accuracy averaged over the probe's groups.
    """
    u = activation_vector(rows_of(model, data.probe.images), data.probe.marks).float()
    best: tuple[float, nn.Module] | None = None
    for strength in PENALTIES:
        new = copy.deepcopy(model)
        optimizer = Descent(task, new, len(data.train), task.epochs)
        new.train()
        for x, y, _ in batches(task, data.train, task.epochs, seed + 1):
            loss = functional.cross_entropy(new(x), y)
            optimizer.step(loss + strength * (head_of(new).weight @ u.T).square().sum())
        score = average_group(new, data.probe)
        if best is None or score > best[0]:
            best = (score, new)
    assert best is not None
    return best[1]


class Oracle:
    """Projection of the true attribute, its pairs estimated again every 25 updates.

    Written on its own, from the formulas alone: one pair per value of the attribute, within
    classes, its filter by a shrunk discriminant.
    """

    def __init__(self, model: nn.Module, probe: Split) -> None:
        self.model, self.probe = model, probe
        self.values = (
            probe.marks.unique()[1:] if len(probe.marks.unique()) == 2 else probe.marks.unique()
        )
        self.maps: tuple[Tensor, Tensor, Tensor] | None = None
        self.handle: torch.utils.hooks.RemovableHandle | None = None

    def estimate(self) -> None:
        """Estimate the pairs within classes from the network as it is."""
        if self.handle:
            self.handle.remove()
        rows = rows_of(self.model, self.probe.images).double()
        pairs = [self.pair(rows, self.probe.marks == v) for v in self.values]
        filters, signals = (torch.stack([p[k] for p in pairs]) for k in (0, 1))
        levels = torch.stack([p[2] for p in pairs])
        moves = torch.linalg.lstsq(signals @ filters.T, signals).solution
        self.maps = tuple(t.float() for t in (filters, moves, levels))
        self.handle = head_of(self.model).register_forward_pre_hook(self.project)

    def pair(self, rows: Tensor, has: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return filter, signal and the level without the attribute."""
        labels = self.probe.labels
        signal, weight, residual = torch.zeros(rows.shape[1]).double(), 0.0, rows.clone()
        for k in labels.unique():
            on, off = (labels == k) & has, (labels == k) & ~has
            for group in (on, off):
                if group.any():
                    residual[group] -= rows[group].mean(0)
            if on.any() and off.any():
                share = float(on.sum() * off.sum() / (on.sum() + off.sum()))
                signal += share * (rows[on].mean(0) - rows[off].mean(0))
                weight += share
        signal /= max(weight, 1e-9)
        spread = residual.T @ residual / len(rows)
        even = spread.diagonal().mean() * torch.eye(len(signal)).double()
        w = torch.linalg.solve(0.9 * spread + 0.1 * even, signal)
        w /= w @ signal
        return w, signal, (rows[~has] @ w).mean()

    def project(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Project the input of the classifier."""
        assert self.maps is not None
        filters, moves, levels = self.maps
        return (args[0] - (args[0] @ filters.T - levels) @ moves,)

    def bake(self) -> None:
        """Fold the projection into the classifier."""
        assert self.maps is not None
        assert self.handle is not None
        filters, moves, levels = self.maps
        head = head_of(self.model)
        pull = head.weight.detach() @ moves.T
        with torch.no_grad():
            head.weight -= pull @ filters
            head.bias += pull @ levels
        self.handle.remove()


def oracle(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Train on with the true attribute projected out and tracked."""
    new = copy.deepcopy(model)
    watcher = Oracle(new, data.probe)
    optimizer = Descent(task, new, len(data.train), task.epochs)
    new.train()
    for step, (x, y, _) in enumerate(batches(task, data.train, task.epochs, seed + 1)):
        if step % TRACK_EVERY == 0:
            watcher.estimate()
        optimizer.step(functional.cross_entropy(new(x), y))
    watcher.estimate()
    watcher.bake()
    return new


def moved_once(task: Task, model: nn.Module, data: Splits, seed: int, along: str) -> nn.Module:
    """Take the true attribute out of the rows once, along one of three directions, as far in each.

    Source: the contrast of pushes along encoding, decoding and random directions of arXiv
    2509.23926, appendix I.
    """
    watcher = Oracle(copy.deepcopy(model), data.probe)
    rows = rows_of(model, data.probe.images).double()
    pairs = [watcher.pair(rows, data.probe.marks == v) for v in watcher.values]
    filters, signals = (torch.stack([p[k] for p in pairs]) for k in (0, 1))
    draw = torch.Generator().manual_seed(seed)
    other = {
        "signal": signals,
        "filter": filters,
        "random": torch.randn(signals.shape, generator=draw, dtype=torch.float64),
    }[along]
    moves = functional.normalize(other, dim=1) * signals.norm(dim=1, keepdim=True)
    watcher.model, levels = copy.deepcopy(model), torch.stack([p[2] for p in pairs])
    watcher.maps = (filters.float(), moves.float(), levels.float())
    watcher.handle = head_of(watcher.model).register_forward_pre_hook(watcher.project)
    watcher.bake()
    del task
    return watcher.model


Labelled = Callable[[Task, nn.Module, Splits, int], nn.Module]
LABELLED: dict[str, Labelled] = {
    "DFR": dfr,
    "LEACE": leace,
    "P-ClArC": p_clarc,
    "RR-ClArC": rr_clarc,
    "oracle": oracle,
    **{f"marks moved, {a}": partial(moved_once, along=a) for a in ("signal", "filter", "random")},
}
