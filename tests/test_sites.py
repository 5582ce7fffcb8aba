"""Stage 1: where a model can be read, and how the rows lie there."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import timm
import torch
from torch import Tensor, nn

from concept_guard.errors import TapError
from concept_guard.taps import Tap, isolated

Untouched = Callable[[nn.Module], AbstractContextManager[None]]

CLASSES = 5
VIT = {"img_size": 32, "patch_size": 8}
SWIN = {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **options)


def images(count: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batch(count: int = 4, size: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    return images(count, size, seed), torch.arange(count) % CLASSES


@pytest.mark.parametrize(
    ("name", "options", "size", "path"),
    [
        ("resnet10t", {}, 64, "fc"),
        ("mobilenetv2_035", {}, 64, "classifier"),
        ("test_convnext", {}, 64, "head.fc"),
        ("test_vit", VIT, 32, "head"),
        ("swin_tiny_patch4_window7_224", SWIN, 64, "head.fc"),
        ("cait_xxs24_224", SMALL, 32, "head"),
        ("test_mambaout", {}, 64, "head.fc"),
    ],
)
def test_the_classifier_maps_a_row_to_the_logits(
    name: str, options: dict[str, object], size: int, path: str
) -> None:
    model = build(name, **options)
    tap = Tap(model, "pre_logits", images(2, size))
    reading = tap.read([batch(4, size)], max_rows=100, seed=0)
    assert (tap.path, tap.layout, tap.grid, tap.num_classes) == (path, "NC", (1, 1), CLASSES)
    assert reading.rows.shape == (4, 1, tap.channels)
    assert tap.classifier is model.get_submodule(path)
    with isolated(model):
        torch.testing.assert_close(
            tap.classifier(reading.rows[:, 0]), reading.logits, rtol=0, atol=0
        )
        torch.testing.assert_close(model(batch(4, size)[0]), reading.logits, rtol=0, atol=0)


def test_a_pointwise_convolution_is_read_and_written_as_the_linear_map_that_it_is() -> None:
    model = build("dla46_c")
    tap = Tap(model, "pre_logits", images(2, 64))
    reading = tap.read([batch(3, 64)], max_rows=100, seed=0)
    assert (tap.path, tap.layout, tap.channels) == ("fc", "NC", 256)
    head = tap.classifier
    assert head is not None
    rows = reading.rows[:, 0]
    # The same sum of 256 products in another order, twice as large below.
    rounding = 2 * 256 * torch.finfo(rows.dtype).eps * float((rows.norm(dim=1)).max())
    rounding *= float(head.weight.detach().norm(dim=1).max())
    torch.testing.assert_close(head(rows), reading.logits, rtol=0, atol=rounding)
    head.weight.sum().backward()
    assert model.fc.weight.grad.shape == (CLASSES, 256, 1, 1)
    with torch.no_grad():
        head.weight.copy_(2 * head.weight)
        head.bias.zero_()
    logits = tap.read([batch(3, 64)], max_rows=100, seed=0).logits
    torch.testing.assert_close(head(rows), logits, rtol=0, atol=rounding)
    assert (logits - reading.logits).abs().max() > 10 * rounding  # control: the model has changed
    assert len([*model.fc.parameters()]) == 2
    model.fc = nn.Sequential(nn.Identity(), model.fc)
    assert tap.classifier is head  # control: it is elsewhere now, but still there
    model.reset_classifier(CLASSES)
    with pytest.raises(TapError, match="no longer part of the model"):
        _ = tap.classifier


class Standardised(nn.Conv2d):
    """Computes something else from the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Take the mean off the weight first."""
        return torch.nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize("head", [Standardised(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)])
def test_a_convolution_that_is_no_plain_linear_map_is_no_classifier(head: nn.Module) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), head, nn.Flatten())
    tap = Tap(model, "pre_logits", torch.randn(2, 4, 3, 3))
    assert (tap.path, tap.classifier) == ("1", None)


def test_a_plain_torch_model_needs_no_get_classifier() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, CLASSES))
    tap = Tap(model, "pre_logits", torch.randn(2, 3, 2, 2))
    assert (tap.path, tap.channels, tap.classifier) == ("3", 6, model[3])


def test_the_last_of_two_maps_that_give_the_logits_is_the_head() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES), nn.Linear(CLASSES, CLASSES, False))
    nn.init.eye_(model[2].weight)
    assert Tap(model, "pre_logits", torch.randn(2, 3, 2, 2)).path == "2"


def test_a_row_with_an_axis_for_one_token_is_a_row() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (1, 12)), nn.Linear(12, CLASSES))
    model = nn.Sequential(model, nn.Flatten())
    x = torch.randn(2, 3, 2, 2)
    tap = Tap(model, "pre_logits", x)
    assert (tap.path, tap.channels, tap.classifier) == ("0.2", 12, model[0][2])
    torch.testing.assert_close(tap.logits(x, lambda rows: 2 * rows), model(2 * x))


def test_a_parametrised_head_is_no_classifier_to_write_to() -> None:
    head = nn.utils.parametrizations.weight_norm(nn.Linear(12, CLASSES))
    tap = Tap(nn.Sequential(nn.Flatten(), head), "pre_logits", torch.randn(2, 3, 2, 2))
    assert tap.path == "1"
    assert tap.classifier is None


class Cast(nn.Linear):
    """Computes what a Linear does, as timm's own subclass for scripting does."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply weight and bias."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class Cosine(nn.Linear):
    """Computes something else from the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the rows first."""
        return super().forward(torch.nn.functional.normalize(x))


