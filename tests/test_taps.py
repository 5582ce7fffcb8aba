"""Stage 1: what a tap reads and edits, and that reading leaves no trace."""

import gc
import io
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torch.utils.hooks import RemovableHandle

from concept_guard.errors import ProbeError, TapError
from concept_guard.taps import Tap, check_labels, probe_batches

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
Look = Callable[[], object]

CLASSES = 5
VIT = {"img_size": 32, "patch_size": 8}


def build(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=CLASSES, **options)


def images(count: int = 2, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def batch(count: int = 4, size: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    return images(count, size, seed), torch.arange(count) % CLASSES


def vit_tap(where: str = "stage:-2") -> tuple[nn.Module, Tap]:
    model = build("test_vit", **VIT)
    return model, Tap(model, where, images())


def doubled(rows: Tensor) -> Tensor:
    return 2 * rows


class Shift:
    """An edit with a vector, as a correction is one."""

    def __init__(self, by: Tensor) -> None:
        self.by = by

    def __call__(self, rows: Tensor) -> Tensor:
        """Move all rows by the same vector."""
        return rows + self.by.to(rows.dtype)


def test_max_rows_and_max_images_bound_a_reading() -> None:
    _, tap = vit_tap()  # 16 positions
    loader = DataLoader(TensorDataset(*batch(9)), 4)
    sizes = {
        (16 * 5, None): 5,
        (16 * 5 + 15, 7): 5,
        (16 * 7, 3): 3,
        (1, None): 1,
        (10_000, None): 9,
    }
    for (max_rows, max_images), expected in sizes.items():
        reading = tap.read(loader, max_rows=max_rows, seed=0, max_images=max_images)
        assert (len(reading.rows), reading.seen) == (expected, 9)
        everything = tap.read(loader, max_rows=10_000, seed=0)
        torch.testing.assert_close(reading.rows, everything.rows[reading.indices], rtol=0, atol=0)
        assert torch.equal(reading.labels, everything.labels[reading.indices])


def test_other_image_sizes_are_read_with_their_own_grid() -> None:
    model = build("resnet10t")
    tap = Tap(model, "stage:-1", images(2, 64))
    reading = tap.read([batch(3, 96)], max_rows=100, seed=0)
    assert (tap.grid, reading.grid, reading.rows.shape) == ((2, 2), (3, 3), (3, 9, 512))
    mixed = [batch(3, 64), batch(3, 96)]
    with pytest.raises(ProbeError, match="starts at image 3: 9 positions .* expected 4"):
        tap.read(mixed, max_rows=100, seed=0)


def test_a_model_in_another_precision_is_read_in_float32() -> None:
    model = build("test_vit", **VIT).to(torch.bfloat16)
    reading = Tap(model, "pre_logits", images()).read([batch()], max_rows=10, seed=0)
    assert (reading.rows.dtype, reading.logits.dtype) == (torch.float32, torch.float32)
    assert (reading.labels.dtype, reading.indices.dtype) == (torch.int64, torch.int64)
    assert reading.rows.isfinite().all()


def test_rows_that_are_not_finite_are_handed_on() -> None:
    model, tap = vit_tap("pre_logits")
    model.norm.weight.data.fill_(float("nan"))
    assert tap.read([batch()], max_rows=10, seed=0).rows.isnan().all()
    tap.close()
    assert Tap(model, "pre_logits", images()).path == "head"


def test_reading_names_all_labels_that_are_no_class_but_needs_not_every_class() -> None:
    _, tap = vit_tap()
    wrong = [(images(), torch.tensor([0, 9])), (images(), torch.tensor([8, 0]))]
    with pytest.raises(ProbeError, match=r"image 1 has 9, image 2 has 8; the model has 5"):
        tap.read(wrong, max_rows=10, seed=0)
    with pytest.raises(ProbeError, match="probe is empty"):
        tap.read([], max_rows=10, seed=0)
    assert tap.read(iter([(images(), torch.tensor([1, 1]))]), max_rows=99, seed=0).seen == 2


def test_an_unreadable_image_is_an_error_of_the_dataset() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise OSError("cannot identify image file 'cat.jpg'")

    _, tap = vit_tap()
    with pytest.raises(OSError, match=r"cat\.jpg"):
        tap.read(DataLoader(Broken(), 4), max_rows=10, seed=0)


def test_an_edit_changes_the_spatial_tokens_only() -> None:
    model, tap = vit_tap("module:blocks.2")
    outputs: list[Tensor] = []
    model.blocks[2].register_forward_hook(lambda _m, _a, output: outputs.append(output))
    model.eval()
    x = images()
    model(x)
    tap.edit = doubled
    model(x)
    plain, edited = outputs
    torch.testing.assert_close(edited[:, :1], plain[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(edited[:, 1:], 2 * plain[:, 1:], rtol=0, atol=0)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("where", "axis"), [("module:0", 1), ("module:0@NHWC", 3), ("pre_logits", 1)]
)
def test_an_edit_keeps_layout_and_memory_format(
    memory: torch.memory_format, where: str, axis: int
) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, CLASSES, 1), nn.Flatten()
    )
    model = model.to(memory_format=memory).eval()
    tap = Tap(model, where, images())
    seen: list[Tensor] = []
    if where == "pre_logits":
        model[2].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    else:
        model[0].register_forward_hook(lambda _module, _args, output: seen.append(output))
    x = images().to(memory_format=memory)
    model(x)
    tap.edit = Shift(torch.arange(1.0, tap.channels + 1))
    model(x)
    plain, edited = seen
    shape = [1, 1, 1, 1]
    shape[axis] = tap.channels
    torch.testing.assert_close(edited, plain + tap.edit.by.reshape(shape), rtol=0, atol=0)
    assert edited.stride() == plain.stride()


def test_train_mode_passes_are_never_edited() -> None:
    model = build("resnet10t").train()
    tap = Tap(model, "pre_logits", images(2, 64))
    torch.manual_seed(0)
    plain = model(images(2, 64))
    tap.edit = doubled
    torch.manual_seed(0)
    assert torch.equal(model(images(2, 64)), plain)
    model.eval()
    tap.edit = None
    plain = model(images(2, 64))
    tap.edit = doubled
    assert not torch.equal(model(images(2, 64)), plain)  # control


def test_an_edit_is_differentiable_and_never_in_place() -> None:
    model = build("resnet10t")
    tap = Tap(model, "stage:-1", images(2, 64))
    by = torch.zeros(512, requires_grad=True)
    tap.edit = Shift(by)
    model.eval()(images(2, 64)).sum().backward()
    assert by.grad is not None
    assert by.grad.abs().sum() > 0


def test_an_edit_under_autocast_gets_the_dtype_of_the_activation() -> None:
    model = build("resnet10t")
    tap = Tap(model, "stage:-1", images(2, 64))
    dtypes = []

    def edit(rows: Tensor) -> Tensor:
        dtypes.append(rows.dtype)
        return rows.float()

    tap.edit, tap.listening = edit, True
    outputs: list[Tensor] = []
    model.layer4.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        model(images(2, 64))  # in train mode: captured, not edited
        model.eval()(images(2, 64))
        tap.logits(images(2, 64), edit)
    assert dtypes == [torch.bfloat16, torch.float32]  # the own pass leaves autocast
    assert outputs[1].dtype == torch.bfloat16
    assert tap.captured is not None
    assert tap.captured.dtype == torch.float32


def test_rows_are_read_before_the_edit_and_logits_after_it() -> None:
    model, tap = vit_tap("pre_logits")
    plain = tap.read([batch()], max_rows=100, seed=0)
    tap.edit = doubled
    edited = tap.read([batch()], max_rows=100, seed=0)
    torch.testing.assert_close(edited.rows, plain.rows, rtol=0, atol=0)
    expected = torch.nn.functional.linear(2 * plain.rows[:, 0], model.head.weight, model.head.bias)
    torch.testing.assert_close(edited.logits, expected)
    torch.testing.assert_close(tap.logits(batch()[0], None), plain.logits, rtol=0, atol=0)
    tap.edit = None
    torch.testing.assert_close(tap.logits(batch()[0], doubled), edited.logits, rtol=0, atol=0)
    assert tap.edit is None


def test_the_current_edit_survives_an_error_in_another() -> None:
    _, tap = vit_tap()
    tap.edit = doubled

    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("broken edit")

    with pytest.raises(RuntimeError, match="broken edit"):
        tap.logits(images(), broken)
    assert tap.edit is doubled


def test_a_tap_that_falls_silent_later_says_so() -> None:
    model = build("resnet10t")
    tap = Tap(model, "stage:-1", images(2, 64))
    model.set_grad_checkpointing()
    for edit in (None, doubled):
        with pytest.raises(TapError, match="'layer4' never fires: gradient checkpointing"):
            tap.logits(images(2, 64), edit)


def test_a_tap_that_falls_silent_within_a_pass_returns_no_stale_rows() -> None:
    model = build("resnet10t")
    tap = Tap(model, "stage:-1", images(2, 64))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield batch(2, 64)
        model.set_grad_checkpointing()
        yield batch(2, 64)

    with pytest.raises(TapError, match="'layer4' never fires"):
        tap.read(batches(), max_rows=10, seed=0)


def test_only_train_mode_passes_are_captured_while_listening() -> None:
    model, tap = vit_tap("pre_logits")
    model.train()
    model(images())
    assert tap.captured is None
    tap.listening = True
    model.eval()
    model(images())
    tap.read([batch()], max_rows=10, seed=0)
    assert tap.captured is None
    model.train()
    model(images(3))
    assert tap.captured is not None
    assert tap.captured.shape == (3, 1, 64)
    assert not tap.captured.requires_grad
    tap.forget()
    assert tap.captured is None


def test_calls_are_counted_but_not_the_own_ones() -> None:
    model, tap = vit_tap()
    assert tap.fired == 0
    model(images())
    model(images())
    tap.read([batch()], max_rows=10, seed=0)
    tap.logits(images(), doubled)
    assert tap.fired == 2
    tap.reset_fired()
    assert tap.fired == 0


@pytest.mark.parametrize("where", ["pre_logits", "stage:-2"])
def test_hooks_wait_for_no_device(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tap = vit_tap(where)
    tap.edit, tap.listening = Shift(torch.ones(64)), True

    def never(*_: object) -> None:
        raise AssertionError("a value was asked for")

    for asks in ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, asks, never)
    for training in (True, False):
        model.train(training)(images())
    assert (tap.fired, tap.captured is not None) == (2, True)
    with pytest.raises(AssertionError, match="a value was asked for"):  # control
        bool(torch.ones(1))


def test_the_model_sees_the_probe_in_the_batches_of_its_loader() -> None:
    """Another batch size would be tuned for anew, with cudnn.benchmark."""
    model, tap = vit_tap()
    sizes = []
    model.register_forward_hook(lambda _module, args, _output: sizes.append(len(args[0])))
    tap.read(DataLoader(TensorDataset(*batch(23)), 10, shuffle=True), max_rows=40, seed=0)
    assert sizes == [10, 10, 3]


def test_an_in_place_activation_does_not_overwrite_what_was_read() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3600, CLASSES)
    )
    tap = Tap(model, "module:0", images())
    tap.listening = True
    x, labels = batch()
    expected = torch.nn.functional.conv2d(x, model[0].weight, model[0].bias)
    expected = expected.flatten(2).transpose(1, 2)
    assert expected.min() < 0  # control: the rectified map would fail
    model(x)
    torch.testing.assert_close(tap.captured, expected)
    reading = tap.read([(x, labels)], max_rows=10_000, seed=0)
    torch.testing.assert_close(reading.rows, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_recomputation_of_a_checkpoint_captures_the_same_rows(use_reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    tap = Tap(model, "module:0", torch.randn(2, 4))
    tap.listening = True
    x = torch.randn(2, 4, requires_grad=True)
    output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)
    assert tap.captured is not None
    first = tap.captured.clone()
    output.sum().backward()
    assert tap.fired == 2  # control: it was recomputed
    torch.testing.assert_close(tap.captured, first, rtol=0, atol=0)


def test_a_compiled_model_reads_edits_and_captures_without_recompiling() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    tap = Tap(model, "pre_logits", torch.randn(2, 4))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    shift = Shift(torch.ones(4))
    tap.edit, tap.listening = shift, True
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 4)
    plain = tap.logits(x, None)
    for _ in range(4):
        output = compiled(x)
    assert len(graphs) == 1
    assert tap.fired == 1
    torch.testing.assert_close(tap.captured, model[1](model[0](x))[:, None].detach())
    torch.testing.assert_close(output, plain)  # train mode: no edit
    model.eval()
    for _ in range(4):
        output = compiled(x)
    assert len(graphs) == 2
    torch.testing.assert_close(output, plain + model[2].weight.sum(dim=1))
    model.compile(backend=backend)  # compiled in place: the probe must still run eagerly
    tap.read([(torch.randn(7, 4), torch.zeros(7, dtype=torch.int64))], max_rows=9, seed=0)
    assert len(graphs) == 2
    shift.by += 1
    torch.testing.assert_close(compiled(x), output + model[2].weight.sum(dim=1))
    assert len(graphs) == 2


