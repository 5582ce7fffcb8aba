"""Stage 3a: whether predictions follow the mean colour of images where it is not what a class is.

Nothing here knows the network, or what is done about such a style.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import scipy
import torch
from torch import Tensor

from concept_guard.ranks import Ranks
from concept_guard.reading import Reading, checked_pair, mean_colours
from concept_guard.thresholds import balanced_accuracy, threshold_of

REMEMBERED = 4096  # training samples, of those since the last round
FOLLOWED = 0.5  # correlation within classes from which a logit follows a style
DECIDED = 0.95  # balanced accuracy from which the style decides predictions, and nothing else does
MOST_CHANCE = 0.001  # that errors go with their labels as much, where they do not at all
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # of classes
RIDGE = 1e-3  # of the mean variance, where a covariance is inverted


@dataclass(frozen=True, eq=False)
class Style:
    """A direction of mean colours that decides predictions, against other evidence.

    Attributes:
        class_index: The class that images with it are taken for.
        present: `(N,)` bool, which probe images have it.
        p_value: One-sided, of errors that go with their labels otherwise as much by chance.
        reason: In words.
    """

    class_index: int
    present: Tensor
    p_value: float
    reason: str


class Styles:
    """Remembers mean colours of probe images and of training samples, and searches them for styles.

    A style that goes with the class on nearly all images looks like the class itself: the few on
    which it does not are errors, as images with a wrong label would be. What tells them apart is
    other evidence. The mean of each channel over an image is cheap, and some of it is left when
    the direction that the predictions follow is taken out: if this rest, which speaks for the
    class on images that are right, speaks for their labels on the errors, too, the labels are
    right, and the style is a shortcut. Wrong labels would have it speak against them.

    Source: Huang and Belongie (2017), arXiv 1703.06868 (channel statistics as the style of an
    image); Mann and Whitney (1947), Annals of Mathematical Statistics 18:50-60 (rank test).
    Departure: read in the images themselves. On squares whose background goes with their class on
    98 % of 800 images, 17 of 20 errors side with their labels in the first convolution, 5 of 20 in
    the last stage (benchmarks/README.md): what the network does not use, it does not keep. Nothing
    is found where mean colours hold no other evidence.

    Args:
        ranks: The processes that train, each on samples of its own.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._probe = torch.empty(0, 0)
        self._seen: deque[tuple[Tensor, Tensor, Tensor]] = deque()
        self._number = 0  # of samples in it

    def noting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of the probe as they are, remembering mean colours on the way.

        Args:
            batches: `(images, labels)` pairs, the whole probe.

        Yields:
            The same batches.
        """
        found, start = [], 0
        for batch in batches:
            images, labels = checked_pair(batch, start)
            start += len(labels)
            found.append(mean_colours(images))
            yield batch
        known = [colours.cpu() for colours in found if colours is not None]
        alike = len(known) == len(found) and len({c.shape[1] for c in known}) == 1
        self._probe = torch.cat(known) if alike else torch.empty(0, 0)

    def see(self, colours: Tensor | None, predicted: Tensor | None, labels: Tensor | None) -> None:
        """Remember the samples of a training batch, if all is known of them.

        Args:
            colours: `(B, C)` mean colours.
            predicted: `(B,)` classes they are taken for.
            labels: `(B,)` their classes.
        """
        if colours is None or predicted is None or labels is None:
            return
        if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype not in WHOLE:
            return
        if not len(colours) == len(predicted) == len(labels):
            return
        self._seen.append((colours.clone(), predicted.clone(), labels.detach().clone()))
        self._number += len(labels)
        while self._number - len(self._seen[0][0]) >= REMEMBERED:
            self._number -= len(self._seen.popleft()[0])

    def found(self, reading: Reading) -> tuple[Style, ...]:
        """Return the styles that decide predictions against other evidence; then forget samples.

        Args:
            reading: Of the probe.

        Returns:
            Styles, the most certain first.
        """
        samples = [[t.cpu() for t in batch] for batch in self._seen]
        self._seen.clear()
        self._number = 0
        told = [batch for of_one in self._ranks.gathered(samples) for batch in of_one]
        if not self._probe.numel():
            return ()
        indices, labels = reading.indices.cpu(), reading.labels.cpu()
        probe = self._probe[indices].double()
        fitting = [t for t in told if t[0].shape[1] == probe.shape[1]]
        logits = reading.logits.cpu().double()
        colours = torch.cat([probe, *(c.double() for c, *_ in fitting)])
        predicted = torch.cat([logits.argmax(dim=1), *(p for _, p, _ in fitting)])
        classes = torch.cat([labels, *(y for *_, y in fitting)])
        known = (classes >= 0) & (classes < logits.shape[1])  # others are told to be ignored
        return _searched(colours[known], predicted[known], classes[known], logits)

    def state_dict(self) -> dict[str, Any]:
        """Return the samples since the last round; none where processes have samples of their own.

        Returns:
            Tensors.
        """
        seen = self._seen if self._ranks.size == 1 else ()
        return {"seen": [[t.cpu().clone() for t in batch] for batch in seen]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            saved: Result of `state_dict`.
        """
        self._seen = deque((c, p, y) for c, p, y in saved["seen"])
        self._number = sum(len(c) for c, *_ in self._seen)


