"""Looking changes nothing: the guard leaves training, names and memory as it found them."""

import gc
import random
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from worlds import (
    CLASSES,
    PROBE,
    QUICK,
    UPDATES,
    correcting,
    fallen,
    flagging,
    net,
    stream,
    train,
    world,
)

from concept_guard import ConceptGuard

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
VIT = {"img_size": 16, "patch_size": 4}
NOISY = {"drop_rate": 0.3, "drop_path_rate": 0.3}


class Augmented(Dataset[tuple[Tensor, int]]):
    """Draws from every global random state, as augmentations do."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = world(PROBE, planted=False).images[index]
        noise = random.random() + np.random.rand()  # noqa: NPY002 - the global state is the point
        return image + torch.rand(3, 1, 1) + noise, index % CLASSES


def noisy_resnet() -> nn.Module:
    return net(**NOISY).train()


def noisy_vit() -> nn.Module:
    return net("test_vit", **VIT, **NOISY).train()


def partly_frozen() -> nn.Module:
    """Some BatchNorm layers in eval mode, some without gradients, some both, most neither."""
    model = net().train()
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers[:4]:
        layer.eval()
    for layer in layers[2:6]:
        layer.requires_grad_(False)
    return model


MODELS = {build.__name__: build for build in (noisy_resnet, noisy_vit, partly_frozen)}


def three_epochs(name: str, **options: object) -> tuple[dict[str, Tensor], ConceptGuard | None]:
    """Train three epochs of three batches; rounds run after updates 2, 5 and 8."""
    model = MODELS[name]()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is the point
    loader = DataLoader(Augmented(), batch_size=16, shuffle=True)
    guard = None
    if options:
        config = {"start": 2, "every": 3, "concepts": 4, "alpha": 1e-4, "action": options["action"]}
        guard = ConceptGuard(model, probe=loader, config=config, log_dir=options.get("log_dir"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(3):
        for images, labels in loader:
            losses = cross_entropy(model(images), labels, reduction="none")
            loss = losses.mean() if guard is None else guard.loss(losses, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if guard is not None:
                guard.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {**state, "rng": torch.get_rng_state(), "draw": torch.rand(3)}, guard


@cache
def alone(name: str) -> dict[str, Tensor]:
    return three_epochs(name)[0]


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(left) == list(right)
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


@pytest.mark.filterwarnings("ignore:probe. its images depend on random")
@pytest.mark.parametrize("name", MODELS)
def test_observing_is_bit_identical_to_the_loop_without_a_guard(name: str) -> None:
    watched, guard = three_epochs(name, action="observe")
    assert guard is not None
    assert guard.report is not None
    assert guard.report.step == 8
    assert_same(alone(name), watched)


@pytest.mark.filterwarnings("ignore:probe. its images depend on random")
@pytest.mark.parametrize("name", MODELS)
def test_correcting_is_bit_identical_while_nothing_is_flagged(name: str, tmp_path: Path) -> None:
    watched, guard = three_epochs(name, action=["project", "rebalance"], log_dir=tmp_path)
    assert guard is not None
    assert guard.report is not None
    assert guard.report.flagged == guard.erased == ()
    assert_same(alone(name), watched)
    assert list(tmp_path.glob("events.*"))  # writing events draws no random numbers either


def test_the_comparison_can_fail() -> None:
    assert all(value.isfinite().all() for value in alone("noisy_resnet").values())
    model = noisy_resnet()
    assert_same(dict(model.state_dict()), dict(noisy_resnet().state_dict()))
    with pytest.raises(AssertionError, match="fc.weight"):
        assert_same(dict(model.state_dict()), {**model.state_dict(), "fc.weight": torch.ones(1)})


def test_observing_changes_no_bit_even_when_the_mark_is_flagged() -> None:
    plain, watched = fallen(), fallen()
    train(plain, stream(UPDATES + 9, first=UPDATES))
    guard = flagging(watched, action="observe")
    assert guard.report is not None
    assert guard.report.flagged
    train(watched, stream(UPDATES + 9, first=UPDATES), guard)
    assert (guard.report.step, guard.erased) == (9, ())
    assert_same(dict(plain.state_dict()), dict(watched.state_dict()))
    corrected = fallen()  # control: correcting is not harmless
    train(corrected, stream(UPDATES + 9, first=UPDATES), correcting(corrected))
    with pytest.raises(AssertionError):
        assert_same(dict(plain.state_dict()), dict(corrected.state_dict()))


def names(model: nn.Module) -> dict[str, list[str]]:
    """Everything that is registered on a model, by name and in order."""
    return {
        "state_dict": list(model.state_dict()),
        "parameters": [name for name, _ in model.named_parameters()],
        "buffers": [name for name, _ in model.named_buffers()],
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [f"{path}.{a}" for path, m in model.named_modules() for a in vars(m)],
        "of parameters": [f"{name}.{a}" for name, p in model.named_parameters() for a in vars(p)],
    }


def test_names_never_change() -> None:
    model = fallen()
    expected = names(model)
    tensors = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    guard = correcting(model)
    assert guard.erased
    assert names(model) == expected
    train(model, stream(UPDATES + 2, first=UPDATES), guard)
    assert names(model) == expected
    guard.bake()
    assert names(model) == expected
    guard.close()
    assert names(model) == expected
    kept = {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}
    assert kept == tensors  # the optimizer still holds the model's own parameters


def test_what_is_called_in_inference_mode_can_be_trained_with_later() -> None:
    """Timm validates in this mode, whose tensors no gradient may meet."""
    model = fallen()
    guard = ConceptGuard(model, probe=world(PROBE).loader(), config={**QUICK, "start": 100})
    with torch.inference_mode():
        assert guard.round() is not None
        (concept,) = guard.erased
        guard.restore(concept)
        guard.erase(concept)
        state = guard.state_dict()
    train(model, stream(UPDATES + 4, first=UPDATES), guard)  # tracks after update 3
    with torch.inference_mode():
        guard.load_state_dict(state)
        assert guard.explain(world(PROBE).images[:2])
        copied = guard.baked_copy()
    train(model, stream(UPDATES + 8, first=UPDATES + 4), guard)
    with torch.inference_mode():
        guard.bake()
    for trained in (copied, model):
        assert not any(p.is_inference() for p in trained.parameters())
        train(trained, stream(UPDATES + 9, first=UPDATES + 8))


@pytest.mark.parametrize("where", ["pre_logits", "stage:-1"])
def test_closing_leaves_nothing_on_the_model(untouched: Untouched, where: str) -> None:
    model = fallen()
    with untouched(model):
        config = {**QUICK, "concepts": 4, "tap": where, "action": "observe"}
        with ConceptGuard(model, probe=world(PROBE, 80).loader(), config=config) as guard:
            guard.round()
        guard.close()


def test_closing_while_correcting_leaves_nothing(untouched: Untouched) -> None:
    model = fallen()
    images = world(PROBE).images[:8]
    with torch.no_grad():
        plain = model.eval()(images)
        with untouched(model):
            guard = correcting(model)
            assert not torch.equal(model(images), plain)  # control: the correction was at work
            guard.close()
        assert torch.equal(model(images), plain)


def test_closing_in_an_error_leaves_nothing(untouched: Untouched) -> None:
    model = fallen()
    with (
        untouched(model),
        pytest.raises(RuntimeError, match="of the loop"),
        ConceptGuard(model, probe=world(PROBE).loader(), config=QUICK),
    ):
        raise RuntimeError("an error of the loop")


def test_nobody_keeps_anybody_alive_after_closing() -> None:
    model = fallen()
    guard = correcting(model)
    train(model, stream(UPDATES + 2, first=UPDATES), guard)
    guard.close()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None  # although the guard lives

    model = fallen()
    guard = correcting(model)
    train(model, stream(UPDATES + 2, first=UPDATES), guard)
    guard.close()
    references = [weakref.ref(guard), weakref.ref(guard.tap)]
    del guard
    gc.collect()
    assert [reference() for reference in references] == [None, None]  # although the model lives
    assert len(list(model.parameters())) > 0
