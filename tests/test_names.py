"""Names of probe images: those of the files, in the order of the probe, or none."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from concept_guard.names import file_names


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


def test_names_are_those_of_the_data_set_below_what_they_have_in_common(tmp_path: Path) -> None:
    assert file_names(DataLoader(Timm(NAMES)), 3) == tuple(NAMES)
    assert file_names(DataLoader(Folder(tmp_path, NAMES)), 3) == tuple(NAMES)
    few = Subset(Subset(Folder(tmp_path, NAMES), [2, 1, 0]), [2, 0])
    assert file_names(DataLoader(few), 2) == ("cat/a.jpg", "dog/c.jpg")


def test_an_order_that_is_not_that_of_the_names_has_none() -> None:
    shuffled = torch.utils.data.SubsetRandomSampler([0, 1, 2])
    assert file_names(DataLoader(Timm(NAMES), sampler=shuffled), 3) is None
    assert file_names(DataLoader(Timm(NAMES)), 2) is None  # some are left out, nobody knows which


class Broken(Timm):
    """Cannot be asked."""

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Fail."""
        raise RuntimeError(f"{index} {basename} {absolute}")


@pytest.mark.parametrize(
    "probe",
    [
        [(torch.zeros(1), torch.zeros(1))],
        DataLoader(torch.utils.data.TensorDataset(torch.zeros(3))),
        DataLoader(Broken(NAMES)),
        None,
    ],
)
def test_whatever_has_no_names_has_none(probe: object) -> None:
    assert file_names(probe, 3) is None