def test_a_subclass_of_linear_is_judged_by_what_it_computes() -> None:
    x = torch.randn(2, 3, 2, 2)
    for head, is_linear in ((Cast(12, CLASSES), True), (Cosine(12, CLASSES), False)):
        tap = Tap(nn.Sequential(nn.Flatten(), head), "pre_logits", x)
        assert tap.classifier is (head if is_linear else None)
        tap.close()
        for parameter in head.parameters():
            nn.init.zeros_(parameter)  # now both give zeros
        assert Tap(nn.Sequential(nn.Flatten(), head), "pre_logits", x).classifier is None
    plain = nn.Linear(12, CLASSES)
    nn.init.zeros_(plain.weight)
    assert Tap(nn.Sequential(nn.Flatten(), plain), "pre_logits", x).classifier is plain


def test_a_head_whose_output_is_changed_by_a_hook_is_no_classifier() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    model[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    assert Tap(model, "pre_logits", torch.randn(2, 3, 2, 2)).classifier is None


@pytest.mark.parametrize(
    ("name", "where", "options", "message"),
    [
        (
            "deit_tiny_distilled_patch16_224",
            "pre_logits",
            SMALL,
            r"Distilled computes.*Linear and Linear. Use a variant .*, or 'stage:-2'; ",
        ),
        (
            "test_vit",
            "stage:-1",
            VIT,
            r"blocks.5\): changing its rows changes no logit.*use 'stage:-2'",
        ),
        ("test_vit", "module:block.3", VIT, r"no module 'block.3' in V.*nearest: \['blocks.3'"),
        ("test_vit", "module:zzz", VIT, r"nearest: \['patch_embed', .*'head'\]"),
        ("test_vit", "blocks.3", VIT, r"expected 'pre_logits', .* mean 'module:blocks.3'\?"),
        ("test_vit", "module:", VIT, r"expected 'pre_logits'"),
        ("test_vit", "module:blocks.3@NLCH", VIT, r"optional '@NCHW', '@NHWC' or '@NLC'"),
        ("test_vit", "module:blocks.3@NCHW", VIT, r"NCHW does not fit .* \(2, 17, 64\)"),
        ("test_vit", "stage:6", VIT, r"no stage '6'; .* has 6; use 'stage:-2'"),
        ("test_vit", "stage:last", VIT, r"no stage 'last'"),
        ("test_vit", "module:blocks.0.attn.attn_drop", VIT, r"never fires: fused .* 'module:bloc"),
        ("hrnet_w18_small", "stage:-1", {}, r"returns a list, expected one .*'module:stage4\.0\."),
        (
            "mvitv2_tiny",
            "stage:-1",
            {},
            r"calls it 'block.3', which is no module; use 'module:norm'",
        ),
        (
            "swin_tiny_patch4_window7_224",
            "module:layers.0.blocks.0.attn",
            SWIN,
            r"shape \(32, 16, 24\) for 2 images.*use 'module:layers.0.blocks.0'",
        ),
    ],
)
def test_an_unusable_place_is_refused_with_a_way_out(
    untouched: Untouched, name: str, where: str, options: dict[str, object], message: str
) -> None:
    model = build(name, **options)
    size = {"mvitv2_tiny": 224, "test_vit": 32}.get(name, options.get("img_size", 64))
    with untouched(model), pytest.raises(TapError, match=message):
        Tap(model, where, images(2, size))


def test_places_that_the_logits_do_depend_on_are_not_refused() -> None:
    averaging = build("test_vit", **VIT, global_pool="avg")
    assert Tap(averaging, "stage:-1", images()).path == "blocks.5"
    silent = build("resnet10t")
    nn.init.zeros_(silent.fc.weight)  # as some models start: no logit depends on anything yet
    assert Tap(silent, "stage:-1", images(2, 64)).path == "layer4"


def test_the_suggested_way_out_of_gradient_checkpointing_works() -> None:
    model = build("resnet10t")
    model.set_grad_checkpointing()
    with pytest.raises(TapError, match="gradient checkpointing .*use 'module:layer4.0'"):
        Tap(model, "stage:-1", images(2, 64))
    assert Tap(model, "module:layer4.0", images(2, 64)).channels == 512


@pytest.mark.parametrize(
    ("name", "options", "size", "where"),
    [
        ("resnet10t", {}, 64, "layer3"),
        ("test_efficientnet", {}, 64, "blocks.2"),
        ("test_vit", {**VIT, "global_pool": "avg"}, 32, "blocks"),
        ("swin_tiny_patch4_window7_224", SWIN, 64, "layers.1.blocks"),
        ("test_convnext", {}, 64, "stages.2.blocks"),
    ],
)
def test_containers_fall_silent_with_gradient_checkpointing(
    name: str, options: dict[str, object], size: int, where: str
) -> None:
    model = build(name, **options)
    model.set_grad_checkpointing()
    message = "never fires: gradient checkpointing calls the children"
    with pytest.raises(TapError, match=message) as told:
        Tap(model, f"module:{where}", images(2, size))
    way_out = re.findall(r"use '(module:[^']+)'", str(told.value))[0]
    assert Tap(model, way_out, images(2, size)).channels > 0


@pytest.mark.parametrize("where", ["pre_logits", "stage:-1", "module:layer2", "stage:0"])
def test_a_tap_reads_by_calling_the_model_itself(where: str) -> None:
    """Other entrances pass some hooks by, and which ones depends on the entrance."""
    model = build("resnet10t")
    tap, calls = Tap(model, where, images(2, 64)), []
    model.register_forward_hook(lambda *_: calls.append(1))
    tap.read([batch(4, 64), batch(4, 64)], max_rows=10_000, seed=0)
    assert len(calls) == 2


def test_rows_are_as_wide_as_the_classifier_is_not_as_the_last_map() -> None:
    model = build("mobilenetv3_small_050")
    tap = Tap(model, "pre_logits", images(2, 64))
    assert tap.channels == model.head_hidden_size == 1024
    tap.close()
    assert Tap(model, "stage:-1", images(2, 64)).channels == model.num_features == 288


def test_a_container_whose_children_are_called_never_fires() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.parts[1](self.parts[0](x)))

    with pytest.raises(TapError, match="calls its children, not the .* use 'module:parts.1'"):
        Tap(Net(), "module:parts", torch.randn(2, 4))
    with pytest.raises(TapError, match="does not use it; use 'pre_logits'"):
        Tap(Net(), "module:spare", torch.randn(2, 4))


