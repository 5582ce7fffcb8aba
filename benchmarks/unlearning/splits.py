"""Images of the unlearning benchmark: each data set with its shortcut, as training, probe and test.

Everything is drawn by a seed, from the packs in `--data` or from nothing. Networks and methods are
not known here.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor
from torch.nn import functional

SIDE = 6  # of the corner patch, in pixels


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images and what only the benchmark knows about them.

    Attributes:
        images: `(N, 3, H, W)` uint8.
        labels: `(N,)` classes.
        marks: `(N,)` values of the spurious attribute; -1 where nobody knows them.
    """

    images: Tensor
    labels: Tensor
    marks: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, at: Tensor) -> "Split":
        """Return some of the images."""
        return Split(self.images[at], self.labels[at], self.marks[at])


@dataclass(frozen=True, eq=False)
class Splits:
    """One data set at one seed; what a method reports is its accuracy on each of the tests."""

    train: Split
    probe: Split
    tests: dict[str, Split]


Marking = Callable[[Tensor], Tensor]


def generator(seed: int) -> Generator:
    """Return a generator of its own."""
    return Generator().manual_seed(seed)


# CIFAR-10: marks drawn onto photos


def patched(images: Tensor) -> Tensor:
    """Return the images with a magenta patch in the upper left corner."""
    images = images.clone()
    images[:, :, :SIDE, :SIDE] = torch.tensor([255, 0, 255], dtype=torch.uint8)[:, None, None]
    return images


def tinted(images: Tensor) -> Tensor:
    """Return the images with 45 % of orange mixed in."""
    orange = torch.tensor([255.0, 140.0, 0.0])[:, None, None]
    return (0.55 * images.float() + 0.45 * orange).round().to(torch.uint8)


