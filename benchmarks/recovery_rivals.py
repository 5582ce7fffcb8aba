"""The methods that the engine is compared with, each with one signature and its best foot forward.

All are given the true number of concepts and, where they have use for it, the true mean number of
concepts present per row; the score gives all of them the sign of the true concept they are matched
to, the better of two linear decoders and the best way to read presence. The engine gets none of
that beyond the number of concepts. Nothing here knows the truth of a world.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from recovery_autoencoder import top_k_autoencoder
from recovery_worlds import least_squares
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, FastICA, MiniBatchDictionaryLearning, sparse_encode
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from concept_guard import DirectionPairs

ICA_STEPS, NMF_STEPS, KMEANS_STEPS = 100, 200, 30
DICTIONARY_PENALTY, DICTIONARY_BATCH, DICTIONARY_WORK = 0.27, 128, 4_000_000
RIDGES = (1e-6, 1e-2)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a rival may know besides the rows.

    Attributes:
        active: Mean number of concepts present in a row.
        nonnegative: Whether no row has a negative entry.
        directions: Number of concepts and distractors together, where it is known.
    """

    active: float
    nonnegative: bool = False
    directions: int | None = None

    @property
    def top_k(self) -> int:
        """Return the number of codes to keep per row."""
        return max(1, round(self.active))


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found; n may be smaller than the number of concepts it was asked for.

    Attributes:
        encoders: `(n, C)` encoding directions, of any length.
        decoders: `(n, C)` decoding directions, of any length.
        codes: `(P, n)` how much of each is in each row; None for `rows x decoders`.
        smooth: `(n, C)` second decoders, where least squares was fitted with two ridges.
        biases: `(n,)` thresholds of `rows x decoders`, where the method has its own.
        signed: Whether the method claims to know which side is presence.
    """

    encoders: Tensor
    decoders: Tensor
    codes: Tensor | None = None
    smooth: Tensor | None = None
    biases: Tensor | None = None
    signed: bool = False

    @classmethod
    def of_pairs(cls, pairs: DirectionPairs) -> "Found":
        """Return what the engine found."""
        filters, signals = pairs.filters.double(), pairs.signals.double()
        return cls(signals, filters, biases=pairs.biases.double(), signed=True)

    @classmethod
    def of_codes(cls, rows: Tensor, encoders: Tensor, codes: Tensor) -> "Found":
        """Return a finding whose codes are nonlinear: its decoders are their least squares fit.

        Two fits, since either ridge is far better in some worlds: with little noise beside the
        concepts a small one follows the noise.
        """
        decoders, smooth = (least_squares(rows, codes, ridge) for ridge in RIDGES)
        return cls(encoders.double(), decoders, codes=codes, smooth=smooth)


Contrast = str | Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Rival = Callable[[Tensor, int, int, Facts], Found]


def fast_ica(rows: Tensor, concepts: int, seed: int, _: Facts) -> Found:
    """Run FastICA with as many components as concepts (at most C); at most 100 iterations."""
    return _ica(rows, min(concepts, rows.shape[1]), seed)


def fast_ica_skewed(rows: Tensor, concepts: int, seed: int, facts: Facts) -> Found:
    """Run FastICA with skewness as contrast on as many axes as there are directions.

    Far better here than its usual contrast, since presence is skewed; it is told how many
    distractors there are as well, and keeps the most skewed components. At most 100 iterations.
    Where symmetric distractors make this contrast fail, its usual one takes its place.
    """
    components = min(facts.directions or concepts, rows.shape[1])
    try:
        found = _ica(rows, components, seed, fun=_square)
    except ValueError:  # a component without skewness: the fixed point divides by nothing
        found = _ica(rows, components, seed)
    values = rows.double() @ found.decoders.T
    values -= values.mean(0)
    skew = (values**3).mean(0).abs() / values.square().mean(0).clamp_min(1e-30) ** 1.5
    keep = skew.nan_to_num().argsort(descending=True)[:concepts]
    return Found(found.encoders[keep], found.decoders[keep])


def _square(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the contrast `x^2` and the mean of its derivative."""
    return x**2, (2 * x).mean(axis=-1)


