"""Training, probe and test images of a recipe, and the order in which they are trained on.

Nothing here knows about optimizers or the guard.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from concept_guard.errors import ConfigError
from concept_guard.training.digits import load_digits
from concept_guard.training.images import Images, Transform, held_out, split_folder
from concept_guard.training.recipe import Recipe

Samples = Dataset[Any]
Batches = DataLoader[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Splits:
    """The images of a run.

    Attributes:
        classes: Class names in the order of their indices.
        train: Training images, augmented.
        probe: Held-out images for the guard and for the accuracy after each epoch.
        tests: Images of the final table: `test`, or `clean` and `marked` for the digits.
        sizes: Images per split.
    """

    classes: tuple[str, ...]
    train: Samples
    probe: Samples
    tests: Mapping[str, Samples]
    sizes: Mapping[str, int]

    def files(self) -> list[Images]:
        """Return those of the splits that are read from files."""
        return [s for s in (self.train, self.probe, *self.tests.values()) if isinstance(s, Images)]


def open_splits(recipe: Recipe) -> Splits:
    """Return the images that a recipe asks for.

    Args:
        recipe: Says where the images are and how they are split.

    Returns:
        The splits; files are only listed here, and read when they are needed.
    """
    return _digits(recipe) if recipe.dataset == "digits" else _folders(recipe)


def _digits(recipe: Recipe) -> Splits:
    size, share = recipe.img_size or 32, recipe.val_fraction or 1 / 3
    mean, std = (torch.tensor(c)[:, None, None] for c in (recipe.mean or (), recipe.std or ()))
    splits = {
        name: TensorDataset((split.images - mean) / std, split.labels)
        for name, split in load_digits(size, recipe.planted, share, recipe.seed).items()
    }
    sizes = {name: len(split) for name, split in splits.items()}
    train, probe = splits.pop("train"), splits.pop("probe")
    return Splits(tuple("0123456789"), train, probe, splits, sizes)


def _folders(recipe: Recipe) -> Splits:
    train = _reader(recipe, recipe.train_split, {})
    index: dict[str, int] = train.class_to_idx
    test = _reader(recipe, recipe.test_split, index)
    everything = torch.arange(len(train))
    if recipe.val_split is None:
        kept, held = _share_held_out(recipe, train, list(index))
        probe = train
    else:
        probe = _reader(recipe, recipe.val_split, index)
        kept, held = everything, torch.arange(len(probe))
    augmented, plain = _transforms(recipe)
    made = {
        "train": _images(recipe, train, kept, augmented),
        "probe": _images(recipe, probe, held, plain),
        "test": _images(recipe, test, torch.arange(len(test)), plain),
    }
    sizes = {name: len(split) for name, split in made.items()}
    return Splits(tuple(index), made["train"], made["probe"], {"test": made["test"]}, sizes)


def _images(recipe: Recipe, reader: Any, positions: Tensor, transform: Transform) -> Images:
    action = recipe.on_unreadable or "skip"
    return Images(reader, positions, transform, seed=recipe.seed, on_unreadable=action)


def _reader(recipe: Recipe, split: str | None, index: Mapping[str, int]) -> Any:
    folder = split_folder(str(recipe.data_dir), str(split))
    reader = class_folders(str(folder), {})
    unknown = sorted(set(reader.class_to_idx) - set(index)) if index else []
    if unknown:
        raise ConfigError(
            f"{folder}: classes {', '.join(unknown)} have no training images; "
            f"expected some of: {', '.join(index)}."
        )
    return reader if not index else class_folders(str(folder), index)


def class_folders(folder: str, index: Mapping[str, int]) -> Any:
    """Return timm's reader of a folder with one sub-folder per class.

    Args:
        folder: Where the images are.
        index: Sub-folder to class index; empty numbers them in alphabetical order.

    Returns:
        The reader: file and class by index.

    Raises:
        ConfigError: If there are no images, or some outside the class folders.
    """
    from timm.data import create_dataset  # heavy

    listing: dict[str, Any] = {"root": folder, "search_split": False}
    try:
        reader = create_dataset("", class_map=dict(index), **listing).reader
    except RuntimeError as error:
        raise ConfigError(f"{folder}: {error}. Put the images in one folder per class.") from error
    outside = [reader.filename(i) for i, (_, k) in enumerate(reader.samples) if k == _none(reader)]
    if outside:
        raise ConfigError(
            f"{folder}: {len(outside)} images such as {outside[0]} lie in no class folder; "
            "move them into one folder per class."
        )
    return reader


def _none(reader: Any) -> int:
    """Return the index of the nameless class that timm gives to images outside the folders."""
    return int(reader.class_to_idx.get("", -1))


def _share_held_out(recipe: Recipe, reader: Any, names: list[str]) -> tuple[Tensor, Tensor]:
    labels = torch.tensor([label for _, label in reader.samples])
    single = [names[k] for k, count in enumerate(labels.bincount().tolist()) if count < 2]
    if single:
        raise ConfigError(
            f"{recipe.data_dir}: classes {', '.join(single)} have a single training image, so none "
            "can be held out for the probe. Add images, or name a probe folder: val_split=FOLDER."
        )
    return held_out(labels, recipe.val_fraction or 0.2, recipe.seed)


def data_config(recipe: Recipe) -> dict[str, Any]:
    """Return timm's data configuration: input size, mean, std, interpolation, crop."""
    asked = {key: getattr(recipe, key) for key in ("img_size", "mean", "std", "crop_pct")}
    return model_data_config(recipe.model, asked)


