"""Stage 2, find: the terms of the decoding objective, one pure function each.

Nothing here knows about models, optimisers or where the activations come from.
"""

import math

import torch
from torch import Tensor

LN2 = math.log(2.0)


def sparsity(factors: Tensor) -> Tensor:
    """Return, per row, the entropy in bits of its membership shares.

    With `y = sigmoid(factor)` and `q = y / sum(y)` this is `-sum(q log2 q)`: 0 when a row belongs
    to one concept only, `log2 K` when it belongs to all of them alike.

    Source: arXiv 2509.23926, sparsity loss (inherited from UIBE, arXiv 2303.10523).

    Args:
        factors: `(P, K)` latent factors, unit-free.

    Returns:
        `(P,)` entropies in bits, between 0 and `log2 K`.
    """
    log_y = torch.nn.functional.logsigmoid(factors)
    log_q = log_y - torch.logsumexp(log_y, dim=1, keepdim=True)
    return -(log_q.exp() * log_q).sum(dim=1) / LN2


def max_activation(factors: Tensor) -> Tensor:
    """Return, per row, how far the memberships it mostly belongs to are from 1.

    `-sum(q log2 y)`, which equals `sparsity - log2(sum(y))`: it is 0 for a row with exactly one
    full membership and grows without bound for a row that belongs to nothing.

    Source: arXiv 2509.23926, maximum activation loss.

    Args:
        factors: `(P, K)` latent factors, unit-free.

    Returns:
        `(P,)` values in bits.
    """
    log_y = torch.nn.functional.logsigmoid(factors)
    q = torch.softmax(log_y, dim=1)
    return -(q * log_y).sum(dim=1) / LN2


def inactive(factors: Tensor, share: float, gamma: float = 1.1) -> Tensor:
    """Return how far concepts fall short of their least share of the rows.

    `mean_i relu(nu - mean_p(y^gamma)) / nu`: 0 when every concept holds at least the share `nu`.

    Source: arXiv 2509.23926, inactive classifier loss.

    Args:
        factors: `(P, K)` latent factors, unit-free.
        share: Least share of the rows that a concept should hold, in (0, 1].
        gamma: Exponent above 1 that makes one full membership count more than two halves.

    Returns:
        Scalar between 0 and 1.
    """
    held = torch.sigmoid(factors).pow(gamma).mean(dim=0)
    return torch.relu(share - held).mean() / share


def margin(filters: Tensor) -> Tensor:
    """Return the mean inverse margin, which is the mean length of the filters.

    Source: arXiv 2509.23926, maximum margin loss with `M = 1 / |w|` per concept.

    Args:
        filters: `(K, C)` decoding directions.

    Returns:
        Scalar, in units of factor per unit of activation.
    """
    lengths: Tensor = torch.linalg.vector_norm(filters, dim=1)
    return lengths.mean()


def confidence(logits: Tensor) -> Tensor:
    """Return the negative mean entropy in nats of the predicted class distributions.

    Minimising it makes a network undecided on the given samples. Applied to samples moved to
    where all detectors are undecided, this is the uncertainty region alignment loss.

    Source: arXiv 2509.23926, uncertainty region alignment, unconstrained form.

    Args:
        logits: `(B, M)` class logits.

    Returns:
        Scalar between `-ln M` and 0.
    """
    log_p = torch.log_softmax(logits, dim=1)
    return (log_p.exp() * log_p).sum(dim=1).mean()
