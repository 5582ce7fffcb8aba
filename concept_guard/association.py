"""Stage 3b: which concepts go with errors towards a class: effect size, exact test, multiplicity.

Nothing here knows how concepts were found, what causes the errors, or what will be done about them.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor

CONFIDENCE = 0.95
LEAST_CARRIERS = 5  # images of other classes that carry a concept; fewer are no evidence
PULL, POWER = 0.5, 0.8  # see `Sensitivity`
MOST_CARRIERS = 200  # where the search for a sensitivity ends


@dataclass(frozen=True, eq=False)
class Differences:
    """How much more often images with a concept are taken for a class than those without.

    Attributes:
        difference: `(K, M)` risk differences, the true class held fixed.
        low: `(K, M)` lower ends of their 95 % intervals.
        high: `(K, M)` upper ends.
    """

    difference: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, eq=False)
class Association(Differences):
    """How much concepts go with errors towards classes, for all (concept, class) pairs.

    Attributes:
        p_value: `(K, M)` one-sided exact p-values.
        q_value: `(K, M)` after Benjamini-Hochberg over the tables that can say something.
        present: `(K, M)` images of other classes that carry the concept.
    """

    p_value: Tensor
    q_value: Tensor
    present: Tensor


def associate(present: Tensor, predicted: Tensor, labels: Tensor, num_classes: int) -> Association:
    """Test for every concept and class whether the concept goes with errors towards the class.

    For concept i and class k, among the images of every other class c, compare how often those
    with and those without the concept are predicted as k. The difference is the mean over c with
    weights `n1 n0 / (n1 + n0)`; its interval combines Wilson's intervals of the two rates at
    their effective numbers of images. The p-value is that of the exact test with c as stratum:
    of the errors of class c towards k any images of c may be the ones.

    Source: Mantel and Haenszel (1959), J. National Cancer Institute 22:719-748 (strata, weights);
    Gart (1971), Review of the International Statistical Institute 39:148-169 (exact test);
    Newcombe (1998), Statistics in Medicine 17:873-890, method 10, with the stratified Wilson
    limits of Yan and Su (2010), Statistics in Biopharmaceutical Research 2:323-335; Benjamini and
    Hochberg (1995), J. Royal Statistical Society B 57:289-300.
    Departure: the tables hold the true class fixed. Of 28 networks whose predictions were permuted
    within classes, 100 times each, Fisher's test on the images of all other classes together found
    something at q <= .05 in 59 % of the draws, because a concept of cats goes with whatever cats
    are mistaken for; this one in 1.2 % (most in one network: 6 of 100). Concepts depend on each
    other, so that Benjamini and Yekutieli's control would be safe in theory; it finds .2 % there
    and costs power, so it is not needed.

    Args:
        present: `(N, K)` bool, which images carry which concept.
        predicted: `(N,)` predicted classes.
        labels: `(N,)` classes.
        num_classes: M.

    Returns:
        The results, on the CPU; difference and interval are 0 where no class has images both with
        and without the concept.
    """
    errors, n1, count = _counted(present, predicted, labels, num_classes)
    found = _differences(*errors, n1, count[:, None] - n1)
    p_value, informative = _exact(*errors, n1, count)
    q_value = np.ones_like(p_value)
    if informative.any():
        q_value[informative] = scipy.stats.false_discovery_control(p_value[informative])
    of_others = (n1.sum(dim=0) - n1).long()
    p, q = torch.from_numpy(p_value), torch.from_numpy(q_value)
    return Association(*(t.T.contiguous() for t in (*found, p, q, of_others)))


def risk_differences(
    present: Tensor, predicted: Tensor, labels: Tensor, num_classes: int
) -> Differences:
    """Return the risk differences and intervals of `associate`, without its tests.

    Args:
        present: `(N, K)` bool, which images carry which concept.
        predicted: `(N,)` predicted classes.
        labels: `(N,)` classes.
        num_classes: M.

    Returns:
        The results, on the CPU; 0 where no class has images both with and without the concept.
    """
    errors, n1, count = _counted(present, predicted, labels, num_classes)
    found = _differences(*errors, n1, count[:, None] - n1)
    return Differences(*(t.T.contiguous() for t in found))


def _counted(
    present: Tensor, predicted: Tensor, labels: Tensor, num_classes: int
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return the errors, `(M, K)` images with each concept by class, and `(M,)` images by class.

    The errors are the concepts they carry, `(E, K)`, the class they go towards and their own.
    """
    present, predicted, labels = (t.cpu() for t in (present, predicted, labels))
    carried = present.to(torch.float64)
    count = torch.bincount(labels, minlength=num_classes).to(torch.float64)
    n1 = torch.zeros((num_classes, present.shape[1]), dtype=torch.float64)
    n1.index_add_(0, labels, carried)
    wrong = predicted != labels
    return (carried[wrong], predicted[wrong], labels[wrong]), n1, count


