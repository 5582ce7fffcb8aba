"""The command line: what it prints, where, with which exit code, and how recipes are refused."""

import logging
import os
import re
import runpy
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from concept_guard import cli, commands
from concept_guard.decisions import FOLDER, FlagLine, Stage, Standing
from concept_guard.training import Interrupted, Recipe, RunResult, load_recipe, runs
from concept_guard.training.digits import Planted
from concept_guard.training.interrupts import Interrupts
from concept_guard.training.outcomes import Answers, Measure, causes, measures, table

RECIPES = Path(__file__).parents[1] / "recipes"
GOOD = """\
dataset: digits
model: resnet10t
epochs: 1
lr: 0.05
guard:
  alpha: 0.1
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD, encoding="utf8")
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return what stands on stderr after a run that ends with exit code 2 and nothing else."""
    assert cli.main(["run", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("concept-guard: ")
    return err


# --- recipes and overrides ----------------------------------------------------------------------


def test_a_recipe_is_read_and_overrides_win(recipe: Path) -> None:
    found = load_recipe(recipe, ["epochs=3", "guard.every=2ep", "lr=1e-3", "planted.class=7"])
    assert (found.epochs, found.lr, found.guard.every, found.guard.alpha) == (3, 0.001, "2ep", 0.1)
    assert found.planted is not None
    assert found.planted.label == 7


def test_defaults_are_filled_in(recipe: Path) -> None:
    found = load_recipe(recipe, ["seed=5"])
    assert (found.img_size, found.mean, found.momentum) == (32, (0.5, 0.5, 0.5), 0.9)
    assert found.guard.seed == 5
    assert load_recipe(recipe, ["seed=5", "guard.seed=1"]).guard.seed == 1
    assert load_recipe(recipe, ["opt=adamw"]).momentum is None


def test_every_offender_of_a_recipe_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: resnet10\nepochs: 0\nbatch-size: 3\nalpha: 0.1\n"
        "checkpoint_path: /absent/weights.pth\nguard:\n  evry: 3\n  action: penalise\n",
        encoding="utf8",
    )
    assert refused(capsys, path, "seed=x", "planted.klass=1").splitlines() == [
        f"concept-guard: {path}: 11 problems",
        f"  {path}:1: model = 'resnet10': timm has no such model; "
        "nearest: resnet10t, resnet101, resnet101s",
        f"  {path}:2: epochs = 0: expected greater than or equal to 1",
        f"  {path}:3: unknown key 'batch-size'; nearest: 'batch_size'",
        f"  {path}:4: unknown key 'alpha'; nearest: 'guard.alpha'",
        f"  {path}:5: checkpoint_path = '/absent/weights.pth': no such file; "
        "give it on the command line as checkpoint_path=FILE",
        f"  {path}:7: unknown key 'guard.evry'; nearest: 'guard.every'",
        f"  {path}:8: guard.action = 'penalise': penalise cannot be used here: expected observe "
        "alone, or a list out of project, penalize, rebalance, augment, refit that names each once",
        f"  {path}: dataset: expected either data_dir (an image folder) or dataset: digits",
        "  command line planted.klass=1: unknown key 'planted.klass'; nearest: 'planted.class'",
        f"  {path}: lr is missing; this key is required",
        "  command line seed=x: seed = 'x': expected a valid integer",
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epcohs=3", "unknown key 'epcohs'; nearest: 'epochs'"),
        ("guard.alpah=1", "unknown key 'guard.alpah'; nearest: 'guard.alpha'"),
        ("guard", "'guard': expected key=value, for example epochs=3"),
        ("=3", "'=3': expected key=value"),
        ("lr.x=3", "lr.x=3: lr = 0.05 is a value, it has no 'x' in it"),
        ("epochs=[", "command line epochs=\\[:1: this is not readable YAML"),
        ("data_dir=/absent", "data_dir = '/absent': no such folder; give it on the command line"),
        ("data_dir=$ABSENT/x", "environment variable \\$ABSENT is not set; export it first"),
        ("dataset=cifar", "dataset = 'cifar': expected 'digits'"),
        ("aug=rrc", "aug = 'rrc': has no effect on dataset: digits; remove it"),
        ("workers=2", "workers = 2: has no effect on dataset: digits"),
        ("val_fraction=1", "val_fraction = 1: expected less than 1"),
        ("mean=[0.5]", "mean = \\[0.5\\]: expected three numbers, one per colour channel"),
        ("batch_size=1", "batch_size = 1: expected greater than or equal to 2"),
        ("opt=lion", "opt = 'lion': expected 'sgd' or 'adamw'"),
        ("lr=.inf", "lr = inf: expected a finite number"),
        ("warmup_epochs=1", "warmup_epochs = 1: expected less than epochs = 1"),
        ("sched=step", "sched = 'step': expected 'cosine'"),
        ("device=tpu9", "device = 'tpu9': not usable here"),
        ("experiment=a/b", "experiment = 'a/b': expected the name of one folder"),
        ("experiment=..", "experiment = '..': expected the name of one folder"),
        ("resume=true", "resume = True: name the run to continue: experiment="),
        ("compare=1", "compare = 1: expected a valid boolean"),
        ("planted={class: 12}", "planted.class = 12: expected less than or equal to 9"),
        ("planted={strength: 0}", "planted.strength = 0: expected greater than 0"),
        ("guard.start=0", "guard.start = 0: expected a whole number of updates, at least 1"),
        ("img_size=4", "img_size = 4: expected greater than or equal to 8"),
        ("seed=-1", "seed = -1: expected greater than or equal to 0"),
        ("weight_decay=-1", "weight_decay = -1: expected greater than or equal to 0"),
        ("log_interval=0", "log_interval = 0: expected greater than or equal to 1"),
    ],
)
def test_a_wrong_override_is_refused_by_name(
    recipe: Path, capsys: pytest.CaptureFixture[str], word: str, message: str
) -> None:
    assert re.search(message, refused(capsys, recipe, word))


