"""Loops that call the guard in the wrong place are told so once; right ones hear nothing."""

import copy
import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from timm.optim import Lookahead
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from worlds import UPDATES, correcting, erased_at, fallen, flagging, stream, train

from concept_guard import ConceptGuard
from concept_guard.wiring import WINDOW, is_of_another

CLASSES = 3
X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % CLASSES
Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Net(nn.Sequential):
    """A body, and a classifier that can be replaced."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES))

    def reset_classifier(self) -> None:
        """Replace the classifier, as timm's models do."""
        self[3] = nn.Linear(6, CLASSES)


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def adamw(parameters: Iterable[nn.Parameter], **how: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, **how)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": sgd,
    "foreach": lambda p: adamw(p, foreach=True),
    "fused": lambda p: adamw(p, fused=True),
    "lookahead": lambda p: Lookahead(sgd(p)),
}


def said(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulate: int = 1,
    steps: int = 3 * WINDOW,
    before: Callable[[int], None] = lambda _: None,
    skips: Callable[[int], bool] = lambda _: False,
    of_logits: bool = True,
) -> list[str]:
    """Return the warnings of a loop that calls the guard once per batch."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = {"action": "observe", "start": 10**6}
        with ConceptGuard(model, probe=[(X, Y)], config=config) as guard:
            for n in range(steps):
                before(n)
                logits = model.train()(X)
                losses = cross_entropy(logits, Y, reduction="none")
                losses = losses if of_logits else model[1](model[0](X)).abs().mean(dim=1)
                guard.loss(losses, Y).backward()
                if n % accumulate == accumulate - 1 and not skips(n):
                    optimizer.step()
                    optimizer.zero_grad()
                guard.step()
            assert guard._health._wiring._window is None  # looked at, and let go of
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_a_step_per_micro_batch_is_said_once(name: str, accumulate: int) -> None:
    model = Net()
    heard = said(model, OPTIMIZERS[name](model.parameters()), accumulate=accumulate)
    if accumulate == 1:
        assert not heard
        return
    (message,) = heard
    assert (
        f"called {WINDOW} times while the optimizer changed the model {WINDOW // accumulate}"
        in (message)
    )
    assert "if (i + 1) % accumulate == 0: optimizer.step()" in message


def frozen(model: Net) -> Iterable[nn.Parameter]:
    model[0].requires_grad_(False)
    return [p for p in model.parameters() if p.requires_grad]


def frozen_classifier(model: Net) -> Iterable[nn.Parameter]:
    model[3].requires_grad_(False)
    return model[0].parameters()


TRAINED: dict[str, Callable[[Net], Iterable[nn.Parameter]]] = {
    "frozen layers": frozen,
    "a frozen classifier": frozen_classifier,
    "the classifier alone": lambda model: model[3].parameters(),
    "norms and classifier": lambda model: [*model[1].parameters(), *model[3].parameters()],
    "two groups": lambda model: [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": model[3].parameters()},
    ],
}


@pytest.mark.parametrize("name", ["sgd", "fused"])
@pytest.mark.parametrize("trained", TRAINED)
def test_loops_that_train_a_part_hear_nothing(name: str, trained: str) -> None:
    model = Net()
    assert not said(model, OPTIMIZERS[name](TRAINED[trained](model)))


def test_a_loss_that_leaves_the_classifier_out_is_no_reason() -> None:
    model = Net()
    assert not said(model, sgd([*model[0].parameters(), *model[1].parameters()]), of_logits=False)


def test_a_warm_up_from_zero_and_zero_gradients_are_no_reason() -> None:
    model = Net()
    optimizer = sgd(model.parameters())

    def warm_up(n: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.0 if n < 2 * WINDOW else 0.01

    assert not said(model, optimizer, before=warm_up)
    model = Net()
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.zero_()  # no gradient reaches the first layer, none but the bias the last
    assert not said(model, torch.optim.SGD(model.parameters(), lr=0.01))


@pytest.mark.parametrize("name", ["sgd", "fused"])
def test_skips_of_a_scaler_are_no_reason(name: str) -> None:
    model = Net()
    at_first = said(model, OPTIMIZERS[name](model.parameters()), skips=lambda n: n < 12)
    now_and_then = said(model, OPTIMIZERS[name](model.parameters()), skips=lambda n: n % 10 == 0)
    assert not at_first + now_and_then


@pytest.mark.parametrize("name", ["sgd", "fused"])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_an_optimizer_of_another_model_is_told(name: str, is_frozen: bool) -> None:
    model = Net()
    model[3].requires_grad_(not is_frozen)
    (message,) = said(model, OPTIMIZERS[name](copy.deepcopy(model).parameters()))
    assert f"no parameter of the guarded Net has changed in {2 * WINDOW} calls" in message
    assert "optimizer = create_optimizer_v2(model, ...)" in message


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_is_older_than_the_classifier_is_told(name: str) -> None:
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    model.reset_classifier()
    (message,) = said(model, optimizer)
    assert f"the classifier (3) has gradients, but has not changed in {2 * WINDOW}" in message
    assert "before the classifier was, by model.reset_classifier" in message
    assert not said(model, OPTIMIZERS[name](model.parameters()))  # the way out


def test_looking_waits_for_no_device_while_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    optimizer = sgd(model.parameters())
    with ConceptGuard(model, probe=[(X, Y)], config={"action": "observe"}) as guard:
        wiring = guard._health._wiring

        def never(*_: object) -> None:
            raise AssertionError("a value was asked for")

        for _ in range(WINDOW + 1):
            cross_entropy(model(X), Y).backward()
            optimizer.step()
            with monkeypatch.context() as patch:
                for asks in ("__bool__", "item", "tolist", "equal"):
                    patch.setattr(Tensor, asks, never)
                assert not wiring.updated()
        assert wiring._window is None


def test_a_step_after_closing_is_no_error() -> None:
    model = Net()
    guard = ConceptGuard(model, probe=[(X, Y)], config={"action": "observe"})
    model(X)
    guard.step()
    guard.close()
    with pytest.warns(UserWarning, match="has stopped firing"):
        guard.step()


def steps(guard: ConceptGuard, count: int) -> list[str]:
    """Return the warnings of steps without guard.loss."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for images, _ in stream(UPDATES + count, first=UPDATES):
            guard.tap.model.train()(images)
            guard.step()
    return [str(warning.message) for warning in caught]


