"""Stage 2, find: from rows to direction pairs; candidates, choice, warm start.

Nothing here knows about models, rounds or flags.
"""

from collections.abc import Iterable
from dataclasses import replace

import scipy  # its parts are imported when they are first used
import torch
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.alignment import Head
from concept_guard.directions.amplitudes import by_amplitudes
from concept_guard.directions.basis import Basis
from concept_guard.directions.candidates import CHANCE, CLEAR, Candidates, chosen, polished
from concept_guard.directions.checks import faults
from concept_guard.directions.clarity import excess
from concept_guard.directions.components import begun, components, drawn
from concept_guard.directions.descent import descend_pairs
from concept_guard.directions.encoding import signal_vectors
from concept_guard.directions.pairs import DirectionPairs
from concept_guard.directions.reservoir import collected, sampled
from concept_guard.directions.splits import splits
from concept_guard.directions.threads import few_threads
from concept_guard.directions.widening import widened

AXES, ROWS_EACH = 64, 128  # axes of the basis at least; rows searched per further one
SEARCHED = 20_000  # rows that are searched; the moments and the signal vectors use all
DRAWN, DRAWN_EACH = 600, 4  # rows that are climbed from: at least, and per concept; see `init`
AFFORDED = 4_000_000  # rows times rows climbed from; of few rows more are climbed from
SPLIT = 300  # rows that splits begin at
NEAR = 0.9  # correlation of factors from which a split is the component that it lies near
PART = 0.45  # correlation of a mixture of four components with each of them is .5
FAR_CLEARER = 1.25  # mixtures of two components have up to 1.2 times their clarity
ROOM = 4  # coordinates per row of a group; a smaller group looks clear by chance
FULL = 4.0  # factor at the mean of the rows that carry a concept


