"""The guard works on every family of timm's classifiers, as the table in recipes/README.md says.

Here ten networks whose heads, layouts and refusals differ; all of them with `-m slow`.
"""

import re
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.functional import cross_entropy

from concept_guard import baking
from concept_guard.correction import Projection
from concept_guard.hooks import Hook
from concept_guard.layouts import Layout
from concept_guard.taps import Tap

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import families
    from families_list import FAMILIES, Architecture
finally:
    sys.path.remove(str(ROOT / "benchmarks"))

QUICK = {
    "beit_base_patch16_224",  # the classifier reads the mean of the tokens
    "test_resnet",
    "test_convnext",
    "test_mambaout",  # NHWC
    "swin_tiny_patch4_window7_224",  # NHWC
    "test_vit",  # the last block's tokens are not read
    "naflexvit_base_patch16_gap",  # registers
    "cait_xxs24_224",  # declares a class token that its blocks have not
    "levit_128s",  # two heads, or one
}
PAGE = families.PAGE.read_text(encoding="utf8")
TABLE = PAGE.split(families.BEGIN)[1].split(families.END)[0]
ROWS = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]


def architecture(name: str) -> Architecture:
    return next(a for a in FAMILIES if a.name == name)


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(a, id=str(a), marks=() if a.name in QUICK else pytest.mark.slow)
        for a in FAMILIES
    ],
)
def test_a_network_is_guarded_as_the_table_says(chosen: Architecture) -> None:
    row = families.examined(chosen)
    if f"timm {timm.__version__}," in TABLE:  # another release may name its modules otherwise
        assert row in ROWS


def test_the_table_has_a_row_for_every_network_and_says_how_it_was_made() -> None:
    named = [re.match(r"\| (\S+) \| (.+?), \d+ px \|", row) for row in ROWS]
    assert [(m[1], m[2]) for m in named if m] == [(a.family, str(a)) for a in FAMILIES]
    made = r"commit [0-9a-f]{7,},\s+\d{4}-\d\d-\d\d, .*torch [\d.]+, timm [\d.]+"
    assert re.search(made, TABLE)
    assert {a.name for a in FAMILIES} >= QUICK


def test_a_family_that_timm_has_not_is_found() -> None:
    assert {a.family for a in FAMILIES} <= set(timm.list_modules())
    wrong = [a.name for a in FAMILIES if a.name not in timm.list_models(module=a.family)]
    assert not wrong, wrong


@pytest.mark.parametrize(
    ("module", "name", "broken", "complaint"),
    [
        (baking, "bake_into", lambda *_: None, "baking changes the logits"),
        (Hook, "__call__", lambda *_: torch.zeros(20, 96), "attaching changed the logits"),
        (families, "train", lambda m, _, guard: guard and m(torch.ones(9, 3, 64, 64)), "observing"),
        (Projection, "__call__", lambda _, rows: rows, "erasing moves the logits by 0.0"),
        (Tap, "close", lambda _: None, "hooks are left"),
    ],
)
def test_what_is_wrong_is_found(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, broken: object, complaint: str
) -> None:
    chosen = architecture("test_resnet")
    model, batches = chosen.built(), chosen.probe()
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError, match=complaint):
        families.corrected(model, batches, "pre_logits")


def test_a_map_that_is_read_in_a_wrong_layout_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = architecture("cait_xxs24_224")
    monkeypatch.setattr(Layout, "rows", lambda _, x: x.roll(1, dims=1))  # by one token
    with pytest.raises(AssertionError, match="stage:-1 is not as timm's own maps are"):
        families.mapped(chosen.built(), chosen.probe(), "stage:-1")


def test_a_naflex_network_trains_on_dicts_of_patches() -> None:
    chosen = architecture("naflexvit_base_patch16_gap")
    model, batches = chosen.built(), chosen.probe()
    images, labels = batches[0]
    patches = torch.nn.functional.unfold(images, 16, stride=16).transpose(1, 2)
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(len(images), -1, -1)
    valid = torch.ones(patches.shape[:2], dtype=torch.bool)
    inputs = {"patches": patches, "patch_coord": places, "patch_valid": valid}
    guard, _ = families.attached(model, batches, "pre_logits", families.KEPT)
    families.erase_the_tint(guard, batches)
    families.train(model, (inputs, labels), guard)
    rows = guard.tap.captured
    assert rows is None  # used up by the update
    model.train()(inputs)
    assert guard.tap.captured is not None
    assert guard.tap.captured.shape == (len(labels), 1, guard.tap.channels)


def test_a_network_that_returns_two_logits_in_training_trains_under_a_correction() -> None:
    chosen = architecture("levit_128s")
    model, batches = chosen.built(), chosen.probe()
    guard, refusal = families.attached(model, batches, "pre_logits", families.KEPT)
    assert refusal == "`pre_logits`: several heads -> `stage:-1`"
    families.erase_the_tint(guard, batches)
    model.set_distilled_training()
    images, labels = batches[0]
    both = model.train()(images)
    assert len(both) == 2
    losses = sum(cross_entropy(out, labels, reduction="none") for out in both)
    loss = guard.loss(losses, labels)
    loss.backward()
    guard.step()
    assert loss != losses.mean()  # the tint is rare, and weighs more
    assert bool(model.head.linear.weight.grad.abs().sum() > 0)


@pytest.mark.slow
@pytest.mark.parametrize("baked", [True, False])
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_vit", "swin_tiny_patch4_window7_224"]
)
def test_onnx_predicts_as_the_network_does(name: str, baked: bool) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"export to ONNX needs {package}: pip install it")
    model, batches = architecture(name).built(), architecture(name).probe()
    plain, images = families.logits(model, batches[:1]), batches[0][0]
    guard, _ = families.attached(model, batches, "pre_logits", families.KEPT)
    families.erase_the_tint(guard, batches)
    corrected = families.logits(model, batches[:1])
    if baked:
        guard.bake()
    told = nullcontext() if baked else pytest.warns(UserWarning, match="exported with the guard")
    with told:
        program = torch.onnx.export(model.eval(), (images,), dynamo=True, verbose=False)
    guard.close()
    assert program is not None
    (found,) = program(images)
    torch.testing.assert_close(found, corrected, rtol=0, atol=1e-5)
    assert (found - plain).abs().max() > 1e-3  # control
