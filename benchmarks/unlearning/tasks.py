"""Tasks of the unlearning benchmark: a data set, a network and how it is trained. No methods here.

Every method starts from the same network, trained plainly for `base_epochs`, and may train it for
`epochs` more (or as long from scratch, where that is the method).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import splits
import timm
import torch
from splits import Split, Splits, generator
from torch import Tensor, nn
from torch.nn import functional

MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


class Convolutions(nn.Module):
    """Five convolutions of 16 channels, average pooling and a linear classifier."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        strides, channels = (2, 2, 2, 2, 1), (3, 16, 16, 16, 16, 16)
        layers: list[nn.Module] = []
        for n, stride in enumerate(strides):
            layers += [nn.Conv2d(channels[n], channels[n + 1], 3, stride, 1), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.head(self.body(x))


@dataclass(frozen=True)
class Task:
    """A data set with the network that learns it.

    Attributes:
        name: Of the row in the table.
        draw: Seed to images.
        build: Returns an untrained (or pretrained) network.
        optimizer: Model to its optimizer.
        base_epochs: Plain training before any method.
        epochs: Training that a method may use.
        batch: Images per update.
        augment: Applied to every training batch, uint8 to uint8.
        cycle: Whether the learning rate goes through one cycle in either training.
    """

    name: str
    draw: Callable[[int], Splits]
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    base_epochs: int
    epochs: int
    batch: int = 64
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    cycle: bool = True


def normalised(images: Tensor) -> Tensor:
    """Return uint8 images as network input in [-1, 1]."""
    return images.float().div(127.5).sub(1.0)


def cropped(images: Tensor, draw: torch.Generator) -> Tensor:
    """Return random crops of 40 to 100 % of the area, some mirrored, at the same size."""
    n = len(images)
    scale = (0.4 + 0.6 * torch.rand(n, generator=draw)).sqrt()
    shift = (2 * torch.rand(n, 2, generator=draw) - 1) * (1 - scale)[:, None]
    mirror = torch.where(torch.rand(n, generator=draw) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * mirror, scale, shift
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    drawn = functional.grid_sample(images.float(), grid, align_corners=False)
    return drawn.round().clamp(0, 255).to(torch.uint8)


def batches(
    task: Task, train: Split, epochs: int, seed: int, weights: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `(images, labels, positions)` of all epochs, in the same order for every method.

    Args:
        task: Its batch size and augmentation.
        train: What is learnt.
        epochs: Passes over it.
        seed: Of the order, and of torch's own generator, from which dropout draws.
        weights: `(N,)` chances of being drawn, with replacement; None takes every image once.
    """
    draw = generator(seed)
    torch.manual_seed(seed)
    for _ in range(epochs):
        if weights is None:
            order = torch.randperm(len(train), generator=draw)
        else:
            order = torch.multinomial(weights, len(train), replacement=True, generator=draw)
        for at in order.split(task.batch):
            images = train.images[at]
            if task.augment:
                images = task.augment(images, draw)
            yield normalised(images), train.labels[at], at


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits in eval mode, in chunks; the mode is left as it was."""
    was = model.training
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(normalised(x)) for x in images.split(250)])
    model.train(was)
    return logits


def base(task: Task, data: Splits, seed: int, folder: Path) -> nn.Module:
    """Return the network that every method starts from; it is trained once and stored."""
    path = folder / f"{task.name.replace(' ', '_')}_{seed}.pt"
    torch.manual_seed(seed)
    model = task.build()
    if path.is_file():
        model.load_state_dict(torch.load(path))
        return model
    plain(task, model, data.train, task.base_epochs, seed)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model


def plain(task: Task, model: nn.Module, train: Split, epochs: int, seed: int) -> None:
    """Train without any method."""
    descend(task, model, train, epochs, seed, mean_loss)


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def mean_loss(model: nn.Module, x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """Return the plain mean."""
    del at
    return functional.cross_entropy(model(x), y)


def descend(
    task: Task,
    model: nn.Module,
    train: Split,
    epochs: int,
    seed: int,
    loss: Loss,
    *,
    weights: Tensor | None = None,
) -> None:
    """Train a network on a loss.

    Args:
        task: Its optimizer, batch size and augmentation.
        model: Changed in place.
        train: What is learnt.
        epochs: Passes over it.
        seed: Of the order.
        loss: Model, images, labels and positions of a batch to a scalar.
        weights: `(N,)` chances of being drawn, with replacement; None takes every image once.
    """
    optimizer = Descent(task, model, len(train), epochs)
    model.train()
    for x, y, at in batches(task, train, epochs, seed, weights):
        optimizer.step(loss(model, x, y, at))


class Descent:
    """The optimizer of a task, its learning rate in one cycle over the training if it has one."""

    def __init__(self, task: Task, model: nn.Module, images: int, epochs: int) -> None:
        self.optimizer = task.optimizer(model)
        steps = epochs * -(-images // task.batch)
        rate = self.optimizer.param_groups[0]["lr"]
        one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, cycle_momentum=False)
        cycles = task.cycle and epochs > 0
        self.schedule = one_cycle(self.optimizer, rate, total_steps=steps) if cycles else None

    def step(self, loss: Tensor) -> None:
        """Descend a loss by one update."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule:
            self.schedule.step()


def sgd(rate: float, **changes: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return the maker of an optimizer with momentum, Nesterov's unless that is changed."""
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, **MOMENTUM | changes)


def adamw(rate: float, decay: float = 0.05) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return the maker of AdamW."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)


def resnet() -> nn.Module:
    """Return an untrained resnet10t for ten classes."""
    return timm.create_model("resnet10t", num_classes=10)


def small_resnet() -> nn.Module:
    """Return an untrained resnet of four blocks for ten classes."""
    return timm.create_model("test_resnet", num_classes=10)


def vit() -> nn.Module:
    """Return an untrained small vision transformer for 32 px and ten classes."""
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)


