"""A script of timm's kind trains with the guard by one option on its command line."""

import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import OrderedDistributedSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import normalize
from torchvision.utils import save_image
from worlds import CLASSES, NET, PROBE, TEST, TRAIN, accuracy, mark, world

from concept_guard import ConfigError
from concept_guard.integrations.timm_script import VARIABLE, guard_script, settings, undivided

TESTS = Path(__file__).parent
AUTO = "concept_guard.integrations.timm_auto"
GUARD = {"start": "1ep", "every": 25, "track_every": 5, "concepts": 8}
SCRIPT = {
    "model": "resnet10t",
    "model_kwargs": NET,
    "num_classes": CLASSES,
    "input_size": 16,
    "epochs": 3,
    "lr": 0.02,
}


def shown(images: Tensor) -> Tensor:
    """Return the images of a world in [0, 1], to be written and read again."""
    return (0.15 * images + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images by split and class."""
    folder = tmp_path_factory.mktemp("data")
    for split, of in {"train": world(TRAIN, 1600), "validation": world(PROBE)}.items():
        for k in range(CLASSES):
            (folder / split / str(k)).mkdir(parents=True)
        for n, (image, label) in enumerate(zip(shown(of.images), of.labels.tolist(), strict=True)):
            save_image(image, folder / split / str(label) / f"{n:04d}.png")
    return folder


def run(
    data: Path, out: Path, *options: str, guard: dict[str, object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own, with settings of the guard in its YAML."""
    out.mkdir(parents=True, exist_ok=True)
    config = {**SCRIPT, "data_dir": str(data), "output": str(out)}
    if guard is not None:
        config["concept_guard"] = {**guard, "log_dir": str(out / "log")}
        options = ("--device-modules", AUTO, *options)
    (out / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf8")
    command = [sys.executable, str(TESTS / "timm_train.py"), "-c", str(out / "config.yaml")]
    paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop(VARIABLE, None)
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )


def scores(checkpoint: Path) -> tuple[float, float]:
    """Return the accuracy of an ordinary timm checkpoint on clean and on marked images."""
    model = timm.create_model(
        "resnet10t", num_classes=CLASSES, checkpoint_path=str(checkpoint), **NET
    )
    test, (mean, std) = world(TEST, 400), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def as_read(images: Tensor) -> Tensor:
        return normalize((255 * shown(images)).round() / 255, list(mean), list(std))

    clean, marked = (as_read(images) for images in (test.images, mark(test.images)))
    return accuracy(model, clean, test.labels), accuracy(model, marked, test.labels)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output of a run with the guard and an average of the weights."""
    out = tmp_path_factory.mktemp("whole")
    done = run(data, out, "--model-ema", guard=GUARD)
    assert done.returncode == 0, done.stderr
    assert "guard: flagged: concept" in done.stderr
    return out


@pytest.mark.thorough
def test_the_shortcut_is_unlearnt_and_the_checkpoint_is_an_ordinary_one(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    done = run(data, tmp_path)
    assert done.returncode == 0, done.stderr
    plain, guarded = (scores(out / "last.pth.tar") for out in (tmp_path, whole))
    assert guarded[1] > plain[1] + 0.15
    assert guarded[0] > plain[0] - 0.02
    checkpoint = torch.load(whole / "last.pth.tar", weights_only=True)
    assert {"state_dict", "state_dict_ema", "task_state"} <= set(checkpoint)
    events = EventAccumulator(str(whole / "log")).Reload()
    assert "concept_guard/probe/top1" in events.Tags()["scalars"]


@pytest.mark.thorough
def test_a_resumed_run_ends_as_the_one_that_was_not_stopped(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    done = run(data, tmp_path, "--model-ema", "--stop-after", "2", guard=GUARD)
    assert done.returncode == 0, done.stderr
    last = str(tmp_path / "last.pth.tar")
    done = run(data, tmp_path / "again", "--model-ema", "--resume", last, guard=GUARD)
    assert done.returncode == 0, done.stderr
    ends = [
        torch.load(out / "last.pth.tar", weights_only=True) for out in (whole, tmp_path / "again")
    ]
    for key in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(ends[0][key][n], ends[1][key][n]) for n in ends[0][key])
    steps = [end["task_state"]["concept_guard"]["steps"] for end in ends]
    assert steps == [150, 150]


@pytest.mark.thorough
def test_the_option_alone_changes_no_bit_while_nothing_is_corrected(
    data: Path, tmp_path: Path
) -> None:
    outs = tmp_path / "plain", tmp_path / "observed"
    for out, guard in zip(outs, (None, {**GUARD, "action": "observe"}), strict=True):
        done = run(data, out, "--stop-after", "2", "--grad-accum-steps", "2", guard=guard)
        assert done.returncode == 0, done.stderr
    plain, observed = (torch.load(out / "last.pth.tar", weights_only=True) for out in outs)
    for name, value in plain["state_dict"].items():
        assert torch.equal(observed["state_dict"][name], value)
    assert observed["task_state"]["concept_guard"]["steps"] == 50  # updates, not batches


@pytest.mark.parametrize(
    ("options", "guard", "message"),
    [
        (["--no-validation"], GUARD, "the script built no validation loader"),
        ([], {"evry": 3}, "evry"),
    ],
)
def test_what_is_wrong_stops_the_run_before_training(
    data: Path, tmp_path: Path, options: list[str], guard: dict[str, object], message: str
) -> None:
    done = run(data, tmp_path, *options, guard=guard)
    assert done.returncode != 0
    assert "ConfigError" in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "last.pth.tar").exists()


@pytest.fixture
def script() -> types.ModuleType:
    """Return a module with the names that timm's train.py imports."""
    module: Any = types.ModuleType("train")
    module.ClassificationTask, module.create_loader = object, lambda *_, **__: range(7)
    module.LogitDistillationTask = object
    return module


def test_distillation_is_refused_and_other_scripts_are_named(script: Any) -> None:
    guard_script(script, [])
    with pytest.raises(ConfigError, match="distillation is not guarded; leave out --kd-model"):
        script.LogitDistillationTask(student_model=nn.Identity())
    with pytest.raises(ConfigError, match="other has no ClassificationTask and no create_loader"):
        guard_script(types.ModuleType("other"), [])


def test_settings_come_from_the_yaml_of_the_script_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = tmp_path / "train.yaml", tmp_path / "guard.yaml"
    file.write_text("lr: 0.1\nconcept_guard:\n  every: 3\n", encoding="utf8")
    other.write_text("every: 5\n", encoding="utf8")
    monkeypatch.delenv(VARIABLE, raising=False)
    assert settings([]) == {}
    assert settings(["--lr", "1", "--config", str(file)]) == {"every": 3}
    monkeypatch.setenv(VARIABLE, str(other))
    assert settings(["-c", str(file)]) == {"every": 5}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="none.yaml cannot be read"):
        settings([])
    other.write_text("- every\n", encoding="utf8")
    monkeypatch.setenv(VARIABLE, str(other))
    with pytest.raises(ConfigError, match="is a list, expected settings such as"):
        settings([])


@pytest.mark.parametrize("prefetched", [False, True])
def test_the_loader_of_one_of_two_processes_is_read_in_full(*, prefetched: bool) -> None:
    dataset = [(np.full((3, 4, 4), n, dtype=np.uint8), n % 2) for n in range(6)]
    share = OrderedDistributedSampler(dataset, num_replicas=2, rank=1)
    loader: Any = DataLoader(dataset, 2, sampler=share, collate_fn=fast_collate)
    if prefetched:
        plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "device": torch.device("cpu")}
        loader = PrefetchLoader(loader, **plain)
    known = [255 * x if prefetched else x for x, _ in loader]
    assert [int(x[0, 0, 0]) for batch in known for x in batch] == [1, 3, 5]
    found = [255 * x if prefetched else x for x, _ in undivided(loader)]
    assert [round(float(x[0, 0, 0])) for batch in found for x in batch] == [0, 1, 2, 3, 4, 5]
    assert [int(x[0, 0, 0]) for batch in known for x in batch] == [1, 3, 5]  # untouched
    everything = DataLoader(dataset, 2)
    assert undivided(everything) is everything
