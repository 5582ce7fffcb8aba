"""The doctor: each fault is found with its mend, all at once, and nothing is left changed."""

import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from worlds import CLASSES, PROBE, QUICK, net, world

from concept_guard import ConceptGuard, DoctorReport, GuardConfig, Loop, Problem, doctor
from concept_guard.counterfactual import Counterfactual
from concept_guard.examination import Cost, Ratio, cost, examination, place

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
IMAGES, LABELS = world(PROBE, 40).images[:8], world(PROBE, 40).labels[:8]
EVERY_SWITCH = Loop(grad_checkpointing=True, autocast="bfloat16", channels_last=True)


def small(name: str = "test_resnet", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **options)


def examined(model: nn.Module, config: Any = None, **options: Any) -> DoctorReport:
    return doctor(model, options.pop("sample", IMAGES), config, seconds=0, **options)


def only(report: DoctorReport) -> Problem:
    (problem,) = report.problems
    return problem


# --- a healthy model ----------------------------------------------------------------------------


@pytest.mark.parametrize("loop", [Loop(), EVERY_SWITCH, Loop(autocast="float16")])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout"])
def test_a_healthy_model_has_no_problem(name: str, loop: Loop, untouched: Untouched) -> None:
    model = small(name, **({"img_size": 16} if name == "test_vit" else {})).train()
    with untouched(model):
        report = examined(model, loop=loop)
    assert report.problems == ()
    assert not report.stops
    text = str(report)
    assert f"the tap fires in training, forward and backward: {loop.switches}" in text.replace(
        "\n    ", " "
    )
    for fact in ("are those of a plain pass", "reach the logits", "folds into", "4 classes"):
        assert fact in text
    assert max(map(len, text.splitlines())) <= 100


class Flat(nn.Module):
    """Compiles fast."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("build", [Flat, pytest.param(net, marks=pytest.mark.slow, id="resnet10t")])
def test_compilation_is_tried_and_leaves_no_graph_behind(
    build: Callable[[], nn.Module], untouched: Untouched
) -> None:
    model, backend = build(), "eager" if build is Flat else "aot_eager"
    before = torch.compile(build(), backend=backend)
    before(IMAGES)  # a network like it: its graph must not be taken for the examined one
    with untouched(model):
        report = examined(model, loop=Loop(compile=backend))
    assert report.problems == ()
    assert any(f"torch.compile ({backend})" in fact for fact in report.facts)
    with ConceptGuard(model, probe=world(PROBE, 40).loader(), config=QUICK) as guard:
        torch.compile(model, backend=backend)(IMAGES)  # nor the doctor's for the user's own
        guard.loss(torch.zeros((), requires_grad=True))
        guard.step()
    torch._dynamo.reset()


def test_a_tap_in_the_middle_tells_its_layout() -> None:
    model = small("test_vit", img_size=16)
    report = examined(model, {"tap": "module:blocks.1", "action": "rebalance"})
    assert report.problems == ()
    (rows,) = [fact for fact in report.facts if fact.startswith("rows: ")]
    assert rows == (
        "rows: output of blocks.1 (NLC, 64 channels, 1 x 1 positions behind 1 prefix tokens, "
        "which are left alone); 4 classes"
    )


# --- faults of the settings and the schedule ----------------------------------------------------


def test_all_problems_are_listed_at_once_and_what_stops_comes_first() -> None:
    model = nn.Sequential(net(), nn.Identity())
    model[0].fc.weight.data[0, 0] = torch.nan
    report = examined(
        model,
        {"evry": 3, "alpha": 2.0, "start": "1ep", "gate": True, "strength": 0.5},
        sample=(IMAGES, LABELS + 2),
        loop=Loop(probe_images=3, grad_checkpointing=True),
    )
    found = [problem.found for problem in report.problems]
    for part in (
        "unknown key 'evry'",
        "alpha = 2.0",
        "start = '1ep' is in epochs",
        "0.fc.weight hold NaN",
        "Sequential has none",
        "labels outside [0, 4)",
        "3 images for 4 classes",
        "logits of the sample hold NaN",
        "gate = true",
    ):
        assert any(part in text for text in found), part
    stops = [problem.stops for problem in report.problems]
    assert stops == sorted(stops, reverse=True)
    assert report.stops
    assert all(problem.mend for problem in report.problems)
    text = str(report)
    assert text.splitlines()[0].endswith("9 problems, 8 of which stop the guard")
    assert text.index("did you mean 'every'?") < text.index("LIMITS")
    assert "0 of which" not in str(replace(report, problems=report.problems[-1:]))


SCHEDULES = {
    "start": ({"start": 400}, "start = 400: the first round comes after 400 updates", True),
    "ramp": ({"start": 100, "ramp": 90}, "ramp = 90: a correction .* never reaches", False),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_outlasts_the_training_is_found(name: str) -> None:
    config, found, stops = SCHEDULES[name]
    problem = only(examined(net(), config, loop=Loop(updates=168)))
    assert problem.stops == stops
    assert re.search(found, problem.found)
    assert not examined(net(), config, loop=Loop(updates=800)).problems  # control


def test_large_readings_are_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_total_memory", lambda _: 4 * 32 * 4000)
    problem = only(examined(net(), loop=Loop(probe_images=1001)))
    assert "max_rows = 200000: a reading of 1001 images takes" in problem.found
    assert problem.mend == "max_rows: 1000"
    assert not examined(net(), loop=Loop(probe_images=1000)).problems  # control


# --- faults of the model ------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """Answers with two logits in training, as distilled models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Any:
        """Return logits."""
        logits = self.net(x)
        return (logits, logits) if self.training else logits


