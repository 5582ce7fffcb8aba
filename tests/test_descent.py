"""Stage 2: the published descent finds planted concepts, and each of its options matters."""

from dataclasses import fields, replace

import pytest
import torch
from planted import ConceptWorld, concept_world, normal
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from concept_guard.directions.descent import Schedule, descend_pairs
from concept_guard.directions.detectors import orthonormal
from concept_guard.directions.pairs import DirectionPairs
from concept_guard.directions.threads import SMALL, few_threads

BRIEF = Schedule(updates=(12, 6, 12), refresh=5, batch=64)  # for what needs no convergence
SHORT = Schedule(updates=(150, 0, 250), batch=300)


def head(rows: Tensor) -> Tensor:
    return rows @ torch.linspace(-1, 1, 2 * rows.shape[-1]).sin().reshape(2, -1).mT


def brief(rows: Tensor, **options: object) -> DirectionPairs:
    return descend_pairs(rows, **{"concepts": 3, "schedule": BRIEF, "head": head, **options})


def same(a: DirectionPairs, b: DirectionPairs) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("filters", "signals", "biases"))


def recovered(world: ConceptWorld, pairs: DirectionPairs) -> tuple[float, float]:
    """Return the worst IoU of a detector and the worst cosine of a signal vector, matched."""
    alike = cosine_similarity(world.signals[:, None].float(), pairs.signals[None], dim=2)
    _, order = linear_sum_assignment(alike.numpy(), maximize=True)
    present = pairs.select(order.tolist()).present(world.rows)
    iou = (present & world.member).sum(dim=0) / (present | world.member).sum(dim=0)
    return float(iou.min()), float(alike[torch.arange(len(order)), order].min())


@pytest.fixture(scope="module")
def world() -> ConceptWorld:
    return concept_world(0)


@pytest.fixture
def images(rng: torch.Generator) -> Tensor:
    return (normal(rng, 100, 2, 6) @ normal(rng, 6, 6) + 2).float()


def test_planted_concepts_are_found(world: ConceptWorld) -> None:
    pairs = descend_pairs(world.rows, concepts=4, schedule=SHORT)
    iou, cosine = recovered(world, pairs)
    assert iou > 0.95
    assert cosine > 0.95
    own = (pairs.filters * pairs.signals).sum(dim=1)
    torch.testing.assert_close(own, torch.ones(4), rtol=0, atol=1e-4)


def test_rows_without_concepts_do_not_pass_for_found(world: ConceptWorld) -> None:
    untouched = replace(SHORT, updates=(0, 0, 0))
    assert recovered(world, descend_pairs(world.rows, concepts=4, schedule=untouched))[0] < 0.5


def test_the_first_step_ties_filters_margins_and_thresholds_of_standardised_rows(
    images: Tensor,
) -> None:
    rows = images.flatten(0, 1)
    tied = brief(images, schedule=replace(BRIEF, updates=(12, 0, 0)))
    standard = tied.filters * rows.std(dim=0)
    gram = standard @ standard.mT
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(3), rtol=0, atol=1e-4)
    thresholds = tied.biases - tied.filters @ rows.mean(dim=0)
    torch.testing.assert_close(thresholds, thresholds[:1].expand(3), rtol=0, atol=1e-4)
    freed = brief(images, schedule=replace(BRIEF, updates=(12, 6, 0)))
    standard = freed.filters * rows.std(dim=0)
    assert float((standard @ standard.mT - gram).abs().max()) > 1e-3  # control