def pretrained(weights: Path) -> nn.Module:
    """Return mobilenetv2_100 with ImageNet weights and a new head for four classes."""
    model = timm.create_model(
        "mobilenetv2_100", pad_type="same", bn_eps=1e-3, checkpoint_path=str(weights)
    )
    model.reset_classifier(4)
    return model


def registry(data: Path, weights: Path) -> dict[str, Task]:
    """Return all tasks by name; those that end in `clean` have no shortcut."""
    c10, mnist = data / "cifar10_jpg_20k10k.npz", data / "mnist_t10k.npz"
    bar = data / "bar4_licensed_128.npz"
    marks = {"patch": {0: splits.patched}, "tint": {1: splits.tinted}}
    marks["two"] = {**marks["patch"], **marks["tint"]}
    marks["clean"] = {}
    tasks = [
        Task(f"cifar {name}", partial(splits.cifar, c10, shortcuts=m), resnet, sgd(0.02), 12, 3)
        for name, m in marks.items()
    ]
    tasks += [
        Task(
            f"vit {name}",
            partial(splits.cifar, c10, shortcuts=marks[name]),
            vit,
            adamw(1e-3),
            15,
            3,
        )
        for name in ("two", "clean")
    ]
    for share in (0.005, 0.01, 0.02, 0.05, None):
        name = f"digits {100 * share:g} %" if share else "digits clean"
        draw = partial(digits32, mnist, conflicting=share)
        tasks.append(Task(name, draw, small_resnet, adamw(2e-3), 10, 10))
    for name, shares in (
        ("squares symmetric", (0.49, 0.01, 0.01, 0.49)),
        ("squares asymmetric", (0.25, 0.25, 0.49, 0.01)),
        ("squares clean", (0.25, 0.25, 0.25, 0.25)),
    ):
        # timm starts with zeros in the last map of each block, from where nothing is learnt at this
        # rate: without any shortcut .51 of the test images after 50 epochs, otherwise .82.
        build = partial(timm.create_model, "resnet18", num_classes=2, zero_init_last=False)
        optimizer = sgd(1e-3, nesterov=False, weight_decay=1e-4)
        tasks.append(
            Task(
                name,
                partial(splits.squares, shares=shares),
                build,
                optimizer,
                5,
                15,
                100,
                cycle=False,
            )
        )
    for name, share in (("glyphs", 0.5), ("glyphs clean", 0.0)):
        draw = partial(splits.glyphs, share=share, elsewhere=0.1 * share)
        tasks.append(Task(name, draw, partial(Convolutions, 3), adamw(2e-3, 0), 600, 60, 50))
    tasks.append(
        Task(
            "bar",
            partial(splits.places, bar),
            partial(pretrained, weights),
            sgd(0.005),
            4,
            4,
            32,
            cropped,
        )
    )
    return {task.name: task for task in tasks}


def digits32(path: Path, seed: int, conflicting: float | None) -> Splits:
    """Return coloured digits padded to 32 px, with a probe of evenly drawn colours."""
    return splits.padded(splits.digits(path, seed, conflicting, balanced_probe=True))