def _searched(
    colours: Tensor, predicted: Tensor, classes: Tensor, logits: Tensor
) -> tuple[Style, ...]:
    """Return styles, given `(S, C)` images, of which the first N are those of the `(N, M)` logits.

    What a logit follows is estimated from the probe, within classes. Of two styles that part the
    images alike, or as opposites, the more certain one is kept.
    """
    size = len(logits)
    spread = _within(colours[:size], classes[:size])
    odds = torch.logit(logits.softmax(dim=1), eps=1e-12)
    follow = _within(odds, classes[:size])
    covariance = _ridged(spread.T @ spread / size)
    filters = torch.linalg.solve(covariance, spread.T @ follow / size)  # (C, M)
    scores = spread @ filters
    scale = (scores.square().sum(0) * follow.square().sum(0)).sqrt().clamp_min(1e-12)
    followed = ((scores * follow).sum(0) / scale).nan_to_num()
    found: list[Style] = []
    for k in (followed >= FOLLOWED).nonzero()[:, 0].tolist():
        style = _tested(colours, predicted, classes, size, filters[:, k], covariance, k)
        found += [] if style is None else [style]
    kept: list[Style] = []
    for style in sorted(found, key=lambda s: s.p_value):
        same = (float((style.present == other.present).double().mean()) for other in kept)
        if all(0.1 < share < 0.9 for share in same):
            kept.append(style)
    return tuple(kept)


def _tested(
    colours: Tensor,
    predicted: Tensor,
    classes: Tensor,
    size: int,
    direction: Tensor,
    covariance: Tensor,
    k: int,
) -> Style | None:
    """Return the style along a direction of colours if it decides class k, and wrongly."""
    score, taken, own = colours @ direction, predicted == k, classes == k
    if taken[:size].all() or not taken[:size].any():
        return None
    threshold = threshold_of(score[:size], taken[:size])
    side = score > threshold
    decided = balanced_accuracy(side[:size], taken[:size])
    if decided < DECIDED:
        return None
    signal = covariance @ direction
    rest = colours - score[:, None] * signal / (direction @ signal)
    right, misled = predicted == classes, (side != own) & (predicted != classes)
    groups = [rest[right & own], rest[right & ~own]]
    if min(map(len, groups)) <= colours.shape[1]:
        return None
    around = torch.cat([group - group.mean(dim=0) for group in groups])
    apart = groups[0].mean(dim=0) - groups[1].mean(dim=0)
    witness = rest @ torch.linalg.solve(_ridged(around.T @ around / len(around)), apart)
    for_k, against = witness[misled & own], witness[misled & ~own]
    if not len(for_k) or not len(against):
        return None
    test = scipy.stats.mannwhitneyu(for_k.numpy(), against.numpy(), alternative="greater")
    if not test.pvalue <= MOST_CHANCE:
        return None
    sided = float(test.statistic) / (len(for_k) * len(against))
    reason = (
        f"the mean colour of images decides whether they are taken for this class (balanced "
        f"accuracy {decided:.3f}), and in the rest of their colours {int(misled.sum())} probe and "
        f"training images that it misleads look like their own labels (AUC {sided:.2f}, p = "
        f"{test.pvalue:.1g}): the labels are right"
    )
    return Style(k, side[:size], float(test.pvalue), reason)


def _within(values: Tensor, classes: Tensor) -> Tensor:
    """Return values less the means of their classes."""
    known, at = classes.unique(return_inverse=True)
    sums = torch.zeros(len(known), values.shape[1], dtype=values.dtype).index_add_(0, at, values)
    centred: Tensor = values - (sums / at.bincount()[:, None])[at]
    return centred


def _ridged(covariance: Tensor) -> Tensor:
    """Return a covariance that can be inverted."""
    level = covariance.diagonal().mean().clamp_min(1e-12)
    ridge: Tensor = RIDGE * level * torch.eye(len(covariance), dtype=covariance.dtype)
    return covariance + ridge
