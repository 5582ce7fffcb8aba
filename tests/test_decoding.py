"""Stage 2: the reduced basis, orthonormal filters and threads that the search works with."""

import pytest
import torch
from planted import normal

from concept_guard.directions.decoding import Basis, orthonormal
from concept_guard.directions.threads import SMALL, few_threads


def test_the_reduced_basis_standardises_and_orders_its_axes(rng: torch.Generator) -> None:
    rows = normal(rng, 400, 7) @ normal(rng, 7, 7) * 2.0 ** torch.arange(-4, 3) + 3
    rows[:, 2] = 1.0
    basis = Basis.of(rows, rank=7)
    reduced = (rows - basis.mean) @ basis.inward.double()
    moments = reduced.T @ reduced / len(rows)
    assert moments.shape == (6, 6)  # the constant channel is left out
    torch.testing.assert_close(moments, moments.diagonal().diag(), rtol=0, atol=1e-4)
    assert (moments.diagonal().diff() <= 0).all()
    assert float(moments.trace()) == pytest.approx(6, rel=0.01)  # unit variance per live channel
    back = basis.mean + reduced @ basis.outward.double()
    live = torch.arange(7) != 2
    torch.testing.assert_close(back[:, live], rows[:, live], rtol=0, atol=1e-4)
    torch.testing.assert_close(Basis.of(rows, rank=2).inward, basis.inward[:, :2])


@pytest.mark.parametrize(("floor", "live"), [(0.09, 3), (0.11, 2)])
def test_channels_below_the_floor_are_dead(rng: torch.Generator, floor: float, live: int) -> None:
    rows = normal(rng, 4000, 3)
    rows = (rows - rows.mean(dim=0)) / rows.std(dim=0) * torch.tensor([5.0, 50.0, 20.0])
    basis = Basis.of(rows, rank=3, floor=floor)
    assert int((basis.inward.abs().sum(dim=1) > 0).sum()) == live


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