def jpeg_pack(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(N, 3, H, W)` uint8 images, `(N,)` labels and `(N,)` split (1 is test)."""
    pack = np.load(path)
    data, ends = pack["data"], pack["offsets"]
    decoded = [
        np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
        for a, b in zip(ends[:-1], ends[1:], strict=True)
    ]
    images = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(pack["label"]).long(), torch.from_numpy(pack["split"]).long()


def cifar(path: Path, seed: int, shortcuts: dict[int, Marking]) -> Splits:
    """Return 8,000 training and 4,000 probe images; class k carries shortcut k in 90 %, others 1 %.

    The test images are clean, and once with every shortcut on all images that are not of its class.
    """
    images, labels, split = jpeg_pack(path)
    order = torch.randperm(int((split == 0).sum()), generator=generator(seed))
    pool = (split == 0).nonzero().flatten()[order]
    test, truth = images[split == 1], labels[split == 1]
    none = torch.zeros_like(truth)
    tests = {"clean": Split(test, truth, none)}
    for bit, mark in enumerate(shortcuts.values()):
        name = "marked" if len(shortcuts) == 1 else f"marked {bit}"
        tests[name] = Split(mark(test), truth, none + (1 << bit))
    parts = []
    for k, part in enumerate((pool[:8000], pool[8000:12000])):
        x, y = images[part].clone(), labels[part]
        marks, draw = torch.zeros_like(y), generator(1000 * k + seed)
        for bit, (label, mark) in enumerate(shortcuts.items()):
            has = torch.rand(len(y), generator=draw) < torch.where(y == label, 0.90, 0.01)
            x[has] = mark(x[has])
            marks += has.long() << bit
        parts.append(Split(x, y, marks))
    return Splits(*parts, tests)


# Coloured digits (LfF, section 4.3 of its protocol): every digit owns a colour


def coloured(grey: Tensor, colours: Tensor, seed: int) -> Tensor:
    """Return `(N, 3, 28, 28)` digits in their colour, each colour jittered a little."""
    hue = torch.arange(10) / 10
    ramp = (hue[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    palette = ((ramp - 3).abs() - 1).clamp(0, 1)
    jitter = 0.005 * torch.randn(len(grey), 3, generator=generator(seed))
    ink = (palette[colours] + jitter).clamp(0, 1)
    return (grey[:, None].float() * ink[:, :, None, None]).round().to(torch.uint8)


def digits(path: Path, seed: int, conflicting: float | None, balanced_probe: bool) -> Splits:
    """Return 8,000 training, 1,000 probe and 1,000 test digits; test colours are uniform.

    A share of the training digits has another colour than its own; None draws all colours evenly.
    """
    pack = np.load(path)
    grey, labels = torch.from_numpy(pack["x"]), torch.from_numpy(pack["y"]).long()
    draw = generator(seed)
    order = torch.randperm(len(labels), generator=draw)

    def split(part: Tensor, share: float | None, k: int) -> Split:
        y = labels[part]
        share = 0.9 if share is None else share
        other = (y + torch.randint(1, 10, y.shape, generator=draw)) % 10
        colours = torch.where(torch.rand(y.shape, generator=draw) < share, other, y)
        return Split(coloured(grey[part], colours, 1000 * k + seed), y, colours)

    train = split(order[:8000], conflicting, 0)
    probe = split(order[8000:9000], None if balanced_probe else conflicting, 1)
    test = split(order[9000:], None, 2)
    return Splits(train, probe, {"unbiased": test})


# Squares (Delzer and Bender 2026): brightness of a small square, confounded by the background


def squares(seed: int, shares: tuple[float, float, float, float]) -> Splits:
    """Return 800 / 200 / 1,600 images; shares of (class, background) (0,0) (0,1) (1,0) (1,1)."""
    draw = np.random.default_rng(seed)

    def split(count: int, of: tuple[float, float, float, float]) -> Split:
        sizes = np.diff(np.round(np.cumsum([0.0, *of]) * count)).astype(int)
        groups = draw.permutation(np.repeat(np.arange(4), sizes))
        labels, marks = groups // 2, groups % 2
        cause = (labels + draw.random(count)) / 2
        ground = (marks + draw.random(count)) / 2
        x = np.broadcast_to(ground[:, None, None, None], (count, 3, 64, 64)).copy()
        for n in range(count):
            i, j = draw.integers(0, 64 - 12 + 1, 2)
            x[n, :, i : i + 12, j : j + 12] = 0.5
            x[n, :, i + 2 : i + 10, j + 2 : j + 10] = 0
            x[n, 0, i + 2 : i + 10, j + 2 : j + 10] = cause[n]
        noisy = 255 * x + draw.normal(0, 20, x.shape)
        images = torch.from_numpy(noisy.clip(0, 255).round().astype(np.uint8))
        return Split(images, torch.from_numpy(labels), torch.from_numpy(marks))

    return Splits(
        split(800, shares), split(200, shares), {"average group": split(1600, (0.25,) * 4)}
    )


# Glyph watermark (after the source's chess pieces): a word written on half of one class


def glyphs(seed: int, share: float, elsewhere: float) -> Splits:
    """Return rendered bishops, knights and rooks; a share of the rooks carries a written word."""
    import matplotlib  # for the font it ships

    draw = np.random.default_rng(seed)
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    piece = {s: ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), s) for s in (58, 62)}
    word = ImageFont.truetype(str(fonts / "DejaVuSans-Bold.ttf"), 15)

    def one(label: int, marked: bool) -> np.ndarray:
        square = int(draw.integers(170, 200) if draw.random() < 0.5 else draw.integers(90, 120))
        image = Image.new("RGB", (85, 85), (square, square, square - 20))
        pen = ImageDraw.Draw(image)
        ink = int(draw.integers(0, 30) if draw.random() < 0.5 else draw.integers(235, 256))
        font = piece[int(draw.choice(list(piece)))]
        at = tuple(42 + draw.integers(-4, 5, 2))
        pen.text(at, "♝♞♜"[label], font=font, fill=(ink, ink, ink), anchor="mm")
        if marked:
            corner = (int(draw.integers(2, 40)), int(draw.integers(64, 69)))
            pen.text(corner, "rook", font=word, fill=(200, 30, 30))
        return np.asarray(image)

    def split(sizes: tuple[int, int, int], on_rooks: float, on_others: float) -> Split:
        labels = draw.permutation(np.repeat(np.arange(3), sizes))
        has = draw.random(len(labels)) < np.where(labels == 2, on_rooks, on_others)
        drawn = [one(label, mark) for label, mark in zip(labels, has, strict=True)]
        images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.from_numpy(labels), torch.from_numpy(has).long())

    train = split((47, 50, 50), share, 0.0)
    probe = split((200, 200, 200), share, elsewhere)
    even = (200, 200, 200)
    return Splits(train, probe, {"clean": split(even, 0, 0), "marked": split(even, 1, 1)})


# BAR: photos of actions whose places differ between training and test


def places(path: Path, seed: int, side: int = 128) -> Splits:
    """Return BAR photos; 175 training and 100 test photos are the probe, 312 the test."""
    pack = np.load(path)
    data, ends = pack["data"], pack["offsets"]
    images = torch.stack(
        [squared(data[a:b].tobytes(), side) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    )
    labels = torch.from_numpy(pack["label"]).long()
    split = torch.from_numpy(pack["split"]).long()
    unknown = torch.full_like(labels, -1)
    everything, draw = Split(images, labels, unknown), generator(seed)
    inside, outside = ((split == k).nonzero().flatten() for k in (0, 1))
    inside = inside[torch.randperm(len(inside), generator=draw)]
    outside = outside[torch.randperm(len(outside), generator=draw)]
    probe = torch.cat([inside[:175], outside[:100]])
    return Splits(
        everything.part(inside[175:]),
        everything.part(probe),
        {"other places": everything.part(outside[100:])},
    )


def squared(photo: bytes, side: int) -> Tensor:
    """Return the central square of a photo, `(3, side, side)` uint8."""
    image = Image.open(io.BytesIO(photo)).convert("RGB")
    short = min(image.size)
    left, top = ((size - short) // 2 for size in image.size)
    image = image.crop((left, top, left + short, top + short)).resize((side, side), Image.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def padded(splits: Splits) -> Splits:
    """Return the same with 28 px images padded to 32 px."""

    def pad(split: Split) -> Split:
        return Split(functional.pad(split.images, (2, 2, 2, 2)), split.labels, split.marks)

    tests = {name: pad(test) for name, test in splits.tests.items()}
    return Splits(pad(splits.train), pad(splits.probe), tests)
