"""Stage 2: a sample of rows is uniform, ordered, repeatable and bounded."""

import math
from collections.abc import Iterator

import pytest
import torch
from planted import normal
from torch import Tensor

from concept_guard.directions import reservoir
from concept_guard.directions.reservoir import collected, sampled


def numbered(count: int, *lengths: int) -> list[Tensor]:
    """Return rows 0, 1, 2, ... in batches of these lengths, the last one of what is left."""
    rows = torch.arange(count, dtype=torch.float64)[:, None].expand(-1, 2)
    return list(rows.split([*lengths, count - sum(lengths)]))


def test_few_rows_are_all_kept_in_order(rng: torch.Generator) -> None:
    rows = normal(rng, 20, 3)
    for lengths in ((20,), (1, 19), (7, 0, 13), (5, 5, 5, 5)):
        assert torch.equal(collected(rows.split(lengths), 20, seed=3), rows)
    assert torch.equal(sampled(rows, 20, rng), rows)
    assert torch.equal(sampled(rows, 99, rng), rows)


@pytest.mark.parametrize("size", [1, 5, 19])
def test_many_rows_leave_as_many_as_asked_in_order(size: int) -> None:
    for lengths in ((), (3, 3), (1, 16)):
        kept = collected(iter(numbered(20, *lengths)), size, seed=1)[:, 0]
        assert len(kept) == size
        assert bool((kept.diff() > 0).all())
    drawn = sampled(numbered(20)[0], size, torch.Generator().manual_seed(1))[:, 0]
    assert len(drawn) == size
    assert bool((drawn.diff() > 0).all())


def frequencies(draw: object, trials: int) -> Tensor:
    """Return how often each of 20 rows is in samples of 5."""
    hits = torch.zeros(20, dtype=torch.float64)
    for seed in range(trials):
        hits[draw(seed)[:, 0].long()] += 1
    return hits / trials


def test_every_row_is_kept_as_often_as_any_other() -> None:
    # Each row is kept with probability 1/4: the deviation of 800 trials is .0153, and none of 20
    # rows is beyond 4.5 of these but once in 7,000 runs.
    bound = 4.5 * math.sqrt(0.25 * 0.75 / 800)
    batches = numbered(20, 2, 9)
    streamed = frequencies(lambda seed: collected(batches, 5, seed), 800)
    whole = numbered(20)[0]
    drawn = frequencies(lambda seed: sampled(whole, 5, torch.Generator().manual_seed(seed)), 800)
    for found in (streamed, drawn):
        assert float((found - 0.25).abs().max()) < bound

    def by_batch(seed: int) -> Tensor:  # control: a choice of what is held so far, batch by batch
        kept = batches[0][:0]
        for batch in batches:
            kept = sampled(torch.cat([kept, batch]), 5, torch.Generator().manual_seed(seed))
        return kept

    assert float((frequencies(by_batch, 800) - 0.25).abs().max()) > bound


def test_the_seed_decides_and_the_cut_into_batches_does_not() -> None:
    one = collected(numbered(500, 100, 100), 50, seed=4)
    assert torch.equal(one, collected(numbered(500, 100, 100), 50, seed=4))
    assert torch.equal(one, collected(numbered(500, 1, 250), 50, seed=4))
    assert not torch.equal(one, collected(numbered(500, 100, 100), 50, seed=5))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    collected(numbered(20), 5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_more_than_the_sample_and_one_batch_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    join = torch.cat

    def watched(tensors: list[Tensor]) -> Tensor:
        whole = join(tensors)
        held.append(len(whole))
        return whole

    waiting = 0

    def stream() -> Iterator[Tensor]:
        nonlocal waiting
        for _ in range(50):
            waiting += 1
            yield torch.zeros(8, 2)

    monkeypatch.setattr(reservoir.torch, "cat", watched)
    assert len(collected(stream(), 30, seed=0)) == 30
    assert waiting == 50
    assert held
    assert max(held) == 38


def test_rows_come_without_their_graph_and_in_their_own_type(rng: torch.Generator) -> None:
    rows = normal(rng, 10, 2).half().requires_grad_()
    kept = collected(rows.split(4), 6, seed=0)
    assert not kept.requires_grad
    assert kept.dtype == torch.float16


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], r"rows: got no batch, expected at least one \(B, C\) tensor"),
        ([torch.zeros(3, 2, 2)], r"rows: batch 0 is \(3, 2, 2\), expected \(B, C\)"),
        ([torch.zeros(3)], r"rows: batch 0 is \(3,\), expected \(B, C\)"),
        ([torch.zeros(3, 2), torch.zeros(3, 4)], r"batch 1 is \(3, 4\), expected \(B, 2\)"),
    ],
)
def test_what_is_no_batch_is_named(batches: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collected(batches, 5, seed=0)
