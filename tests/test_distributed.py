"""Several processes train one model as one process does, and hold the same."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import exit_codes, together
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from worlds import (
    CLASSES,
    PROBE,
    QUICK,
    UPDATES,
    correcting,
    fallen,
    logits,
    net,
    sgd,
    stream,
    world,
)

from concept_guard import BakeError, ConceptGuard, ConfigError, ProbeError, TapError
from concept_guard import ranks as ranks_module
from concept_guard.clock import Clock
from concept_guard.ranks import Ranks, digest

MORE = 50  # updates
RUNS = {  # actions, updates, and how far rounding may take the weights apart
    "exact": (["project", "rebalance"], MORE, 1e-9),
    "default": (["project", "rebalance", "refit"], MORE, 1e-5),
    "penalized": (["penalize"], 20, 1e-5),  # its term is computed in float32
}


def exact(folder: Path) -> nn.Module:
    """Return a network that has fallen, in float64 and without statistics of batches."""
    model = net(norm_layer="groupnorm1").double()
    path = folder / "fallen.pt"
    if path.exists():
        model.load_state_dict(torch.load(path))
        return model
    optimizer = sgd(model, 0.02)
    model.train()
    for images, labels in stream(2 * UPDATES):
        cross_entropy(model(images.double()), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), path)
    return model


def doubled(batch: int = 50) -> DataLoader[tuple[Tensor, ...]]:
    probe = world(PROBE)
    return DataLoader(TensorDataset(probe.images.double(), probe.labels), batch)


def divided(model: nn.Module) -> nn.Module:
    """Return the model with its parameters divided among the processes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def go_on(
    run: str,
    rank: int,
    size: int,
    folder: Path,
    name: str,
    wrapped: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
) -> None:
    """Train on with a guard on this process's share of every batch; write what comes of it."""
    (action, updates, _), model = RUNS[run], exact(folder)
    guard = ConceptGuard(model, probe=doubled(), config={**QUICK, "action": action})
    trained = wrapped(model) if size > 1 else model
    optimizer = sgd(
        model, 0.01
    )  # at a rate at which rounding does not grow beyond the bounds above
    model.train()
    for images, labels in stream(2 * UPDATES + updates, first=2 * UPDATES):
        x, y = images.double()[rank::size], labels[rank::size]
        losses = cross_entropy(trained(x), y, reduction="none")
        guard.loss(losses, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        guard.step()
    state = guard.state_dict()
    guard.bake()
    guard.close()
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.save({"guard": state, "model": full}, folder / f"{name}.pt")


def share_of_one(rank: int, folder: Path) -> None:
    for name in RUNS:
        go_on(name, rank, distributed.get_world_size(), folder, f"{name}_{rank}")
    go_on("default", rank, distributed.get_world_size(), folder, f"divided_{rank}", divided)
    ranks_module.processes = lambda: 1  # the control: guards that know nothing of each other
    go_on("exact", rank, distributed.get_world_size(), folder, f"apart_{rank}")


def apart(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest difference between two states of a model."""
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.thorough
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    exact(tmp_path)
    for name in RUNS:
        go_on(name, 0, 1, tmp_path, name)
    together(share_of_one, tmp_path)
    found = {path.stem: torch.load(path) for path in tmp_path.glob("*.pt") if path.stem != "fallen"}
    for name, (_, _, rounding) in RUNS.items():
        one, first, second = (found[stem] for stem in (name, f"{name}_0", f"{name}_1"))
        assert one["guard"]["tracked"]
        flags = [run["guard"]["report"]["flags"] for run in (one, first, second)]
        told = [[(flag["concept"], flag["status"]) for flag in of_one] for of_one in flags]
        assert told[0] == told[1] == told[2]
        assert digest(first["guard"]) == digest(second["guard"])
        assert apart(first["model"], second["model"]) == 0
        for part in ("filters", "signals", "biases"):
            alone, shared = (run["guard"]["pairs"][part] for run in (one, first))
            torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
        assert apart(one["model"], first["model"]) < rounding
    of_parts = [found[f"divided_{rank}"] for rank in (0, 1)]
    assert digest(of_parts[0]["guard"]) == digest(of_parts[1]["guard"])
    assert apart(found["default"]["model"], of_parts[0]["model"]) < RUNS["default"][2]
    control = found["apart_0"], found["apart_1"]
    assert digest(control[0]["guard"]) != digest(control[1]["guard"])
    assert apart(found["exact"]["model"], control[0]["model"]) > 1e-6


def usual(model: nn.Module, **options: Any) -> ConceptGuard:
    config = {**QUICK, **options.pop("config", {})}
    return ConceptGuard(model, probe=world(PROBE).loader(50), config=config, **options)


def one_rank_fails(rank: int, folder: Path) -> None:
    """A stage that fails in one process, one that rounds otherwise, and models that differ."""
    model = fallen()
    for buffer in model.buffers():
        buffer.add_(rank)  # what a process sees for itself is its own
    own = copy.deepcopy(model.state_dict())
    guard = usual(model, log_dir=folder / f"log{rank}")
    guard.round()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    everywhere: list[Any] = [None, None]
    distributed.all_gather_object(everywhere, digest(guard.state_dict()))
    assert everywhere[0] == everywhere[1]
    assert guard.erased
    assert (folder / f"log{rank}").exists() == (rank == 0)

    before, act_on = digest(guard.state_dict()), guard._corrector.act_on

    def failing(*args: Any) -> Tensor | None:
        done = act_on(*args)
        if rank == 1:
            raise MemoryError("no room left")
        return done

    guard._corrector.act_on = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError if rank == 0 else MemoryError, match="no room left"):
        guard.round()
    assert digest(guard.state_dict()) == before

    def rounding(*args: Any) -> Tensor | None:
        done = act_on(*args)
        guard._corrector.tracked[0].pair.signal.mul_(1 + 1e-6 * rank)
        return done

    guard._corrector.act_on = rounding  # type: ignore[method-assign]
    guard.round()
    distributed.all_gather_object(everywhere, digest(guard.state_dict()))
    assert everywhere[0] == everywhere[1]
    guard._corrector.act_on = act_on  # type: ignore[method-assign]

    corrected = logits(model)
    head = model.fc.weight.detach().clone()
    bias = model.fc.bias.detach().clone()
    with torch.no_grad():
        model.fc.bias.add_(rank)
    with pytest.raises(ValueError, match="models with different weights.*DistributedDataParallel"):
        guard.bake()
    with torch.no_grad():
        model.fc.bias.copy_(bias)
    assert torch.equal(model.fc.weight, head)
    torch.testing.assert_close(logits(model), corrected)
    copied = guard.baked_copy() if rank == 0 else None  # of one process alone
    assert copied is None or not torch.equal(copied.fc.weight, head)
    guard.bake()
    assert not torch.equal(model.fc.weight, head)
    distributed.all_gather_object(everywhere, digest(model.fc.state_dict()))
    assert everywhere[0] == everywhere[1]
    guard.close()
    odd_probes(rank)


def odd_probes(rank: int) -> None:
    """Probes of which every process has a part, and a guard that one process cannot build."""
    data = TensorDataset(world(PROBE).images, world(PROBE).labels)
    divided = DataLoader(data, 50, sampler=DistributedSampler(data, shuffle=False))
    with ConceptGuard(fallen(), probe=divided, config=QUICK) as guard:
        assert guard._images == len(data)
    model = fallen()
    with pytest.raises(ProbeError, match="different probes, of 200, 200 images.*whole probe"):
        ConceptGuard(model, probe=[*divided], config=QUICK)
    assert not model.global_pool._forward_hooks
    tap = "pre_logits" if rank == 0 else "module:nowhere"
    with pytest.raises(RuntimeError if rank == 0 else TapError, match="nowhere"):
        ConceptGuard(fallen(), probe=divided, config={"tap": tap})
    heard_by_all(rank)


def heard_by_all(rank: int) -> None:
    """A loss that is not finite in one process, a budget, a sampler, a batch without classes."""
    model = fallen()
    guard = usual(model, config={"budget": "50%", "action": ["project", "rebalance"]})
    guard._schedule.clock = Stingy(rank)
    (images, labels), *_ = stream(1)
    model.train()(images)
    guard.loss(torch.tensor([1.0, float("nan") if rank else 1.0]), torch.tensor([0, 1]))
    with pytest.warns(UserWarning, match="loss hold NaN"):
        assert guard.round() is None
    guard.loss(torch.ones(2), torch.tensor([0, 1]))
    assert guard.step() is not None  # a round, which the first process can afford
    losses = cross_entropy(model.train()(images), labels, reduction="none")
    if rank:
        with pytest.warns(UserWarning, match="targets are soft"):
            guard.loss(losses, torch.eye(CLASSES)[labels])
    else:
        guard.loss(losses, labels)
    counts = guard.state_dict()["counts"]
    everywhere: list[Any] = [None, None]
    distributed.all_gather_object(everywhere, digest(counts))
    assert everywhere[0] == everywhere[1]

    drawn = [*guard.sampler(7)]
    distributed.all_gather_object(everywhere, drawn)
    assert [len(part) for part in everywhere] == [4, 4]
    assert {*everywhere[0], *everywhere[1]} == {*range(7)}
    model(images)
    at = torch.tensor([2 * rank, 2 * rank + 1])
    model(images[:2])
    guard.loss(torch.ones(2), labels[:2], indices=at)
    known = guard.state_dict()["samples"]
    assert known["labels"].tolist() == [*labels[:2].tolist()] * 2 + [-1] * 3
    guard.close()


class Stingy(Clock):
    """Has time left, as far as the first process sees it."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def affords(self, budget: float | None) -> bool:
        """Return whether this is the first process."""
        return budget is None or self._rank == 0


@pytest.mark.thorough
def test_what_fails_or_differs_in_one_process_leaves_all_alike(tmp_path: Path) -> None:
    together(one_rank_fails, tmp_path)


def found_by(guard: ConceptGuard) -> str:
    """Return a hash of what rounds and acts leave behind, and single updates do not change."""
    state = guard.state_dict()
    return digest([state[part] for part in ("pairs", "ids", "report", "tracked", "subspace")])


def dies_in_a_round(rank: int, folder: Path) -> None:
    """The second process is killed in the middle of a round; the first one writes checkpoints."""
    model, saved = fallen(), folder / "checkpoint.pt"
    guard = usual(model, config={"every": 2})
    trained = DistributedDataParallel(model)
    act_on = guard._corrector.act_on

    def dying(*args: Any) -> Tensor | None:
        if rank and guard.steps > 2:
            os._exit(9)
        return act_on(*args)

    guard._corrector.act_on = dying  # type: ignore[method-assign]
    optimizer, before = sgd(model), ""
    model.train()
    for images, labels in stream(8):
        losses = cross_entropy(trained(images[rank::2]), labels[rank::2], reduction="none")
        guard.loss(losses, labels[rank::2]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard.steps < 2:
            guard.step()
            before = found_by(guard)
        else:
            with pytest.warns(UserWarning, match="work at step 3 is skipped.*training goes on"):
                guard.step()
            assert found_by(guard) == before
            state = {"model": guard.baked_copy().state_dict(), "guard": guard.state_dict()}
            torch.save(state, saved)
            break


@pytest.mark.thorough
def test_a_process_that_dies_takes_no_state_with_it(tmp_path: Path) -> None:
    assert exit_codes(dies_in_a_round, tmp_path) == [0, 9]
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = fallen()
    guard = usual(model)
    with pytest.warns(UserWarning, match="saved by 2 processes, 1 go on.*steps_per_epoch"):
        guard.load_state_dict(saved["guard"])
    assert guard.steps == 3
    assert guard.erased
    model.load_state_dict(saved["model"])


def test_guards_that_know_nothing_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fallen()
    with usual(model) as guard:
        monkeypatch.setattr(ranks_module, "processes", lambda: 2)
        model(world(PROBE).images[:2])
        with pytest.raises(ConfigError, match="built before.*2 processes.*init_process_group"):
            guard.step()
        guard._ranks._group, guard._ranks.size = object(), 2
        monkeypatch.setattr(ranks_module, "processes", lambda: 1)
        with pytest.raises(ConfigError, match="guard.bake.* before .*destroy_process_group"):
            guard.bake()
    alone = Ranks(alone=True)
    alone.check()
    assert alone.gathered(3) == [3]
    assert alone.of_first(3) == 3


def test_a_digest_tells_states_apart_but_not_how_long_they_took() -> None:
    state = {"a": torch.tensor([1.0, 2.0]), "b": [1, "x", None], "seconds": 3.0}
    same = digest(state)
    assert digest(copy.deepcopy(state)) == same
    assert digest({**state, "seconds": 4.0}) == same
    others = (
        {**state, "a": torch.tensor([1.0, 2.0 + 1e-6])},
        {**state, "a": torch.tensor([1, 2])},
        {**state, "a": torch.tensor([[1.0, 2.0]])},
        {**state, "b": [1, "x", 0]},
        {**state, "b": [1, ["x", None]]},
        {**state, "c": 0},
    )
    for other in others:
        assert digest(other) != same


def test_a_classifier_that_is_divided_while_the_loss_is_computed_corrects_nothing() -> None:
    model = fallen()
    guard = correcting(model)
    images, labels = next(stream(1))
    losses = cross_entropy(model(images), labels, reduction="none")
    assert not torch.equal(guard.loss(losses, labels), losses.mean())
    model.fc.weight.full_tensor = None  # as parameters of fully_shard have one
    with pytest.warns(UserWarning, match=r"divide it together with the whole model, fully_shard\("):
        assert torch.equal(guard.loss(losses, labels), losses.mean())
    with pytest.raises(BakeError, match="cannot be copied; call guard.bake.. in all of them"):
        guard.baked_copy()