class Dicts(nn.Module):
    """Takes nothing but a dict of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        """Return logits."""
        return self.head(x["patches"])


class Frozen(nn.Linear):
    """Stays in eval mode, whatever is asked of it."""

    def train(self, mode: bool = True) -> "Frozen":  # noqa: ARG002, FBT001, FBT002 - torch's own
        """Do nothing."""
        return super().train(mode=False)


class Uncopied(nn.Module):
    """Holds the result of its last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.last = self.net(IMAGES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)


def with_frozen_head() -> nn.Module:
    model = net()
    model.fc = Frozen(model.num_features, CLASSES)
    return model.train()


def changed(act: Callable[[nn.Module], object]) -> nn.Module:
    model = net()
    act(model)
    return model


def dead(model: nn.Module) -> None:
    model.layer4[-1].bn2.weight.data.zero_()
    nn.init.zeros_(model.layer4[0].downsample[2].weight)


FAULTS: dict[str, tuple[Callable[[], nn.Module], str, str, bool]] = {
    "compiled": (
        lambda: torch.compile(net(), backend="eager"),
        r"compiled already, and hooks added after torch.compile never fire",
        r"build the guard on the plain model",
        True,
    ),
    "compiled in place": (
        lambda: changed(lambda m: m.compile(backend="eager")),
        r"compiled already",
        r"build the guard on the plain model",
        True,
    ),
    "compiled head": (
        lambda: changed(lambda m: m.fc.compile(backend="eager")),
        r"fc is compiled already",
        r"build the guard first",
        True,
    ),
    "no gradient": (
        lambda: net().requires_grad_(False),
        r"no parameter requires a gradient",
        r"requires_grad_\(True\)",
        True,
    ),
    "one logit": (
        lambda: changed(lambda m: m.reset_classifier(1)),
        r"it has 1 logit, so that no prediction is ever wrong",
        r"num_classes=2",
        True,
    ),
    "distilled": (
        lambda: timm.create_model(
            "deit_tiny_distilled_patch16_224", num_classes=4, img_size=16, depth=1
        ),
        r"no Linear or 1x1 Conv2d of VisionTransformerDistilled computes the logits alone",
        r"^Use a variant of the model with one head, if there is any, or 'module:",
        True,
    ),
    "two heads in training": (
        TwoHeads,
        r"TwoHeads returns a tuple in training mode",
        r"set_distilled_training\(False\)",
        False,
    ),
    "dict input": (
        Dicts,
        r"Dicts fails on images \(8, 3, 16, 16\): IndexError",
        r"the size that the model was made for",
        True,
    ),
    "head that is not trained": (
        with_frozen_head,
        r"fc stays in eval mode when model.train\(\) is called",
        r"tap a module that is not frozen",
        True,
    ),
    "frozen classifier": (
        lambda: changed(lambda m: m.fc.requires_grad_(False)),
        r"the classifier is frozen: it cannot learn",
        r"fc.requires_grad_\(True\)",
        False,
    ),
    "no bias": (
        lambda: changed(lambda m: setattr(m, "fc", nn.Linear(32, CLASSES, bias=False))),
        r"followed by a classifier without bias",
        r"keep the guard attached",
        False,
    ),
    "dead": (
        lambda: changed(dead),
        r"all rows of the sample are the same",
        r"tap an earlier module",
        True,
    ),
    "not copied": (
        Uncopied,
        r"it cannot be copied \(Only Tensors created explicitly",
        r"hold no results of a pass",
        False,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_fault_of_the_model_is_found_with_its_mend(name: str, untouched: Untouched) -> None:
    build, found, mend, stops = FAULTS[name]
    model = build()
    with untouched(model):
        problem = only(examined(model))
    assert re.search(found, problem.found)
    assert re.search(mend, problem.mend)
    assert problem.stops == stops


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_model_takes_no_hooks() -> None:
    problem = only(examined(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)))))
    assert problem.found == "it is a ScriptModule, which takes no hooks of Python"
    assert "before torch.jit.script" in problem.mend


