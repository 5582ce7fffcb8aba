"""The command line's own training: its checkpoints, its folder, and that stopping changes nothing.

Most tests train with `Passive` in place of the guard, which looks at nothing: what they show does
not depend on the guard. The last part runs the real one.
"""

import os
import re
import signal
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from photos import write_photos
from torch import Tensor, nn
from worlds import flagging

from concept_guard.config import GuardConfig
from concept_guard.errors import BakeError, ConfigError, StateError
from concept_guard.training import Interrupted, Recipe, RunResult, load_recipe, loop, reports, run
from concept_guard.training.building import build_model, build_optimizer, build_scheduler
from concept_guard.training.checkpoints import load_checkpoint, seed_everything
from concept_guard.training.digits import Planted
from concept_guard.training.interrupts import Interrupts
from concept_guard.training.loop import Leg
from concept_guard.training.outcomes import Round
from concept_guard.training.splits import open_splits, ordered

NET = {"channels": [8, 8, 16, 16], "stem_width": 8}  # resnet10t with 14,000 weights
NOISY = {**NET, "drop_rate": 0.3, "drop_path_rate": 0.3}  # draws from the global generator
Weights = dict[str, Tensor]


def digits(output: Path, **keys: Any) -> Recipe:
    """A run of 2 epochs with 7 updates each."""
    given: dict[str, Any] = {
        "dataset": "digits",
        "model": "resnet10t",
        "model_kwargs": NOISY,
        "batch_size": 128,
        "epochs": 2,
        "lr": 0.05,
        "output": str(output),
        "experiment": "run",
    }
    return Recipe(**{**given, **keys})


