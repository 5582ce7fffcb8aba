"""What the pages say is true: their commands run, their links lead somewhere, their tags are all.

The commands run in order, in a copy of the project, as a reader would type them; the mark `docs`
selects them. Commands that install are those of `.ci/run`, which runs them as they stand.
"""

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_readme import blocks, local_links, run_blocks

from concept_guard import tags

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(f"recipes/{p}.md" for p in ("README", "concepts", "limits", "tags")))
BY_CI = "pip install "  # .ci/run runs these lines itself


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf8")


def commands(text: str) -> list[str]:
    """Return the commands of a page, each in one line; comments behind them are no part."""
    joined = "".join(blocks(text, "sh")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith(BY_CI)]


COMMANDS = list(dict.fromkeys(line for name in PAGES for line in commands(page(name))))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the pages take for granted: the project as it was checked out."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("recipes", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "README.md", folder)
    return folder


def environment() -> dict[str, str]:
    """Return one in which the commands are those of this interpreter."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": beside, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}


def run(command: str, folder: Path) -> None:
    """Run a command to its end, or, if it is a server, until it answers."""
    if command.startswith("tensorboard "):
        answers(command, folder)
        return
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def answers(command: str, folder: Path, seconds: float = 120.0) -> None:
    """Start TensorBoard on a free port and stop it once it says where it is."""
    words = ["exec", command, "--port", "0"]
    with subprocess.Popen(
        ["bash", "-c", " ".join(words)], cwd=folder, env=environment(), stderr=subprocess.PIPE
    ) as server:
        assert server.stderr is not None
        said, end = b"", time.monotonic() + seconds
        try:
            while b"http://" not in said and time.monotonic() < end:
                if select.select([server.stderr], [], [], 1.0)[0]:
                    part = os.read(server.stderr.fileno(), 4096)
                    if not part:
                        break
                    said += part
        finally:
            server.terminate()
    assert b"http://" in said, said.decode()


@pytest.mark.docs
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(project: Path, command: str) -> None:
    run(command, project)


@pytest.mark.docs
def test_a_command_that_fails_is_found(project: Path) -> None:
    with pytest.raises(AssertionError, match="no such folder"):
        run("concept-guard report output/train/absent", project)
    with pytest.raises(AssertionError, match="usage: tensorboard"):
        answers("tensorboard --logdri runs", project)


def test_the_commands_of_a_page_are_found() -> None:
    text = "```sh\npip install . && a\na b   # why\nc \\\n  d\n```\n```text\nnever\n```\n"
    assert commands(text) == ["a b", "c    d"]
    assert {"concept-guard", "python", "tensorboard", "torchrun"} == {
        command.split()[0] for command in COMMANDS
    }


@pytest.mark.parametrize("name", PAGES[1:])
def test_the_python_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks(page(name))


def anchors(text: str) -> set[str]:
    """Return the names under which GitHub knows the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    shown = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in shown}


def broken(name: str, text: str) -> list[str]:
    """Return the links of a page that lead to no file of the project, or to no heading of it."""
    wrong = [link for link in local_links(text) if not (ROOT / name).parent.joinpath(link).exists()]
    for target in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        there = (ROOT / name).parent / file if file else ROOT / name
        if "://" not in target and there.suffix == ".md" and there.exists():
            whole = there.read_text(encoding="utf8") if file else text
            wrong += [target] if anchor not in anchors(whole) else []
    return wrong


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    assert not broken(name, page(name))


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = (
        "# A heading: [x](tags.md)\n[a](absent.md) [b](#absent) [c](#a-heading-x) [d](tags.md#no)"
    )
    assert broken("recipes/concepts.md", text) == ["absent.md", "#absent", "tags.md#no"]


def listed(text: str) -> list[str]:
    """Return the tags that stand in the first column of a table."""
    return re.findall(r"^\| `(concept_guard/[^`]+)` \|", text, re.MULTILINE)


def written() -> set[str]:
    """Return the tags that the code writes; those of a slot with a k for its number."""
    slots = {form.format("k") for form in (*tags.SLOT.values(), tags.CARD)}
    fixed = {tags.MISREAD, tags.REPORT, tags.HISTORY}
    return slots | fixed | {tag for tag, _ in tags.ROUND} | set(tags.ACTS.values())


def test_the_page_of_tags_lists_exactly_the_tags_of_the_code() -> None:
    found = listed(page("recipes/tags.md"))
    assert sorted(found) == sorted(written())
    less = page("recipes/tags.md").replace("`concept_guard/probe/top1` |", "`x` |")
    assert sorted(listed(less)) != sorted(written())  # control


def test_no_tag_is_spelled_anywhere_but_in_the_table() -> None:
    spelled = re.compile(r'"concept_guard/(summary|probe|acts|slot_|cost|stability|cards|report)')
    files = [*(ROOT / "concept_guard").rglob("*.py")]
    found = {path.name for path in files if spelled.search(path.read_text(encoding="utf8"))}
    assert found == {"tags.py", "entries.py"}