def test_a_meta_model_is_not_run() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    assert "meta device" in only(examined(model)).found


def test_a_container_that_checkpointing_silences_is_found(untouched: Untouched) -> None:
    model, config = net(layers=[2, 1, 1, 1]), {"tap": "module:layer1", "action": "observe"}
    assert not examined(model, config).problems  # control
    with untouched(model):
        problem = only(examined(model, config, loop=Loop(grad_checkpointing=True)))
    assert "gradient checkpointing calls the children of a container" in problem.found
    assert problem.mend == "use 'module:layer1.1'"
    assert problem.stops


def test_wrappers_are_seen_through() -> None:
    report = examined(nn.DataParallel(net()))
    assert not report.problems
    assert "inside DataParallel, which is seen through" in report.facts
    (problem,) = examined(torch.compile(nn.DataParallel(net()), backend="eager")).problems
    assert "compiled already" in problem.found


def test_other_guards_are_spoken_of_and_left_alone(untouched: Untouched) -> None:
    model, probe = net(), world(PROBE, 40).loader()
    with ConceptGuard(model, probe=probe, config=QUICK):
        with untouched(model):
            problem = only(examined(model))
        assert problem.stops
        assert "'fc' is guarded already" in problem.found
        assert "Call close() on the first guard" in problem.mend
        copied = copy.deepcopy(model)
        problem = only(examined(copied))
        assert problem.stops
        assert "is a copy of a guarded model" in problem.found
        assert "Guard the model that is trained" in problem.mend
    assert not examined(model).problems


class Overwriting(nn.Module):
    """Shows other rows under autocast than without."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = x.flatten(1)
        return self.fc(x.flip(1) if torch.is_autocast_enabled("cpu") else x)


def test_rows_that_differ_under_a_switch_are_found() -> None:
    problem = only(examined(Overwriting(), loop=Loop(autocast="bfloat16")))
    assert "rows that fc leaves behind in training differ by" in problem.found
    assert "bfloat16 autocast" in problem.found
    assert not examined(Overwriting()).problems  # control


class PastTheHead(nn.Module):
    """Evaluates by a way around its own head."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(768, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = x.flatten(1)
        if not self.training and torch.is_autocast_enabled("cpu"):
            return x @ self.fc.weight.T + self.fc.bias
        return self.fc(x)


def test_a_head_that_is_passed_by_in_evaluation_is_found() -> None:
    problem = only(examined(PastTheHead(), loop=Loop(autocast="bfloat16")))
    assert problem.found == "fc does not fire in eval mode under bfloat16 autocast"
    assert not examined(PastTheHead()).problems  # control


def test_random_rows_are_not_compared() -> None:
    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self[0](x + torch.rand_like(x) if self.training else x)

    report = examined(Noisy(nn.Linear(768, CLASSES)))
    assert not report.problems
    assert "rows in training are random: not compared with those of a plain pass" in report.facts


def test_what_is_dropped_at_random_does_not_hide_the_rows() -> None:
    report = examined(net(drop_rate=0.5, drop_path_rate=0.5))
    assert not report.problems
    assert any("are those of a plain pass" in fact for fact in report.facts)


def test_a_pass_that_fails_names_the_switches() -> None:
    def backend(*_: object) -> None:
        raise RuntimeError("no compiler here")

    problem = only(examined(net(), loop=Loop(compile=backend)))
    assert "the pass fails" in problem.found
    assert "no compiler here" in problem.found
    assert "leave out the switches one by one (torch.compile" in problem.mend


# --- faults of the sample -----------------------------------------------------------------------

