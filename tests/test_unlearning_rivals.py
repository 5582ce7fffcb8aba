"""The rivals of the unlearning benchmark do what they are defined to, on rows with known truth."""

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parents[1] / "benchmarks" / "unlearning"
CHANNELS, CLASSES = 12, 3  # three pixels of four columns


@pytest.fixture(scope="module")
def bench() -> Any:
    """Return the benchmark's modules, which import each other by their bare names."""
    sys.path.insert(0, str(FOLDER))
    try:
        import labelled
        import rivals
        import splits
        import tasks
    finally:
        sys.path.remove(str(FOLDER))
    return type(
        "Bench", (), {"labelled": labelled, "rivals": rivals, "splits": splits, "tasks": tasks}
    )


def biased(bench: Any, seed: int, count: int = 900, share: float = 0.95) -> Any:
    """Return a split: rows as uint8 images, a class and a mark that goes with class 0."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    with_mark = torch.where(labels == 0, share, 1 - share)
    marks = (torch.rand(count, generator=draw) < with_mark).long()
    rows = 128 + 12 * torch.randn(count, CHANNELS, generator=draw)
    rows[torch.arange(count), labels] += 20
    rows[:, 5] += 80 * marks
    rows[:, 6] -= 40 * marks
    images = rows.round().clamp(0, 255).to(torch.uint8).view(count, 3, 2, 2)
    return bench.splits.Split(images, labels, marks)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS, CLASSES))


@pytest.fixture(scope="module")
def trained(bench: Any) -> tuple[Any, Any, nn.Module]:
    """Return a task, its images, and a network that leans on the mark."""
    parts = [biased(bench, seed) for seed in (0, 1)]
    data = bench.splits.Splits(*parts, {"even": biased(bench, 2, share=0.5)})
    task = bench.tasks.Task("toy", lambda _: data, network, bench.tasks.adamw(0.1, 0.0), 4, 4)
    model = network()
    bench.tasks.plain(task, model, data.train, 4, 0)
    return task, data, model


def accuracy(bench: Any, model: nn.Module, split: Any) -> float:
    return float(bench.rivals.accuracy(model, split))


def pull(model: nn.Module, rows: Callable[[], Tensor]) -> float:
    """Return how far the mark moves the logit of its class."""
    head = model[1].weight.detach().double()
    return float(head[0] @ rows())


def mean_shift(bench: Any, model: nn.Module, split: Any) -> Tensor:
    """Return the mean difference that the mark makes within classes."""
    rows = bench.labelled.rows_of(model, split.images).double()
    of_classes = [
        rows[(split.labels == k) & (split.marks == 1)].mean(0)
        - rows[(split.labels == k) & (split.marks == 0)].mean(0)
        for k in range(CLASSES)
    ]
    return torch.stack(of_classes).mean(0)


def test_the_plain_network_leans_on_the_mark(bench: Any, trained: tuple[Any, ...]) -> None:
    _, data, model = trained
    assert pull(model, lambda: mean_shift(bench, model, data.probe)) > 1
    assert accuracy(bench, model, data.probe) > accuracy(bench, model, data.tests["even"]) + 0.1


@pytest.mark.parametrize("name", ["P-ClArC", "LEACE", "oracle"])
def test_erasing_takes_the_mark_out_of_the_logits(
    bench: Any, trained: tuple[Any, ...], name: str
) -> None:
    if name == "LEACE":
        pytest.importorskip("concept_erasure")
    task, data, model = trained
    new = bench.labelled.LABELLED[name](task, model, data, 0)
    before = abs(pull(model, lambda: mean_shift(bench, model, data.tests["even"])))
    after = abs(pull(new, lambda: mean_shift(bench, new, data.tests["even"])))
    # Estimated on biased images the vectors of P-ClArC and LEACE hold some of the class.
    assert after < (0.2 if name == "oracle" else 0.3) * before
    kept = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model.state_dict(), kept, rtol=0, atol=0)


def test_p_clarc_makes_logits_blind_to_its_vector(bench: Any, trained: tuple[Any, ...]) -> None:
    task, data, model = trained
    new = bench.labelled.p_clarc(task, model, data, 0)
    rows = bench.labelled.rows_of(model, data.probe.images)
    u = bench.labelled.activation_vector(rows, data.probe.marks).float()
    torch.testing.assert_close(u @ u.T, torch.eye(1))
    with torch.no_grad():
        assert float((new[1].weight @ u.T).abs().max()) < 1e-5
        assert float((model[1].weight @ u.T).abs().max()) > 0.01  # control


def test_as_long_moves_along_signal_filter_and_random_directions(
    bench: Any, trained: tuple[Any, ...]
) -> None:
    task, data, model = trained
    rows = bench.labelled.rows_of(model, data.probe.images)
    left, moves = {}, {}
    for along in ("signal", "filter", "random"):
        new = bench.labelled.LABELLED[f"marks moved, {along}"](task, model, data, 0)
        left[along] = abs(pull(new, lambda new=new: mean_shift(bench, new, data.tests["even"])))
        with torch.no_grad():  # what the logits lack is the move, read by the classifier
            moves[along] = model[1](rows) - new[1](rows)
    before = abs(pull(model, lambda: mean_shift(bench, model, data.tests["even"])))
    assert left["signal"] < 0.1 * before
    assert left["signal"] < left["filter"]
    assert left["random"] > 0.3 * before  # control; 12 channels are few
    for change in moves.values():  # one direction: of rank 1 but for a constant
        sizes = torch.linalg.svdvals(change - change.mean(dim=0))
        assert sizes[1] < 1e-3 * sizes[0]


@pytest.mark.parametrize("name", ["DFR", "RR-ClArC"])
def test_labelled_training_gains_on_images_without_the_bias(
    bench: Any, trained: tuple[Any, ...], name: str
) -> None:
    task, data, model = trained
    new = bench.labelled.LABELLED[name](task, model, data, 0)
    before, after = (accuracy(bench, m, data.tests["even"]) for m in (model, new))
    assert after > before + 0.05


def test_dfr_fits_balanced_groups(bench: Any, trained: tuple[Any, ...]) -> None:
    task, data, model = trained
    refitted = bench.labelled.probe_refitted(task, model, data, 0)
    balanced = bench.labelled.dfr(task, model, data, 0)
    leans = [
        pull(m, lambda: mean_shift(bench, model, data.tests["even"])) for m in (refitted, balanced)
    ]
    assert leans[1] < 0.5 * leans[0]  # balanced over classes alone, the bias is learnt again


@pytest.mark.parametrize("name", ["jtt", "lff", "group_dro"])
def test_rivals_that_train_lean_less_on_the_mark(
    bench: Any, trained: tuple[Any, ...], name: str
) -> None:
    task, data, _ = trained
    plain = network()
    bench.tasks.plain(task, plain, data.train, 8, 0)
    model = getattr(bench.rivals, name)(task, data, 0)
    shift = mean_shift(bench, plain, data.tests["even"])
    assert pull(model, lambda: shift) < pull(plain, lambda: shift)
    assert accuracy(bench, model, data.tests["even"]) > accuracy(bench, plain, data.tests["even"])


def test_batches_come_in_the_same_order_and_by_their_weights(
    bench: Any, trained: tuple[Any, ...]
) -> None:
    task, data, _ = trained
    first, second = (
        torch.cat([at for _, _, at in bench.tasks.batches(task, data.train, 1, 3)]) for _ in "ab"
    )
    assert torch.equal(first, second)
    assert torch.equal(first.sort().values, torch.arange(len(data.train)))
    weights = (data.train.marks == 1).float()
    drawn = torch.cat([at for _, _, at in bench.tasks.batches(task, data.train, 1, 3, weights)])
    assert bool((data.train.marks[drawn] == 1).all())


def test_squares_have_the_groups_asked_for(bench: Any) -> None:
    data = bench.splits.squares(0, (0.49, 0.01, 0.01, 0.49))
    groups = torch.bincount(2 * data.train.labels + data.train.marks)
    assert groups.tolist() == [392, 8, 8, 392]
    test = data.tests["average group"]
    assert torch.bincount(2 * test.labels + test.marks).tolist() == [400] * 4
    ground = test.images[:, :, 0, 0].float().mean(1)
    assert ground[test.marks == 1].mean() > ground[test.marks == 0].mean() + 80
