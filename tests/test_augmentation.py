"""Training images get the mark and lose it at random, and nothing else changes."""

import copy
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import together
from test_guard_resume import differences, read, written
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, interpolate
from worlds import (
    MARK,
    PROBE,
    SIDE,
    TRAIN,
    UPDATES,
    correcting,
    fallen,
    flagging,
    held_out,
    net,
    sgd,
    stream,
    the_flagged,
    train,
    world,
)

from concept_guard import ConceptGuard, effects
from concept_guard.augmentation import POSITIONS, SHARE, Augmentation
from concept_guard.config import GuardConfig
from concept_guard.hooks import ImagesHook, OutcomeHook, Shared
from concept_guard.probe import probe_batches
from concept_guard.ranks import digest
from concept_guard.reading import Reading

Untouched = Callable[[nn.Module], AbstractContextManager[None]]
ALONE = {"action": ["augment"]}
MANY = 1000  # images; fewer than positions, so that each has random numbers of its own
CORNER = torch.zeros(SIDE, SIDE, dtype=torch.bool)
CORNER[:MARK, :MARK] = True


def sigmas(share: float, count: int, *, of: float = 4.5) -> float:
    """Return how far a share of so many images strays from what is expected, at most."""
    return of * (share * (1 - share) / count) ** 0.5


def are_marked(images: Tensor) -> Tensor:
    """Return which images have the mark: 6 there, without it noise around 0 of deviation .4."""
    red, green, blue = images[:, :, CORNER].mean(dim=2).T
    return red - green + blue > 3


def seen(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Return the images that the first layer gets when the model is called."""
    kept: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
    with torch.no_grad():
        model(*args, **kwargs)
    handle.remove()
    (images,) = kept
    return images


def frozen(model: nn.Module) -> nn.Module:
    """Return the model in train mode, but for statistics of batches, which a pass would change."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def editing(**config: object) -> ConceptGuard:
    """Return a guard that corrects the mark and has drawn the random numbers of an update."""
    guard = correcting(**{**ALONE, **config})
    guard._corrector.updated()
    return guard


@cache
def edited() -> tuple[Tensor, Tensor, Tensor]:
    """Return many images, the same as they are trained on, and their classes."""
    data, guard = world(TRAIN, 2000), editing()
    found = []
    for start in range(0, 2000, MANY):
        guard._corrector.updated()
        found.append(seen(guard.tap.model.train(), data.images[start : start + MANY]))
    return data.images, torch.cat(found), data.labels


def test_the_mark_says_little_about_the_class_any_more() -> None:
    images, new, labels = edited()
    before, after = are_marked(images), are_marked(new)
    assert torch.equal(before, world(TRAIN, 2000).marked)
    for k, share in enumerate((0.98, 0.01, 0.01, 0.01)):
        own = labels == k
        expected = 0.5 * SHARE + (1 - SHARE) * share
        assert abs(float(after[own].double().mean()) - expected) < sigmas(0.5, int(own.sum()))
        assert abs(float(before[own].double().mean()) - share) < 0.02  # control
    assert abs(float(after.double().mean()) - 0.5) < 0.05


def test_places_without_the_mark_keep_their_values_bit_for_bit() -> None:
    images, new, _ = edited()
    assert torch.equal(new[:, :, ~CORNER], images[:, :, ~CORNER])
    changed = are_marked(images) != are_marked(new)
    assert float((new - images)[changed][:, :, CORNER].std(dim=2).mean()) > 0.5  # control


def test_a_share_of_the_images_is_left_alone() -> None:
    images, new, _ = edited()
    plain = ~are_marked(images)  # a corner without the mark is filled from other images
    alone = (new == images).flatten(1).all(dim=1)[plain].double().mean()
    assert abs(float(alone) - (1 - SHARE)) < sigmas(SHARE, int(plain.sum()))


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("ramp", [0, 4])
def test_the_share_follows_strength_and_ramp(strength: float, ramp: int) -> None:
    guard = correcting(**ALONE, strength=strength, ramp=ramp)
    guard._corrector._updates = 0
    data = world(TRAIN, 2000)
    images = data.images[~data.marked][:MANY]
    for update in range(1, 6):
        guard._corrector.updated()
        new = seen(guard.tap.model.train(), images)
        share = float((new != images).flatten(1).any(dim=1).double().mean())
        expected = SHARE * strength * (min(1.0, update / ramp) if ramp else 1.0)
        assert abs(share - expected) < sigmas(expected, MANY)


def test_images_are_edited_from_the_update_after_the_mark_is_corrected_until_it_is_not() -> None:
    model = fallen()
    guard = flagging(model, **ALONE)
    images = world(TRAIN, 2000).images[:100]

    def is_edited() -> bool:
        train(model, [next(stream(1))], guard)
        return not torch.equal(seen(model.train(), images), images)

    assert not is_edited()
    concept = the_flagged(guard)
    guard.erase(concept)
    assert torch.equal(seen(model.train(), images), images)
    assert is_edited()
    guard.restore(concept)
    assert guard.tap.augment is None
    assert not is_edited()
    guard.erase(concept)
    assert is_edited()
    guard.veto(concept)
    assert not is_edited()


@pytest.mark.parametrize("end", ["bake", "close"])
def test_a_guard_that_is_done_edits_nothing(end: str, untouched: Untouched) -> None:
    model = frozen(fallen())
    images = world(TRAIN).images[:50]
    with untouched(model):
        guard = correcting(model, **ALONE)
        guard._corrector.updated()
        assert not torch.equal(seen(model, images), images)  # control
        getattr(guard, end)()
        assert torch.equal(seen(model, images), images)
        guard.close()
    assert guard.tap.augment is None
    assert guard.tap.outcome == (None, None)


def test_passes_in_eval_mode_and_passes_of_the_guard_are_not_edited() -> None:
    guard = editing()
    model, images = guard.tap.model, world(TRAIN).images[:50]
    assert torch.equal(seen(model.eval(), images), images)
    assert not torch.equal(seen(model.train(), images), images)  # control
    plain = guard.tap.logits(images, None)
    guard.tap.augment = None
    assert torch.equal(guard.tap.logits(images, None), plain)
    assert torch.equal(
        guard.tap.read([(images, world(TRAIN).labels[:50])], max_rows=99, seed=0).logits, plain
    )


def pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def averaged(model: nn.Module) -> nn.Module:
    return ModelEmaV3(model).module


def baked(model: nn.Module) -> nn.Module:
    guard = correcting(model, action=["project", "augment"])
    guard._corrector.updated()
    return guard.baked_copy()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, averaged])
