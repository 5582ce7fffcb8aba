"""The recipes for other training loops run as they stand, and unlearn the tint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOPS = ("in_timm_task", "in_lightning", "in_transformers", "in_accelerate")
TWO = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def shares(name: str, folder: Path, *launcher: str) -> list[tuple[float, float]]:
    """Run a recipe and return the shares that are right without and with the tint, as printed."""
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "recipes" / f"{name}.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = r"without the tint ([\d.]+), other digits with the tint ([\d.]+)"
    return [(float(plain), float(tinted)) for plain, tinted in re.findall(said, done.stdout)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_recipe_unlearns_the_tint(tmp_path: Path, name: str) -> None:
    ((plain, tinted),) = shares(name, tmp_path)
    assert plain > 0.95
    assert tinted > 0.693 + 0.1  # without the guard


@pytest.mark.slow
@pytest.mark.parametrize(("name", "without"), [("in_ddp", 0.213), ("in_accelerate", 0.693)])
def test_a_recipe_unlearns_the_tint_in_two_processes(
    tmp_path: Path, name: str, without: float
) -> None:
    ((plain, tinted),) = shares(name, tmp_path, *TWO)  # the first process speaks
    assert plain > 0.95
    assert tinted > without + 0.1


def test_every_recipe_is_listed() -> None:
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf8")
    files = {p.name for p in (ROOT / "recipes").iterdir() if p.suffix in {".py", ".yaml"}}
    assert {name for name in files if name not in listed} == {"tinted_digits.py"}
