"""Stage 3: where scores part images with something from images without.

Nothing here knows what the scores are of.
"""

from torch import Tensor


def threshold_of(scores: Tensor, carried: Tensor) -> float:
    """Return where scores part images with a concept from those without, at equal error rates.

    Args:
        scores: `(N,)` the higher, the likelier.
        carried: `(N,)` bool, as it is; both occur.

    Returns:
        Half way between two scores: the mean of the shares of both groups that are read rightly
        is largest there.
    """
    from sklearn.metrics import roc_curve  # takes half a second to import, and is rarely needed

    wrong, right, steps = roc_curve(carried.numpy(), scores.numpy(), drop_intermediate=False)
    best = int((right - wrong).argmax())
    return float(steps[best] + steps[min(best + 1, len(steps) - 1)]) / 2


def balanced_accuracy(read: Tensor, carried: Tensor) -> float:
    """Return the mean of the shares of both groups that are read rightly.

    Args:
        read: `(N,)` bool, as read.
        carried: `(N,)` bool, as it is; both occur.

    Returns:
        From 0 to 1.
    """
    return float((read[carried].double().mean() + (~read[~carried]).double().mean()) / 2)
