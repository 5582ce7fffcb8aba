"""Stage 2, find: the terms of the published objective, one pure function each.

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


def self_weighted(values: Tensor, eta: float = 4.0) -> Tensor:
    """Return the mean of values weighted by their own power: a maximum that can be descended.

    `sum_k v_k^(eta + 1) / sum_k v_k^eta`, between the mean and the largest value; 0 when all are.

    Source: arXiv 2509.23926, eq. 4, self-weighted reduction.

    Args:
        values: `(n,)` numbers of at least 0.
        eta: 0 gives the mean; the larger, the closer to the maximum.

    Returns:
        Scalar in the units of the values.
    """
    largest = values.detach().max()
    unit = values / largest.clamp_min(torch.finfo(values.dtype).tiny)  # powers of it do not vanish
    weight = unit.pow(eta)
    return largest * (weight * unit).sum() / weight.sum().clamp_min(1.0)


def sparsity_bound(factors: Tensor, eta: float = 4.0) -> Tensor:
    """Return the sparsity term of the rows that share their membership most.

    Source: arXiv 2509.23926, sparsity bound loss: `self_weighted` of the rows' sparsity.

    Args:
        factors: `(P, K)` latent factors, unit-free.
        eta: See `self_weighted`.

    Returns:
        Scalar in bits, between 0 and `log2 K`.
    """
    return self_weighted(sparsity(factors).clamp_min(0.0), eta)


def excessive(factors: Tensor, ceiling: float, gamma: float = 1.1, eta: float = 4.0) -> Tensor:
    """Return how far concepts go beyond their largest share of the rows.

    `self_weighted` of `relu(mean_p(y^gamma) - rho) / (1 - rho)`: 0 when no concept holds more
    than the share `rho`.

    Source: arXiv 2509.23926, eq. 5, excessively active classifier loss.

    Args:
        factors: `(P, K)` latent factors, unit-free.
        ceiling: Largest share of the rows that a concept should hold, rho, in (0, 1).
        gamma: Exponent above 1 that makes one full membership count more than two halves.
        eta: See `self_weighted`.

    Returns:
        Scalar between 0 and 1.
    """
    held = torch.sigmoid(factors).pow(gamma).mean(dim=0)
    return self_weighted(torch.relu(held - ceiling) / (1.0 - ceiling), eta)


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


def cross_reading(filters: Tensor, signals: Tensor) -> Tensor:
    """Return how much filters read the signals of other concepts.

    The root of the mean, over all pairs of concepts, of the squared cosine between the filter of
    one and the signal vector of another; a concept's own pair counts as 0.

    Source: arXiv 2509.23926, eq. 6, filter-signal orthogonality (read as a root mean square).

    Args:
        filters: `(K, C)` decoding directions.
        signals: `(K, C)` encoding directions.

    Returns:
        Scalar between 0 and 1.
    """
    cosines = (
        torch.nn.functional.normalize(filters, dim=1)
        @ torch.nn.functional.normalize(signals, dim=1).mT
    )
    others = cosines - torch.diag(cosines.diagonal())
    tiny = torch.finfo(cosines.dtype).tiny  # the root of 0 has no slope
    return others.square().mean().clamp_min(tiny).sqrt()


def limited(violation: Tensor, multiplier: Tensor, penalty: float) -> Tensor:
    """Return what a limit adds to an objective, by the augmented Lagrangian.

    `(relu(mu + p g)^2 - mu^2) / (2 p)`: its slope in the violation `g` is `relu(mu + p g)`, which
    is what the multiplier `mu` moves towards. With `mu = 0`, nothing while the limit is kept.

    Source: Bertsekas 1982, Constrained optimization and Lagrange multiplier methods, chapter 3;
    arXiv 2509.23926 names the method without a formula.

    Args:
        violation: How far a term is beyond its limit; negative where it keeps it.
        multiplier: Present weight of the limit, mu, at least 0.
        penalty: Stiffness, p, above 0.

    Returns:
        Values of the shape of `violation`.
    """
    pushed = torch.relu(multiplier + penalty * violation)
    return (pushed.square() - multiplier.square()) / (2 * penalty)
