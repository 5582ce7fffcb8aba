"""`concept-guard doctor`: models, recipes and arguments of train.py, examined in words."""

import getpass
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from torchvision.utils import save_image
from worlds import CLASSES, PROBE, TRAIN, world

from concept_guard import ConfigError, DoctorReport, cli
from concept_guard.checkup import running
from concept_guard.checkup.arguments import asked, of_script
from concept_guard.checkup.cases import case_of
from concept_guard.examination import Loop
from concept_guard.integrations.timm_script import VARIABLE

RECIPES = Path(__file__).parents[1] / "recipes"
AUTO = "concept_guard.integrations.timm_auto"
MODEL = ["test_resnet", "num_classes=4", "input_size=32"]
SCRIPT = {
    "model": "test_resnet",
    "num_classes": CLASSES,
    "input_size": [3, 32, 32],
    "batch_size": 16,
    "epochs": 2,
}


@pytest.fixture(autouse=True)
def _without_settings_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def checkup(source: str, words: Sequence[str] = ()) -> DoctorReport:
    return running.checkup(source, words, seconds=0)


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["doctor", "--no-cost", *map(str, words)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image folder of 40 training and 12 validation images."""
    root = tmp_path_factory.mktemp("data")
    for split, of in {"train": world(TRAIN, 40), "validation": world(PROBE, 12)}.items():
        for n, (image, label) in enumerate(zip(of.images, of.labels.tolist(), strict=True)):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            save_image(image.clamp(0, 1), root / split / str(label) / f"{n}.png")
    return root


def written(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data), encoding="utf8")
    return path


# --- a model by its name ------------------------------------------------------------------------


def test_a_healthy_model_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = said(capsys, *MODEL, "amp=true", "amp_dtype=bfloat16")
    assert code == 0
    assert out.startswith("test_resnet: ResNet, tap 'pre_logits': no problem\n")
    assert "forward and backward: bfloat16 autocast" in out
    assert "random weights and random images" in out
    assert err == "test_resnet with bfloat16 autocast: a minute or so\n"


def test_all_problems_of_a_model_are_told_and_the_exit_code_is_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (*MODEL, "guard.alpha=2", "guard.evry=3", "tap=module:layer9")
    code, out, _ = said(capsys, *words)
    assert code == 1
    assert "3 problems, 3 of which stop the guard" in out
    for part in ("alpha = 2", "did you mean 'every'?", "no module 'layer9' in ResNet"):
        assert part in out


def test_what_only_limits_the_guard_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, *MODEL, "tap=stage:-1")
    assert code == 0
    assert "1 problem, none of which stops the guard" in out
    assert "LIMITS  guard.bake()" in out


def test_options_may_stand_behind_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "test_resnet", "num_classes=4", "--no-cost"]) == 0
    out, _ = capsys.readouterr()
    assert "no problem" in out
    assert "cost on" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_resnet", "--amp"], "unrecognized --amp; expected key=value, or put train.py"),
        (["test_resnet", "inpt_size=3"], "unknown key 'inpt_size'; nearest: 'input_size'"),
        (["test_resnet", "amp=7", "epochs=x"], "2 problems"),
        ([], "nothing to examine; name a timm model, a recipe or train.py"),
        (["none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_misuse_exits_with_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = said(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("words", "found", "mend"),
    [
        (["resnet19"], "timm has no model 'resnet19'", "did you mean resnet18"),
        ([*MODEL, "model_kwargs={x: 1}"], "refuses its arguments", "change model_kwargs"),
        ([*MODEL, "initial_checkpoint=none.pth"], "no file none.pth", "give the weights"),
    ],
)
def test_a_model_that_cannot_be_built_is_told_beside_the_settings(
    words: list[str], found: str, mend: str
) -> None:
    report = checkup(words[0], [*words[1:], "guard.evry=3"])
    (problem,) = [p for p in report.problems if found in p.found]
    assert mend in problem.mend
    assert any("evry" in p.found for p in report.problems)
    assert report.stops


def test_the_size_of_a_fixed_model_is_that_of_the_images() -> None:
    assert not checkup("test_vit", ["num_classes=4", "input_size=32"]).problems


# --- recipes ------------------------------------------------------------------------------------


def test_a_recipe_is_examined_with_its_own_images() -> None:
    case = case_of(str(RECIPES / "quickstart.yaml"), ["model_kwargs={channels: [8, 8, 16, 16]}"])
    assert case.loop == Loop(batch_size=64, updates=168, probe_images=540)
    assert not case.problems
    report = checkup(str(RECIPES / "quickstart.yaml"), ["guard.start=400"])
    (problem,) = report.problems
    assert "the first round comes after 400 updates, and the training ends after 168" in (
        problem.found
    )


def test_a_recipe_that_cannot_be_run_is_examined_as_far_as_it_goes() -> None:
    report = checkup(
        str(RECIPES / "quickstart.yaml"),
        ["epcohs=3", "lr=x", "guard.alpha=7", "guard.tap=module:layer9"],
    )
    found = " ".join(problem.found for problem in report.problems)
    for part in ("'epcohs'", "lr = 'x'", "guard.alpha = 7", "no module 'layer9'"):
        assert part in found
    assert len(report.problems) == 4
    assert "examined as far as the recipe can be read" in report.facts
    assert {problem.where for problem in report.problems} == {
        "command line epcohs=3",
        "command line lr=x",
        "command line guard.alpha=7",
        "tap 'module:layer9'",
    }
    (problem,) = checkup(str(RECIPES / "quickstart.yaml"), ["model=resnet19"]).problems
    assert "timm has no such model" in problem.found


# --- train.py -----------------------------------------------------------------------------------


def test_a_yaml_of_train_py_is_read_with_its_block_of_settings(
    tmp_path: Path, folder: Path
) -> None:
    data = {**SCRIPT, "data_dir": str(folder), "concept_guard": {"every": "1ep", "log_dir": "x"}}
    path = written(tmp_path / "train.yaml", data)
    report = checkup(str(path))
    (problem,) = report.problems  # 4 updates in all, and the first round after 100
    assert "the first round comes after 100 updates, and the training ends after 4" in problem.found
    assert not checkup(str(path), ["concept_guard.start=1"]).problems
    loop = case_of(str(path), ["grad_checkpointing=true", "grad_accum_steps=2"]).loop
    assert loop == Loop(grad_checkpointing=True, batch_size=16, updates=2, probe_images=12)


def test_a_command_line_of_train_py_is_read_like_the_script_does(tmp_path: Path) -> None:
    path = written(tmp_path / "train.yaml", {**SCRIPT, "lr": 0.1, "amp_dtype": "bfloat16"})
    words = ["data", "-c", str(path), "--lr", "0.2", "--amp", "-b", "8", "--torchcompile"]
    arguments, data = of_script([*words, "--mixup", "0.2", "--model-kwargs", "a=1"])
    assert (arguments.model, arguments.batch_size, arguments.amp) == ("test_resnet", 8, True)
    assert (arguments.data_dir, arguments.torchcompile) == ("data", "inductor")
    assert (arguments.mixup, arguments.model_kwargs) == (0.2, {"a": 1})
    assert arguments.amp_dtype == "bfloat16"
    assert data["lr"] == 0.1


WRONG = {
    "torchscript": (["--torchscript"], "ScriptModule", True),
    "distillation": (["--kd-model-name", "resnet18"], "distillation is not guarded", True),
    "naflex": (["--naflex-loader"], "dicts of patches", True),
    "no validation": (["--val-split", ""], "no validation loader", True),
    "mixup": (["--mixup", "0.2", "--cutmix", "1"], "the targets are soft", False),
    "jsd": (["--jsd-loss"], "no mean over samples", False),
    "no data": (["--data-dir", "/absent"], "no folder /absent", True),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_at_odds_with_a_guard_are_told(name: str, tmp_path: Path) -> None:
    words, found, stops = WRONG[name]
    path = written(tmp_path / "train.yaml", SCRIPT)
    base = ["-c", str(path), "--device-modules", AUTO]
    assert not checkup("train.py", base).problems  # control
    (problem,) = checkup("train.py", [*base, *words]).problems
    assert found in problem.found
    assert problem.stops == stops
    assert problem.mend


def test_soft_targets_do_not_matter_to_who_observes(tmp_path: Path) -> None:
    data = {**SCRIPT, "mixup": 0.2, "concept_guard": {"action": "observe"}}
    assert not checkup(str(written(tmp_path / "train.yaml", data))).problems


def test_a_script_without_the_guard_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "train.yaml", {**SCRIPT, "concept-guard": {"every": 3}})
    report = checkup("train.py", ["--config", str(path)])
    found = {problem.where: problem for problem in report.problems}
    assert found["--device-modules"].mend == f"--device-modules {AUTO}"
    assert found["concept-guard"].mend == "call the block concept_guard:"
    assert len(found) == 2


def test_a_validation_split_that_lacks_a_class_is_told(tmp_path: Path, folder: Path) -> None:
    data = {**SCRIPT, "num_classes": 5, "data_dir": str(folder), "concept_guard": {"start": 1}}
    (problem,) = checkup(str(written(tmp_path / "train.yaml", data))).problems
    assert problem.where == "split validation"
    assert "no image of 1 of 5 classes: 4" in problem.found
    assert problem.stops


def test_settings_from_the_environment_win_as_in_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "train.yaml", {**SCRIPT, "concept_guard": {"every": 3}})
    monkeypatch.setenv(VARIABLE, str(written(tmp_path / "guard.yaml", {"evry": 3})))
    (problem,) = checkup(str(path)).problems
    assert "evry" in problem.found


def test_a_block_that_is_no_mapping_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "train.yaml", {**SCRIPT, "concept_guard": [3]})
    (problem,) = checkup(str(path)).problems
    assert "is a list" in problem.found
    assert "settings such as" in problem.expected


def test_values_of_a_wrong_type_are_refused_with_their_line(tmp_path: Path) -> None:
    path = written(tmp_path / "train.yaml", {"amp": "yes", "model": "resnet18"})
    with pytest.raises(ConfigError, match=r"train.yaml:1: amp = 'yes': expected a valid boolean"):
        of_script(["-c", str(path)])
    with pytest.raises(ConfigError, match=r"input_size=\[3\]: .*expected a side in pixels"):
        asked("resnet18", ["input_size=[3]"])


# --- versions -----------------------------------------------------------------------------------


def test_the_environment_is_told_without_private_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--env")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    for name in ("concept-guard", "python", "torch", "torchvision", "timm", "numpy", "scipy"):
        assert name in names
    for name in ("tensorboard", "lightning", "transformers", "accelerate", "platform", "cuda"):
        assert name in names
    private = (str(Path.home()), str(Path.cwd()), socket.gethostname())
    assert not any(len(word) > 1 and word in out for word in private)
    assert getpass.getuser() not in out.replace("torch", "").split()
    code, out, _ = said(capsys, "--env", *MODEL)
    assert code == 0
    assert "no problem" in out
