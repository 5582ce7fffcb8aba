"""Concepts that no statistics can tell from a class: said so, and training goes on unharmed."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from worlds import PROBE, QUICK, UPDATES, fallen, logits, mark, stream, train, world

from concept_guard import ConceptGuard

ALL = ["project", "penalize", "rebalance", "refit"]


def one(labels: Tensor) -> Tensor:
    """Return presence in a single image, of another class than the one that leans on the mark."""
    return torch.arange(len(labels)) == int((labels == 1).nonzero()[0])


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    "in every image of its class, in no other": lambda y: y == 0,
    "in every image of two classes": lambda y: (y == 0) | (y == 1),
    "in every image": lambda y: y >= 0,
    "in no image": lambda y: y < 0,
    "in one image": one,
    "in its class alone, in half of it": lambda y: (y == 0) & (torch.arange(len(y)) % 8 == 0),
    "in other classes alone": lambda y: (y != 0) & (torch.arange(len(y)) % 3 == 0),
}


def guard_of(model: nn.Module, case: str, **config: object) -> ConceptGuard:
    """Return a guard of a network that leans on the mark, with the mark where the case says."""
    probe = world(PROBE, planted=False)
    has = CASES[case](probe.labels)
    images = torch.where(has[:, None, None, None], mark(probe.images), probe.images)
    loader = DataLoader(TensorDataset(images, probe.labels), batch_size=64)
    return ConceptGuard(model, probe=loader, config={**QUICK, "action": ALL, **config})


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_and_nothing_becomes_infinite(case: str) -> None:
    model = fallen()
    guard = guard_of(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, stream(UPDATES + 10, first=UPDATES), guard)  # rounds after updates 1 and 9
        assert guard.report is not None
        guard.bake()
    guard.close()
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert bool(logits(model).isfinite().all())


@pytest.mark.parametrize("case", CASES)
def test_what_a_person_erases_is_erased_or_refused_with_the_reason(case: str) -> None:
    model = fallen()
    guard = guard_of(model, case, approve="manual", action=["project", "rebalance"])
    report = guard.round()
    assert report is not None
    refused = []
    for concept in report.concepts:
        before = guard.erased, logits(model)
        try:
            guard.erase(concept.id)
        except ValueError as error:
            refused.append(str(error))
            assert guard.erased == before[0]
            assert torch.equal(logits(model), before[1])
    assert all(
        said.startswith(("cannot be erased: concept", "cannot be erased together: concept"))
        for said in refused
    )
    assert guard.erased or refused
    train(model, stream(UPDATES + 4, first=UPDATES), guard)
    assert bool(logits(model).isfinite().all())
    guard.restore(guard.erased)
    guard.close()


def test_a_mark_in_every_image_of_its_class_and_in_no_other_is_not_flagged() -> None:
    """It is the class, for all that the probe tells; with counter-examples it is flagged."""
    guard = guard_of(fallen(), "in every image of its class, in no other", action="observe")
    report = guard.round()
    assert report is not None
    assert report.flagged == ()
    control = ConceptGuard(
        fallen(), probe=world(PROBE).loader(), config={**QUICK, "action": "observe"}
    )
    found = control.round()
    assert found is not None
    assert found.flagged != ()
