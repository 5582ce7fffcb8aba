"""A world of tiny photos: one colour per class, in the folders that timm expects."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def write_photos(root: Path, splits: dict[str, int]) -> Path:
    """Write `<root>/<split>/<class>/<n>.png`, as many per class as `splits` says."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (24, 24, 3), dtype=np.uint8)
                pixels[:, :, label] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root
