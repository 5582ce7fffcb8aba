"""Whether a training loop calls the guard where it should, as far as its updates show.

Nothing here knows what the guard does with them.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from concept_guard.errors import TapError
from concept_guard.taps import Tap

UNHEARD = 3  # updates under correction without any guard.loss: one may be a batch left out
WINDOW = 40  # calls of guard.step that are looked at, twice as many where they look wrong
MOVED = 0.6  # share of them that must have changed the model; with two micro-batches it is .5
SHOWN = 8  # parameters whose values are compared, spread over the model
NEAREST = 2000  # nodes of a graph that are looked at, from the loss backwards


class Wiring:
    """Looks at the first updates of a run, and then no more.

    What an optimizer does is first read from the version counters of parameters, which costs
    nothing. The fused ones of torch (2.15) do not raise them, so that values have the last word.

    Args:
        tap: Where the model is read.
    """

    def __init__(self, tap: Tap) -> None:
        self._tap = tap
        self._is_heard, self._is_traced, self._unheard = False, False, 0
        self._window: Window | None = Window(tap, by_value=False)

    def heard(self, loss: Tensor) -> str:
        """Take note of a training loss.

        Args:
            loss: As `guard.loss` gets it.

        Returns:
            What is wrong with it and the way out; empty if nothing is.
        """
        self._is_heard = True
        if not self._tap.listening or self._is_traced:
            return ""
        self._is_traced = True
        if not is_of_another(loss, self._tap.model):
            return ""
        return (
            f"guard.loss got the loss of another model: no parameter of the guarded "
            f"{type(self._tap.model).__name__} is in its graph. Give it the loss of the guarded "
            "model: loss = guard.loss(criterion(model(images), labels), labels)"
        )

    def updated(self) -> str:
        """Take note of a call of `guard.step`.

        Returns:
            What is wrong with the loop and the way out; empty if nothing is.
        """
        self._unheard += self._tap.listening
        if not self._is_heard and self._unheard >= UNHEARD:
            return (
                f"guard.loss was not called in {UNHEARD} updates under correction, so that "
                "training does not unlearn. Change the loop to loss = "
                "guard.loss(criterion(model(images), labels), labels) with a criterion of "
                "reduction='none'; only to watch, set action: observe"
            )
        if self._window is None or not self._window.is_full():
            return ""
        problem, by_value = self._window.problem(), self._window.by_value
        # A first suspicion is looked into once more, by values.
        self._window = Window(self._tap, by_value=True) if problem and not by_value else None
        return problem if by_value else ""

    def close(self) -> None:
        """Let go of the model's values."""
        self._window = None


class Window:
    """Some calls of `guard.step` in a row, and which of them found the model changed.

    Args:
        tap: Where the model is read.
        by_value: Whether to compare values, and not only version counters.
    """

    def __init__(self, tap: Tap, *, by_value: bool) -> None:
        self._tap, self.by_value = tap, by_value
        self._last: list[Any] = []
        self._moves: list[list[Any]] = []  # of the model, of the classifier; read at the end
        self._has_gradients = True

    def is_full(self) -> bool:
        """Look at the model.

        Returns:
            Whether it was looked at often enough by now.
        """
        parameters = [p for p in self._tap.model.parameters() if p.requires_grad]
        head = self._head()
        watched: Sequence[Tensor] = parameters if head is None else [head]
        self._has_gradients &= any(p.grad is not None for p in watched)
        now: list[Any] = [_versions(parameters), _versions([] if head is None else [head])]
        if self.by_value:
            spread = parameters[:: max(1, len(parameters) // SHOWN)]
            now += [_values(spread), _values([] if head is None else [head])]
        if self._last:
            moved = [_differ(a, b) for a, b in zip(self._last, now, strict=True)]
            self._moves.append(moved)
        self._last = now
        return len(self._moves) == WINDOW

    def problem(self) -> str:
        """Return what is wrong with the loop and the way out; empty if nothing is."""
        seen, name = [[bool(m) for m in moves] for moves in self._moves], self._tap.path
        moved = sum(any(moves) for moves in seen)
        head_moved = sum(any(moves[1::2]) for moves in seen)
        if moved <= MOVED * WINDOW and (moved or not self.by_value):
            return (
                f"guard.step() was called {WINDOW} times while the optimizer changed the model "
                f"{moved} times: it counts updates, not batches. Call it where the optimizer "
                "steps: if (i + 1) % accumulate == 0: optimizer.step(); optimizer.zero_grad(); "
                "guard.step()"
            )
        if not moved and self._has_gradients:
            return (
                f"no parameter of the guarded {type(self._tap.model).__name__} has changed in "
                f"{2 * WINDOW} calls of guard.step(), although it has gradients: unless the "
                "learning rate is 0, the optimizer was built from other parameters. Build it from "
                "the model as it is now: optimizer = create_optimizer_v2(model, ...)"
            )
        if moved and not head_moved and self._has_gradients and self._head() is not None:
            return (
                f"the classifier ({name}) has gradients, but has not changed in {2 * WINDOW} "
                "updates, as the rest of the model has: the optimizer was built before the "
                "classifier was, by model.reset_classifier or the like. Build it afterwards: "
                "optimizer = create_optimizer_v2(model, ...)"
            )
        return ""

    def _head(self) -> Tensor | None:
        """Return the trainable weight of the classifier behind the tap, if there is one."""
        try:
            head = self._tap.classifier
        except TapError:  # replaced, which is said elsewhere
            return None
        weight = next((p for p in head.parameters() if p.ndim > 1), None) if head else None
        return weight if weight is not None and weight.requires_grad else None


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    return [parameter._version for parameter in parameters]


def _values(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the first rows of parameters, of sharded ones those that are here."""
    here = [getattr(p.detach(), "to_local", p.detach)() for p in parameters]
    return [(p[:1] if p.ndim else p).clone() for p in here]


def _differ(before: list[Any], now: list[Any]) -> Any:
    """Return whether versions or values differ, of values as a tensor: nothing waits for it."""
    if not before or not isinstance(before[0], Tensor) or len(before) != len(now):
        return before != now
    return torch.stack([(a != b).any() for a, b in zip(before, now, strict=True)]).any()


def is_of_another(loss: Tensor, model: nn.Module) -> bool:
    """Return whether a loss depends on parameters, none of which belongs to the model.

    Where that is not certain, as for sharded parameters, it is taken to be the model's.

    Args:
        loss: Of any shape.
        model: Any model.
    """
    own = {id(p) for p in model.parameters() if p.requires_grad}
    sharded = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not own or sharded or loss.grad_fn is None:
        return False
    todo: deque[Any] = deque([loss.grad_fn])
    visited, leaves = {loss.grad_fn}, 0
    while todo and len(visited) < NEAREST:
        node = todo.popleft()
        leaf = getattr(node, "variable", None)  # of the nodes in which gradients end
        if leaf is not None and id(leaf) in own:
            return False
        leaves += isinstance(leaf, nn.Parameter)
        for following, _ in node.next_functions:
            if following is not None and following not in visited:
                visited.add(following)
                todo.append(following)
    return leaves > 0