def test_rates_fall_to_a_tenth_over_the_second_half(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.Adam.step

    def watched(self: torch.optim.Adam) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    brief(images, schedule=replace(BRIEF, updates=(100, 0, 0)))
    assert rates[:51] == pytest.approx([0.01] * 51)
    assert rates[75] == pytest.approx(0.01 * 0.55)
    assert rates[-1] == pytest.approx(0.01 * 0.118)


def test_a_scale_and_an_offset_of_the_rows_do_not_matter(images: Tensor) -> None:
    few = replace(BRIEF, updates=(4, 2, 4))  # rounding grows from update to update
    plain = brief(images, head=None, schedule=few)
    moved = brief(64 * images + 32, head=None, schedule=few)
    torch.testing.assert_close(moved.filters * 64, plain.filters, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved.signals / 64, plain.signals, rtol=1e-2, atol=1e-2)
    factors = moved.factors(64 * images + 32)
    torch.testing.assert_close(factors, plain.factors(images), rtol=1e-2, atol=1e-2)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_random_state(images: Tensor) -> None:
    state = torch.get_rng_state()
    first, second = brief(images, seed=3), brief(images.double(), seed=3)
    assert same(first, second)
    assert not same(first, brief(images, seed=4))
    assert torch.equal(state, torch.get_rng_state())


def test_the_same_bits_come_out_without_gradients_and_under_autocast(images: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = brief(images)
    assert same(inside, brief(images))
    assert not inside.filters.requires_grad


@pytest.mark.parametrize(
    "option",
    [
        {"aligned": False},
        {"free_signals": True},
        {"start": "random"},
        {"estimator": "joint"},
        {"pooled": False, "head": lambda rows: head(rows.tanh()).mean(dim=1)},
        {"concepts": 4},
    ],
    ids=lambda option: next(iter(option)),
)
def test_every_option_changes_the_result(images: Tensor, option: dict[str, object]) -> None:
    plain, other = brief(images), brief(images, **option)
    assert not same(plain, other)
    for values in (other.filters, other.signals, other.biases):
        assert bool(values.isfinite().all())


OTHER = Schedule(
    sparsity=0.5,
    bound=0.5,
    alignment=0.5,
    max_activation=0.1,
    margin=0.5,
    inactive=0.005,
    excessive=0.01,
    cross_reading=0.02,
    tau=(0.8, 0.8, 0.8),
    crowd=0.1,
    updates=(12, 7, 12),
    rates=(0.02, 0.01, 0.01),
    penalty=0.6,
    patience=5,
    refresh=3,
    batch=48,
)


@pytest.mark.parametrize("name", [field.name for field in fields(Schedule)])
def test_every_number_of_the_schedule_changes_the_result(images: Tensor, name: str) -> None:
    crowded = replace(BRIEF, crowd=0.5, tau=(2.0,) * 3)  # no support suits floor and ceiling
    other = replace(crowded, **{name: getattr(OTHER, name)})
    assert not same(brief(images, schedule=crowded), brief(images, schedule=other))


def test_signals_are_estimates_unless_they_are_trained(images: Tensor) -> None:
    own = {
        free: (pairs.filters * pairs.signals).sum(dim=1)
        for free in (False, True)
        for pairs in [brief(images, free_signals=free)]
    }
    torch.testing.assert_close(own[False], torch.ones(3), rtol=0, atol=1e-4)
    assert float((own[True] - 1).abs().max()) > 1e-3  # nothing holds a trained one to its filter


def test_without_alignment_the_head_is_not_asked(images: Tensor) -> None:
    asked = []

    def counted(rows: Tensor) -> Tensor:
        asked.append(rows.shape)
        return head(rows)

    assert same(brief(images, head=counted, aligned=False), brief(images, head=None))
    assert not asked
    brief(images, head=counted)
    assert asked == [(64, 6)] * sum(BRIEF.updates)  # one mean row per image


def test_rows_are_images_of_one_row(images: Tensor) -> None:
    rows = images.flatten(0, 1)
    assert same(brief(rows), brief(rows[:, None]))
    assert same(brief(rows, pooled=False), brief(rows))


def test_the_head_is_asked_about_activations_not_about_scaled_ones(images: Tensor) -> None:
    seen: list[Tensor] = []

    def watched(rows: Tensor) -> Tensor:
        seen.append(rows.detach())
        return head(rows)

    far = images + 100
    brief(far, head=watched)
    assert all(bool((rows > 0).all()) for rows in seen)


def test_a_module_as_head_keeps_its_weights_and_gets_no_gradient(images: Tensor) -> None:
    module = nn.Linear(6, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    brief(images, head=module)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_dead_channels_and_more_concepts_than_channels_give_finite_pairs(images: Tensor) -> None:
    images[..., 2] = 5.0
    for concepts in (3, 9):
        pairs = brief(images, concepts=concepts)
        assert pairs.filters.shape == (concepts, 6)
        for values in (pairs.filters, pairs.signals, pairs.biases):
            assert bool(values.isfinite().all())


@pytest.mark.parametrize(
    ("rows", "concepts", "complaint"),
    [
        (torch.zeros(4), 2, r"rows: got \(4,\) torch.float32, expected floating \(P, C\)"),
        (torch.zeros(4, 2, dtype=torch.int64), 2, "rows: got .* torch.int64"),
        (torch.zeros(4, 2), 2, "rows: 4 rows without any variation"),
        (torch.rand(1, 2), 2, "rows: 1 rows without any variation"),
        (torch.tensor([[1.0, torch.nan], [0, 1]]), 2, "rows: 1 of 2 hold NaN"),
        (torch.eye(4), 1, "concepts: got 1, expected 2 to 4, the number of rows"),
        (torch.ones(2, 2), 3, "rows: 2 rows without any.*; concepts: got 3, expected 2 to 2"),
    ],
)
def test_bad_arguments_are_named(rows: Tensor, concepts: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        descend_pairs(rows, concepts=concepts)


def test_orthonormal_rows_are_the_nearest_ones(rng: torch.Generator) -> None:
    wide = normal(rng, 3, 8)
    left, _, right = torch.linalg.svd(wide, full_matrices=False)
    torch.testing.assert_close(orthonormal(wide), left @ right, rtol=0, atol=1e-12)
    tall = normal(rng, 5, 2)
    unit = tall / tall.norm(dim=1, keepdim=True)
    torch.testing.assert_close(orthonormal(tall), unit)


def test_small_work_runs_on_one_thread_and_gives_the_others_back_also_after_an_error() -> None:
    def fail(work: int) -> None:
        with few_threads(work):
            assert torch.get_num_threads() == 1
            raise RuntimeError("inside")

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with few_threads(SMALL):
            assert torch.get_num_threads() == 3
            torch.set_num_threads(6)
            with few_threads(SMALL):
                assert torch.get_num_threads() == 4
            assert torch.get_num_threads() == 6
        with pytest.raises(RuntimeError, match="inside"):
            fail(SMALL - 1)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
