"""What is exported predicts as the model does: baked, or with the correction still in its hook."""

import warnings

import pytest
import torch
from torch import Tensor
from worlds import PROBE, correcting, erased_at, fallen, logits, mark, world

SAID = "exported with the guard on it"


def images() -> Tensor:
    return mark(world(PROBE).images[:64])


@pytest.mark.parametrize("tap", ["pre_logits", "stage:-1"])
def test_a_model_that_is_still_corrected_is_exported_as_it_predicts(tap: str) -> None:
    model = fallen()
    plain = logits(model)
    guard = correcting(model) if tap == "pre_logits" else erased_at(model, tap)
    corrected = logits(model)
    assert (corrected - plain).abs().max() > 0.1  # control
    with pytest.warns(UserWarning, match=SAID):
        exported = torch.export.export(model.eval(), (images(),)).module()
    guard.close()
    assert torch.equal(logits(model), plain)
    torch.testing.assert_close(exported(images()), corrected, rtol=0, atol=1e-5)


def test_a_traced_model_keeps_the_correction() -> None:
    model = fallen()
    guard = correcting(model)
    corrected = logits(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.trace.* is deprecated")
        with pytest.warns(UserWarning, match=SAID):
            traced = torch.jit.trace(model.eval(), images())
    guard.close()
    torch.testing.assert_close(traced(images()), corrected, rtol=0, atol=1e-5)
