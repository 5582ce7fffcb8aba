"""Stage 2: a mark that splits rows is the clearest split, and no mark gives no clear split."""

import pytest
import torch
from planted import normal, whitened
from torch import Tensor
from torch.nn.functional import normalize

from concept_guard.directions.candidates import CHANCE, CLEAR
from concept_guard.directions.clarity import clarity
from concept_guard.directions.components import begun, drawn
from concept_guard.directions.splits import SCHEDULE, splits

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.seeds) for seed in range(1, 8))]


def marked(seed: int, size: float, count: int = 3000) -> tuple[Tensor, Tensor]:
    """Return white rows of 64 normal coordinates, and the 3 % that carry a mark of this size."""
    rng = torch.Generator().manual_seed(seed)
    mark = torch.rand(count, generator=rng) < 0.03
    along = normalize(normal(rng, 64), dim=0)
    return whitened(normal(rng, count, 64) + size * mark[:, None] * along).float(), mark


def starts(white: Tensor, seed: int = 0) -> Tensor:
    return begun(white, drawn(white, 300, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mark_in_noise_is_the_clearest_split_and_its_rows_are_found(seed: int) -> None:
    # Groups 8 deviations apart overlap at the half-way threshold in 6e-5 of the rows.
    white, mark = marked(seed, 8.0)
    found = splits(white, starts(white))
    lengths = white.square().sum(dim=1)
    clear = found.clarities(lengths)
    wrong = int((found.present[:, 0] != mark).sum())
    assert wrong <= 2
    # (m1 - m0) / (s1 + s0) is 8 / 2; the correction and 90 rows leave a tenth of that open.
    assert float(clear[0]) == pytest.approx(4.0, abs=0.5)
    assert float(clear[1]) < CHANCE
    assert bool((clear.diff() <= 0).all())
    # Control: the start that lies nearest does not find these rows before it climbs.
    factors = white @ normalize(white[mark][:1], dim=1).T
    assert int(((factors[:, 0] > 4) != mark).sum()) > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_rows_have_no_split_beyond_chance(seed: int) -> None:
    white, _ = marked(seed, 0.0)
    found = splits(white, starts(white))
    assert float(found.clarities(white.square().sum(dim=1)).max()) < CHANCE


def test_few_normal_rows_are_no_clear_cut_once_their_pull_is_taken_off() -> None:
    corrected, plain = [], []
    for seed in range(4):
        white, _ = marked(seed, 0.0, count=500)
        found = splits(white, starts(white))
        corrected.append(float(found.clarities(white.square().sum(dim=1)).max()))
        plain.append(float(found.clarities().max()))
    assert max(corrected) < CLEAR
    assert sorted(plain)[1] > CLEAR  # control: uncorrected, five of 500 rows look like a mark


def test_every_split_is_its_own_discriminant() -> None:
    white, _ = marked(0, 8.0)
    found = splits(white, starts(white))
    torch.testing.assert_close(found.factors, white @ found.directions.T, rtol=0, atol=1e-4)
    on = found.present[:, 0]
    discriminant = normalize(white[on].mean(dim=0) - white[~on].mean(dim=0), dim=0)
    # Unit vectors of 64 float32 coordinates, from sums over 3,000 rows.
    torch.testing.assert_close(found.directions[0], discriminant, rtol=0, atol=1e-4)
    middle = 0.5 * (found.factors[on, 0].mean() + found.factors[~on, 0].mean())
    assert float(found.thresholds[0]) == pytest.approx(float(middle), abs=1e-3)
    alike = (found.directions @ found.directions.T).fill_diagonal_(0)
    assert float(alike.max()) <= SCHEDULE[-1][1]


def test_splits_are_ordered_by_the_corrected_clarity() -> None:
    white, _ = marked(0, 0.0, count=500)
    found = splits(white, starts(white))
    lengths = white.square().sum(dim=1)
    corrected = clarity(found.factors, found.present, lengths)
    assert bool((corrected.diff() <= 0).all())
    assert not bool((found.clarities().diff() <= 0).all())


def test_two_marks_of_different_size_come_in_order(rng: torch.Generator) -> None:
    part = torch.rand(4000, generator=rng)
    marks = torch.stack([part < 0.05, part > 0.9], dim=1)
    sizes = torch.tensor([[7.0], [12.0]]).double() * torch.linalg.qr(normal(rng, 32, 2))[0].T
    white = whitened(normal(rng, 4000, 32) + marks.double() @ sizes).float()
    found = splits(white, starts(white))
    assert int((found.present[:, 0] != marks[:, 1]).sum()) <= 2
    assert int((found.present[:, 1] != marks[:, 0]).sum()) <= 8  # 7 / 2 deviations: 2e-4 of 4,000