def test_copies_of_the_model_are_not_edited(copied: Callable[[nn.Module], nn.Module]) -> None:
    guard = editing()
    model, images = guard.tap.model, world(TRAIN).images[:50]
    other = copied(model).train()
    assert not torch.equal(seen(model.train(), images), images)  # control
    noted = guard.tap.outcome
    assert torch.equal(seen(other, images[:7]), images[:7])
    assert all(a is b for a, b in zip(guard.tap.outcome, noted, strict=True))  # nor do they note


def test_a_baked_copy_is_not_edited() -> None:
    other, images = baked(fallen()).train(), world(TRAIN).images[:50]
    assert torch.equal(seen(other, images), images)


def test_the_tensor_of_the_caller_and_the_random_state_stay() -> None:
    guard = editing()
    images = world(TRAIN).images[:100].clone()
    kept, state = images.clone(), torch.get_rng_state()
    guard._corrector.updated()
    new = seen(guard.tap.model.train(), images)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(new, kept)  # control


@pytest.mark.parametrize("action", ["observe", ["project", "rebalance"], ["penalize", "refit"]])
def test_without_the_action_a_pass_gets_the_very_tensor_and_nothing_is_drawn(action: Any) -> None:
    guard = correcting(action=action)
    guard.round()
    images = world(TRAIN).images[:50]
    before = guard.state_dict()["augmentation"]
    guard._corrector.updated()
    assert seen(guard.tap.model.train(), images) is images
    assert guard.tap.augment is None
    assert differences(guard.state_dict()["augmentation"], before) == []
    assert differences(editing().state_dict()["augmentation"], before)  # control