def test_all_wrong_overrides_are_told_at_once(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, recipe, "guard", "=3")
    assert "command line: 2 problems" in said
    assert "'guard'" in said
    assert "'=3'" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\n  b: c\n", r"recipe.yaml:2: this is not readable YAML: mapping values"),
        ("model: a\nmodel: b\n", r"recipe.yaml:2: 'model' is set a second time"),
        ("- model\n", r"recipe.yaml: got a list, expected lines of the form `key: value`"),
    ],
)
def test_malformed_recipes_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    recipe.write_text(text, encoding="utf8")
    assert re.search(message, refused(capsys, recipe))


def test_a_missing_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "absent.yaml: cannot be read: No such file" in refused(capsys, tmp_path / "absent.yaml")


def test_a_missing_split_is_named_with_those_that_exist(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train", "holdout"):
        (tmp_path / "photos" / name / "ant").mkdir(parents=True)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"data_dir: {tmp_path}/photos\nmodel: resnet10t\nepochs: 1\nlr: 0.1\n")
    said = refused(capsys, path)
    assert f"test_split: no folder 'test' in {tmp_path}/photos; set it to one of: holdout" in said
    assert load_recipe(path, ["test_split=holdout"]).val_fraction == 0.2
    both = ["test_split=holdout", "val_split=holdout", "val_fraction=0.1", "planted={}"]
    said = refused(capsys, path, *both, "opt=adamw", "momentum=0.5")
    assert "val_fraction = 0.1: expected either val_split or val_fraction; remove one" in said
    assert "planted = {}: only dataset: digits can carry a planted shortcut" in said
    assert "momentum = 0.5: only opt: sgd has a momentum" in said


def test_paths_may_hold_home_and_environment_variables(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.pth").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/runs")
    found = load_recipe(recipe, ["checkpoint_path=~/weights.pth", "output=$RUNS/a"])
    assert found.checkpoint_path == str(tmp_path / "weights.pth")
    assert found.output == "/runs/a"


def test_the_quickstart_trains_both_ways_on_planted_digits() -> None:
    found = load_recipe(RECIPES / "quickstart.yaml")
    assert found.compare
    assert found.planted is not None


def test_finetune_folder_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, RECIPES / "finetune_folder.yaml")
    assert "give it on the command line as data_dir=FOLDER" in said
    assert "give it on the command line as checkpoint_path=FILE" in said
    assert "2 problems" in said


# --- exit codes and output ----------------------------------------------------------------------


def finished(folder: Path) -> RunResult:
    return RunResult(
        folder=folder,
        guarded={"accuracy": Measure("all test images", 0.5, 4)},
        plain=None,
        flags=(),
        verdict="no evidence",
        identical=None,
        baked=True,
        unreadable=(),
        table="the table",
        seconds=61.4,
    )


def ended(folder: Path) -> str:
    """Return what stands on stdout after such a run."""
    return (
        f"the table\n\n61 s, everything in {folder}\nwhat the guard saw and did, round by round: "
        f"tensorboard --logdir {folder.parent}, or as a page: concept-guard report {folder}\n"
    )


