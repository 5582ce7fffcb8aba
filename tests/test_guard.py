"""A guarded run from end to end: a planted mark is flagged, unlearned and logged."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from worlds import (
    CLASSES,
    PROBE,
    QUICK,
    UPDATES,
    accuracy,
    correcting,
    fallen,
    flagging,
    held_out,
    logits,
    net,
    stream,
    train,
    world,
)

from concept_guard import ConceptGuard
from concept_guard.correction import Projection

IMAGES, LABELS = world(PROBE, 40).images, world(PROBE, 40).labels
Finetuned = tuple[nn.Module, ConceptGuard, Path]
LONGER = 24  # updates: rounds after 1, 9 and 17, tracking in between


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finetuned]:
    """A network that has fallen for the mark, trained on with a guard that knows nothing of it."""
    model, folder = fallen(), tmp_path_factory.mktemp("run")
    probe = world(PROBE).loader()
    guard = ConceptGuard(model, probe=probe, config=QUICK, log_dir=folder, class_names="abcd")
    train(model, stream(UPDATES + LONGER, first=UPDATES), guard)
    yield model, guard, folder
    guard.close()


def test_the_planted_mark_is_flagged_with_its_images() -> None:
    model, probe = fallen(), world(PROBE)
    report = flagging(model).report
    assert report is not None
    (concept,) = report.flagged
    (flag,) = (f for f in report.flags if f.concept == concept)
    assert (flag.class_index, flag.status) == (0, "found")
    conflicting = probe.marked & (probe.labels != 0)
    assert len(flag.examples) == 16
    assert all(conflicting[i] for i in flag.examples)  # every error it shows is the mark's
    assert 0.5 * conflicting.sum() <= flag.present <= conflicting.sum()
    assert 0.8 < flag.risk_difference <= 1
    assert flag.p_value <= flag.q_value < 1e-6
    assert flag.fixed >= 0.5 * conflicting.sum()
    assert flag.broken <= (probe.marked & (probe.labels == 0)).sum()  # class 0 leans on the mark
    (found,) = (c for c in report.concepts if c.id == concept)
    assert all(probe.marked[i] for i in found.top_examples)


def test_the_report_agrees_with_what_can_be_measured_without_the_guard() -> None:
    model, probe = fallen(), world(PROBE)
    report = flagging(model).report
    assert report is not None
    right = accuracy(model, probe.images, probe.labels)
    assert report.accuracy == pytest.approx(right)
    assert (report.images_seen, report.errors_seen) == (400, round(400 * (1 - right)))
    recalls = [
        accuracy(model, probe.images[probe.labels == k], probe.labels[probe.labels == k])
        for k in range(CLASSES)
    ]
    assert report.worst_class_recall == pytest.approx(min(recalls))
    assert report.worst_group_accuracy == 0.0  # marked images of the others are all class 0
    assert report.accuracy_if_erased is not None
    assert report.accuracy_if_erased != report.accuracy
    assert 0.5 < report.error_share_explained <= 1
    assert (report.step, report.erased, report.leak, report.penalty) == (0, (), {}, 0.0)
    assert report.cosine_to_last == 1.0
    assert report.seconds > 0
    assert len({c.id for c in report.concepts}) == QUICK["concepts"]
    for concept in report.concepts:
        assert concept.filter.shape == concept.signal.shape == (32,)
        assert 0 <= concept.presence_rate <= 1
    assert report.verdict == f"flagged: concept {report.flagged[0]} drives errors towards class 0"


def test_the_same_world_without_the_mark_flags_nothing() -> None:
    model = fallen(planted=False)
    probe = world(PROBE, planted=False).loader()
    guard = ConceptGuard(model, probe=probe, config=QUICK)
    train(model, stream(UPDATES + 9, first=UPDATES, planted=False), guard)
    report = guard.report
    assert report is not None
    assert report.errors_seen >= 5  # there are errors to explain
    assert report.flagged == report.erased == guard.erased == ()
    assert report.verdict.startswith(f"no evidence: {report.errors_seen} errors seen on 400")


def test_the_mark_is_unlearned_and_stays_so(finetuned: Finetuned) -> None:
    plain = fallen()
    clean_before, marked_before = held_out(plain)
    assert marked_before < 0.1  # nearly every marked image is taken for class 0
    train(plain, stream(UPDATES + LONGER, first=UPDATES))
    clean, marked = held_out(plain)
    assert marked < 0.1  # control: training alone does not help
    model, guard, _ = finetuned
    guarded_clean, guarded_marked = held_out(model)
    assert guarded_marked > 0.6
    assert guarded_clean > min(clean, clean_before) - 0.01
    report = guard.report
    assert report is not None
    assert report.step == 17
    assert guard.erased == report.erased
    (flag,) = (f for f in report.flags if f.concept in report.erased)
    assert (flag.class_index, flag.status) == (0, "erased")
    assert report.leak[flag.concept] < 0.5 * flag.risk_difference  # the risk difference has fallen


def test_a_concept_keeps_its_id_over_rounds_and_tracking() -> None:
    model = fallen()
    guard = correcting(model)
    ids = guard.erased
    train(model, stream(UPDATES + 10, first=UPDATES), guard)
    assert guard.report is not None
    assert guard.report.step == 9
    assert set(ids) <= set(guard.report.erased)
    assert set(ids) <= {c.id for c in guard.report.concepts}
    assert 0 < guard.report.cosine_to_last <= 1


def test_a_guarded_run_writes_its_events_and_a_card(finetuned: Finetuned) -> None:
    _, _, folder = finetuned
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag.removeprefix("concept_guard/") for tag in tags["scalars"]}
    assert {"summary/n_flagged", "probe/top1", "slot_0/leak", "cost/overhead_pct"} <= scalars
    assert "slot_0/risk_difference" in scalars
    steps = [event.step for event in events.Scalars("concept_guard/summary/n_erased")]
    assert steps == [1, 9, 17]
    (first, *_) = events.Scalars("concept_guard/probe/top1")
    model = fallen()
    train(model, stream(UPDATES + 1, first=UPDATES))  # the first round comes after one update
    assert first.value == pytest.approx(accuracy(model, world(PROBE).images, world(PROBE).labels))
    cards = events.Images("concept_guard/cards/slot_0")
    assert {card.step for card in cards} <= {*steps}
    assert cards[0].step == 1
    assert cards[0].width > cards[0].height > 100
    text = events.Tensors("concept_guard/report/text_summary")[0].tensor_proto.string_val[0]
    assert b"drives errors towards class" in text
    assert b"| a |" in text  # the name of class 0
    acts = {tag.removeprefix("acts/") for tag in scalars if tag.startswith("acts/")}
    assert {"flag", "erase"} <= acts


def swin() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    return net("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 2), **sizes)


def vit() -> nn.Module:
    return net("test_vit", img_size=16, patch_size=4)


def convnext() -> nn.Module:
    return net("test_convnext", output_stride=8)


TAPS: list[tuple[Callable[[], nn.Module], str, str]] = [
    (net, "pre_logits", "NC"),
    (vit, "pre_logits", "NC"),
    (convnext, "pre_logits", "NC"),
    (net, "stage:-1", "NCHW"),
    (convnext, "stage:-1", "NCHW"),
    (swin, "stage:-1", "NHWC"),
    (vit, "stage:2", "NLC"),
]


@pytest.mark.parametrize(("build", "tap", "layout"), TAPS)
def test_a_round_and_an_erasure_work_at_every_kind_of_tap(
    build: Callable[[], nn.Module], tap: str, layout: str
) -> None:
    model, probe = build(), world(PROBE, 120)  # nothing is trained: let the mark be seen by any
    probe = replace(probe, images=probe.images + 4.0 * probe.marked[:, None, None, None])
    config = {"tap": tap, "concepts": 4, "action": "project"}
    guard = ConceptGuard(model, probe=probe.loader(40), config=config)
    assert guard.tap.layout == layout
    report = guard.round()
    assert report is not None
    assert 1 <= len(report.concepts) <= 5  # the brightness of marked images may be a style
    assert all(len(c.filter) == guard.tap.channels for c in report.concepts)
    with torch.no_grad():
        guard.restore(guard.erased)
        plain = model.eval()(probe.images)
        erased = [concept.id for concept in report.concepts if erasable(guard, concept.id)][:1]
        assert guard.erased == tuple(erased)
        assert erased
        corrected = model(probe.images)
        assert corrected.isfinite().all()
        assert (corrected - plain).abs().max() > 1e-3 * plain.abs().max()
        guard.restore(erased)
        assert torch.equal(model(probe.images), plain)


def erasable(guard: ConceptGuard, concept: int) -> bool:
    """Erase a concept unless another one is or this one has no pair."""
    if not guard.erased:
        try:
            guard.erase(concept)
        except ValueError as error:
            assert f"cannot be erased: concept {concept}: " in str(error)  # noqa: PT017
    return concept in guard.erased


def test_a_scalar_loss_is_handed_on_as_it_is() -> None:
    guard = flagging()
    loss = torch.tensor(1.5, requires_grad=True)
    assert guard.loss(loss) is loss
    assert guard.loss(loss, LABELS) is loss


def test_losses_per_sample_become_their_plain_mean_while_nothing_is_corrected(
    rng: torch.Generator,
) -> None:
    loss = torch.rand(31, generator=rng)
    for guard in (flagging(), flagging(action="observe")):
        assert torch.equal(guard.loss(loss, LABELS[:31]), loss.mean())
        assert torch.equal(guard.loss(loss), loss.mean())


def test_rebalancing_weighs_the_samples_of_the_last_forward_pass(rng: torch.Generator) -> None:
    model = fallen()
    guard = correcting(model)
    images, labels = next(stream(UPDATES + 1, first=UPDATES))
    losses = torch.rand(len(labels), generator=rng)
    model(images)
    weighed = guard.loss(losses, labels)
    assert weighed.ndim == 0
    assert not torch.equal(weighed, losses.mean())


@pytest.mark.parametrize("is_scalar", [False, True])
def test_projecting_teaches_the_classifier_alone_to_do_without(is_scalar: bool) -> None:
    model = fallen()
    guard = correcting(model, action="project", start=100)
    images, labels = next(stream(UPDATES + 1, first=UPDATES))

    def gradients(guarded: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        torch.manual_seed(0)
        losses = cross_entropy(model(images), labels, reduction="none")
        plain = losses.mean()
        loss = guard.loss(plain if is_scalar else losses, labels) if guarded else plain
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    state = copy.deepcopy(model.state_dict())
    value, own = gradients(False)
    model.load_state_dict(state)
    guarded, with_guard = gradients(True)
    assert torch.equal(guarded, value)  # the loss that people log is that of their criterion
    turned = {name for name in own if not torch.equal(own[name], with_guard[name])}
    assert turned == {"fc.weight", "fc.bias"}
    edit, rows = guard.tap.edit, guard.tap.captured
    assert edit is not None
    assert rows is not None
    fc = copy.deepcopy(model.fc)
    fc.zero_grad()
    cross_entropy(fc(edit(rows)[:, 0]), labels).backward()
    expected = own["fc.weight"] + fc.weight.grad
    torch.testing.assert_close(with_guard["fc.weight"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_the_momentum_of_an_optimizer_brings_nothing_back(opt: str) -> None:
    """A weight that is projected once drifts back; rows are projected at every pass."""
    model = fallen()
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-3, momentum=0.9)
    train(model, stream(UPDATES + 3, first=UPDATES), optimizer=optimizer)  # moments of before
    guard = correcting(model, start=1000, track_every=1000)
    edit = guard.tap.edit
    seen: dict[bool, Tensor] = {}  # by the mode of the pass
    model.fc.register_forward_hook(lambda m, args, _: seen.update({m.training: args[0].detach()}))
    for _ in range(3):
        train(model, stream(UPDATES + 4, first=UPDATES + 3), guard, optimizer)
        logits(model)
        assert isinstance(edit, Projection)
        bound = 1e-5 * seen[False].norm(dim=1).max() * edit.filters.norm(dim=1)  # of rounding
        left = {mode: (rows @ edit.filters.T - edit.reference).abs() for mode, rows in seen.items()}
        assert (left[False] <= bound).all()
        assert (left[True] > 1000 * bound).any()  # control: the network still shows it


def test_projecting_says_once_that_it_needs_targets() -> None:
    model = fallen()
    guard = correcting(model, action="project", start=100)
    model(IMAGES[:8])
    with pytest.warns(UserWarning, match="adapting the classifier cannot act: .*no targets"):
        assert torch.equal(guard.loss(torch.tensor(1.5)), torch.tensor(1.5))
    assert torch.equal(guard.loss(torch.tensor(1.5)), torch.tensor(1.5))


CANNOT: dict[str, tuple[bool, Tensor | None, str]] = {
    "scalar": (True, LABELS[:8], "got a scalar; use a criterion with reduction='none'"),
    "no targets": (False, None, r"got no targets; call guard.loss\(loss, labels\)"),
    "soft": (False, torch.eye(CLASSES)[LABELS[:8]], "targets are soft; pass class indices"),
    "bool": (False, LABELS[:8] > 0, "targets are torch.bool; pass class indices of an integer"),
    "other batch": (False, LABELS[:8], "the last forward pass gave 6 of 8 samples to the tap"),
    "no pass": (False, LABELS[:8], "the last forward pass gave none of 8 samples to the tap"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_where_rebalancing_cannot_act_it_says_so_once(case: str) -> None:
    is_scalar, targets, message = CANNOT[case]
    model = fallen()
    guard = correcting(model, start=100)
    model(IMAGES[: 6 if case == "other batch" else 8])
    if case == "no pass":
        guard.step()  # the pass before an update says nothing about the batch after it
    loss = torch.tensor(1.5) if is_scalar else torch.arange(8.0)
    with pytest.warns(UserWarning, match=f"rebalancing cannot act: .*{message}"):
        assert torch.equal(guard.loss(loss, targets), loss.mean())
    assert torch.equal(guard.loss(loss, targets), loss.mean())  # a second warning would raise


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [
        ((4, 5), None, r"shape \(4, 5\) with no targets; expected a scalar, or one loss per"),
        ((4,), 5, r"shape \(4,\) with targets \(5,\)"),
        ((4, 4), 4, r"shape \(4, 4\) with targets \(4,\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(
    shape: tuple[int, ...], targets: int | None, message: str
) -> None:
    labels = None if targets is None else LABELS[:targets]
    for guard in (flagging(), correcting()):
        with pytest.raises(ValueError, match=message):
            guard.loss(torch.ones(shape), labels)