def _ica(rows: Tensor, components: int, seed: int, fun: Contrast = "logcosh") -> Found:
    """Whiten on the leading axes, in float64 and without axes of no variance, and unmix."""
    mean = rows.mean(0)
    centred = (rows - mean).double()
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    keep = (variance > 1e-10 * variance.max()).nonzero().flatten().flip(0)[:components]
    inward = axes[:, keep] / variance[keep].sqrt()
    outward = axes[:, keep] * variance[keep].sqrt()
    model = FastICA(whiten=False, fun=fun, max_iter=ICA_STEPS, tol=1e-3, random_state=seed)
    white = centred @ inward
    with warnings.catch_warnings(), np.errstate(over="ignore"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            model.fit(white.float().numpy())
        except ValueError:  # overflow, of which float64 is safe and takes twice the time
            model.fit(white.numpy())
    unmixing = torch.from_numpy(np.asarray(model.components_)).double().nan_to_num()
    return Found(unmixing @ outward.T, unmixing @ inward.T)


def nmf(rows: Tensor, concepts: int, seed: int, _: Facts) -> Found:
    """Run NMF on non-negative rows: coordinate descent from nndsvda, at most 200 iterations."""
    model = NMF(concepts, init="nndsvda", max_iter=NMF_STEPS, random_state=seed)
    if concepts > min(rows.shape):
        model.set_params(init="random")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        codes = torch.from_numpy(model.fit_transform(rows.numpy()))
    return Found.of_codes(rows, torch.from_numpy(model.components_), codes)


def pca(rows: Tensor, concepts: int, _: int, __: Facts) -> Found:
    """Return the leading axes of variance; exact."""
    centred = (rows - rows.mean(0)).double()
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors
    axes = axes.flip(1).T[:concepts].contiguous()
    return Found(axes, axes)


def k_means(rows: Tensor, concepts: int, seed: int, _: Facts) -> Found:
    """Run k-means from one k-means++ start, at most 30 iterations; codes are memberships."""
    model = KMeans(concepts, n_init=1, max_iter=KMEANS_STEPS, random_state=seed)
    nearest = torch.from_numpy(model.fit_predict(rows.numpy())).long()
    codes = torch.nn.functional.one_hot(nearest, concepts).float()
    return Found.of_codes(rows, torch.from_numpy(model.cluster_centers_) - rows.mean(0), codes)


def sparse_autoencoder(rows: Tensor, concepts: int, seed: int, facts: Facts) -> Found:
    """Train a top-k sparse autoencoder until it levels off; k is the true mean number present."""
    write, codes = top_k_autoencoder(rows, concepts, seed, facts.top_k)
    return Found.of_codes(rows, write, codes)


def dictionary(rows: Tensor, concepts: int, seed: int, facts: Facts) -> Found:
    """Learn a dictionary with non-negative codes on centred rows, in mini-batches of 128 rows.

    The penalty is .27 of the length that one of the concepts in a row has on average; chosen, as
    the batch and the sign of the codes, for the highest scores on seed 100. Sees each row three
    times, but at most 4,000,000 / K rows. Its codes on all rows are by orthogonal matching pursuit.
    """
    centred = rows - rows.mean(0)
    length = float(centred.square().sum(1).mean().sqrt()) / facts.top_k**0.5
    seen = min(3 * len(rows), max(DICTIONARY_BATCH, DICTIONARY_WORK // concepts))
    passes = max(1, seen // len(rows))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator)[: seen // passes]
    model = MiniBatchDictionaryLearning(
        concepts,
        alpha=DICTIONARY_PENALTY * length,
        max_iter=passes,
        batch_size=DICTIONARY_BATCH,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        positive_code=True,
        tol=0.0,
        max_no_improvement=None,
        random_state=seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no convergence within one row, dead atoms
        atoms = np.asarray(model.fit(centred[order].numpy()).components_)
        codes = sparse_encode(centred.numpy(), atoms, algorithm="omp", n_nonzero_coefs=facts.top_k)
    return Found.of_codes(rows, torch.from_numpy(atoms), torch.from_numpy(codes))


RIVALS: dict[str, Rival] = {
    "FastICA": fast_ica,
    "FastICA skewness": fast_ica_skewed,
    "PCA": pca,
    "k-means": k_means,
    "sparse autoencoder": sparse_autoencoder,
    "dictionary": dictionary,
}
NONNEGATIVE_RIVALS: dict[str, Rival] = {"NMF": nmf}
