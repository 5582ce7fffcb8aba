"""How near a finding is to the truth: matching, cosines, presence, signal values.

Nothing here knows which method found what.
"""

import numpy as np
import torch
from recovery_rivals import Found
from recovery_worlds import Toy, World
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

FOUND_IOU = 0.8


def matched(truth: Tensor, found: Tensor, *, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Match found directions to true ones, one to one, for the largest sum of cosines.

    Args:
        truth: `(K, C)` directions.
        found: `(n, C)` directions.
        signed: Whether an opposite direction counts as wrong; otherwise as found, and turned.

    Returns:
        Positions in `truth`, positions in `found` and signs, `(min(K, n),)` each.
    """
    cosines = normalize(truth.double(), dim=1) @ normalize(found.double(), dim=1).T
    worth = cosines if signed else cosines.abs()
    a, b = linear_sum_assignment(-worth.nan_to_num(0.0).numpy())
    signs = cosines[a, b].sign()
    return torch.from_numpy(a), torch.from_numpy(b), torch.ones_like(signs) if signed else signs


def auc(values: Tensor, present: Tensor, chunk: int = 64) -> Tensor:
    """Return the area under the ROC curve of each column; ties count half.

    Args:
        values: `(P, n)` evidence for presence.
        present: `(P, n)` bool, the truth.
        chunk: Columns ranked at a time; bounds memory.

    Returns:
        `(n,)` float64, NaN where a column is all present or all absent.
    """
    out = []
    for v, p in zip(values.split(chunk, 1), present.split(chunk, 1), strict=True):
        ordered, order = v.T.contiguous().sort(dim=1)
        truth = p.T.gather(1, order)
        place = torch.arange(len(v)).expand_as(order)
        fresh = torch.ones_like(truth)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first = torch.where(fresh, place, 0).cummax(1).values
        ends = torch.ones_like(truth)
        ends[:, :-1] = fresh[:, 1:]
        last = torch.where(ends, place, len(v)).flip(1).cummin(1).values.flip(1)
        ones = truth.sum(1).double()
        ranks = (0.5 * (first + last).double() * truth).sum(1)
        area = (ranks - ones * (ones - 1) / 2) / (ones * (len(v) - ones))
        out.append(area)
    return torch.cat(out)


def paired_cosines(truth: Tensor, found: Tensor) -> Tensor:
    """Return the cosine of each row of `truth` with the same row of `found`, 0 for zero rows."""
    product = normalize(truth.double(), dim=1) * normalize(found.double(), dim=1)
    return product.sum(1).nan_to_num(0.0)


def world_scores(world: World, found: Found) -> dict[str, float]:
    """Return the mean matched cosine of encoders and of decoders and the mean AUC of presence.

    Concepts are matched by their encoders. A concept that nothing is matched to scores 0, 0 and .5.
    Of two linear decoders the one with the higher mean cosine counts; presence is read by codes or
    by linear decoders, whichever scores higher on average.
    """
    a, b, signs = matched(world.signals, found.encoders, signed=found.signed)
    count = len(world.signals)
    encoder = (paired_cosines(world.signals[a], found.encoders[b]) * signs).sum() / count
    linear = [d[b] for d in (found.decoders, found.smooth) if d is not None]
    decoder = max(
        float((paired_cosines(world.filters[a], d) * signs).sum()) / count for d in linear
    )
    readings = [(world.rows - world.rows.mean(0)) @ d.float().T for d in linear]
    if found.codes is not None:
        readings.append(found.codes[:, b].float())
    present = world.present[:, a]
    known = present.any(0) & ~present.all(0)
    areas = [auc((z * signs.float())[:, known], present[:, known]).sum() for z in readings]
    testable = world.present.any(0) & ~world.present.all(0)
    missing = testable.sum() - known.sum()
    area = (torch.stack(areas).max() + 0.5 * missing) / testable.sum()
    return {"encoder": float(encoder), "decoder": decoder, "auc": float(area)}


def best_iou(values: Tensor, present: Tensor) -> float:
    """Return the highest intersection over union with presence that any threshold reaches."""
    order = values.argsort(descending=True)
    hits = present[order].cumsum(0).double()
    union = torch.arange(1, len(order) + 1) + present.sum() - hits
    return float((hits / union).max())


def toy_scores(toy: Toy, found: Found) -> dict[str, float]:
    """Return IoU, RMSE of signal values and cosines on the toy, mean and worst over the concepts.

    IoU is that of `factor > bias` with presence; a method without biases gets the threshold with
    the highest IoU. RMSE compares `(z - mean z) / (w . s)`, s of unit length, with the centred true
    signal values, which lie between 0 and 5. A concept that nothing is matched to scores IoU 0,
    cosines 0 and the RMSE of a constant.
    """
    count = len(toy.signals)
    centred = toy.factors.double() - toy.factors.double().mean(0)
    iou, encoder, decoder = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
    rmse = centred.square().mean(0).sqrt()
    a, b, signs = matched(toy.signals, found.encoders, signed=found.signed)
    for true, k, sign in zip(a.tolist(), b.tolist(), signs, strict=True):
        w, s = sign * found.decoders[k], sign * normalize(found.encoders[k], dim=0)
        z = toy.rows.double() @ w
        present = toy.present[:, true]
        if found.biases is None:
            iou[true] = best_iou(z, present)
        else:
            on = z > found.biases[k]
            iou[true] = float((on & present).sum() / (on | present).sum().clamp_min(1))
        values = (z - z.mean()) / (w @ s)
        rmse[true] = (values - centred[:, true]).square().mean().sqrt()
        encoder[true] = toy.signals[true] @ s
        decoder[true] = normalize(toy.decoders[true], dim=0) @ normalize(w, dim=0)
    out = {"found": float((iou > FOUND_IOU).sum())}
    for name, values in (("iou", iou), ("encoder", encoder), ("decoder", decoder)):
        out |= {name: float(values.mean()), f"{name}_worst": float(values.min())}
    return out | {"rmse": float(rmse.mean()), "rmse_worst": float(rmse.max())}


def agreement(first: Found, second: Found, rows: Tensor) -> dict[str, float]:
    """Return how well two findings agree: mean matched cosine of filters and signals, and more.

    Each measure is matched on its own; directions that are left over count as 0.
    `correlation` is that of the factors on `rows`, `(P, C)`.
    """

    def mean_match(worth: Tensor) -> float:
        worth = worth.nan_to_num(0.0)
        a, b = linear_sum_assignment(-worth.numpy())
        return float(worth[a, b].sum()) / max(worth.shape)

    def cosines(u: Tensor, v: Tensor) -> Tensor:
        return normalize(u.double(), dim=1) @ normalize(v.double(), dim=1).T

    centred = (rows - rows.mean(0)).double()
    return {
        "filters": mean_match(cosines(first.decoders, second.decoders)),
        "signals": mean_match(cosines(first.encoders, second.encoders)),
        "correlation": mean_match(
            cosines((centred @ first.decoders.T).T, (centred @ second.decoders.T).T)
        ),
    }


def detector_scores(
    found: Found, rows: Tensor, present: Tensor, outside: Tensor
) -> dict[str, float]:
    """Return how well the best concept of a finding tells one known presence.

    Args:
        found: Any finding. A signed one is not turned.
        rows: `(P, C)` activations.
        present: `(P,)` bool.
        outside: `(P,)` bool, the rows outside of the class that the presence goes with.

    Returns:
        The AUC over all rows, that over rows `outside` alone (same concept), and for a finding with
        its own biases precision, recall and the position of the concept; NaN for others.
    """
    readings = [rows.double() @ found.decoders.T]
    if found.codes is not None:
        readings.append(found.codes.double())
    best = {"auc": -1.0}
    for z in readings:
        areas = auc(z, present[:, None].expand(-1, z.shape[1]))
        turn = torch.where((areas < 0.5) & (not found.signed), -1.0, 1.0)
        areas = torch.where(turn < 0, 1 - areas, areas)
        k = int(areas.argmax())
        if float(areas[k]) <= best["auc"]:
            continue
        beside = auc((turn[k] * z[outside, k])[:, None], present[outside, None])
        best = {"auc": float(areas[k]), "auc_outside": float(beside)}
        best |= {"precision": np.nan, "recall": np.nan, "position": np.nan}
        if found.biases is not None:
            on = z[:, k] > found.biases[k]
            hits = float((on & present).sum())
            best["precision"] = hits / max(1, int(on.sum()))
            best |= {"recall": hits / max(1, int(present.sum())), "position": float(k)}
    return best
