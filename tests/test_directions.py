"""Stage 2: pairs are found in rows without labels, the same for a seed, and bad rows are named."""

from collections.abc import Iterator

import pytest
import torch
from planted import MixtureWorld, auc, matched, normal, sparse_world, toy_world
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions import DirectionPairs, fit, fit_pairs

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 10))]
MIXTURES = [
    0,
    6,
    *(pytest.param(seed, marks=pytest.mark.seeds) for seed in (1, 2, 3, 4, 5, 7)),
]
EPS32 = torch.finfo(torch.float32).eps


def small_rows(rng: torch.Generator, count: int = 900, channels: int = 8) -> Tensor:
    """Return rows of four sparse concepts among normal ones, at no one's mean."""
    amounts = (torch.rand(count, 4, generator=rng) < 0.1) * (
        3 + torch.rand(count, 4, generator=rng)
    )
    axes = torch.linalg.qr(normal(rng, channels, channels))[0].float()
    rows = torch.cat([amounts, normal(rng, count, channels - 4).float()], dim=1) @ axes
    return rows + 0.05 * normal(rng, count, channels).float() + 2


def same(a: DirectionPairs, b: DirectionPairs) -> bool:
    tensors = ("filters", "signals", "biases")
    return a.notes == b.notes and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)


def finite(pairs: DirectionPairs) -> bool:
    tensors = (pairs.filters, pairs.signals, pairs.biases)
    return all(bool(t.isfinite().all()) for t in tensors)


def overlap(present: Tensor, truth: Tensor) -> Tensor:
    """Return the intersection over union of each column."""
    return (present & truth).sum(dim=0) / (present | truth).sum(dim=0)


def judged(world: MixtureWorld, pairs: DirectionPairs) -> tuple[Tensor, Tensor, Tensor]:
    """Return overlap of presence, RMSE of mean-removed signal values, cosine of encoders."""
    cosines, at = matched(world.signals, pairs.signals)
    pairs = pairs.select(at.tolist())
    values = pairs.factors(world.rows.float()).double() * pairs.signals.double().norm(dim=1)
    error = (values - values.mean(dim=0)) - (world.amounts - world.amounts.mean(dim=0))
    present = pairs.present(world.rows.float())
    return overlap(present, world.present), error.square().mean(dim=0).sqrt(), cosines