def test_logits_that_are_changed_behind_the_head_are_not_its_output() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x).mul_(2)

    with pytest.raises(TapError, match="of Net computes the logits alone; .* is unknown. Use"):
        Tap(Net(), "pre_logits", torch.randn(2, 4))


def test_a_module_that_runs_twice_is_refused() -> None:
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 3))
    with pytest.raises(TapError, match="'1' runs 2 times"):
        Tap(model, "module:1", torch.randn(2, 4))


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(TapError, match=r"returns \(2, 3, 4, 4\) in eval mode, expected logits"):
        Tap(nn.Sequential(nn.Conv2d(3, 3, 1)), "pre_logits", images(2, 4))
    with pytest.raises(TapError, match=r"sample has shape \(0, 3, 4, 4\)"):
        Tap(nn.Sequential(nn.Conv2d(3, 3, 1)), "pre_logits", images(0, 4))


def test_a_compiled_model_is_refused() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 3))
    sample = torch.randn(2, 4)
    with pytest.raises(TapError, match="OptimizedModule is compiled already.*guard first"):
        Tap(torch.compile(model, backend="eager"), "pre_logits", sample)
    model[0].compile(backend="eager")
    with pytest.raises(TapError, match="0 is compiled already"):
        Tap(model, "module:0.0", sample)
    assert Tap(model, "pre_logits", sample).path == "1"
    model.compile(backend="eager")
    with pytest.raises(TapError, match="Sequential is compiled already"):
        Tap(model, "pre_logits", sample)