def test_a_deep_copy_follows_the_edit_but_neither_captures_nor_counts() -> None:
    model, tap = vit_tap("pre_logits")
    ema = ModelEmaV3(model)
    x = images()
    plain = tap.logits(x, None)
    tap.edit, tap.listening = doubled, True
    ema.module.train()
    ema.module(x)
    assert (tap.fired, tap.captured) == (0, None)
    ema.module.eval()
    torch.testing.assert_close(ema.module(x), tap.logits(x, doubled), rtol=0, atol=0)
    tap.edit = None
    torch.testing.assert_close(ema.module(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["pre_logits", "stage:2"])
def test_a_saved_model_keeps_the_edit_it_had(where: str) -> None:
    model, tap = vit_tap(where)
    x, edit = images(), Shift(torch.ones(64))
    tap.edit = edit
    expected = tap.logits(x, edit)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = pickle.dumps(model)
    tap.edit = None
    edit.by.zero_()
    for loaded in (torch.load(file, weights_only=False), pickle.loads(pickled)):
        loaded.eval()
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=0)
    assert not torch.equal(tap.logits(x, None), expected)


def test_untouched_can_fail(untouched: Untouched) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AssertionError, match="_forward_hooks/0"), untouched(model):
        model[0].register_forward_hook(lambda *_: None)