class Pixels(nn.Module):
    """Takes images by name, as models of transformers do."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, scale: float = 1.0) -> Tensor:
        """Return logits."""
        logits: Tensor = self.network(pixel_values * scale)
        return logits


@pytest.mark.parametrize("place", ["name", "first"])
def test_images_are_edited_however_the_model_is_called(place: str) -> None:
    model = Pixels(fallen())
    guard = ConceptGuard(model, probe=world(PROBE).loader(), config={"concepts": 8, **ALONE})
    guard.round()
    assert guard.erased
    guard._corrector.updated()
    images = world(TRAIN).images[:200]
    args, kwargs = ((), {"pixel_values": images}) if place == "name" else ((images,), {})
    new = seen(model.train(), *args, **kwargs)
    changed = (new != images).flatten(1).any(dim=1).double().mean()
    assert float(changed) > 0.7
    scaled = seen(model.train(), *args, scale=2.0, **kwargs)  # other arguments come through
    torch.testing.assert_close(scaled, 2 * new)
    colours, predicted = guard.tap.outcome
    assert colours is not None
    assert predicted is not None
    torch.testing.assert_close(colours, new.mean(dim=(2, 3)))  # of what was seen
    assert predicted.shape == (200,)


def test_what_is_noted_of_a_pass_and_of_which() -> None:
    shared, model = Shared(), nn.Identity()
    hook, images = OutcomeHook(shared), world(TRAIN).images[:6]
    logits = torch.eye(4)[[0, 1, 2, 3, 1, 0]].requires_grad_()
    for output in (logits, SimpleNamespace(logits=logits)):
        shared.colours = shared.predicted = None
        assert hook(model, (images,), {}, output) is None
        assert shared.colours is not None
        assert shared.predicted is not None
        assert shared.predicted.tolist() == [0, 1, 2, 3, 1, 0]
        torch.testing.assert_close(shared.colours, images.mean(dim=(2, 3)))
        assert not shared.colours.requires_grad
    shared.colours = shared.predicted = None
    unknown: list[tuple[tuple[Any, ...], Any]] = [
        ((images,), {"logits": logits}),
        ((images,), logits[0]),
        (({"patches": images},), logits),
        ((), logits),
        ((images,), None),
    ]
    for args, output in unknown:
        hook(model, args, {}, output)
        assert shared.predicted is None
    for quiet in (model.eval(), nn.Identity()):
        shared.reading = quiet.training
        hook(quiet, (images,), {}, logits)
        assert shared.colours is None
    hook(model.train(), (images.to(torch.uint8),), {}, logits)
    assert shared.colours is None


def test_a_pass_without_images_is_handed_on() -> None:
    shared = Shared()
    shared.augment = lambda images: images + 1
    hook, model = ImagesHook(shared), nn.Identity()
    for args, kwargs in (((), {}), (({"a": torch.ones(2)},), {}), ((), {"pixel_values": None})):
        assert hook(model, args, kwargs) is None
    assert hook(model, (torch.zeros(1), 5), {"b": 6}) is not None  # control
    shared.listening = True
    hook(model, ("text",), {})
    assert shared.images is None


def test_a_compiled_model_edits_and_does_not_recompile_while_it_trains() -> None:
    guard = editing()
    model, graphs = frozen(guard.tap.model), []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    images, labels = next(stream(1))
    compiled(images)
    begun = len(graphs)  # of the hooks on the model, and of what is between them
    for _ in range(3):
        guard._corrector.updated()
        expected = model(images)
        noted = guard.tap.outcome
        logits = compiled(images)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(guard.tap.outcome, noted)
        guard.loss(cross_entropy(logits, labels, reduction="none"), labels).backward()
    assert len(graphs) == begun
    guard.tap.augment = None
    assert float((compiled(images) - logits).detach().abs().max()) > 0.1  # control


def test_images_of_another_size_are_named_once_and_training_goes_on() -> None:
    guard = editing()
    model, optimizer = guard.tap.model.train(), sgd(guard.tap.model)
    larger = [(interpolate(x, scale_factor=2), y) for x, y in stream(3)]
    message = (
        r"augment cannot act: the model is called with images \(3, 32, 32\) of torch.float32, the "
        r"probe has \(3, 16, 16\) of floating numbers; give both the same size and "
        "normalisation, or leave augment out of the actions"
    )
    with pytest.warns(UserWarning, match=message) as told:
        train(model, larger, guard, optimizer)
    assert len(told) == 1
    assert seen(model.train(), larger[0][0]) is larger[0][0]
    train(model, stream(2), guard, optimizer)  # and acts again where it can
    assert guard._corrector.augmentation.problem == ""
    images = world(TRAIN).images[:100]
    assert not torch.equal(seen(model, images), images)


def test_a_compiled_model_leaves_images_of_another_size_alone() -> None:
    guard = editing()
    model = guard.tap.model.train()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    larger = interpolate(world(TRAIN).images[:8], scale_factor=2)
    for _ in range(2):
        compiled(larger)
        assert "(3, 32, 32)" in guard._corrector.augmentation.problem


def test_images_in_half_precision_are_edited_as_others() -> None:
    images = world(TRAIN, 2000).images[:MANY]
    guard = editing()
    model = guard.tap.model.train()
    plain = are_marked(seen(model, images))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = seen(model, images)
    assert torch.equal(are_marked(mixed), plain)
    narrow = seen(model.to(torch.bfloat16), images.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(are_marked(narrow.float()), plain)


def test_more_images_than_random_numbers_take_turns() -> None:
    guard = editing()
    images = world(TRAIN, 2000).images[:POSITIONS].repeat(2, 1, 1, 1)
    first, second = are_marked(seen(guard.tap.model.train(), images)).chunk(2)
    assert torch.equal(first, second)
    assert 0.4 < float(first.double().mean()) < 0.6


def test_processes_draw_for_images_of_their_own() -> None:
    """The second of two works with the second half of the same random numbers."""
    one, images = editing()._corrector.augmentation, world(TRAIN, 2000).images[: POSITIONS // 2]
    other = editing()._corrector.augmentation
    other._first = POSITIONS // 2
    together_ = one(images.repeat(2, 1, 1, 1))
    assert torch.equal(are_marked(one(images)), are_marked(together_[: len(images)]))
    assert torch.equal(are_marked(other(images)), are_marked(together_[len(images) :]))
    assert not torch.equal(are_marked(other(images)), are_marked(one(images)))  # control


def test_what_images_carried_before_is_what_a_sampler_learns() -> None:
    guard = correcting(action=["rebalance", "augment"])
    model, data = guard.tap.model.train(), world(TRAIN, 2000)
    guard.sampler(2000)
    guard._corrector.updated()
    images, labels, at = data.images[:400], data.labels[:400], torch.arange(400)
    new = seen(model, images)
    losses = cross_entropy(model(images), labels, reduction="none")
    guard.loss(losses, labels, indices=at)
    known = guard._samples._carried[the_flagged(guard)][:400] == 1
    assert float((known == data.marked[:400]).double().mean()) > 0.99
    assert float((are_marked(new) == data.marked[:400]).double().mean()) < 0.7  # control


def test_what_images_carried_is_forgotten_once_none_are_edited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = correcting(action=["rebalance", "augment"])
    model, concept = guard.tap.model.train(), the_flagged(guard)
    guard.sampler(2000)
    guard._corrector.updated()
    seen(model, world(TRAIN).images[:40])
    rows = torch.zeros(7, 1, guard.tap.channels)
    assert [len(c) for c in guard._corrector.carried(rows)] == [40]
    guard.restore(concept)
    monkeypatch.setattr(effects, "LEAST", 1.1)  # it cannot be read from images any more
    guard.erase(concept)
    seen(model, world(TRAIN).images[:7])
    assert [len(c) for c in guard._corrector.carried(rows)] == [7]


def started() -> tuple[nn.Module, torch.optim.Optimizer, ConceptGuard]:
    model = fallen()
    guard = correcting(model, action=["rebalance", "augment"], ramp=6)
    return model, sgd(model), guard


def go_on(
    model: nn.Module, optimizer: torch.optim.Optimizer, guard: ConceptGuard, first: int
) -> dict[str, Any]:
    """Train from one of ten updates to the last, over a round and three trackings."""
    train(model, stream(UPDATES + 10, first=UPDATES + first), guard, optimizer)
    return {"model": model.state_dict(), "guard": guard.state_dict()}


@cache
def unbroken() -> tuple[bytes, bytes]:
    """Return what a run holds after four of its ten updates, and at the end."""
    model, optimizer, guard = started()
    train(model, stream(UPDATES + 4, first=UPDATES), guard, optimizer)
    parts = {"model": model, "optimizer": optimizer, "guard": guard}
    halfway = written({name: part.state_dict() for name, part in parts.items()})
    return halfway, written(go_on(model, optimizer, guard, 4))


def test_a_run_is_the_same_a_second_time() -> None:
    torch.manual_seed(5)  # the guard must not depend on the global state
    assert differences(go_on(*started(), 0), read(unbroken()[1])) == []


@pytest.mark.parametrize("fresh", [True, False])
def test_a_resumed_run_is_bit_identical(fresh: bool) -> None:
    halfway, end = map(read, unbroken())
    model, optimizer, guard = started()
    if fresh:
        model = net()
        config = {**guard.config.model_dump(mode="json")}
        optimizer = sgd(model)
        guard = ConceptGuard(model, probe=world(PROBE).loader(), config=config)
    else:
        train(model, stream(7), guard, optimizer)
    for name, part in (("model", model), ("optimizer", optimizer), ("guard", guard)):
        part.load_state_dict(halfway[name])
    assert differences(go_on(model, optimizer, guard, 4), end) == []


@pytest.mark.parametrize("lost", ["draws", "numbers", "samples"])
def test_the_comparison_notices_what_is_not_restored(lost: str) -> None:
    halfway, end = map(read, unbroken())
    kept = halfway["guard"]["augmentation"]
    instead = {
        "draws": torch.Generator().manual_seed(99).get_state(),
        "numbers": torch.ones_like(kept["numbers"]),
        "samples": {},
    }
    kept[lost] = instead[lost]
    model, optimizer, guard = started()
    for name, part in (("model", model), ("optimizer", optimizer), ("guard", guard)):
        part.load_state_dict(halfway[name])
    assert differences(go_on(model, optimizer, guard, 4), end)


def test_a_state_is_plain_data_and_taken_by_guards_that_do_not_augment() -> None:
    state = read(written(editing().state_dict()))
    other = flagging(action=["project"])
    other.load_state_dict(state)
    assert other.erased
    assert other.tap.augment is None
    images = world(TRAIN).images[:50]
    other._corrector.updated()
    assert seen(other.tap.model.train(), images) is images
    again = flagging(**ALONE)  # and back again: from the next round on
    again.load_state_dict(read(written(other.state_dict())))
    assert again.tap.augment is None
    again.round()
    assert again.tap.augment is not None


def test_the_effect_is_estimated_anew_only_when_other_images_carry_the_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = correcting(**ALONE)
    augmentation = guard._corrector.augmentation
    (before,) = augmentation._effects.values()
    guard.round()
    assert [*augmentation._effects.values()] == [before]
    monkeypatch.setattr(type(before.sample), "is_stale", lambda *_: True)
    guard.round()
    assert [*augmentation._effects.values()] != [before]


def test_what_is_done_is_said_of_every_concept() -> None:
    (note,) = correcting(**ALONE)._corrector.augmentation.notes
    concept = the_flagged(correcting(**ALONE))
    assert note.startswith(f"concept {concept}: training images get it and lose it at random; ")
    assert correcting(action=["project"])._corrector.augmentation.notes == ()


def test_a_concept_that_cannot_be_read_from_images_leaves_them_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(effects, "LEAST", 1.1)  # balanced accuracy
    guard = correcting(**ALONE)
    (note,) = guard._corrector.augmentation.notes
    assert note.startswith(f"concept {the_flagged(guard)}: training images are left as they are: ")
    guard._corrector.updated()
    images = world(TRAIN).images[:50]
    assert guard.erased
    assert guard.tap.augment is None
    assert seen(guard.tap.model.train(), images) is images


def test_concepts_in_images_of_two_sizes_are_not_both_said_to_be_edited() -> None:
    rng = torch.Generator().manual_seed(0)
    labels, carried = torch.arange(800) // 100, torch.rand(800, generator=rng) < 0.4
    sizes = [torch.randn(400, 3, side, side, generator=rng) for side in (12, 10)]
    batches, held = [], []
    for half, images in enumerate(sizes):
        own = torch.arange(800) // 400 == half
        images[carried[own], :, :2, :2] = 2.0
        batches += zip(images.split(50), labels[own].split(50), strict=True)
        held.append(SimpleNamespace(concept=half, carriers=(carried & own)[:, None]))
    probe = probe_batches(batches, 0)
    augmentation = Augmentation(probe, GuardConfig(action=["augment"]))
    rows = torch.zeros(800, 1, 2), torch.zeros(800, 8)
    reading = Reading(*rows, labels, torch.arange(800), 800, (1, 1))
    for concepts in (held, held[1:]):  # the second one alone is edited
        augmentation.follow(concepts, reading, torch.device("cpu"))
        said = [note.split(";")[0] for note in augmentation.notes]
        edited = [note.endswith("training images get it and lose it at random") for note in said]
        assert edited == [True, False][: len(concepts)]
        if len(concepts) == 2:
            assert said[1] == (
                "concept 1: training images are left as they are: those with it are of another "
                "size than those with concept 0"
            )
    assert augmentation(sizes[1]) is not sizes[1]
    assert augmentation(sizes[0]) is sizes[0]  # control


def test_without_a_concept_the_same_object_comes_back() -> None:
    probe = probe_batches(world(PROBE).loader(), 0)
    augmentation = Augmentation(probe, GuardConfig(action=["augment"]))
    images = world(TRAIN).images[:5]
    assert augmentation(images) is images
    augmentation.draw(1.0)
    assert augmentation(images) is images
    assert (augmentation.acting, augmentation.notes, augmentation.problem) == (False, (), "")


@pytest.mark.thorough
def test_training_on_edited_images_unlearns_the_mark() -> None:
    """Right predictions of marked images of the other classes, after as many updates."""
    found = {}
    for name, action in {"plain": "observe", "augment": ["augment"]}.items():
        model = fallen()
        guard = correcting(model, action=action)
        train(model, stream(UPDATES + 60, first=UPDATES), guard)
        guard.close()
        found[name] = held_out(model)
    assert found["augment"][1] > found["plain"][1] + 0.15
    assert found["augment"][0] > found["plain"][0] - 0.03


def hold_the_same(rank: int, _folder: Path) -> None:
    """Train on this process's share; the guards hold the same, but edit images of their own."""
    model = fallen()
    config = {"start": 50, "track_every": 2, "concepts": 8, **ALONE}
    guard = ConceptGuard(model, probe=world(PROBE).loader(50), config=config)
    guard.round()
    batches = ((x[rank::2], y[rank::2]) for x, y in stream(UPDATES + 5, first=UPDATES))
    train(nn.parallel.DistributedDataParallel(model), batches, guard, sgd(model))
    assert guard.tap.augment is not None
    mine = are_marked(seen(model.train(), world(TRAIN).images[:100]))
    everywhere: list[Any] = [None, None]
    distributed.all_gather_object(everywhere, (digest(guard.state_dict()), digest(mine)))
    assert everywhere[0][0] == everywhere[1][0]
    assert everywhere[0][1] != everywhere[1][1]


@pytest.mark.thorough
def test_two_processes_hold_the_same_and_edit_images_of_their_own(tmp_path: Path) -> None:
    together(hold_the_same, tmp_path)


def test_images_keep_their_memory_format() -> None:
    guard = editing()
    images = next(stream(1))[0]
    plain = guard._corrector.augmentation(images)
    last = guard._corrector.augmentation(images.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not plain.is_contiguous(memory_format=torch.channels_last)  # control
    assert torch.equal(plain, last)
    assert not torch.equal(plain, images)