def test_a_data_parallel_wrapper_is_seen_through() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    tap = Tap(nn.DataParallel(model), "pre_logits", torch.randn(2, 4))
    assert (tap.path, tap.classifier) == ("0", model[0])


@pytest.mark.parametrize(
    ("name", "options", "size", "where", "layout", "grid", "prefix"),
    [
        ("resnet10t", {}, 64, "stage:-1", "NCHW", (2, 2), 0),
        ("resnet10t", {}, 64, "module:layer1", "NCHW", (16, 16), 0),
        ("test_convnext", {}, 64, "stage:-1", "NCHW", (2, 2), 0),
        ("test_convnext", {}, 64, "module:stages.0.blocks.0.mlp.fc1", "NHWC", (16, 16), 0),
        ("swin_tiny_patch4_window7_224", SWIN, 64, "stage:-1", "NHWC", (8, 8), 0),
        ("swin_tiny_patch4_window7_224", SWIN, 64, "module:patch_embed.proj", "NCHW", (16, 16), 0),
        ("test_mambaout", {}, 64, "stage:1", "NHWC", (8, 8), 0),
        ("test_vit", VIT, 32, "stage:-2", "NLC", (4, 4), 1),
        ("deit_tiny_distilled_patch16_224", SMALL, 32, "stage:0", "NLC", (2, 2), 2),
        ("cait_xxs24_224", SMALL, 32, "stage:-1", "NLC", (2, 2), 0),  # declares 1, has none
        ("xcit_nano_12_p16_224", {"img_size": 32}, 32, "stage:0", "NLC", (2, 2), 0),  # likewise
        (
            "vit_small_patch14_reg4_dinov2",
            {**SMALL, "img_size": 28},
            28,
            "stage:0",
            "NLC",
            (2, 2),
            5,
        ),
        ("mixer_s32_224", {"img_size": 128}, 128, "stage:0", "NLC", (4, 4), 0),
    ],
)
def test_the_layout_is_found(
    name: str,
    options: dict[str, object],
    size: int,
    where: str,
    layout: str,
    grid: tuple[int, int],
    prefix: int,
) -> None:
    model = build(name, **options)
    tap = Tap(model, where, images(2, size))
    assert (tap.layout, tap.grid, tap.num_prefix) == (layout, grid, prefix)
    seen: list[Tensor] = []
    model.get_submodule(tap.path).register_forward_hook(lambda _m, _a, output: seen.append(output))
    reading = tap.read([batch(2, size)], max_rows=10_000, seed=0)
    rows = reading.rows.reshape(2, *grid, tap.channels)
    expected = {
        "NCHW": lambda x: x.permute(0, 2, 3, 1),
        "NHWC": lambda x: x,
        "NLC": lambda x: x[:, prefix:].reshape(2, *grid, -1),
    }[layout](seen[0])
    torch.testing.assert_close(rows, expected, rtol=0, atol=0)
    assert reading.grid == grid


