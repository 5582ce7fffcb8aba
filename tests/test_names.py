"""Names of probe images: those of the files, in the order of the probe, or none."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, SubsetRandomSampler, TensorDataset
from worlds import PROBE, QUICK, fallen, world

from concept_guard import ConceptGuard
from concept_guard.history import read_history
from concept_guard.names import file_names
from concept_guard.probe import probe_batches


class Timm(Dataset[int]):
    """Tells names as the data sets of timm do."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the name."""
        assert not basename
        assert not absolute
        return self.names[index]

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return len(self.names)


class Folder(Dataset[int]):
    """Tells names as the folders of torchvision do."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.samples = [(str(root / name), 0) for name in names]

    def __getitem__(self, index: int) -> int:
        return index

    def __len__(self) -> int:
        return len(self.samples)


NAMES = ["cat/a.jpg", "cat/b.jpg", "dog/c.jpg"]


def named(loader: Any, images: int) -> tuple[str, ...] | None:
    return file_names(probe_batches(loader, 0), images)


def test_names_are_those_of_the_data_set_below_what_they_have_in_common(tmp_path: Path) -> None:
    assert named(DataLoader(Timm(NAMES)), 3) == tuple(NAMES)
    assert named(DataLoader(Folder(tmp_path, NAMES)), 3) == tuple(NAMES)
    few = Subset(Subset(Folder(tmp_path, NAMES), [2, 1, 0]), [2, 0])
    assert named(DataLoader(few), 2) == ("cat/a.jpg", "dog/c.jpg")


def test_names_stand_in_the_order_in_which_the_guard_reads_the_probe() -> None:
    assert named(DataLoader(Timm(NAMES), shuffle=True), 3) == tuple(NAMES)
    some = SubsetRandomSampler([2, 0])
    assert named(DataLoader(Timm(NAMES), sampler=some), 2) == ("cat/a.jpg", "dog/c.jpg")
    assert named(DataLoader(Timm(NAMES)), 2) is None  # some are left out, nobody knows which


class Wrapped:
    """Shows a loader as the prefetcher of timm does."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader, self.dataset, self.sampler = loader, loader.dataset, loader.sampler

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


def test_a_wrapped_loader_has_names_only_in_the_order_of_its_data_set() -> None:
    assert named(Wrapped(DataLoader(Timm(NAMES))), 3) == tuple(NAMES)
    assert named(Wrapped(DataLoader(Timm(NAMES), shuffle=True)), 3) is None


class Broken(Timm):
    """Cannot be asked."""

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Fail."""
        raise RuntimeError(f"{index} {basename} {absolute}")


@pytest.mark.parametrize(
    "probe",
    [
        [(torch.zeros(1), torch.zeros(1))],
        DataLoader(TensorDataset(torch.zeros(3))),
        DataLoader(Broken(NAMES)),
    ],
)
def test_whatever_has_no_names_has_none(probe: Any) -> None:
    assert named(probe, 3) is None


class Photos(TensorDataset):
    """Images with file names."""

    def filename(self, index: int) -> str:
        """Return the name."""
        return f"photos/{index:03}.jpg"


def test_what_a_guard_logs_has_the_names_of_the_files(tmp_path: Path) -> None:
    probe = world(PROBE)
    loader = DataLoader(Photos(probe.images, probe.labels), batch_size=100)
    with ConceptGuard(fallen(), probe=loader, config=QUICK, log_dir=tmp_path) as guard:
        report = guard.round()
    assert report is not None
    flag = next(f for f in report.flags if f.status == "erased")
    (found,) = read_history(tmp_path).rounds
    (kept,) = [c for c in found.concepts if c.id == flag.concept]
    assert kept.flags[0].examples == tuple(f"{i:03}.jpg" for i in flag.examples)