def test_closing_leaves_nothing_on_the_model(untouched: Untouched) -> None:
    model = build("test_vit", **VIT)
    with untouched(model):
        tap = Tap(model, "stage:-2", images())
        tap.edit, tap.listening = doubled, True
        tap.read(DataLoader(TensorDataset(*batch(8)), 2, shuffle=True), max_rows=10, seed=0)
        tap.close()
        tap.close()
    assert (tap.captured, tap.listening, tap.classifier) == (None, False, None)
    for use in (
        lambda: tap.logits(images(), None),
        lambda: tap.read([batch()], max_rows=10, seed=0),
    ):
        with pytest.raises(TapError, match="'stage:-2' is closed"):
            use()


def test_a_closed_tap_does_not_keep_the_model_alive() -> None:
    model, tap = vit_tap("pre_logits")
    alive = weakref.ref(model)
    tap.close()
    del model
    gc.collect()
    assert alive() is None


def test_a_guarded_model_keeps_its_keys_and_attributes(untouched: Untouched) -> None:
    model, _ = vit_tap()
    keys = list(model.state_dict())
    with untouched(model):
        tap = Tap(model, "pre_logits", images())
        tap.close()
    assert list(model.state_dict()) == keys


class Stubborn(nn.Linear):
    """A module that refuses hooks."""

    def register_forward_hook(self, *_: object, **__: object) -> RemovableHandle:
        """Refuse."""
        raise RuntimeError("no hook here")