def stands(folder: Path, stage: Stage) -> None:
    """Let a flag of a run wait."""
    flags = (FlagLine(3, "ant", "waiting", 0.5, 1e-8, ""),)
    Standing(stage, 8, 16, "now", "flagged", True, (3, 4), (), flags, 0).write(folder / FOLDER)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """Replace training by a note of what was asked for."""
    recipes: list[Recipe] = []

    def note(recipe: Recipe) -> RunResult:
        recipes.append(recipe)
        return finished(tmp_path / "run")

    monkeypatch.setattr("concept_guard.training.run", note)
    return recipes


def test_the_table_is_printed_on_stdout(
    recipe: Path, tmp_path: Path, asked: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", str(recipe), "seed=3"]) == 0
    assert capsys.readouterr().out == ended(tmp_path / "run")
    assert [one.seed for one in asked] == [3]


def test_flags_that_nobody_approved_are_named_at_the_end(
    recipe: Path, tmp_path: Path, asked: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    stands(tmp_path / "run", "finished")
    assert cli.main(["run", str(recipe)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "not corrected, because nobody approved: concepts 3. This run is finished. Train again "
        "(another experiment=NAME) and approve while it trains, or with guard.approve=auto"
    )
    assert len(asked) == 1


def test_progress_and_warnings_are_plain_lines_on_stderr(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def talk(_recipe: Recipe) -> RunResult:
        logging.getLogger("concept_guard.training").info("epoch 1")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a.png: unreadable image", stacklevel=1)
        return finished(tmp_path)

    monkeypatch.setattr("concept_guard.training.run", talk)
    assert cli.main(["run", str(recipe)]) == 0
    assert capsys.readouterr().err == "epoch 1\nwarning: a.png: unreadable image\n"
    assert not logging.getLogger("concept_guard").handlers


def test_quiet_leaves_warnings_and_the_result(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def talk(_recipe: Recipe) -> RunResult:
        logging.getLogger("concept_guard.training").info("epoch 1")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a.png: unreadable image", stacklevel=1)
        return finished(tmp_path)

    monkeypatch.setattr("concept_guard.training.run", talk)
    for words in (["--quiet", str(recipe), "seed=3"], [str(recipe), "--quiet", "seed=3"]):
        assert cli.main(["run", *words]) == 0
        out, err = capsys.readouterr()
        assert out == ended(tmp_path)
        assert err == "warning: a.png: unreadable image\n"
    assert cli.main(["run", str(recipe)]) == 0  # control
    assert capsys.readouterr().err.startswith("epoch 1\n")


def test_the_doctor_is_quiet_before_and_behind_a_model_but_not_for_a_script() -> None:
    for words in (["--quiet", "resnet18", "amp=true"], ["resnet18", "amp=true", "--quiet"]):
        options = cli._parsed(["doctor", *words])
        assert (options.quiet, options.words) == (True, ["amp=true"])
    options = cli._parsed(["doctor", "train.py", "DATA", "--quiet"])
    assert (options.quiet, options.words) == (False, ["DATA", "--quiet"])
    assert cli._parsed(["audit", "a", "--quiet"]).quiet
    with pytest.raises(SystemExit):  # where there is no progress there is nothing to silence
        cli._parsed(["approve", "a", "--quiet"])


def test_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    for code in (commands.OK, commands.FAILED, commands.MISUSED, commands.STOPPED):
        assert re.search(rf"^  {code} +\S", said, re.MULTILINE), code
    assert not re.search(r"^  3 +\S", said, re.MULTILINE)  # control
    listed = (RECIPES / "README.md").read_text(encoding="utf8")
    for code in (commands.OK, commands.FAILED, commands.MISUSED, commands.STOPPED):
        assert f"| {code} |" in listed


def test_python_m_does_the_same(
    recipe: Path,
    asked: list[Recipe],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["concept_guard", "run", str(recipe), "seed=4"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("concept_guard", run_name="__main__")
    assert stop.value.code == 0
    assert "the table" in capsys.readouterr().out
    assert [one.seed for one in asked] == [4]


def test_ctrl_c_prints_the_command_that_continues(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_recipe: Recipe) -> RunResult:
        raise Interrupted("stopped after update 3 of 9", Path("out/a b"))

    monkeypatch.setattr("concept_guard.training.run", stop)
    assert cli.main(["run", str(recipe), "seed=3", "experiment=old", "resume=true"]) == 130
    said = capsys.readouterr().err
    assert said == (
        "concept-guard: stopped after update 3 of 9. To continue:\n"
        f"  concept-guard run {recipe} seed=3 'experiment=a b' resume=true\n"
    )


def test_ctrl_c_says_what_waits_before_the_command_that_continues(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(_recipe: Recipe) -> RunResult:
        raise Interrupted("stopped after update 3 of 9", tmp_path / "a")

    monkeypatch.setattr("concept_guard.training.run", stop)
    stands(tmp_path / "a", "stopped")
    assert cli.main(["run", str(recipe)]) == 130
    assert capsys.readouterr().err == (
        "concept-guard: stopped after update 3 of 9. 1 concept waits for approval: "
        f"concept-guard approve {tmp_path}/a 3\nTo continue:\n"
        f"  concept-guard run {recipe} experiment=a resume=true\n"
    )


def test_ctrl_c_before_training_says_so(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "open_splits", stop)
    assert cli.main(["run", str(recipe), "experiment=a"]) == 130
    assert capsys.readouterr().err == "concept-guard: stopped before training began\n"
    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["run", str(recipe)]) == 130
    assert capsys.readouterr().err == "concept-guard: stopped before anything was done\n"


def test_a_taken_folder_is_a_failure_without_traceback(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "args.yaml").touch()
    assert cli.main(["run", str(recipe), f"output={tmp_path}", "experiment=old"]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"concept-guard: \S+/old holds the state of another run.*\n", said)


def test_an_unknown_command_is_refused_and_help_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, code in ((["traim"], 2), ([], 2), (["--help"], 0), (["--version"], 0)):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        assert stop.value.code == code
    out, err = capsys.readouterr()
    assert "invalid choice: 'traim'" in err
    assert "concept-guard " in out


# --- the table ----------------------------------------------------------------------------------


def test_the_conflicting_groups_are_measured_apart() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    answers = {
        "clean": Answers(torch.tensor([1, 0, 1, 1, 1, 1]), labels, 0.0),
        "marked": Answers(torch.tensor([0, 0, 0, 0, 0, 1]), labels, 0.0),
    }
    found = measures(answers, ["ant", "bee"], Planted(label=0, kind="mark"))
    assert {name: (row.value, row.count) for name, row in found.items()} == {
        "clean": (5 / 6, 6),
        "marked": (0.25, 4),  # of class 1 alone: class 0 owns the mark
        "unmarked": (0.5, 2),
        "worst": (0.25, 4),
    }
    assert found["worst"].note == "marked"
    assert found["unmarked"].name == "class ant, without the mark"
    rows = measures({"test": answers["marked"]}, ["ant", "bee"], None)
    assert (rows["accuracy"].value, rows["worst_class"].value) == (0.5, 0.25)
    assert rows["worst_class"].note == "bee"


def test_the_table_is_aligned_and_shows_the_gain() -> None:
    plain = {"accuracy": Measure("all test images", 0.5, 40)} | {
        "worst_class": Measure("recall of the worst class", 0.25, 10, "ant")
    }
    guarded = {"accuracy": Measure("all test images", 0.75, 40)} | {
        "worst_class": Measure("recall of the worst class", 0.2, 10, "bee")
    }
    assert table(plain, guarded).splitlines() == [
        "share of right predictions  without guard   with guard    gain",
        "all test images (40)                0.500        0.750  +0.250",
        "recall of the worst class     0.250 (ant)  0.200 (bee)  -0.050",
    ]
    assert table(None, guarded).splitlines() == [
        "share of right predictions   with guard",
        "all test images (40)              0.750",
        "recall of the worst class   0.200 (bee)",
    ]


def test_causes_name_class_evidence_and_status() -> None:
    flag: Any = SimpleNamespace(
        concept=4,
        class_index=1,
        risk_difference=0.625,
        interval=(0.5, 0.7),
        q_value=1.2e-9,
        present=31,
        fixed=11,
        broken=1,
        status="erased",
        reason="it is a matter of degree",
    )
    assert causes([flag], ["ant", "bee"], 90, "1 flag").splitlines() == [
        "concept 4 -> class bee, erased: risk difference +0.62 [+0.50, +0.70], q = 1.2e-09; "
        "present in 31 of 90 probe images; erasing it there fixes 11 predictions and breaks 1",
        "    it is a matter of degree",
        "guard: 1 flag",
    ]
    assert causes((), ["ant"], 90, "no evidence: 3 errors") == "guard: no evidence: 3 errors"


def test_ctrl_c_is_remembered_only_inside() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_ctrl_c_is_left_alone() -> None:
    found: list[object] = []

    def enter() -> None:
        with Interrupts() as interrupts:
            found.extend([interrupts.requested, signal.getsignal(signal.SIGINT)])

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [False, before]
