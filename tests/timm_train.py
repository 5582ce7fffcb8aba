"""A script in the manner of timm's train.py, on its public training API; see test_timm_script.

It knows nothing of the guard. The order of things is that of the original: model, loaders, task,
optimizer, resuming, EMA, compilation, saver; `update_ema` after every update.
"""

import argparse
import importlib
from pathlib import Path
from typing import Any

import torch
import yaml
from timm import utils
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from torch import nn

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--data-dir")
PARSER.add_argument("--model")
PARSER.add_argument("--model-kwargs", type=yaml.safe_load, default={})
PARSER.add_argument("--num-classes", type=int)
PARSER.add_argument("--input-size", type=int)
PARSER.add_argument("--epochs", type=int)
PARSER.add_argument("--stop-after", type=int)
PARSER.add_argument("--batch-size", type=int, default=32)
PARSER.add_argument("--grad-accum-steps", type=int, default=1)
PARSER.add_argument("--lr", type=float)
PARSER.add_argument("--output")
PARSER.add_argument("--resume")
PARSER.add_argument("--model-ema", action="store_true")
PARSER.add_argument("--torchcompile")
PARSER.add_argument("--no-validation", action="store_true")
PARSER.add_argument("--device-modules", nargs="+", default=[])


def arguments() -> argparse.Namespace:
    """Read the YAML of `--config` as defaults, then the rest, as timm does: unknown keys pass."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("-c", "--config")
    given, rest = first.parse_known_args()
    if given.config:
        PARSER.set_defaults(**yaml.safe_load(Path(given.config).read_text(encoding="utf8")))
    return PARSER.parse_args(rest)


def main() -> None:
    """Train, validate and save after every epoch."""
    utils.setup_default_logging()
    args = arguments()
    for module in args.device_modules:
        importlib.import_module(module)
    utils.random_seed(42, 0)
    model = create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    loaders: list[Any] = []
    for split, is_training in (("train", True), ("validation", False)):
        if split == "validation" and args.no_validation:
            continue
        loaders.append(
            create_loader(
                create_dataset("", args.data_dir, split=split),
                input_size=(3, args.input_size, args.input_size),
                batch_size=args.batch_size,
                is_training=is_training,
                no_aug=True,
                crop_pct=1.0,
                num_workers=0,
                use_prefetcher=False,
            )
        )
    device = torch.device("cpu")
    task = ClassificationTask(
        model=model, criterion=nn.CrossEntropyLoss(), device=device, dtype=None, verbose=True
    )
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=args.lr)
    first: int | None = 0
    if args.resume:
        first = resume_task_checkpoint(task, args.resume, optimizer)
    if args.model_ema:
        task.setup_ema(decay=0.9)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    saver = utils.CheckpointSaver(
        task.get_trainable_module(), optimizer, checkpoint_dir=args.output, task=task
    )
    for epoch in range(first or 0, args.stop_after or args.epochs):
        utils.random_seed(42 + epoch, 0)  # so that a resumed run sees the same batches
        one_epoch(args, task, loaders[0], optimizer, epoch)
        if len(loaders) > 1:
            evaluator, model = task.create_evaluator(), task.get_eval_model().eval()
            with torch.inference_mode():
                for images, target in loaders[1]:
                    evaluator.update(model(images), target)
        saver.save_checkpoint(epoch, metric=epoch)


def one_epoch(
    args: argparse.Namespace,
    task: ClassificationTask,
    loader: Any,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> None:
    """Train for an epoch."""
    task.get_trainable_module().train()
    steps = args.grad_accum_steps
    updates = epoch * -(-len(loader) // steps)
    optimizer.zero_grad()
    for n, (images, target) in enumerate(loader):
        loss = task(images, target)["loss"]
        (loss / steps).backward()
        if (n + 1) % steps and n + 1 < len(loader):
            continue
        optimizer.step()
        updates += 1
        optimizer.zero_grad()
        task.update_ema(step=updates)


if __name__ == "__main__":
    main()
