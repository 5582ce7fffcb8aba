"""A probe that is the training set itself is told where an adapter sees both."""

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset, random_split
from worlds import PROBE, TRAIN, fallen, world

from concept_guard.integrations.held_out import warn_if_trained_on
from concept_guard.integrations.lightning import ConceptGuardCallback as OfLightning
from concept_guard.integrations.timm_script import guard_script
from concept_guard.integrations.transformers import ConceptGuardCallback as OfTransformers

TOLD = r"probe: its \w+ holds the images that are trained on, expected held-out ones.*random_split"
SETTINGS = {"action": "observe", "concepts": 4}
HELD_OUT, LEARNT = (TensorDataset(world(s, 40).images, world(s, 40).labels) for s in (PROBE, TRAIN))


class Files(Dataset[Any]):
    """A folder as timm (with a reader) or torchvision (without) shows it."""

    def __init__(self, *names: str, reader: bool = True) -> None:
        samples = [(name, 0) for name in names]
        self.reader = SimpleNamespace(samples=samples)
        if not reader:
            del self.reader
            self.samples = samples

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("reader", [False, True])
def test_the_same_data_or_the_same_files_are_told(reader: bool) -> None:
    for loaders in (
        (DataLoader(LEARNT, 10), DataLoader(LEARNT, 20, shuffle=True)),
        (DataLoader(Files("a", "b", reader=reader)), DataLoader(Files("a", "b", reader=reader))),
    ):
        with pytest.warns(UserWarning, match=TOLD):
            warn_if_trained_on(*loaders)


def test_other_data_and_other_parts_are_not() -> None:
    parts = random_split(LEARNT, [30, 10], torch.Generator().manual_seed(0))
    for probe, train in (
        (DataLoader(HELD_OUT), DataLoader(LEARNT, shuffle=True)),
        (DataLoader(parts[0]), DataLoader(parts[1])),
        (
            DataLoader(LEARNT, sampler=SubsetRandomSampler(range(10))),
            DataLoader(LEARNT, sampler=SubsetRandomSampler(range(10, 40))),
        ),
        (DataLoader(Files("a", "b")), DataLoader(Files("a", "c"))),
        ([world(PROBE, 40).images], DataLoader(LEARNT)),
        (DataLoader(LEARNT), None),
    ):
        warn_if_trained_on(probe, train)  # a warning would be an error


def of_timm(probe: Any, train: Any) -> None:
    script = ModuleType("script")
    loaders = iter([train, probe])
    script.create_loader = lambda *_, **__: next(loaders)
    script.ClassificationTask = object
    guard_script(script, [])
    script.create_loader(is_training=True)
    script.create_loader(is_training=False)
    script.ClassificationTask(fallen(), nn.CrossEntropyLoss(), verbose=False).guard.close()


def of_lightning(probe: Any, train: Any) -> None:
    callback = OfLightning(probe, SETTINGS)
    module = SimpleNamespace(
        automatic_optimization=True, model=fallen(), training_step=lambda batch: batch
    )
    trainer = SimpleNamespace(
        world_size=1, checkpoint_callbacks=[], global_step=0, train_dataloader=train
    )
    callback.setup(trainer, module, "fit")
    try:
        callback.on_train_start(trainer, module)
    finally:
        callback.teardown(trainer, module, "fit")


def of_transformers(probe: Any, train: Any) -> None:
    callback = OfTransformers(fallen(), probe, SETTINGS)
    arguments, state = SimpleNamespace(world_size=1), SimpleNamespace(global_step=0)
    try:
        callback.on_train_begin(arguments, state, None, train_dataloader=train)
    finally:
        callback.guard.close()


@pytest.fixture
def in_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work in a folder of its own, as timm's script writes into the current one."""
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        yield


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize("adapter", [of_timm, of_lightning, of_transformers])
def test_the_adapters_look(adapter: Callable[[Any, Any], None]) -> None:
    probe = DataLoader(LEARNT, 20)
    with pytest.warns(UserWarning, match=TOLD):
        adapter(probe, DataLoader(LEARNT, 20, shuffle=True))
    adapter(DataLoader(HELD_OUT, 20), DataLoader(LEARNT, 20, shuffle=True))