class Passive:
    """Has the interface of the guard and does nothing; `at` maps an update to what happens."""

    at: dict[int, Callable[[], Any]] = {}
    alive = 0
    bake_error: str | None = None

    def __init__(
        self, model: nn.Module, *, probe: Any, config: Any, log_dir: Any, class_names: Any
    ) -> None:
        self.model, self.probe, self.config = model, probe, config
        self.log_dir, self.class_names = log_dir, class_names
        self.steps, self.report, self.cards, self.baked = 0, None, {}, ""
        self.erased: tuple[int, ...] = ()
        Passive.alive += 1

    def loss(self, losses: Tensor, targets: Tensor) -> Tensor:
        """The plain mean."""
        assert losses.shape == targets.shape
        return losses.mean()

    def step(self) -> Any:
        """Count, let happen what `at` holds, and return the round that it makes."""
        self.steps += 1
        return self.at.get(self.steps, lambda: None)()

    def bake(self) -> None:
        """Fail if asked."""
        if self.bake_error is not None:
            raise BakeError(self.bake_error)

    def close(self) -> None:
        """Count who was closed."""
        Passive.alive -= self.model is not None
        self.model = None  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"schema_version": 1, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the count."""
        self.steps = state["steps"]


@pytest.fixture
def passive(monkeypatch: pytest.MonkeyPatch) -> type[Passive]:
    monkeypatch.setattr(loop, "ConceptGuard", Passive)
    monkeypatch.setattr(Passive, "at", {})
    monkeypatch.setattr(Passive, "alive", 0)
    monkeypatch.setattr(Passive, "bake_error", None)
    return Passive


def saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "last.pth.tar", weights_only=True)
    return state


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


# --- model, optimizer, schedule -----------------------------------------------------------------


def test_the_learning_rate_warms_up_and_follows_a_cosine(tmp_path: Path) -> None:
    recipe = digits(tmp_path, epochs=10, warmup_epochs=2, lr=0.1)
    optimizer = build_optimizer(recipe, nn.Linear(2, 2))
    schedule = build_scheduler(recipe, optimizer, 100)
    rates = []
    for update in range(1, 102):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step_update(update)
    warm, cosine = torch.tensor(rates[:20]), torch.tensor(rates[20:])
    assert 0 < warm[0] < 0.01
    torch.testing.assert_close(warm.diff(), torch.full((19,), float(warm[1] - warm[0])))
    expected = 0.05 * (1 + torch.cos(torch.pi * torch.arange(20, 101) / 100))
    torch.testing.assert_close(cosine, expected)


@pytest.mark.parametrize(("opt", "kind"), [("sgd", "SGD"), ("adamw", "AdamW")])
def test_the_optimizer_spares_norms_and_biases(tmp_path: Path, opt: str, kind: str) -> None:
    recipe = digits(tmp_path, opt=opt, weight_decay=0.1)
    optimizer = build_optimizer(recipe, nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert type(optimizer).__name__ == kind
    decays = {group["weight_decay"]: len(group["params"]) for group in optimizer.param_groups}
    assert decays == {0.0: 3, 0.1: 1}
    if opt == "sgd":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_weights_of_another_task_get_a_new_head(tmp_path: Path) -> None:
    source = timm.create_model("resnet10t", num_classes=7, **NET)
    path = tmp_path / "weights.pth"
    torch.save(source.state_dict(), path)
    recipe = digits(tmp_path, model_kwargs=NET, checkpoint_path=str(path))
    model = build_model(recipe, 3, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    found, given = model.state_dict(), source.state_dict()
    kept = [key for key in given if not key.startswith("fc.")]
    assert kept
    assert all(torch.equal(found[key], given[key]) for key in kept)
    full = build_model(recipe, 7, 32).state_dict()
    assert torch.equal(full["fc.weight"], given["fc.weight"])  # the same task keeps its head


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_kwargs": {"chanels": 3}}, "model resnet10t with .*chanels.*change model_kwargs"),
        ({"model_kwargs": {**NET, "stem_width": 4}, "weights": True}, "checkpoint_path .*resnet"),
        (
            {"model": "test_vit", "model_kwargs": {"img_size": 64, "dynamic_img_size": False}},
            "model test_vit .* 32 px images: Input height",
        ),
    ],
)
def test_what_timm_refuses_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    if keys.pop("weights", False):
        path = tmp_path / "resnet.pth"
        torch.save(timm.create_model("resnet10t", num_classes=10, **NET).state_dict(), path)
        keys["checkpoint_path"] = str(path)
    with pytest.raises(ConfigError, match=message):
        build_model(digits(tmp_path, **keys), 10, 32)


def test_models_of_a_fixed_size_are_made_for_the_images(tmp_path: Path) -> None:
    recipe = digits(tmp_path, model="test_vit", model_kwargs={})
    assert build_model(recipe, 10, 32)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


# --- checkpoints, stopping, resuming ------------------------------------------------------------


def test_the_output_folder_looks_like_timms(tmp_path: Path, passive: type[Passive]) -> None:
    result = run(digits(tmp_path, compare=True, planted=Planted()))
    folder = tmp_path / "run"
    assert result.folder == folder
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "args.yaml",
        "summary.csv",
        "last.pth.tar",
        "concept_guard/report.html",
        "concept_guard/report.json",
        "concept_guard/report.txt",
        "plain/summary.csv",
        "plain/last.pth.tar",
    }
    header, *rows = (folder / "summary.csv").read_text().splitlines()
    assert header == "epoch,train_loss,eval_loss,eval_top1,lr"
    assert [row.split(",")[0] for row in rows] == ["0", "1"]
    rates = torch.tensor([float(row.split(",")[-1]) for row in rows])  # half a cosine each
    torch.testing.assert_close(rates, torch.tensor([0.025, 0.0]))
    assert load_recipe(folder / "args.yaml") == digits(tmp_path, compare=True, planted=Planted())
    assert passive.alive == 0


def test_the_last_checkpoint_is_an_ordinary_one_of_timm(
    tmp_path: Path, passive: type[Passive]
) -> None:
    result = run(digits(tmp_path))
    path = result.folder / "last.pth.tar"
    assert {"epoch", "arch", "state_dict", "optimizer", "args", "version"} < saved(
        path.parent
    ).keys()
    model = timm.create_model("resnet10t", num_classes=10, checkpoint_path=str(path), **NOISY)
    recipe = digits(tmp_path)
    test = open_splits(recipe).tests["clean"]
    with torch.no_grad():
        right = [
            model.eval()(images).argmax(1) == labels for images, labels in ordered(test, recipe)
        ]
    assert float(torch.cat(right).double().mean()) == result.guarded["accuracy"].value
    assert passive.alive == 0


@pytest.mark.thorough
def test_a_guard_that_does_nothing_changes_nothing(tmp_path: Path, passive: type[Passive]) -> None:
    result = run(digits(tmp_path, compare=True))
    assert result.identical is True
    assert result.plain == result.guarded
    assert "both runs end with identical weights" in result.table
    passive.at = {3: lambda: torch.manual_seed(0) and None}  # control: one disturbed draw
    assert run(digits(tmp_path, compare=True, experiment="other")).identical is False


def test_rounds_are_compared_only_where_they_are_comparable() -> None:
    def at(step: int, flagged: tuple[int, ...]) -> Round:
        return Round(step, 90, step / 100, step / 200, step / 300, flagged)

    def shown(*rounds: Round) -> list[tuple[str, str, int]]:
        made = reports._first_and_last(list(rounds))
        return [(c.before, c.after, len(c.rows)) for c in made]

    assert shown() == shown(at(10, ())) == shown(at(10, (1,))) == []
    assert shown(at(10, ()), at(20, ())) == [("update 10", "update 20", 2)]
    assert shown(at(10, ()), at(20, (1,)), at(30, (1,))) == [("update 20", "update 30", 3)]
    assert shown(at(10, (1,)), at(30, (1, 2))) == [("update 10", "update 30", 2)]  # other groups


def test_a_page_that_cannot_be_made_costs_a_warning_and_not_the_model(
    tmp_path: Path, passive: type[Passive], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no page today")

    monkeypatch.setattr(reports, "analyse", fail)
    with pytest.warns(UserWarning, match=r"no report.html \(ValueError: no page today\)"):
        result = run(digits(tmp_path, epochs=1))
    written = {path.name for path in (result.folder / "concept_guard").iterdir()}
    assert "report.txt" in written
    assert not {name for name in written if name.startswith("report.html")}
    assert saved(result.folder)["concept_guard"]["finished"]
    assert passive.alive == 0


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "ConceptGuard", Passive)
        return saved(run(digits(tmp_path_factory.mktemp("whole"))).folder)


@pytest.mark.parametrize("update", [1, 6, 7, 8, 14])
def test_ctrl_c_and_resuming_change_no_bit(
    tmp_path: Path, passive: type[Passive], uninterrupted: dict[str, Any], update: int
) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore Ctrl-C
    passive.at = {update: press_ctrl_c}
    with pytest.raises(Interrupted, match=rf"after update {update} of 14 \(with guard\)") as stop:
        run(digits(tmp_path))
    assert stop.value.folder == tmp_path / "run"
    assert saved(tmp_path / "run")["concept_guard"]["guard"]["steps"] == update
    assert signal.getsignal(signal.SIGINT) is before
    passive.at = {}
    seed_everything(99)  # a new process starts elsewhere
    run(digits(tmp_path, resume=True))
    state = saved(tmp_path / "run")
    assert same(state["state_dict"], uninterrupted["state_dict"])
    assert state["concept_guard"]["history"] == uninterrupted["concept_guard"]["history"]
    assert passive.alive == 0


def test_the_comparison_above_can_fail(
    tmp_path: Path, passive: type[Passive], uninterrupted: dict[str, Any]
) -> None:
    passive.at = {3: press_ctrl_c}
    with pytest.raises(Interrupted):
        run(digits(tmp_path))
    path = tmp_path / "run" / "last.pth.tar"
    state = saved(path.parent)
    state["concept_guard"]["random"]["torch"] = torch.Generator().manual_seed(5).get_state()
    torch.save(state, path)
    run(digits(tmp_path, resume=True))
    assert not same(saved(path.parent)["state_dict"], uninterrupted["state_dict"])


@pytest.mark.thorough
def test_resuming_works_in_either_of_two_runs(
    tmp_path: Path, passive: type[Passive], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(digits(tmp_path, compare=True, experiment="whole"))
    update, seen = loop.Leg._update, []

    def stop_in_both(leg: loop.Leg, *given: Any) -> None:
        update(leg, *given)
        seen.append(leg.name)
        if len(seen) in (5, 19):  # update 5 without the guard, then update 5 with it
            press_ctrl_c()

    monkeypatch.setattr(loop.Leg, "_update", stop_in_both)
    recipe = digits(tmp_path, compare=True)
    with pytest.raises(Interrupted, match=r"update 5 of 14 \(without guard\)"):
        run(recipe)
    again = digits(tmp_path, compare=True, resume=True)
    with pytest.raises(Interrupted, match=r"update 5 of 14 \(with guard\)"):
        run(again)
    result = run(again)
    assert len(seen) == 28  # no update was made twice
    assert result.plain == whole.plain
    for name in ("", "plain"):
        one, other = saved(whole.folder / name), saved(result.folder / name)
        assert same(one["state_dict"], other["state_dict"])
    assert passive.alive == 0


def test_ctrl_c_twice_stops_at_once_and_keeps_the_last_epoch(
    tmp_path: Path, passive: type[Passive], uninterrupted: dict[str, Any]
) -> None:
    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    passive.at = {10: twice}
    with pytest.raises(Interrupted, match="updates since the last checkpoint are lost"):
        run(digits(tmp_path))
    assert saved(tmp_path / "run")["concept_guard"]["updates"] == 7
    passive.at = {}
    run(digits(tmp_path, resume=True))
    assert same(saved(tmp_path / "run")["state_dict"], uninterrupted["state_dict"])


def test_a_run_stopped_before_its_first_checkpoint_starts_again(
    tmp_path: Path, passive: type[Passive], uninterrupted: dict[str, Any]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.yaml").write_text("model: resnet10t\n")
    run(digits(tmp_path, resume=True))
    assert same(saved(tmp_path / "run")["state_dict"], uninterrupted["state_dict"])
    assert passive.alive == 0


def test_a_folder_with_another_run_is_refused_and_kept(
    tmp_path: Path, passive: type[Passive]
) -> None:
    run(digits(tmp_path, epochs=1))
    before = (tmp_path / "run" / "last.pth.tar").read_bytes()
    with pytest.raises(StateError, match=r"run holds the state of another run.*experiment=NAME"):
        run(digits(tmp_path, epochs=1))
    with pytest.raises(StateError, match=r"run holds a finished run; .*choose another experiment"):
        run(digits(tmp_path, epochs=1, resume=True))
    assert (tmp_path / "run" / "last.pth.tar").read_bytes() == before
    assert passive.alive == 0


def test_runs_without_a_name_get_folders_of_their_own(
    tmp_path: Path, passive: type[Passive]
) -> None:
    first, second = (run(digits(tmp_path, epochs=1, experiment=None)) for _ in range(2))
    assert first.folder != second.folder
    assert first.folder.name.endswith("-resnet10t-32")
    assert passive.alive == 0


def test_nothing_to_resume_is_named(tmp_path: Path, passive: type[Passive]) -> None:
    run(digits(tmp_path, epochs=1))
    with pytest.raises(StateError, match=r"absent holds no run to resume.*runs in .*: run\."):
        run(digits(tmp_path, resume=True, experiment="absent"))
    assert passive.alive == 0


def test_a_run_that_failed_to_start_does_not_take_its_folder(
    tmp_path: Path, passive: type[Passive]
) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        run(digits(tmp_path, epochs=1, model_kwargs={"nonsense": 1}))
    run(digits(tmp_path, epochs=1))
    assert passive.alive == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, r"another recipe \(lr: 0.05 then, 0.1 now\)"),
        ({"guard": {"alpha": 0.2}, "seed": 3}, r"seed: 0 then, 3 now; guard: .*'alpha': 0.05"),
    ],
)
def test_resuming_with_another_recipe_is_refused(
    tmp_path: Path, passive: type[Passive], change: dict[str, Any], message: str
) -> None:
    passive.at = {2: press_ctrl_c}
    with pytest.raises(Interrupted):
        run(digits(tmp_path))
    with pytest.raises(StateError, match=message):
        run(digits(tmp_path, resume=True, **change))


def test_a_damaged_or_foreign_checkpoint_is_named(tmp_path: Path, passive: type[Passive]) -> None:
    passive.at = {2: press_ctrl_c}
    with pytest.raises(Interrupted):
        run(digits(tmp_path))
    path = tmp_path / "run" / "last.pth.tar"
    state = saved(path.parent)
    state["concept_guard"]["schema_version"] = 99
    torch.save(state, path)
    with pytest.raises(StateError, match=r"last.pth.tar: written with schema 99, expected 1"):
        run(digits(tmp_path, resume=True))
    for content in ({"state_dict": {}}, [1]):
        torch.save(content, path)
        with pytest.raises(StateError, match="not a checkpoint of concept-guard run"):
            load_checkpoint(path.parent, digits(tmp_path))
    path.write_bytes(b"damaged")
    with pytest.raises(StateError, match="not a checkpoint of concept-guard run"):
        run(digits(tmp_path, resume=True))


def test_a_correction_that_cannot_be_baked_is_kept_and_said(
    tmp_path: Path, passive: type[Passive], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passive, "bake_error", "no linear map follows the tap")
    result = run(digits(tmp_path, epochs=1))
    assert not result.baked
    assert "not baked, the saved weights need the guard: no linear map" in result.table
    assert passive.alive == 0


def test_the_guard_gets_the_probe_the_seed_and_the_length_of_an_epoch(
    tmp_path: Path, passive: type[Passive], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Passive] = []
    start = passive.__init__

    def remember(guard: Passive, *args: Any, **keys: Any) -> None:
        start(guard, *args, **keys)
        made.append(guard)

    monkeypatch.setattr(passive, "__init__", remember)
    run(digits(tmp_path, seed=4, epochs=1, guard=GuardConfig(start="1ep")))
    (guard,) = made
    assert (guard.config.seed, guard.config.updates("start")) == (4, 7)
    assert guard.log_dir == tmp_path / "run"
    assert guard.class_names == tuple("0123456789")
    labels = [torch.cat([labels for _, labels in guard.probe]) for _ in range(2)]
    assert len(labels[0]) == 450
    assert torch.equal(*labels)  # the order is fixed
    assert digits(tmp_path, seed=4, guard=GuardConfig(seed=1)).guard.seed == 1


def test_progress_is_logged_per_epoch_and_interval(
    tmp_path: Path, passive: type[Passive], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="concept_guard")
    run(digits(tmp_path, log_interval=5))
    lines = [record.message for record in caplog.records]
    lines = [" ".join(re.sub(r"\d\.\d+", "#", line.split(".html")[0]).split()) for line in lines]
    assert lines == [
        "with guard: 2 epochs, 14 updates",
        "update accuracy worst group concepts flagged done cost next",
        "5 loss #",
        "7 # epoch 1 of 2, loss #",
        "10 loss #",
        "14 # epoch 2 of 2, loss #",
        f"page: {tmp_path}/run/concept_guard/report",
    ]
    assert passive.alive == 0


def test_the_log_says_after_a_round_what_waits_and_how_to_approve_it(
    tmp_path: Path, passive: type[Passive], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="concept_guard")

    real = flagging().report
    assert real is not None

    def after(update: int, *statuses: str) -> None:
        flags = tuple(
            replace(real.flags[0], concept=7 + n, status=status)
            for n, status in enumerate(statuses)
        )
        report = replace(real, step=update, verdict="flagged", flags=flags)
        passive.at = {**passive.at, update: lambda: report}

    after(2, "waiting", "erased", "waiting")
    after(4, "erased")  # control
    recipe = digits(tmp_path, epochs=1)
    place = {"size": 32, "device": torch.device("cpu")}
    leg = Leg(recipe, open_splits(recipe), tmp_path / "a", guarded=True, **place)
    with closing(leg), Interrupts() as interrupts:
        leg.train(interrupts)
    said = [record.message for record in caplog.records]
    first, last = (line for line in said if re.match(" +[24] ", line))
    assert first.endswith("approve or veto 7, 9")
    assert f"2 concepts wait for approval: concept-guard approve {tmp_path}/a 7 9" in said
    assert last.endswith("train on")


# --- image folders ------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", {"train": 10, "test": 4})


def folder_recipe(photos: Path, **keys: Any) -> Recipe:
    given: dict[str, Any] = {
        "data_dir": str(photos),
        "dataset": None,
        "model_kwargs": NET,
        "img_size": 24,
        "batch_size": 8,
        "epochs": 1,
    }
    return digits(photos.parent / "out", **{**given, **keys})


def test_an_unreadable_image_stops_the_run_if_asked(photos: Path, passive: type[Passive]) -> None:
    broken = [photos / "train" / name / "1.png" for name in ("ant", "cat")]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"unreadable image \(cannot identify.*\n.*=skip"):
        run(folder_recipe(photos, on_unreadable="stop"))
    assert passive.alive == 0


def test_a_run_goes_on_without_its_unreadable_images(photos: Path, passive: type[Passive]) -> None:
    for name in ("train/ant/1.png", "test/cat/2.png"):
        (photos / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match="no image|cannot identify"):
        result = run(folder_recipe(photos))
    assert {Path(name).parent.name for name in result.unreadable} == {"ant", "cat"}
    assert result.guarded["accuracy"].count == 11
    assert "unreadable images left out: 2, such as" in result.table
    assert passive.alive == 0


# --- with the real guard ------------------------------------------------------------------------

SMALL = GuardConfig(start=4, every=5, track_every=2, concepts=4)


def test_observing_changes_no_weight(tmp_path: Path) -> None:
    watching = SMALL.model_copy(update={"action": ()})
    result = run(digits(tmp_path, compare=True, planted=Planted(), guard=watching))
    assert result.identical is True
    assert result.verdict
    assert list(result.folder.glob("events.out.tfevents.*"))
    assert not list((result.folder / "plain").glob("events*"))


GUARDED: dict[str, Any] = {"planted": Planted(), "guard": SMALL}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, dict[str, Any]]:
    result = run(digits(tmp_path_factory.mktemp("guarded"), **GUARDED))
    return result, saved(result.folder)


@pytest.mark.parametrize("update", [4, 11])
def test_resuming_with_the_guard_changes_no_bit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    guarded: tuple[RunResult, dict[str, Any]],
    update: int,
) -> None:
    original, seen = loop.Leg._update, []

    def stop_once(leg: loop.Leg, *given: Any) -> None:
        original(leg, *given)
        seen.append(leg.updates)
        if len(seen) == update:
            press_ctrl_c()

    monkeypatch.setattr(loop.Leg, "_update", stop_once)
    with pytest.raises(Interrupted):
        run(digits(tmp_path, **GUARDED))
    result = run(digits(tmp_path, resume=True, **GUARDED))
    whole, state = guarded
    assert same(saved(result.folder)["state_dict"], state["state_dict"])
    assert result.guarded == whole.guarded
    assert result.verdict == whole.verdict


@pytest.mark.thorough
def test_the_baked_checkpoint_answers_like_the_table(tmp_path: Path) -> None:
    recipe = digits(tmp_path, planted=Planted(), guard=SMALL, epochs=3)
    result = run(recipe)
    path = str(result.folder / "last.pth.tar")
    model = timm.create_model("resnet10t", num_classes=10, checkpoint_path=path, **NOISY).eval()
    test = open_splits(recipe).tests["clean"]
    with torch.no_grad():
        right = [model(images).argmax(1) == labels for images, labels in ordered(test, recipe)]
    assert float(torch.cat(right).double().mean()) == result.guarded["clean"].value
    assert result.baked


def test_a_folder_of_photos_trains_to_the_end(photos: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # six probe images are few, and the guard may say so
        result = run(folder_recipe(photos, compare=True, guard=SMALL, epochs=2))
    assert result.guarded["accuracy"].count == 12
    assert result.guarded["worst_class"].note in ("ant", "bee", "cat")
    assert (result.folder / "concept_guard" / "report.txt").read_text() == f"{result.table}\n"
