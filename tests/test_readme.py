"""What the README says is true: its Python runs, its links exist, its commands are what CI runs.

The Python blocks run top to bottom in one namespace, on the CPU, in an empty folder with a small
`guard.yaml`. They find `model`, `loader`, `val_loader`, `criterion` and `optimizer` as a reader's
own script would have them; whatever else a block needs, it or an earlier block must make.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMMANDS = (
    "pip install . && concept-guard run recipes/quickstart.yaml",
    'pip install ".[dev]" && pytest',
)
GUARD_YAML = "start: 2\nevery: 2\ntrack_every: 1\nconcepts: 4\n"


def readme() -> str:
    return README.read_text(encoding="utf8")


def blocks(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_blocks(text: str) -> None:
    """Run every Python block of `text`, as one script that has a model and data already."""
    torch.manual_seed(0)
    images, labels = torch.randn(48, 3, 32, 32), torch.arange(48) % 3
    data = TensorDataset(images, labels)
    model = timm.create_model("test_resnet", num_classes=3)
    namespace: dict[str, object] = {
        "model": model,
        "loader": DataLoader(data, batch_size=12, shuffle=True),
        "val_loader": DataLoader(data, batch_size=16),
        "criterion": torch.nn.CrossEntropyLoss(reduction="none"),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
    }
    for block in blocks(text, "python"):
        exec(compile(block, "README.md", "exec"), namespace)


def local_links(text: str) -> list[str]:
    """Return the targets of links and images that point into the project."""
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text)
    return [t.split("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("guard.yaml").write_text(GUARD_YAML, encoding="utf8")
    assert blocks(readme(), "python"), "the README shows no Python"
    run_blocks(readme())


def test_a_block_that_does_not_run_is_found() -> None:
    with pytest.raises(NameError, match="undefined"):
        run_blocks("text\n```python\nx = 1\n```\nmore\n```python\nundefined + x\n```\n")


def test_every_local_link_exists() -> None:
    missing = [link for link in local_links(readme()) if not (ROOT / link).exists()]
    assert not missing, missing


def test_local_links_are_told_from_others() -> None:
    text = "[a](LICENSE) ![b](docs/x.png) [c](https://a.b/c) [d](#part) [e](README.md#part 't')"
    assert local_links(text) == ["LICENSE", "docs/x.png", "README.md"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_two_commands_are_on_the_page(command: str) -> None:
    lines = [line for block in blocks(readme(), "sh") for line in block.splitlines()]
    assert lines.count(command) == 1


def test_the_files_that_the_commands_name_exist() -> None:
    assert (ROOT / "recipes" / "quickstart.yaml").is_file()
    assert (ROOT / "pyproject.toml").is_file()


def test_ci_is_a_valid_executable_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
