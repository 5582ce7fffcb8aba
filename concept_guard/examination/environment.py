"""Doctor: the versions and devices that a report of a fault needs, and nothing about the person.

Nothing here looks at models. No user name, host name, path or environment variable is read.
"""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

NEEDED = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn")
NEEDED_TOO = ("pydantic", "safetensors", "tensorboard")
OPTIONAL = ("lightning", "transformers", "accelerate")


def environment() -> str:
    """Return versions, platform and devices, a line each."""
    return "\n".join(f"{name:14}{value}" for name, value in _entries())


def _entries() -> Iterator[tuple[str, str]]:
    yield "concept-guard", _version("concept-guard") or "not installed, run from its source"
    yield "python", f"{platform.python_implementation()} {platform.python_version()}"
    for name in NEEDED + NEEDED_TOO:
        yield name, _version(name) or "missing"
    for name in OPTIONAL:
        yield name, _version(name) or "not installed (optional)"
    yield "platform", f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} logical CPUs"
    yield "autocast", f"CPU to {str(torch.get_autocast_dtype('cpu')).removeprefix('torch.')}"
    yield "cuda", torch.version.cuda or torch.version.hip or "not built in"
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(n)
            yield f"cuda:{n}", f"{found.name}, {found.total_memory // 2**30} GiB"
    else:
        yield "devices", "mps" if torch.backends.mps.is_available() else "cpu alone"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
