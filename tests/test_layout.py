"""Imports run one way, hooks live in one file, and recipes see only the front door."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import concept_guard

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "concept_guard"

# A module may import only from the rows above its own; same-row imports are forbidden.
LAYERS = [
    {"errors", "clock", "ids", "decisions", "sharding", "entries", "thresholds", "counterfactual"},
    {"ranks", "contrasts"},
    {"strict", "reading", "deciding"},
    {"config", "styles"},
    {"layouts", "heads"},
    {"probe", "sites", "hooks"},
    {"attached", "surveying"},
    {"taps", "steadiness", "names", "effects"},
    {"directions"},
    {"influence", "association", "changes"},
    {"flags"},
    {"tracking", "refit", "benefit"},
    {"correction", "augmentation"},
    {"erasure"},
    {"penalty", "baking"},
    {"trial"},
    {"rounds"},
    {"records", "cards", "localisation", "wiring"},
    {"measures", "explanation", "history", "events", "summaries", "tags"},
    {"health", "keeping"},
    {"logs", "state", "tail", "references"},
    {"corrector", "last_round", "leaks"},
    {"reporting", "sampling", "picturing"},
    {"watch", "rebalancing"},
    {"acts"},
    {"schedule"},
    {"examination"},
    {"guard", "report"},
    {"diagnosis", "integrations", "board", "showing"},
    {"training"},
    {"audit", "checkup"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
RANK = {name: row for row, names in enumerate(LAYERS) for name in names}
INNER = {
    "reading",
    "probe",
    "layouts",
    "sites",
    "hooks",
    "surveying",
    "taps",
    "directions",
    "influence",
    "association",
    "tracking",
    "correction",
    "cards",
}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "concept_guard",
    "tests",
    "recipes",
    "benchmarks",
}
SLOW_TO_IMPORT = ["timm", "tensorboard", "sklearn", "torch", "scipy", "numpy", "pydantic"]
FOR_TENSORBOARD = ["entries", "history", "report", "report.runs", "board", "showing"]
HOOK = re.compile(r"register_(module_)?(forward|backward|full_backward)\w*hook|register_hook")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"), str(path))


def front_door() -> dict[str, str]:
    """Return public name -> stage that it comes from, as `__init__` imports it."""
    names = {"__version__": "errors"}
    for node in ast.walk(parse(PACKAGE / "__init__.py")):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("concept_guard."):
            stage = (node.module or "").split(".")[1]
            names |= {alias.asname or alias.name: stage for alias in node.names}
    return names


def imported(tree: ast.AST, below: str = "concept_guard") -> Iterator[str]:
    """Yield the first component below the package of every import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{'.' * node.level}{node.module or ''}"  # in no row: write the full name
        elif isinstance(node, ast.ImportFrom) and node.module == below:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{below}."):
            yield (node.module or "").removeprefix(f"{below}.").split(".")[0]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{below}."):
                    yield alias.name.removeprefix(f"{below}.").split(".")[0]


def upward(stage: str, targets: Iterable[str]) -> list[str]:
    """Name every import of `stage` that does not point to a row above its own."""
    public = front_door()
    wrong = []
    for target in sorted(set(targets) - {stage}):
        module = target if target in RANK else public.get(target)
        if module is None:
            wrong.append(f"{stage} imports {target}, which is in no row of LAYERS")
        elif RANK[module] >= RANK[stage]:
            wrong.append(f"{stage} imports {target}")
    return wrong


def test_every_import_points_to_a_row_above() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if stage == "__init__":
            continue  # the front door re-exports from everywhere
        assert stage in RANK, f"{path.relative_to(ROOT)} belongs into a row of LAYERS"
        wrong += upward(stage, imported(parse(path)))
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("from concept_guard.guard import ConceptGuard", "taps imports guard"),
        ("import concept_guard.guard as g", "taps imports guard"),
        ("from concept_guard import guard", "taps imports guard"),
        ("def f():\n    from concept_guard.logs import table", "taps imports logs"),
        ("from concept_guard import nothing", "taps imports nothing, which is in no row"),
        ("from . import probe", "taps imports ., which is in no row"),
    ],
)
def test_an_upward_import_is_found(line: str, complaint: str) -> None:
    (found,) = upward("taps", imported(ast.parse(line)))
    assert found.startswith(complaint)
    assert not upward("taps", imported(ast.parse("from concept_guard.probe import x, y")))


@pytest.mark.parametrize(
    "folder", ["directions", "diagnosis", "examination", "report", "training", "audit", "checkup"]
)
def test_the_files_of_a_stage_do_not_import_each_other_in_a_circle(folder: str) -> None:
    graph = {
        path.stem: set(imported(parse(path), f"concept_guard.{folder}"))
        for path in (PACKAGE / folder).glob("*.py")
        if path.stem != "__init__"
    }
    user, used = next((name, min(used)) for name, used in graph.items() if used)
    TopologicalSorter(graph).prepare()
    with pytest.raises(CycleError):  # control: turn one of the imports around as well
        TopologicalSorter({**graph, used: {user}}).prepare()


