"""The switches of people's own loops: with each, observing changes no bit and correcting works."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy
from worlds import (
    CLASSES,
    KEPT,
    PROBE,
    QUICK,
    UPDATES,
    correcting,
    fallen,
    held_out,
    logits,
    sgd,
    stream,
    world,
)

from concept_guard import ConceptGuard, TapError

MORE = 16  # updates of every loop
Built = tuple[nn.Module, Callable[[Tensor], Tensor]]


def channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


def checkpointed(model: nn.Module) -> nn.Module:
    model.set_grad_checkpointing(enable=True)
    return model


class Frozen(nn.Sequential):
    """Stays in eval mode, whatever is asked of it."""

    def train(self, mode: bool = True) -> "Frozen":  # noqa: ARG002, FBT001, FBT002 - torch's own
        """Do nothing."""
        return super().train(mode=False)


def frozen(model: nn.Module) -> nn.Module:
    """Freeze the stem and the first stage, their BatchNorm included."""
    for name in ("conv1", "bn1", "layer1"):
        model.set_submodule(name, Frozen(model.get_submodule(name).requires_grad_(False)))
    return model.train()


PREPARED = {
    "channels_last": channels_last,
    "gradient checkpointing": checkpointed,
    "frozen stem": frozen,
}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "layer decay": {"opt": "adamw", "lr": 1e-3, "layer_decay": 0.7},
    "lookahead": {"opt": "lookahead_adamw", "lr": 1e-3},
    "lion": {"opt": "lion", "lr": 1e-4},
    "lamb": {"opt": "lamb", "lr": 1e-3},
}
PRECISIONS = {"bfloat16": torch.bfloat16, "float16 and a scaler": torch.float16}
SWITCHES = [
    *PREPARED,
    *OPTIMIZERS,
    *PRECISIONS,
    "accumulation",
    "compiled",
    pytest.param("compiled, whole graph", marks=pytest.mark.thorough),
    "scalar loss",
    "mixup",
]
HARD = [name for name in SWITCHES if name != "mixup"]


def trained(switch: str, config: dict[str, object] | None) -> tuple[nn.Module, ConceptGuard | None]:
    """Train a network that has fallen for the mark with a switch, with or without a guard."""
    # Under bfloat16 oneDNN repeats no bit on processors with AMX, with or without a guard.
    with without_onednn() if switch == "bfloat16" else nullcontext():
        return with_switch(switch, config)


def with_switch(
    switch: str, config: dict[str, object] | None
) -> tuple[nn.Module, ConceptGuard | None]:
    model = PREPARED.get(switch, lambda m: m)(fallen())
    guard = None
    if config is not None:
        probe = world(PROBE).loader()
        guard = ConceptGuard(model, probe=probe, config={**QUICK, "start": 2, **config})
    torch._dynamo.reset()  # the graphs of a network like it, which has no hooks
    called: Callable[[Tensor], Tensor] = model
    if switch.startswith("compiled"):
        called = torch.compile(model, backend="aot_eager", fullgraph="whole" in switch)
    settings = OPTIMIZERS.get(switch)
    optimizer = sgd(model) if settings is None else create_optimizer_v2(model, **settings)
    scaler = torch.amp.GradScaler("cpu", enabled="scaler" in switch, init_scale=128.0)
    mix = Mixup(0.5, num_classes=CLASSES) if switch == "mixup" else None
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - from where Mixup draws
    model.train()
    parts = 2 if switch == "accumulation" else 1
    for images, labels in stream(UPDATES + MORE, first=UPDATES):
        for x, y in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            target = y
            if mix is not None:
                x, target = mix(x.clone(), y)
            with precision(switch):
                loss = cross_entropy(
                    called(x), target, reduction="mean" if switch == "scalar loss" else "none"
                )
            loss = loss.mean() if guard is None else guard.loss(loss, target)
            scaler.scale(loss / parts).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if guard is not None:
            guard.step()
    return model, guard


def precision(switch: str) -> AbstractContextManager[object]:
    if switch not in PRECISIONS:
        return nullcontext()
    with ExitStack() as stack:
        stack.enter_context(torch.autocast("cpu", dtype=PRECISIONS[switch]))
        return stack.pop_all()


@contextmanager
def without_onednn() -> Iterator[None]:
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@cache
def plain(switch: str) -> nn.Module:
    return trained(switch, None)[0]


def differing(a: nn.Module, b: nn.Module) -> set[str]:
    left, right = a.state_dict(), b.state_dict()
    return {name for name in left if not torch.equal(left[name], right[name])}


@pytest.mark.parametrize("switch", SWITCHES)
def test_observing_changes_no_bit(switch: str) -> None:
    watched, guard = trained(switch, {"action": "observe"})
    assert guard is not None
    assert guard.report is not None
    assert guard.steps == MORE
    assert not differing(watched, plain(switch))


@pytest.mark.parametrize("switch", HARD)
@pytest.mark.filterwarnings("ignore:rebalancing cannot act. guard.loss got a scalar")
def test_the_mark_is_unlearnt(switch: str) -> None:
    before = held_out(plain(switch))
    model, guard = trained(switch, {})
    assert guard is not None
    assert guard.erased
    assert guard.steps == MORE
    guard.bake()
    guard.close()
    after = held_out(model)
    assert bool(logits(model).isfinite().all())
    assert after[1] > before[1] + 0.2
    assert after[0] > before[0] - 0.03


def test_the_graph_of_a_network_like_it_is_said_to_be_in_the_way() -> None:
    """torch.compile takes the graph of a network without hooks for one with them."""
    images, labels = next(iter(stream(UPDATES + 1, first=UPDATES)))
    torch._dynamo.reset()
    torch.compile(fallen(), backend="aot_eager")(images)
    model = fallen()
    guard = ConceptGuard(model, probe=world(PROBE).loader(), config=QUICK)
    guard.loss(cross_entropy(torch.compile(model, backend="aot_eager")(images), labels))
    with pytest.raises(TapError, match=r"compiled before in this process.*torch\._dynamo\.reset"):
        guard.step()
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager")(images)
    assert guard.step() is not None  # with the way out


def test_soft_targets_are_said_once_and_training_goes_on() -> None:
    with pytest.warns(UserWarning, match="cannot act: targets are soft") as said:
        model, guard = trained("mixup", {})
    assert guard is not None
    assert guard.erased
    assert sum("targets are soft" in str(w.message) for w in said) == 1
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


def compiled_run(backend: Any, config: dict[str, object] | None) -> nn.Module:
    """Train through a compiled network, with a validation pass in between."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = fallen()
    guard = None
    if config is not None:
        guard = ConceptGuard(model, probe=world(PROBE).loader(), config={**QUICK, **config})
    called = model if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    optimizer = sgd(model)
    for n, (images, labels) in enumerate(stream(UPDATES + 44, first=UPDATES)):
        model.train()
        losses = cross_entropy(called(images), labels, reduction="none")
        (losses.mean() if guard is None else guard.loss(losses, labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if guard is not None:
            guard.step()
        if n % 11 == 10:
            model.eval()
            with torch.no_grad():
                called(images)
    assert guard is None or guard.erased
    assert not torch._dynamo.utils.counters["graph_break"]
    return model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_do_not_overwrite_what_is_captured() -> None:
    kept: list[list[Tensor]] = []
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        model = fallen().cuda()
        guard = correcting(model, start=1000)
        called = model if mode is None else torch.compile(model, mode=mode)
        optimizer, losses = sgd(model), []
        for images, labels in stream(UPDATES + 8, first=UPDATES):
            x, y = images.cuda(), labels.cuda()
            loss = guard.loss(cross_entropy(called(x), y, reduction="none"), y)
            rows = guard.tap.captured
            assert rows is not None
            losses.append(rows.sum().detach().clone())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            guard.step()
        kept.append(losses)
    torch.testing.assert_close(kept[1], kept[0], rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_compiling_costs_two_graphs_more_and_gives_the_same() -> None:
    often = {"start": 2, "every": 10, "track_every": 2, "action": KEPT}  # tracks twenty times
    plain_graphs, graphs = CompileCounter(), CompileCounter()
    compiled_run(plain_graphs, None)
    model = compiled_run(graphs, often)
    assert graphs.frame_count <= plain_graphs.frame_count + 2  # the edit, and what is noted
    eager = compiled_run(None, often)
    torch.testing.assert_close(logits(model), logits(eager), rtol=0, atol=1e-5)
