"""The recipes for other training loops run as they stand, and unlearn the tint."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOOPS = ("in_timm_task", "in_lightning", "in_transformers", "in_accelerate")


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_a_recipe_unlearns_the_tint(tmp_path: Path, name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / f"{name}.py")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"without the tint ([\d.]+), other digits with the tint ([\d.]+)", done.stdout
    )
    assert found
    assert float(found[1]) > 0.95
    assert float(found[2]) > 0.693 + 0.1  # without the guard


def test_every_recipe_is_listed() -> None:
    listed = (ROOT / "recipes" / "README.md").read_text(encoding="utf8")
    files = {p.name for p in (ROOT / "recipes").iterdir() if p.suffix in {".py", ".yaml"}}
    assert {name for name in files if name not in listed} == {"tinted_digits.py"}
