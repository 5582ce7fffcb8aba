"""Audit: open the model and the images that the settings name.

Nothing here knows what is looked for in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from concept_guard.audit.images import images_of_folder, images_of_run
from concept_guard.audit.settings import AuditSettings
from concept_guard.audit.weights import find_weights, load_model
from concept_guard.diagnosis import Subject
from concept_guard.training.images import Images
from concept_guard.training.splits import Samples

_DATA_KEYS = ("img_size", "mean", "std", "crop_pct")


@dataclass(frozen=True, eq=False)
class Opened:
    """What is audited.

    Attributes:
        subject: The model, on its device and in eval mode, and its images.
        samples: The images one by one.
        size: How many there are.
    """

    subject: Subject
    samples: Samples
    size: int


def open_audit(settings: AuditSettings) -> Opened:
    """Open model and images.

    Args:
        settings: Name them.

    Returns:
        Both, matched: every class folder is one of the model's classes.
    """
    saved = find_weights(settings)
    asked = {key: saved.args.get(key) for key in _DATA_KEYS}
    asked |= {k: v for k in _DATA_KEYS if (v := getattr(settings, k)) is not None}
    kwargs = settings.model_kwargs or dict(saved.args.get("model_kwargs") or {})
    model = load_model(saved, kwargs, asked["img_size"])
    find = images_of_run if settings.data_dir is None else images_of_folder
    examined = find(settings, saved, model, asked)
    samples = examined.samples
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    subject = Subject(
        model=model.to(name).eval(),
        images=DataLoader(samples, settings.batch_size, num_workers=settings.workers),
        name=saved.model,
        weights="timm's own weights" if saved.path is None else str(saved.path),
        classes=examined.classes,
        source=examined.source,
        file=examined.file,
        broken=samples.broken if isinstance(samples, Images) else None,
    )
    return Opened(subject, samples, len(samples))  # type: ignore[arg-type]
