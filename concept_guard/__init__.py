"""A drop-in guard for training loops of timm image classifiers.

The stages, in the order of the data flow:

    taps         read activations where the model makes them, without leaving a trace
    directions   find encoding-decoding direction pairs in them, without concept labels
    influence    what moving along an encoding direction does to logits
    association  which concepts go with errors: effect, exact test, multiplicity
    flags        which of these cause them, confirmed by erasing
    trial        all concepts of a round put to that test
    explanation  why one image is predicted as it is, concept by concept
    tracking     keep a flagged pair true while the network moves
    correction   project out, rebalance, bake into the weights: the arithmetic
    erasure      what is projected out now, and how it is kept true
    refit        the classifier fitted once more, to held-out images, when baking
    baking       what was corrected becomes the model's own weights, or those of a copy
    decisions    what people approve and veto, from Python and from the command line
    logs         rounds and acts as TensorBoard events: tags, cards, entries of the history
    history      what was logged in a run, read back from its events
    report       pages on a run and on a model, in one file each
    board        the tab of TensorBoard, which shows the same
    examination  what would keep all this from working, found before the training

Names are imported when they are first used: TensorBoard, which asks this package for its tab, must
not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concept_guard.changes import Change
    from concept_guard.config import GuardConfig
    from concept_guard.directions import Concept, DirectionPairs, Schedule, descend_pairs, fit_pairs
    from concept_guard.errors import (
        BakeError,
        ConceptGuardError,
        ConfigError,
        ProbeError,
        StateError,
        TapError,
    )
    from concept_guard.examination import DoctorReport, Loop, Problem, doctor
    from concept_guard.explanation import Explanation
    from concept_guard.flags import Flag
    from concept_guard.guard import ConceptGuard
    from concept_guard.records import RoundReport

__version__ = "0.1.0"

__all__ = [
    "BakeError",
    "Change",
    "Concept",
    "ConceptGuard",
    "ConceptGuardError",
    "ConfigError",
    "DirectionPairs",
    "DoctorReport",
    "Explanation",
    "Flag",
    "GuardConfig",
    "Loop",
    "ProbeError",
    "Problem",
    "RoundReport",
    "Schedule",
    "StateError",
    "TapError",
    "descend_pairs",
    "doctor",
    "fit_pairs",
]

_STAGES = {
    "changes": ("Change",),
    "config": ("GuardConfig",),
    "directions": ("Concept", "DirectionPairs", "Schedule", "descend_pairs", "fit_pairs"),
    "errors": (
        "BakeError",
        "ConceptGuardError",
        "ConfigError",
        "ProbeError",
        "StateError",
        "TapError",
    ),
    "examination": ("DoctorReport", "Loop", "Problem", "doctor"),
    "explanation": ("Explanation",),
    "flags": ("Flag",),
    "guard": ("ConceptGuard",),
    "records": ("RoundReport",),
}
_STAGE_OF = {name: stage for stage, names in _STAGES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _STAGE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_STAGE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