def model_data_config(model: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's data configuration of a model, with what was asked for in its place.

    Args:
        model: timm's name of the model.
        asked: `img_size`, `mean`, `std`, `crop_pct`; None for the model's own.

    Returns:
        Input size, mean, std, interpolation and crop.
    """
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(model)
    config: dict[str, Any] = resolve_data_config(dict(asked), known.to_dict() if known else None)
    return config


def _transforms(recipe: Recipe) -> tuple[Transform, Transform]:
    """Return the training and the evaluation transform."""
    from timm.data import create_transform
    from torchvision.transforms import Compose, RandomHorizontalFlip

    config = data_config(recipe)
    plain: Transform = create_transform(**config)
    if recipe.aug == "none":
        return plain, plain
    if recipe.aug == "flip":
        return Compose([RandomHorizontalFlip(), plain]), plain
    crop: dict[str, Any] = {
        key: config[key] for key in ("input_size", "mean", "std", "interpolation")
    }
    crop |= {"scale": (0.5, 1.0), "hflip": 0.5, "color_jitter": None}
    augmented: Transform = create_transform(**crop, is_training=True)
    return augmented, plain


def ordered(samples: Samples, recipe: Recipe) -> Batches:
    """Return a loader that reads every image once, in the order of the split."""
    return DataLoader(
        samples,
        recipe.batch_size,
        num_workers=recipe.workers or 0,
        generator=torch.Generator().manual_seed(recipe.seed),
        worker_init_fn=_leave_interrupts,
    )


def naming(samples: Samples, split: str, folder: str | Path | None) -> Callable[[int], str]:
    """Return what tells images apart in words.

    Args:
        samples: The images of a split.
        split: Its name.
        folder: Paths are given below it.

    Returns:
        Position to the path of the image, or to `probe image 12` where there are no files.
    """
    if not isinstance(samples, Images):
        return lambda index: f"{split} image {index}"

    def file(index: int) -> str:
        path, root = Path(samples.name(index)), Path(folder or "/")
        return str(path.relative_to(root) if path.is_relative_to(root) else path)

    return file


def updates_per_epoch(size: int, batch_size: int) -> int:
    """Return the number of batches of an epoch; an incomplete last one is dropped."""
    return max(1, size // batch_size)


def epoch_batches(splits: Splits, recipe: Recipe, epoch: int, skip: int) -> Batches:
    """Return the batches of one epoch in an order that depends on seed and epoch alone.

    Args:
        splits: The images; those of `train` are used.
        recipe: Gives batch size, seed and workers.
        epoch: Counted from zero.
        skip: Batches at the start of the epoch that were trained on before.

    Returns:
        A loader over the remaining batches, which leaves the global random state alone.
    """
    size = splits.sizes["train"]
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    order = torch.randperm(size, generator=generator).tolist()
    count = updates_per_epoch(size, recipe.batch_size)
    batches = [order[i * recipe.batch_size : (i + 1) * recipe.batch_size] for i in range(count)]
    if isinstance(splits.train, Images):
        splits.train.epoch = epoch
    return DataLoader(
        splits.train,
        batch_sampler=batches[skip:],
        num_workers=recipe.workers or 0,
        generator=generator,
        worker_init_fn=_leave_interrupts,
    )


def _leave_interrupts(_worker: int) -> None:
    """Let Ctrl-C stop the main process only: it saves first, and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
