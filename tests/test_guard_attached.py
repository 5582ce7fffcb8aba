"""What a guard is attached to: late, twice, or to a copy, it says so and leaves nothing behind."""

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from worlds import PROBE, correcting, fallen, logits, net, world

from concept_guard import ConceptGuard, TapError

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
FIRST = r"guard = ConceptGuard\(model, \.\.\.\); model = torch\.compile\(model\)"


def guard_of(model: nn.Module, **config: object) -> ConceptGuard:
    """Return a guard with a small probe that only watches."""
    settings = {"action": "observe", "concepts": 4, **config}
    return ConceptGuard(model, probe=world(PROBE, 40).loader(), config=settings)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("late", [compiled, compiled_in_place, compiled_forward])
def test_a_model_that_is_compiled_already_is_refused(
    untouched: Untouched, late: Callable[[nn.Module], nn.Module]
) -> None:
    inner = net()
    model = late(inner)
    message = rf"(ResNet|OptimizedModule) is compiled already.*never fire; .*{FIRST}"
    with untouched(inner), pytest.raises(TapError, match=message):
        guard_of(model)


def test_a_compiled_part_is_refused_only_where_the_tap_is_inside() -> None:
    model = net()
    model.layer4.compile(backend="eager")
    with pytest.raises(TapError, match=rf"layer4 is compiled already.*{FIRST}"):
        guard_of(model, tap="module:layer4.0")
    with guard_of(model) as guard, torch.no_grad():  # behind it hooks fire
        model(world(PROBE).images[:2])
        guard.step()


def test_a_model_that_was_compiled_and_called_before_is_found_in_the_first_step() -> None:
    model = net()
    torch._dynamo.reset()
    called = torch.compile(model, backend="eager")
    images = world(PROBE).images[:4]
    called(images)
    with guard_of(model) as guard:  # the plain model is at hand as well
        called(images)  # the graph from before knows no hook
        with pytest.raises(TapError, match=r"not fired before the first.*before torch\.compile"):
            guard.step()
        torch._dynamo.reset()  # the way out
        called(images)
        guard.step()


@pytest.mark.parametrize("made_by", ["script", "trace"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_scripted_or_traced_model_is_refused(untouched: Untouched, made_by: str) -> None:
    inner = net().eval()
    images = world(PROBE).images[:2]
    model = torch.jit.trace(inner, images) if made_by == "trace" else torch.jit.script(inner)
    message = (
        r"scripted or traced \(torch\.jit\).*script that after guard\.bake\(\) and guard\.close"
    )
    with untouched(inner), pytest.raises(TapError, match=message):
        guard_of(model)


def test_a_second_guard_at_the_same_place_is_refused_until_the_first_is_closed() -> None:
    model = net()
    first = guard_of(model)
    hooks = len(model.fc._forward_pre_hooks)
    with pytest.raises(TapError, match=r"'fc' is guarded already.*close\(\) on the first guard"):
        guard_of(model)
    assert len(model.fc._forward_pre_hooks) == hooks == 1
    with guard_of(model, tap="stage:-2"):  # the other way out
        pass
    first.close()
    with guard_of(model):
        assert len(model.fc._forward_pre_hooks) == 1


def saved(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "EMA": lambda model: ModelEmaV3(model).module,
    "deep copy": copy.deepcopy,
    "saved whole": saved,
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("tap", ["pre_logits", "stage:-2"])
def test_a_copy_of_a_guarded_model_is_refused_and_stays_as_it_is(
    untouched: Untouched, kind: str, tap: str
) -> None:
    model = net()
    first = guard_of(model, tap=tap)
    copied = COPIES[kind](model)
    for where in ("pre_logits", "stage:-2"):  # also where the copy itself carries no hook
        message = r"ResNet is a copy of a guarded model.*'(fc|layer3)' carries.*guard\.baked_copy\("
        with untouched(copied), pytest.raises(TapError, match=message):
            guard_of(copied, tap=where)
    first.close()
    with guard_of(copy.deepcopy(model)):  # the way out
        pass


def test_the_ways_out_for_a_copy_work() -> None:
    model = fallen()
    first = correcting(model, action=["project", "rebalance"])
    corrected = logits(model)
    ema = ModelEmaV3(model)
    own = first.baked_copy(ema.module)
    torch.testing.assert_close(logits(own), corrected, rtol=0, atol=1e-4)
    with guard_of(own):
        pass


def test_a_wrapper_of_distributed_training_is_seen_through(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        guard = guard_of(wrapped)
        assert guard.tap.model is model
        images, labels = world(PROBE).images[:8], world(PROBE).labels[:8]
        losses = nn.functional.cross_entropy(wrapped(images), labels, reduction="none")
        guard.loss(losses, labels).backward()
        guard.step()  # it has fired
        guard.close()
        assert not model.fc._forward_pre_hooks
        with pytest.raises(TapError, match=rf"is compiled already.*{FIRST}"):
            guard_of(nn.parallel.DistributedDataParallel(compiled(model)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_an_optimizer_sees_the_model_as_without_a_guard(name: str) -> None:
    options = {"img_size": 16, "patch_size": 4} if name == "test_vit" else {}

    def groups(model: nn.Module) -> list[tuple[float, float, list[str]]]:
        names = {id(p): name for name, p in model.named_parameters()}
        how = {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.7}
        found = create_optimizer_v2(model, **how).param_groups
        return [
            (g["lr_scale"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in found
        ]

    plain, model = groups(net(name, **options)), net(name, **options)
    with guard_of(model):
        assert groups(model) == plain
    assert len(plain) > 8  # control: as many as the depths of the layers
    assert len(groups(nn.Sequential(model))) < len(plain)  # control: behind a wrapper they are lost


def test_nothing_is_said_about_a_model_that_is_attached_to_in_time() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard_of(net()).close()