SAMPLES = {
    "dict": ({"patches": IMAGES}, "it is a dict", "NaFlex models take plain images too"),
    "one image": (IMAGES[:1], "it has 1 images", "pass a batch of the loader"),
    "flat": (torch.zeros(8), r"it is shape (8,)", "yields these"),
    "soft": ((IMAGES, torch.eye(4)[LABELS]), "labels are torch.float32", "pass a clean"),
    "outside": ((IMAGES, LABELS + 1), "labels outside [0, 4), of 2 of 8", "class mapping"),
    "NaN": (IMAGES / 0.0, "the images hold NaN or infinite values", "check mean, std"),
    "channels": (IMAGES[:, :2], "ResNet fails on images (8, 2, 16, 16)", "in_chans"),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_fault_of_the_sample_is_found(name: str, untouched: Untouched) -> None:
    sample, found, mend = SAMPLES[name]
    model = net()
    with untouched(model):
        problems = examined(model, sample=sample).problems
    assert problems[0].where == "sample"
    assert found in problems[0].found
    assert mend in problems[0].mend
    assert problems[0].stops


# --- nothing is left behind ---------------------------------------------------------------------


def test_nothing_is_left_behind_when_something_raises(
    untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        torch.rand(3)
        raise KeyboardInterrupt

    model = net()
    monkeypatch.setattr(examination.Firing, "test", interrupted)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        examined(model, loop=EVERY_SWITCH)


def test_the_switches_of_torch_around_it_do_not_matter() -> None:
    model = net()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        report = examined(model)
    assert not report.problems
    assert sum("(off by 0)" in fact for fact in report.facts) == 2


# --- the cost -----------------------------------------------------------------------------------


@pytest.fixture
def _short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "SHORTEST", 1e-3)


@pytest.mark.usefixtures("_short_turns")
def test_the_cost_is_measured_in_turns(untouched: Untouched) -> None:
    model = net()
    loop = Loop(batch_size=32, probe_images=400, updates=1000)
    with untouched(model):
        report = doctor(model, (IMAGES, LABELS), {"every": 50}, loop=loop, seconds=0.01)
    assert not report.problems
    found = report.cost
    assert found is not None
    assert found.correcting is not None
    assert found.observing.pairs == 5
    assert found.observing.low <= found.observing.middle <= found.observing.high
    assert found.round_ratio.low > 1
    assert (found.rows, found.channels, found.reading_bytes) == (400, 32, 4 * 400 * 32)
    assert found.correcting_share is not None
    assert 0 < found.observing_share < 1
    assert "a round every 50 updates, tracking every 70 at most" in str(report).replace(
        "\n" + 32 * " ", " "
    )


@pytest.mark.usefixtures("_short_turns")
@pytest.mark.parametrize(("action", "edits"), [("project", False), (["project", "augment"], True)])
def test_editing_images_is_among_the_cost_if_it_is_among_the_actions(
    action: object, edits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited, seen = Counterfactual.edited, []

    def noting(there: Counterfactual, images: Tensor, **how: Tensor) -> Tensor:
        seen.append(edited(there, images, **how))
        assert not torch.equal(seen[-1], images)
        return seen[-1]

    monkeypatch.setattr(Counterfactual, "edited", noting)
    report = doctor(net(), (IMAGES, LABELS), {"action": action}, seconds=0.01)
    assert report.cost is not None
    assert report.cost.correcting is not None
    assert bool(seen) == edits


@pytest.mark.usefixtures("_short_turns")
def test_observing_alone_is_not_said_to_correct() -> None:
    report = doctor(net(), IMAGES, {"action": "observe"}, seconds=0.01)
    assert report.cost is not None
    assert report.cost.correcting is None
    assert report.cost.correcting_share is None
    assert "corrects" not in str(report)


def test_dear_rounds_are_spoken_of_unless_a_budget_bounds_them() -> None:
    one = Ratio(1.0, 1.0, 1.0, 5)
    found = Cost(
        (8, 3, 16, 16), 32, "cpu", 1, one, None, 4096, 30.0, replace(one, middle=2.0), 1, 1, 0.5,
        None, "",
    )  # fmt: skip
    loop = Loop(batch_size=32, probe_images=4096, updates=2000)
    (problem,) = place.dear(found, GuardConfig(), loop)
    assert problem.found == "every = 200: rounds would take about 50% of the training time"
    assert problem.mend.startswith("every: 1800, for about 10%")  # nine times as rare
    assert not problem.stops
    assert not list(place.dear(found, GuardConfig(budget="5%"), loop))
    assert not list(
        place.dear(found, GuardConfig(), replace(loop, updates=400))
    )  # four minutes in all
    assert not list(place.dear(found, GuardConfig(), replace(loop, probe_images=None)))
    assert not list(place.dear(replace(found, observing_share=0.2), GuardConfig(), loop))
