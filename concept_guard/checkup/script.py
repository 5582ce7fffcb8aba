"""Checkup: what in the arguments of timm's train.py is at odds with a guard in it.

Nothing here builds a model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from concept_guard.checkup.arguments import Arguments
from concept_guard.errors import ProbeError
from concept_guard.examination import Problem
from concept_guard.integrations.timm_script import KEY
from concept_guard.reading import check_counts

AUTO = "concept_guard.integrations.timm_auto"


def against(
    arguments: Arguments, data: Mapping[str, object], action: tuple[str, ...], *, whole: bool
) -> Iterator[Problem]:
    """Yield what stands against a guard in the script.

    Args:
        arguments: Of the script.
        data: All that its YAML holds.
        action: Of the guard.
        whole: Whether the command line is known, and not its YAML alone.

    Yields:
        Problems.
    """
    if importlib.util.find_spec("timm.task") is None:
        yield _stop("timm", "this release has no timm.task", "timm 1.0.31", "pip install -U timm")
    yield from _attached(arguments, data, whole=whole)
    if arguments.kd_model_name:
        yield _stop(
            "--kd-model-name", "distillation is not guarded", "", "leave it out, or the guard"
        )
    if arguments.naflex_loader:
        yield _stop(
            "--naflex-loader",
            "its batches are dicts of patches, and the script makes its validation loader of them",
            "a probe of (images, labels)",
            "leave it out: NaFlex models take plain images; or write the loop with ConceptGuard",
        )
    if arguments.torchscript:
        yield _stop(
            "--torchscript",
            "a ScriptModule takes no hooks of Python",
            "an nn.Module",
            "leave it out; --torchcompile is guarded",
        )
    if not arguments.val_split:
        yield _stop(
            "--val-split",
            "it is empty, so that the script builds no validation loader, the guard's probe",
            "held-out images",
            "--val-split validation",
        )
    if "rebalance" in action or "project" in action:
        yield from _losses(arguments)


def _attached(
    arguments: Arguments, data: Mapping[str, object], *, whole: bool
) -> Iterator[Problem]:
    if whole and AUTO not in (arguments.device_modules or []):
        yield _stop(
            "--device-modules", "nothing attaches the guard", AUTO, f"--device-modules {AUTO}"
        )
    near = [key for key in get_close_matches(KEY, data, n=3, cutoff=0.75) if key != KEY]
    if near and KEY not in data:
        yield _stop(
            near[0],
            "these settings of the guard are not read, and the script says nothing",
            "",
            f"call the block {KEY}:",
        )


def _losses(arguments: Arguments) -> Iterator[Problem]:
    mixing = [
        f"--{name.replace('_', '-')}"
        for name in ("mixup", "cutmix", "cutmix_minmax")
        if getattr(arguments, name)
    ]
    if mixing:
        yield Problem(
            ", ".join(mixing),
            "the targets are soft, so that no sample is weighed by its class, and the classifier "
            "does not learn to do without what is projected out",
            "targets that are classes",
            "leave it out, or switch it off once a concept is erased (--mixup-off-epoch)",
            stops=False,
        )
    if arguments.jsd_loss:
        yield Problem(
            "--jsd-loss",
            "it is no mean over samples, so that none can be weighed",
            "a loss per sample",
            "leave it out",
            stops=False,
        )


def _stop(where: str, found: str, expected: str, mend: str) -> Problem:
    return Problem(where, found, expected, mend, stops=True)


def images_in(arguments: Arguments, num_classes: int, problems: list[Problem]) -> dict[str, int]:
    """Return how many images the splits of an image folder have, as the script finds them.

    Args:
        arguments: Of the script.
        num_classes: Logits of the model.
        problems: What is wrong with the held-out ones is added.

    Returns:
        Images by `train` and `val`; empty if there is no image folder here.
    """
    root = arguments.data_dir
    if root is None or arguments.dataset not in ("", "folder", "imagefolder"):
        return {}
    if not Path(root).is_dir():
        problems.append(
            Problem("--data-dir", f"no folder {root}", "", "give the image folder", stops=True)
        )
        return {}
    found: dict[str, int] = {}
    for name, split in (("train", arguments.train_split), ("val", arguments.val_split)):
        if not split:
            continue
        try:
            found[name] = len(labels := _labels(root, split))
        except RuntimeError as error:
            problems.append(Problem.of(f"split {split}", error, mend="give another folder"))
            continue
        try:
            check_counts([labels], num_classes, every_class=name == "val")
        except ProbeError as error:
            problems += [
                Problem.of(f"split {split}", line.removeprefix("probe: "))
                for line in str(error).splitlines()
            ]
    return found


def _labels(root: str, split: str) -> torch.Tensor:
    from timm.data import create_dataset

    data: Any = create_dataset("", root=root, split=split)
    return torch.tensor([label for _, label in data.reader.samples], dtype=torch.long)