class Shaped(nn.Module):
    """A classifier of images with one intermediate activation of a given shape."""

    def __init__(self, *shape: int, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.middle, self.head = middle or nn.Identity(), nn.LazyLinear(3)
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        """Pass an activation of that shape through `middle`."""
        total = x.flatten(1).sum(dim=1).reshape(-1, *(1 for _ in self.shape))
        return self.head(self.middle(total + torch.zeros(self.shape)).flatten(1))


@pytest.mark.parametrize("name", ["NCHW", "NHWC"])
def test_an_ambiguous_shape_is_settled_by_a_suffix(name: str) -> None:
    with pytest.raises(TapError, match=r"\(2, 8, 8, 8\) can be .* write 'module:middle@NCHW' or"):
        Tap(Shaped(8, 8, 8), "module:middle", images())
    tap = Tap(Shaped(8, 8, 8), f"module:middle@{name}", images())
    assert (tap.layout, tap.grid) == (name, (8, 8))


@pytest.mark.parametrize(
    ("middle", "layout"),
    [
        (nn.Conv2d(8, 8, 1), "NCHW"),
        (nn.BatchNorm2d(8), "NCHW"),
        (nn.Linear(8, 8), "NHWC"),
        (nn.LayerNorm(8), "NHWC"),
    ],
)
def test_the_kind_of_module_settles_an_ambiguous_shape(middle: nn.Module, layout: str) -> None:
    assert Tap(Shaped(8, 8, 8, middle=middle), "module:middle", images()).layout == layout


@pytest.mark.parametrize(("channels", "layout"), [(6, "NCHW"), (9, "NHWC")])
def test_the_declared_channels_settle_a_shape_without_clear_sides(
    channels: int, layout: str
) -> None:
    model = Shaped(6, 4, 9)
    model.feature_info = [{"module": "middle", "num_chs": channels}]
    tap = Tap(model, "stage:0", images())
    assert (tap.layout, tap.channels) == (layout, channels)


def test_output_fmt_settles_an_ambiguous_shape() -> None:
    model = Shaped(8, 8, 8)
    model.output_fmt = "NHWC"
    assert Tap(model, "module:middle", images()).layout == "NHWC"


def test_tokens_that_form_no_grid_need_a_suffix() -> None:
    model = Shaped(7, 6)
    with pytest.raises(TapError, match="which of 7 tokens .* 'module:middle@NLC' to skip the 0"):
        Tap(model, "module:middle", images())
    tap = Tap(model, "module:middle@NLC", images())
    assert (tap.layout, tap.num_prefix, tap.grid, tap.channels) == ("NLC", 0, (1, 7), 6)


def test_channels_before_tokens_are_refused() -> None:
    model = Shaped(6, 16)
    model.feature_info = [{"module": "middle", "num_chs": 6}]
    with pytest.raises(TapError, match="6 channels before the tokens"):
        Tap(model, "stage:0", images())


def test_a_patch_grid_beats_the_shape_of_the_token_count() -> None:
    # Nine tokens: a 3 x 3 grid by their number, but 5 registers and 2 x 2 patches in truth.
    model = Shaped(9, 6)
    model.num_prefix_tokens, model.patch_embed = 5, nn.Identity()
    tap = Tap(model, "module:middle", images())
    assert tap.num_prefix == 0
    tap.close()
    model.patch_embed.patch_size = (16, 16)
    assert Tap(model, "module:middle", images()).num_prefix == 5


def test_a_class_token_that_is_not_declared_is_found_by_counting() -> None:
    tap = Tap(Shaped(17, 6), "module:middle", images())
    assert (tap.num_prefix, tap.grid) == (1, (4, 4))


def test_a_single_token_is_a_row() -> None:
    model = Shaped(1, 6)
    model.num_prefix_tokens = 1
    tap = Tap(model, "module:middle", images())
    assert (tap.num_prefix, tap.grid) == (0, (1, 1))


def test_prefix_tokens_alone_are_refused() -> None:
    model = Shaped(2, 6)
    model.num_prefix_tokens = 2
    with pytest.raises(TapError, match="which of 2 tokens form the grid"):
        Tap(model, "module:middle@NLC", images())


def test_a_grid_follows_the_proportion_of_the_images() -> None:
    tap = Tap(Shaped(18, 6), "module:middle", torch.randn(2, 3, 32, 64))
    assert (tap.num_prefix, tap.grid) == (0, (3, 6))
