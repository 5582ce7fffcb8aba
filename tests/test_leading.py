"""Stage 2: rows in fewer axes keep what varies within classes."""

import pytest
import torch
from planted import auc, marked_world, normal

from concept_guard.directions import Scatter, leading, refine_membership


def test_the_axes_of_most_variance_within_classes_are_kept(rng: torch.Generator) -> None:
    labels = torch.arange(600) % 3
    turn = torch.linalg.qr(normal(rng, 12, 12))[0]
    spread = torch.tensor([5.0, 4, 3, 2] + 8 * [0.1]).double()
    rows = (normal(rng, 600, 12) * spread) @ turn.T + 50 * normal(rng, 3, 12)[labels]
    kept = leading(Scatter(rows, labels), most=4)
    torch.testing.assert_close(kept.T @ kept, torch.eye(4).double())
    means = torch.stack([rows[labels == k].mean(dim=0) for k in range(3)])
    residual = rows - means[labels]
    values, axes = torch.linalg.eigh(residual.T @ residual)
    overlap = (kept.T @ axes[:, -4:]).square().sum()
    assert float(overlap) == pytest.approx(4.0, abs=1e-6)
    assert float(values[-4] / values[-5]) > 100  # control: there is a cut to find


def test_few_channels_are_all_kept(rng: torch.Generator) -> None:
    rows = normal(rng, 30, 8)
    kept = leading(Scatter(rows, torch.arange(30) % 2), most=8)
    assert torch.equal(rows @ kept, rows)


def test_presence_is_sharpened_alike_in_fewer_axes(rng: torch.Generator) -> None:
    world = marked_world(channels=16)
    beside = 0.05 * normal(rng, len(world.rows), 100).float()
    rows = torch.cat([world.rows, beside], dim=1)
    narrow = rows @ leading(Scatter(rows, world.labels), most=16)
    sharp = refine_membership(Scatter(narrow, world.labels), world.mark, 0)
    assert sharp is not None
    assert (sharp.present == world.mark).float().mean() > 0.99
    lost = rows @ leading(Scatter(rows, world.labels), most=2)  # control: the two distractors alone
    assert auc(lost[:, 0], world.mark) < 0.9
