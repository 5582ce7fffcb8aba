"""Rivals that train: JTT, LfF and GroupDRO, each from its formula. Nothing here knows the guard.

All start from an untrained (or pretrained) network and train it as long as every other method has
trained at its end: `base_epochs + epochs`.
"""

import copy

import torch
from splits import Split, Splits
from tasks import Descent, Task, descend, logits_of, mean_loss
from torch import Tensor, nn
from torch.nn import functional

JTT_EPOCHS, JTT_WEIGHTS = 1, (5, 20, 50)  # of the first network; tried, chosen on the probe
GCE, LFF_MEMORY = 0.7, 0.7
GROUP_RATE = 0.01


def jtt(task: Task, data: Splits, seed: int) -> nn.Module:
    """Train on the errors of a network stopped early, `JTT_WEIGHTS` times as often.

    Source: Liu et al. (2021), arXiv 2107.09044, algorithm 1. The factor is the one with the highest
    accuracy on the probe, which needs no group labels.
    """
    first = started(task, seed)
    descend(task, first, data.train, JTT_EPOCHS, seed, mean_loss)
    wrong = logits_of(first, data.train.images).argmax(1) != data.train.labels
    best: tuple[float, nn.Module] | None = None
    for factor in JTT_WEIGHTS:
        weights = torch.where(wrong, float(factor), 1.0)
        model = started(task, seed)
        descend(task, model, data.train, length(task), seed, mean_loss, weights=weights)
        score = accuracy(model, data.probe)
        if best is None or score > best[0]:
            best = (score, model)
    assert best is not None
    return best[1]


def lff(task: Task, data: Splits, seed: int) -> nn.Module:
    """Weigh the samples that a network with a taste for the easy finds hard.

    Source: Nam et al. (2020), arXiv 2007.02561, section 3.2: a twin descends the generalised cross
    entropy `(1 - p^q) / q`; the network weighs samples by `Lb / (Lb + Ld)` of moving averages, each
    over the largest of its class.
    """
    biased, model = started(task, seed), started(task, seed + 1)
    labels = data.train.labels
    averages = torch.zeros(2, len(labels))
    seen = torch.zeros(len(labels), dtype=torch.bool)
    twin_descent = Descent(task, biased, len(data.train), length(task))

    def relative(k: int, at: Tensor) -> Tensor:
        largest = torch.zeros(int(labels.max()) + 1)
        largest.scatter_reduce_(0, labels, averages[k], "amax")
        return averages[k, at] / largest[labels[at]].clamp_min(1e-8)

    def weighed(net: nn.Module, x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        logits, twin = net(x), biased(x)
        losses = [functional.cross_entropy(z, y, reduction="none") for z in (twin, logits)]
        for k, loss in enumerate(losses):
            old = torch.where(seen[at], averages[k, at], loss.detach())
            averages[k, at] = LFF_MEMORY * old + (1 - LFF_MEMORY) * loss.detach()
        seen[at] = True
        hard, own = relative(0, at), relative(1, at)
        weight = hard / (hard + own + 1e-8)
        right = twin.softmax(1).gather(1, y[:, None])[:, 0].clamp_min(1e-8)
        twin_descent.step(((1 - right**GCE) / GCE).mean())
        return (weight * losses[1]).mean()

    biased.train()
    descend(task, model, data.train, length(task), seed, weighed)
    return model


def group_dro(task: Task, data: Splits, seed: int) -> nn.Module:
    """Descend the loss of the groups by weights that grow with it. Needs the group of every image.

    Source: Sagawa et al. (2020), arXiv 1911.08731, algorithm 1, groups drawn evenly.
    """
    group = groups(data.train)
    shares = torch.zeros(int(group.max()) + 1)
    shares[group.unique()] = 1 / len(group.unique())

    def weighed(net: nn.Module, x: Tensor, y: Tensor, at: Tensor) -> Tensor:
        losses, of = functional.cross_entropy(net(x), y, reduction="none"), group[at]
        count = torch.bincount(of, minlength=len(shares))
        mean = torch.zeros(len(shares)).index_add(0, of, losses) / count.clamp_min(1)
        shares.mul_((GROUP_RATE * mean.detach()).exp()).div_(shares.sum().clone())
        return (shares * mean).sum()

    model = started(task, seed)
    even = 1 / torch.bincount(group)[group]
    descend(task, model, data.train, length(task), seed, weighed, weights=even)
    return model


def probe_added(task: Task, model: nn.Module, data: Splits, seed: int) -> nn.Module:
    """Train on with the probe among the training images: what its class labels alone are worth."""
    both = Split(
        *(
            torch.cat([getattr(part, name) for part in (data.train, data.probe)])
            for name in ("images", "labels", "marks")
        )
    )
    new = copy.deepcopy(model)
    descend(task, new, both, task.epochs, seed + 1, mean_loss)
    return new


def groups(split: Split) -> Tensor:
    """Return the group of every image: class and value of the spurious attribute."""
    return split.labels * (int(split.marks.max()) + 1) + split.marks


def started(task: Task, seed: int) -> nn.Module:
    """Return the network before any training."""
    torch.manual_seed(seed)
    return task.build()


def length(task: Task) -> int:
    """Return the passes over the images that every method has at its end."""
    return task.base_epochs + task.epochs


def accuracy(model: nn.Module, split: Split) -> float:
    """Return the share of right predictions."""
    return float((logits_of(model, split.images).argmax(1) == split.labels).float().mean())