@pytest.mark.parametrize("seed", SEEDS)
def test_the_toy_of_the_source_is_solved(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world = toy_world(seed)
    pairs = fit_pairs(world.rows.float(), concepts=3, seed=seed)
    assert pairs.notes == ()
    overlaps, errors, cosines = judged(world, pairs)
    # Published: .92 to .96, .26.
    assert float(overlaps.min()) >= 0.94
    assert float(errors.max()) <= 0.15
    assert float(cosines.min()) >= 0.98
    # Control: filters that only tell presence apart, and the centres of k-means.
    monkeypatch.setattr(fit, "by_amplitudes", lambda _, candidates: candidates)
    _, errors, cosines = judged(world, fit_pairs(world.rows.float(), concepts=3, seed=seed))
    assert float(errors.min()) > 0.3
    assert float(cosines.max()) < 0.95
    means = KMeans(3, n_init=3, random_state=0).fit(world.rows.numpy()).cluster_centers_
    centres = torch.as_tensor(means) - world.rows.mean(dim=0)
    assert float(matched(world.signals, centres)[0].min()) < 0.95


@pytest.mark.parametrize("seed", MIXTURES)
def test_a_sparse_mixture_is_taken_apart(seed: int) -> None:
    world = sparse_world(seed, concepts=24, channels=24)
    pairs = fit_pairs(world.rows.float(), concepts=24)
    overlaps, _, cosines = judged(world, pairs)
    assert float(cosines.min()) > 0.99
    assert float(overlaps.min()) > 0.9
    # The filter of one of many concepts is not its signal (control), though w.s = 1.
    assert float(matched(world.signals, pairs.filters)[0].mean()) < 0.6
    product = (pairs.filters * pairs.signals).sum(dim=1)
    lengths = pairs.filters.norm(dim=1) * pairs.signals.norm(dim=1)
    assert bool(((product - 1).abs() <= 8 * EPS32 * lengths).all())


def like_real(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rectified rows of ten classes and dense variation, where a mark is, and its signal."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (4000,), generator=rng)
    mark = torch.rand(4000, generator=rng) < 0.04
    signal = 4.5 * normalize(normal(rng, 48).abs(), dim=0)
    rows = normal(rng, 10, 48)[labels] + normal(rng, 4000, 12) @ normal(rng, 12, 48) / 4
    rows = (rows + 0.3 * normal(rng, 4000, 48)).relu() + mark[:, None] * signal
    return rows.float(), mark, signal


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mark_among_classes_is_one_of_the_concepts(seed: int) -> None:
    rows, mark, signal = like_real(seed)
    pairs = fit_pairs(rows, concepts=16)
    cosine, at = matched(signal[None], pairs.signals)
    factor = pairs.factors(rows)[:, at[0]]
    assert auc(factor, mark) > 0.98
    present = factor > 0
    assert float((present & mark).sum() / present.sum()) >= 0.95
    assert float((present & mark).sum() / mark.sum()) >= 0.90
    assert float(cosine) > 0.95
    centred = rows.double() - rows.double().mean(dim=0)
    axes = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -16:].T  # control
    assert float((axes @ normalize(signal, dim=0)).abs().max()) < 0.8


def test_factors_are_four_where_a_concept_is_and_eight_less_elsewhere() -> None:
    world = sparse_world(0, concepts=12, channels=24, active=2)
    pairs = fit_pairs(world.rows.float(), concepts=12)
    factors, present = pairs.factors(world.rows.float()), pairs.present(world.rows.float())
    for k in range(12):
        on, off = factors[present[:, k], k].mean(), factors[~present[:, k], k].mean()
        assert float(on - off) == pytest.approx(8, abs=0.01)
        assert float(on) == pytest.approx(4, abs=0.1)  # the threshold is half-way


def test_structureless_rows_have_fewer_pairs_and_a_note_says_so(rng: torch.Generator) -> None:
    pairs = fit_pairs(normal(rng, 2000, 16).float(), concepts=6)
    assert pairs.filters.shape == pairs.signals.shape == (0, 16)
    assert pairs.biases.shape == (0,)
    assert pairs.notes[0].startswith("6 of 6 concepts are missing: no further direction is more")
    assert pairs.factors(torch.zeros(3, 16)).shape == (3, 0)


@pytest.mark.parametrize("seed", range(4))
def test_no_more_pairs_are_returned_than_there_are_concepts(seed: int) -> None:
    some = small_rows(torch.Generator().manual_seed(seed), 3000, 16)
    few = fit_pairs(some, concepts=8, seed=seed)
    assert len(few.filters) == 4
    assert few.notes[0].startswith("4 of 8 concepts are missing")
    assert fit_pairs(some, concepts=4).notes == ()


@pytest.mark.thorough
def test_a_seed_repeats_bit_for_bit(rng: torch.Generator) -> None:
    rows = small_rows(rng, 12_000)  # of few rows all are climbed from, whatever the seed
    one = fit_pairs(rows, concepts=6, seed=1)
    before = torch.get_rng_state()
    assert same(one, fit_pairs(rows, concepts=6, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert same(one, fit_pairs(rows, concepts=6, seed=1))
    assert not same(one, fit_pairs(rows, concepts=6, seed=2))


def test_more_rows_than_are_searched_are_sampled_and_all_are_used(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = small_rows(rng, 2000)
    whole = fit_pairs(rows, concepts=4)
    monkeypatch.setattr(fit, "SEARCHED", 1000)
    some = fit_pairs(rows, concepts=4)
    assert not same(whole, some)
    assert same(some, fit_pairs(rows, concepts=4))
    cosines, _ = matched(whole.signals, some.signals)
    assert float(cosines.min()) > 0.98
    first = fit_pairs(rows[:1000], concepts=4)  # control: signals of fewer rows
    assert not torch.allclose(first.signals.sort().values, some.signals.sort().values, atol=1e-4)


def test_batches_give_the_pairs_of_all_rows_at_once(rng: torch.Generator) -> None:
    rows = small_rows(rng)

    def stream() -> Iterator[Tensor]:
        yield from rows.split([100, 1, 0, 799])

    assert same(fit_pairs(stream(), concepts=4), fit_pairs(rows, concepts=4))
    assert same(fit_pairs(list(rows.split(90)), concepts=4), fit_pairs(rows, concepts=4))
    few = fit_pairs(stream(), concepts=4, reservoir=400)
    assert same(few, fit_pairs(stream(), concepts=4, reservoir=400))
    assert not same(few, fit_pairs(rows, concepts=4))
    assert same(fit_pairs(rows, concepts=4, reservoir=400), fit_pairs(rows, concepts=4))


def test_a_warm_start_keeps_names_drops_what_is_gone_and_appends_what_is_new() -> None:
    # Signals are orthonormal and noise is the same everywhere: the filter of a concept that is
    # gone reads nothing of one that is new.
    world = sparse_world(0, concepts=10, channels=24, active=2)
    signals = torch.linalg.qr(world.signals.T)[0].T
    noise = 0.1 * normal(torch.Generator().manual_seed(1), 8000, 24)
    old, new = list(range(8)), [*range(2, 8), 8, 9]

    def rows_of(some: list[int]) -> Tensor:
        return (world.amounts[:, some] @ signals[some] + noise).float()

    last = fit_pairs(rows_of(old), concepts=8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3)).tolist()
    last = last.select(order)
    names = matched(signals[old], last.signals)[1].argsort().tolist()  # concept at each place
    warm = fit_pairs(rows_of(new), concepts=8, init=last, seed=9)
    assert len(warm.filters) == 8
    cosines, at = matched(signals[new], warm.signals)
    assert float(cosines.min()) > 0.99
    found = [new[i] for i in at.argsort().tolist()]
    assert found[:6] == [name for name in names if name >= 2]
    assert set(found[6:]) == {8, 9}
    cold = fit_pairs(rows_of(new), concepts=8, seed=9)  # control
    places = matched(signals[new], cold.signals)[1].argsort().tolist()
    assert [new[i] for i in places] != found


def test_a_warm_start_on_the_same_rows_changes_nothing_much(rng: torch.Generator) -> None:
    rows = small_rows(rng, 2000)
    last = fit_pairs(rows, concepts=4)
    warm = fit_pairs(rows, concepts=4, init=last, seed=5)
    assert float((normalize(warm.filters) * normalize(last.filters)).sum(dim=1).min()) > 0.99
    torch.testing.assert_close(warm.biases, last.biases, rtol=0.05, atol=0.05)


def test_earlier_pairs_of_zeros_or_none_are_no_hindrance(rng: torch.Generator) -> None:
    rows = small_rows(rng)
    nothing = DirectionPairs(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3))
    for init in (nothing, nothing.select([])):
        pairs = fit_pairs(rows, concepts=4, init=init)
        assert len(pairs.filters) == 4
        assert finite(pairs)


def test_surroundings_change_nothing_and_are_left_as_they_were(rng: torch.Generator) -> None:
    rows = small_rows(rng)
    plain = fit_pairs(rows, concepts=4)
    threads, copy = torch.get_num_threads(), rows.clone()
    with torch.autocast("cpu", torch.bfloat16):
        inside = fit_pairs(rows, concepts=4)
        assert torch.is_autocast_enabled("cpu")
    assert same(plain, inside)
    assert same(plain, fit_pairs(rows.clone().requires_grad_(), concepts=4))
    with torch.no_grad():
        assert same(plain, fit_pairs(rows, concepts=4))
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not any(t.requires_grad for t in (plain.filters, plain.signals, plain.biases))
    assert torch.get_num_threads() == threads
    assert torch.equal(rows, copy)


def test_the_number_of_threads_is_restored_after_an_error(rng: torch.Generator) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        fit_pairs(small_rows(rng), concepts=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_default_type_changes_nothing_essential(rng: torch.Generator) -> None:
    rows = small_rows(rng)
    plain = fit_pairs(rows, concepts=4)
    torch.set_default_dtype(torch.float64)
    try:
        other = fit_pairs(rows, concepts=4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in (other.filters, other.signals, other.biases)} == {torch.float32}
    cosines, _ = matched(plain.signals, other.signals)
    assert float(cosines.min()) > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_precision_are_worked_on_in_float32(
    rng: torch.Generator, dtype: torch.dtype
) -> None:
    rows = small_rows(rng).to(dtype)
    pairs = fit_pairs(rows, concepts=4)
    assert {t.dtype for t in (pairs.filters, pairs.signals, pairs.biases)} == {torch.float32}
    assert same(pairs, fit_pairs(rows.float(), concepts=4))


def test_channels_may_be_shifted_and_scaled(rng: torch.Generator) -> None:
    rows = small_rows(rng)
    scale, shift = 2.0 ** torch.arange(-4, 4), 8.0 * torch.arange(8)
    plain, moved = fit_pairs(rows, concepts=4), fit_pairs(rows * scale + shift, concepts=4)
    cosines, at = matched(plain.signals * scale, moved.signals)
    assert float(cosines.min()) > 0.9999
    read = moved.select(at.tolist()).present(rows * scale + shift)
    assert float((read != plain.present(rows)).float().mean()) < 0.005


def test_constant_channels_are_neither_read_nor_written(rng: torch.Generator) -> None:
    rows = torch.cat([small_rows(rng), torch.tensor([5.0, 0.0]).expand(900, 2)], dim=1)
    pairs = fit_pairs(rows, concepts=4)
    assert len(pairs.filters) == 4
    assert float(pairs.filters[:, 8:].abs().max()) < 1e-12  # rounding in float64
    assert float(pairs.signals[:, 8:].abs().max()) < 1e-6  # the mean of a constant, rounded
    assert finite(pairs)


def degenerate(kind: str, rng: torch.Generator) -> Tensor:
    rows = small_rows(rng)
    return {
        "duplicates": rows[:5].repeat(60, 1),
        "two different rows": rows[:2].repeat(50, 1),
        "one outlier": torch.cat([torch.ones(99, 8), 2 * torch.ones(1, 8)]),
        "collinear": rows[:, :3] @ normal(rng, 3, 20).float(),
        "fewer rows than channels": normal(rng, 30, 200).float(),
        "two rows": rows[:2],
        "one channel": rows[:, :1],
        "large": 1e15 * rows,
        "small": 1e-15 * rows,
        "binary": (rows > 2.5).float(),
        "a channel of subnormal numbers": torch.cat([rows, rows[:, :1] * 1e-40], dim=1),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "duplicates",
        "two different rows",
        "one outlier",
        "collinear",
        "fewer rows than channels",
        "two rows",
        "one channel",
        "large",
        "small",
        "binary",
        "a channel of subnormal numbers",
    ],
)
def test_degenerate_rows_give_finite_pairs(rng: torch.Generator, kind: str) -> None:
    rows = degenerate(kind, rng)
    pairs = fit_pairs(rows, concepts=2)
    assert finite(pairs)
    assert len(pairs.filters) + len(pairs.notes) >= 1
    assert len(pairs.filters) == 2 or pairs.notes[0].startswith(f"{2 - len(pairs.filters)} of 2")


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (torch.zeros(4, 2, 2), {}, r"rows: got \(4, 2, 2\) torch.float32, expected \(P, C\) float"),
        (torch.zeros(4), {}, r"rows: got \(4,\) torch.float32, expected \(P, C\) float"),
        (torch.zeros(4, 2).long(), {}, r"rows: got \(4, 2\) torch.int64, expected \(P, C\)"),
        (torch.tensor([[1.0, 2], [torch.nan, torch.inf]]), {}, "rows: 1 of 2 hold NaN or infinite"),
        (torch.tensor([[1.0], [torch.inf], [-torch.inf]]), {}, "rows: 2 of 3 hold NaN or infinite"),
        (torch.ones(1, 3), {}, "rows: 1 rows without any variation; collect more"),
        (torch.ones(5, 3), {}, "rows: 5 rows without any variation; collect more"),
        (torch.zeros(0, 3), {}, "rows: 0 rows without any variation; collect more"),
        (torch.zeros(5, 0), {}, r"rows: got \(5, 0\) torch.float32, expected \(P, C\) floating"),
        (torch.eye(5), {"concepts": 1}, "concepts: got 1, expected 2 to 5, the number of rows"),
        (torch.eye(5), {"concepts": 6}, "concepts: got 6, expected 2 to 5, the number of rows"),
        (
            torch.eye(5),
            {"init": DirectionPairs(torch.ones(3, 4), torch.ones(3, 4), torch.ones(3))},
            "init: its filters have 4 channels, expected 5; fit without init",
        ),
        (torch.ones(5, 3), {"concepts": 9}, "rows: 5 rows without(.*); concepts: got 9"),
        ([], {}, r"rows: got no batch, expected at least one \(B, C\) tensor"),
        ([torch.ones(3, 2), torch.ones(3, 3)], {}, r"batch 1 is \(3, 3\), expected \(B, 2\)"),
    ],
)
def test_what_cannot_be_fitted_is_named(
    rows: Tensor, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fit_pairs(rows, **{"concepts": 3, **settings})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_finds_what_the_cpu_finds() -> None:
    world = sparse_world(0, concepts=24, channels=24)
    rows = world.rows.float()
    plain, moved = fit_pairs(rows, concepts=24), fit_pairs(rows.cuda(), concepts=24)
    assert moved.filters.is_cuda
    assert moved.signals.is_cuda
    assert moved.biases.is_cuda
    # Sums in another order turn climbs a little; all of them end at the same 24 directions.
    cosines, at = matched(plain.signals, moved.signals.cpu())
    assert float(cosines.min()) > 0.9999
    read = moved.present(rows.cuda()).cpu()[:, at]
    assert float((read != plain.present(rows)).float().mean()) < 1e-3
    again = fit_pairs(rows.cuda(), concepts=24)
    assert torch.equal(again.filters, moved.filters)
    warm = fit_pairs(rows.cuda(), concepts=24, init=plain.select(list(range(24))))
    assert float(matched(plain.signals, warm.signals.cpu())[0].min()) > 0.999