def test_a_forgotten_loss_is_said_once_something_is_corrected() -> None:
    (message,) = steps(correcting(start=100), 6)
    assert "guard.loss was not called in 3 updates under correction" in message
    assert "loss = guard.loss(criterion(model(images), labels), labels)" in message
    assert not steps(correcting(start=100), 2)
    assert not steps(flagging(start=100, action="observe"), 6)
    assert not steps(flagging(start=100), 6)  # nothing is corrected yet
    guard = correcting(start=100)
    train(guard.tap.model, stream(UPDATES + 1, first=UPDATES), guard)
    assert not steps(guard, 6)  # it was called once


def test_projecting_alone_where_no_classifier_follows_needs_no_loss() -> None:
    assert not steps(erased_at(fallen(), "stage:-1", start=100), 6)


def test_the_loss_of_another_model_is_told_once() -> None:
    guard, other = correcting(start=100), fallen()
    images, labels = next(stream(UPDATES + 1, first=UPDATES))
    guard.tap.model.train()(images)
    losses = cross_entropy(other(images), labels, reduction="none")
    with pytest.warns(UserWarning, match=r"loss of another model: no parameter of the guarded Res"):
        guard.loss(losses, labels)
    guard.loss(losses, labels)  # said once
    guard.step()


def test_losses_of_parts_of_a_batch_are_the_models_own() -> None:
    model = fallen()
    guard = correcting(model, start=100)
    for images, labels in stream(UPDATES + 2, first=UPDATES):
        for x, y in zip(images.chunk(4), labels.chunk(4), strict=True):
            guard.loss(cross_entropy(model(x), y, reduction="none"), y).backward()
        guard.step()


def test_whose_loss_it_is_is_read_from_its_graph() -> None:
    model, other = Net(), Net()
    own = cross_entropy(model(X), Y)
    assert not is_of_another(own, model)
    assert is_of_another(own, other)
    assert is_of_another(cross_entropy(other(X), Y), model)
    assert not is_of_another(own + cross_entropy(other(X), Y), model)  # say with a teacher's
    assert not is_of_another(torch.zeros(()), model)  # nothing to be read
    frozen_model = Net().requires_grad_(False)
    assert not is_of_another(cross_entropy(frozen_model(X + other[0].bias.sum()), Y), frozen_model)
    x = X.clone().requires_grad_()  # re-entrant checkpoints hide the parameters behind the input
    hidden = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)
    assert not is_of_another(cross_entropy(hidden, Y), model)
    compiled = torch.compile(model, backend="aot_eager")
    assert not is_of_another(cross_entropy(compiled(X), Y), model)
    assert is_of_another(cross_entropy(compiled(X), Y), other)