def fit_pairs(
    rows: Tensor | Iterable[Tensor],
    *,
    concepts: int,
    head: Head | None = None,
    init: DirectionPairs | None = None,
    seed: int = 0,
    reservoir: int = 200_000,
) -> DirectionPairs:
    """Find direction pairs in unlabelled rows.

    Filters are directions in white coordinates: those along which rows are most skewed, those
    that show once these are explained (`components`), and those along which rows fall into two
    groups (`splits`). The K best different ones are kept, clear splits first; filters of bounded
    amplitude are then turned to where amplitudes are independent (`by_amplitudes`). Signal vectors
    and biases follow in closed form. There is no descent, so the result does not hang on a
    learning rate or on a number of epochs.

    The same rows and seed on the same device give the same bits. Work is done in float32, sums in
    float64, whatever autocast does outside. Directions without support (no more skewed than
    climbs in normal rows of the same shape, and no clearer split) are not returned; `notes` of
    the result says how many are missing and why. A `ValueError` names everything that is wrong
    with the arguments: rows that are no finite matrix with variation, a K or an `init` that does
    not suit them.

    The leading principal axes are searched: 2 K, at least 64, and one per 128 rows up to 20,000
    (156). What varies less than all of these is not found. More axes make what is found worse: of
    64 concepts among as many distractors in 512 channels 156 give encoders of .992, 312 of .937;
    of 32 concepts 64 axes, which the distractors fill, give .08 and 156 .993.

    Source: arXiv 2509.23926 for what a direction pair is and what is to be found.
    Departure: closed-form climbs in place of its descents (which `descend_pairs` has). On its
    toy, 10 seeds, all three concepts are found in every seed, IoU at least .961, RMSE of signal
    values at most .073, cosine of encoders at least .997 (published: .92-.96, .26).

    Args:
        rows: `(P, C)` activations, of any floating type; or batches of such rows, of which a
            uniform sample of `reservoir` rows is kept.
        concepts: Number of pairs to look for, K; at least 2, at most P.
        head: Maps `(B, C)` activations to `(B, M)` logits. With it the joint descent of
            `descend_pairs`, which aligns the pairs with where the head is undecided, follows. On
            the toy it takes the mean RMSE from .035 to .116 and 5 s more, so it is left out unless
            asked for.
        init: Earlier pairs of the same C. They are searched from, and a third as many rows;
            concepts that are found again stand first, in their order.
        seed: Chooses the rows that are climbed from and, of more than 20,000, those searched.
        reservoir: Rows kept of batches; the bound on memory. Unused for a tensor.

    Returns:
        At most K pairs, on the device of the rows; without `init` in order of evidence. Factors
        are about +4 at the mean of the rows that carry a concept, 8 less at that of the others.
    """
    if not isinstance(rows, Tensor):
        rows = collected(rows, reservoir, seed)
    rows = rows.detach()
    _check(rows, concepts, init)
    generator = torch.Generator().manual_seed(seed)
    work = len(rows) * min(rows.shape[1], AXES)
    with torch.no_grad(), few_threads(work), torch.autocast(rows.device.type, enabled=False):
        axes = max(AXES, 2 * concepts, min(len(rows), SEARCHED) // ROWS_EACH)
        basis = Basis.of(rows, rank=min(rows.shape[1], axes))
        some = sampled(rows, SEARCHED, generator)
        white = basis.white(some)
        known = white[:0] if init is None else _known(basis, init)
        found = by_amplitudes(white, _found(white, known, concepts, generator))
        if init is not None:
            found = found.select(_in_order_of(known, found.directions))
        further = widened(white, basis.others(some), found)
        filters = found.directions @ basis.inward.T + further @ basis.beyond.T
        pairs = _pairs(rows, basis.mean, found, filters, concepts)
    count = len(pairs.filters)
    if head is None or count < 2:
        return pairs
    aligned = descend_pairs(rows, concepts=count, head=head, seed=seed, start=pairs)
    return replace(aligned, notes=pairs.notes)


def _known(basis: Basis, init: DirectionPairs) -> Tensor:
    """Return `(n, R)` unit directions of earlier pairs in white coordinates."""
    directions = init.filters.to(basis.mean) @ basis.outward.T
    return normalize(directions[directions.norm(dim=1) > 0], dim=1)


def _found(white: Tensor, known: Tensor, concepts: int, generator: torch.Generator) -> Candidates:
    """Return the best different candidates: clear ones, components, less clear splits."""
    share = 3 if len(known) else 1
    wanted = max(DRAWN, DRAWN_EACH * concepts, AFFORDED // len(white)) // share
    of_rows = drawn(white, wanted, generator)
    skewed = components(white, concepts, torch.cat([known, of_rows]), generator)
    of_rows = begun(white, drawn(white, SPLIT // share, generator))
    groups = splits(white, torch.cat([known, of_rows]))
    lengths = white.square().sum(dim=1)
    pool = Candidates.of(white, skewed)
    pool += groups.select(_beside(pool, groups, lengths))
    clear = (pool.clarities(lengths) > CLEAR).nonzero().flatten()
    pool = pool.replaced(clear, polished(white, pool.select(clear)))
    worth = _worth(pool, len(skewed), concepts, lengths, white.shape[1])
    return pool.select(chosen(pool, worth, concepts))


def _worth(
    pool: Candidates, components: int, concepts: int, lengths: Tensor, coordinates: int
) -> Tensor:
    """Return the order of choice: what is clear, by clarity; components; other splits.

    Other splits are chosen only where components are too few, and none that is no clearer than
    chance, of few rows for the coordinates there are, or a mixture: with most rows of a clear
    candidate among its own.
    """
    clear = pool.clarities(lengths)
    rank = torch.arange(len(pool)).to(clear)
    is_component = rank < components
    first = clear > CLEAR
    gate = pool.present.to(clear)
    held = gate.T @ gate / gate.sum(dim=0).clamp_min(1)  # (i, j): share of the rows of j with i
    mixed = ((held > 0.5) & first).any(dim=1)
    usable = (clear > CHANCE) & (gate.sum(dim=0) >= coordinates / ROOM) & ~mixed
    worth = torch.where(usable & (components < concepts), clear, -torch.inf)
    worth = torch.where(is_component, 1e3 + components - rank, worth)
    return torch.where(first, 1e6 + clear, worth)


def _beside(skewed: Candidates, groups: Candidates, lengths: Tensor) -> Tensor:
    """Return positions of the splits that are no component, nor a mixture of some.

    A split that lies near a component is that one, whichever of its sides is called present; one
    that may be a mixture of components, or the absence of all of them, has to be far clearer.
    """
    if not len(skewed):
        return torch.arange(len(groups), device=lengths.device)
    alike = (groups.directions @ skewed.directions.T).abs()
    beaten = torch.where(alike > PART, skewed.clarities(lengths), 0.0).amax(dim=1)
    far_clearer = groups.clarities(lengths) > FAR_CLEARER * beaten
    return (far_clearer & ~(alike > NEAR).any(dim=1)).nonzero().flatten()


def _in_order_of(known: Tensor, directions: Tensor) -> Tensor:
    """Return positions: directions that match known ones in their order, then the others."""
    alike = directions @ known.T
    new, old = scipy.optimize.linear_sum_assignment(alike.cpu().numpy(), maximize=True)
    pairs = sorted((o, n) for n, o in zip(new, old, strict=True) if float(alike[n, o]) > NEAR)
    first = [n for _, n in pairs]
    rest = [n for n in range(len(directions)) if n not in first]
    return torch.tensor(first + rest, dtype=torch.long, device=directions.device)


def _pairs(
    rows: Tensor, mean: Tensor, found: Candidates, filters: Tensor, concepts: int
) -> DirectionPairs:
    """Return candidates as pairs of the activations, scaled, with biases and signal vectors."""
    on = found.present.sum(dim=0).clamp_min(1)
    height = excess(found.factors, found.present).sum(dim=0) / on
    scale = 2 * FULL / height.clamp_min(1e-6)
    filters = scale[:, None] * filters
    biases = scale * found.thresholds + filters @ mean
    missing = concepts - len(found)
    note = (
        f"{missing} of {concepts} concepts are missing: no further direction is more skewed than "
        f"climbs in normal rows are, or splits the rows more clearly than {CHANCE}"
    )
    signals = signal_vectors(rows, filters, biases)
    return DirectionPairs(filters, signals, biases, (note,) if missing else ())


def _check(rows: Tensor, concepts: int, init: DirectionPairs | None) -> None:
    """Refuse arguments that cannot be fitted.

    Raises:
        ValueError: Naming everything that is wrong with them.
    """
    if rows.ndim != 2 or not rows.shape[1] or not rows.is_floating_point():
        kind = f"{tuple(rows.shape)} {rows.dtype}"
        raise ValueError(f"rows: got {kind}, expected (P, C) floating activations")
    wrong = faults(rows, concepts)
    if init is not None and init.filters.shape[1] != rows.shape[1]:
        wrong.append(
            f"init: its filters have {init.filters.shape[1]} channels, expected {rows.shape[1]}; "
            "fit without init"
        )
    if wrong:
        raise ValueError("; ".join(wrong))