class StubbornAtLast(nn.Linear):
    """A module that refuses the hook that is to stay."""

    def register_forward_pre_hook(self, *_: object, **__: object) -> RemovableHandle:
        """Refuse."""
        raise RuntimeError("no hook here")


@pytest.mark.parametrize("head", [Stubborn, StubbornAtLast])
def test_all_hooks_are_attached_or_none(untouched: Untouched, head: type[nn.Linear]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), head(4, 3))
    sample = torch.randn(2, 4)
    with untouched(model), pytest.raises(RuntimeError, match="no hook here"):
        Tap(model, "pre_logits", sample)


def test_a_failure_in_the_sample_pass_leaves_no_hook(untouched: Untouched) -> None:
    model = build("test_vit", **VIT)
    sample = torch.randn(2, 4, 32, 32)
    with untouched(model), pytest.raises(RuntimeError, match="to have 3 channels"):
        Tap(model, "pre_logits", sample)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Draws from every global random state, as augmentations do."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = random.random() + np.random.rand()  # noqa: NPY002 - the global state is the point
        return torch.rand(3, 32, 32) + noise, index % CLASSES


Loader = DataLoader[tuple[Tensor, Tensor]]


def trained(
    name: str, options: dict[str, object], attach: Callable[[nn.Module, Loader], Look]
) -> list[Tensor]:
    """Train three updates with all that draws random numbers, and look after each of them."""
    model = build(name, drop_rate=0.3, drop_path_rate=0.3, **options).train()
    for module in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)][:2]:
        module.eval()
    loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global state is the point
    look = attach(model, loader)
    for inputs, labels in loader:
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        look()
    return [*(value.clone() for value in model.state_dict().values()), torch.get_rng_state()]


def unguarded(*_: object) -> Look:
    return lambda: None


def guarded(model: nn.Module, loader: Loader) -> Look:
    probe = probe_batches(loader, seed=3)
    check_labels(probe, CLASSES)
    tap = Tap(model, "pre_logits", images())
    tap.listening = True
    return lambda: (tap.read(probe, max_rows=5, seed=0), tap.logits(images(), doubled))


def naive(model: nn.Module, loader: Loader) -> Look:
    def look() -> None:
        model.eval()
        with torch.no_grad():
            for inputs, _ in loader:
                model(inputs)
        model.train()

    return look


@pytest.mark.parametrize(("name", "options"), [("test_resnet", {}), ("test_vit", VIT)])
def test_training_with_reads_in_between_is_bit_identical(
    name: str, options: dict[str, object]
) -> None:
    alone = trained(name, options, unguarded)
    for one, other in zip(alone, trained(name, options, guarded), strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    control = trained(name, options, naive)  # looking is not harmless by itself
    assert not all(torch.equal(one, other) for one, other in zip(alone, control, strict=True))