def test_the_training_loop_and_the_command_line_never_reach_into_a_stage() -> None:
    paths = [*(PACKAGE / "training").rglob("*.py"), PACKAGE / "cli.py", PACKAGE / "__main__.py"]
    reached = {path.stem: INNER & set(imported(parse(path))) for path in paths}
    assert not any(reached.values()), reached
    assert set(imported(parse(PACKAGE / "guard.py"))) & INNER  # control: the guard does


def test_the_front_door_only_re_exports() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    extra = [
        ast.unparse(node).splitlines()[0]
        for node in parse(PACKAGE / "__init__.py").body
        if not isinstance(node, allowed)
    ]
    lazy = [
        "if TYPE_CHECKING:",
        "def __getattr__(name: str) -> object:",
        "def __dir__() -> list[str]:",
    ]
    assert extra == lazy, extra


def test_the_front_door_is_the_same_for_type_checkers_and_at_run_time() -> None:
    said = {name: stage for name, stage in front_door().items() if name != "__version__"}
    assert said == concept_guard._STAGE_OF
    assert sorted(said) == concept_guard.__all__
    assert {*concept_guard.__all__} <= {*dir(concept_guard)}
    for name, stage in said.items():
        home = import_module(f"concept_guard.{stage}")
        assert getattr(concept_guard, name) is getattr(home, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = concept_guard.nothing


def hook_makers(source: str) -> set[str]:
    """Return the names of the calls in `source` that put a hook on a module or tensor."""
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    return {name for name in names if HOOK.fullmatch(name)}


def test_only_the_taps_put_hooks_on_a_model_and_their_survey_while_it_lasts() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): hook_makers(path.read_text(encoding="utf8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    assert [path for path, makers in found.items() if makers] == ["surveying.py", "taps.py"]
    survey = (PACKAGE / "surveying.py").read_text(encoding="utf8")
    made, removed = (len(re.findall(rf"\b{word}\b", survey)) for word in (HOOK.pattern, "remove"))
    assert made == removed > 0


REBUILDS = re.compile(r"FeatureHookNet|FeatureGetterNet|FeatureListNet|AttentionExtract")


def test_nothing_calls_helpers_of_timm_that_rebuild_the_model() -> None:
    """They replace its head, prune its blocks, or leave it in eval mode."""
    sources = {path: path.read_text(encoding="utf8") for path in PACKAGE.rglob("*.py")}
    assert not [path.name for path, source in sources.items() if REBUILDS.search(source)]
    assert REBUILDS.search("AttentionExtract(model)")  # control


@pytest.mark.parametrize(
    "call",
    ["model.register_forward_hook(f)", "m.a.register_forward_pre_hook(f)", "x.register_hook(f)"],
)
def test_a_hook_elsewhere_is_found(call: str) -> None:
    assert hook_makers(call)


def private_uses(tree: ast.AST, public: Iterable[str]) -> list[str]:
    """Name what a recipe takes from the package past its front door."""
    wrong = [name for name in imported(tree) if name not in public]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "concept_guard"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            if is_private or (node.value.id in aliases and node.attr not in public):
                wrong.append(node.attr)
    return wrong


def test_recipes_and_benchmarks_use_only_the_front_door() -> None:
    public = {*front_door(), "integrations"}
    scripts = [path for name in ("recipes", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    assert scripts, "no recipe and no benchmark was found"
    wrong = {path.name: private_uses(parse(path), public) for path in scripts}
    assert not any(wrong.values()), wrong


@pytest.mark.parametrize(
    "line",
    [
        "from concept_guard.guard import ConceptGuard",
        "import concept_guard.taps",
        "import concept_guard as cg\ncg.taps.Tap",
        "guard._taps",
    ],
)
def test_a_private_use_is_found(line: str) -> None:
    assert private_uses(ast.parse(line), {"ConceptGuard"})
    good = "import concept_guard as cg\nfrom concept_guard import ConceptGuard\ncg.ConceptGuard"
    assert not private_uses(ast.parse(good), {"ConceptGuard"})


def loaded_by(statement: str, slow: Iterable[str] = SLOW_TO_IMPORT) -> set[str]:
    """Return which of the slow packages a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys\nprint(*(set({list(slow)}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.split())


def test_importing_the_package_is_light() -> None:
    assert loaded_by("import concept_guard") == set()
    assert loaded_by("from concept_guard import ConceptGuard") <= {
        "torch",
        "scipy",
        "numpy",
        "pydantic",
    }
    assert loaded_by("import tensorboard") == {"tensorboard"}  # control


def test_what_tensorboard_loads_at_its_start_does_not_load_torch() -> None:
    modules = ", ".join(f"concept_guard.{name}" for name in FOR_TENSORBOARD)
    assert not loaded_by(f"import {modules}") & {"torch", "timm", "numpy", "scipy"}


def test_the_top_level_holds_nothing_unplanned() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: files of the project cannot be told from others")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    tops = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in tops if not name.startswith(".")} <= TOP_LEVEL