def _differences(
    carried: Tensor, towards: Tensor, labels: Tensor, n1: Tensor, n0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(M, K)` differences of rates and the ends of their intervals."""
    share = n1 / (n1 + n0).clamp_min(1)
    hits1, hits0 = torch.zeros_like(n1), torch.zeros_like(n1)
    hits1.index_add_(0, towards, carried * (1 - share)[labels])  # an image with it weighs n0 / N
    hits0.index_add_(0, towards, (1 - carried) * share[labels])
    weight = _of_others(n1 * (1 - share))
    usable = weight > 0
    rate1, rate0 = (hits / weight.clamp_min(1e-300) for hits in (hits1, hits0))
    size1 = weight.square() / _of_others(n1 * (1 - share).square()).clamp_min(1e-300)
    size0 = weight.square() / _of_others(n0 * share.square()).clamp_min(1e-300)
    low1, high1 = _wilson(rate1, size1)
    low0, high0 = _wilson(rate0, size0)
    difference = (rate1 - rate0).clamp(-1.0, 1.0)  # rounding may leave a rate above 1
    low = difference - ((rate1 - low1).square() + (high0 - rate0).square()).sqrt()
    high = difference + ((high1 - rate1).square() + (rate0 - low0).square()).sqrt()
    nothing = torch.zeros_like(difference)
    return (
        torch.where(usable, difference, nothing),
        torch.where(usable, low, nothing),
        torch.where(usable, high, nothing),
    )


def _of_others(values: Tensor) -> Tensor:
    """Return for every class the sum over the other classes."""
    return (values.sum(dim=0) - values).clamp_min(0)


def _wilson(rate: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends of Wilson's interval of a rate seen on so many images."""
    z2 = float(scipy.stats.norm.ppf(0.5 + 0.5 * CONFIDENCE)) ** 2
    size = size.clamp_min(1e-9)
    centre = (rate + z2 / (2 * size)) / (1 + z2 / size)
    spread = z2 * (rate * (1 - rate) / size).clamp_min(0) + (z2 / (2 * size)).square()
    half = spread.sqrt() / (1 + z2 / size)
    return centre - half, centre + half


def _exact(
    carried: Tensor, towards: Tensor, labels: Tensor, n1: Tensor, count: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(M, K)` p-values, and where a table could have had another result.

    Given how many images of a class carry the concept and how many are mistaken for k, the number
    of those that do both is hypergeometric; over the classes these are independent.
    """
    classes, concepts = n1.shape
    seen = torch.zeros_like(n1).index_add_(0, towards, carried).long().numpy()
    confused = torch.bincount(labels * classes + towards, minlength=classes**2)
    cells = confused.view(classes, classes).numpy()
    sizes, carriers = count.long().numpy(), n1.long().numpy()
    p_value, informative = np.ones((classes, concepts)), np.zeros((classes, concepts), dtype=bool)
    for k in np.flatnonzero(cells.any(axis=0)):
        chance = np.ones((concepts, 1))
        for c in np.flatnonzero(cells[:, k]):
            errors = np.arange(cells[c, k] + 1)
            here = scipy.stats.hypergeom.pmf(errors, sizes[c], carriers[c][:, None], errors[-1])
            chance = _convolved(chance, here)
            informative[k] |= (carriers[c] > 0) & (carriers[c] < sizes[c])
        tail = chance[:, ::-1].cumsum(axis=1)[:, ::-1]  # P(at least so many)
        p_value[k] = np.take_along_axis(tail, seen[k][:, None], axis=1)[:, 0].clip(0.0, 1.0)
    return p_value, informative


def _convolved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the distributions of sums, row by row."""
    result = np.zeros((len(a), a.shape[1] + b.shape[1] - 1))
    for shift in range(b.shape[1]):
        result[:, shift : shift + a.shape[1]] += a * b[:, shift : shift + 1]
    return result


@dataclass(frozen=True)
class Sensitivity:
    """How small a shortcut may be to be seen with a probe set.

    Attributes:
        least: Images of other classes that must carry it at least, even if all of them are
            predicted as its class; on fewer it cannot be seen.
        likely: From how many on one that pulls half of them is seen with probability .8,
            whichever its class. Both end at 200.
    """

    least: int
    likely: int


def sensitivity(
    predicted: Tensor, labels: Tensor, num_classes: int, *, concepts: int, alpha: float
) -> Sensitivity:
    """Return from how many images on a shortcut passes the test of `associate`.

    The shortcut is the only one, so that its p-value must be `alpha` over the number of tables,
    and its images are spread over the other classes.

    Args:
        predicted: `(N,)` predicted classes.
        labels: `(N,)` classes.
        num_classes: M.
        concepts: K.
        alpha: False-discovery level.

    Returns:
        The two numbers.
    """
    labels, predicted = labels.cpu(), predicted.cpu()
    count = torch.bincount(labels, minlength=num_classes)
    towards = torch.bincount(predicted[predicted != labels], minlength=num_classes)
    others = (len(labels) - count).numpy()
    errors = np.minimum(towards.numpy(), others)
    others, errors = np.unique(np.stack([others, errors]), axis=1)  # classes alike once
    level = alpha / max(1, concepts * num_classes)
    least = 0
    for n in range(LEAST_CARRIERS, min(MOST_CARRIERS, int(others.max()) - 1) + 1):
        best, power = _passing(n, others, errors, level)
        if not least and best.any():
            least = n
        if (power >= POWER).all():
            return Sensitivity(least, n)
    return Sensitivity(least or MOST_CARRIERS, MOST_CARRIERS)


def _passing(
    carriers: int, others: np.ndarray, errors: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return per class whether errors on all carriers pass the test, and the power."""
    hits = np.arange(carriers + 1)[:, None]
    mistaken = np.minimum(errors + hits, others)
    passed = (
        scipy.stats.hypergeom.sf(hits - 1, others, mistaken, np.minimum(carriers, others)) <= level
    )
    rate = PULL + (1 - PULL) * errors / np.maximum(others, 1)
    return passed[-1], (scipy.stats.binom.pmf(hits, carriers, rate) * passed).sum(axis=0)
