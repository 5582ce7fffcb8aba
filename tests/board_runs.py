"""Runs written by hand for the tab of TensorBoard; nothing here trains, or uses the guard's log."""

import io
from pathlib import Path

from PIL import Image
from tensorboard.compat.proto import summary_pb2 as proto
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from concept_guard.entries import (
    ActEntry,
    AnyEntry,
    ConceptEntry,
    FlagEntry,
    GroupEntry,
    RoundEntry,
    StartEntry,
    dumped,
)

TIME = "2026-01-02 03:04:05"
SLOT = 1  # of the concept of every round


def start(step: int = 0) -> StartEntry:
    settings = {"tap": "pre_logits", "every": "100"}
    return StartEntry(step=step, time=TIME, version="0.1.0", model="ResNet", settings=settings)


def round_entry(step: int, class_name: str = "cat", **changes: object) -> RoundEntry:
    """Return a round in which concept 7 pulls towards a class and is erased."""
    flag = FlagEntry(
        class_name=class_name,
        risk_difference=0.5,
        interval=(0.4, 0.6),
        q_value=1e-6,
        fixed=9,
        broken=1,
        present=30,
        status="erased",
        examples=("a.png",),
    )
    concept = ConceptEntry(
        id=7, slot=SLOT, presence_rate=0.3, flags=(flag,), erased=True, leak=0.1, drift=0.9
    )
    group = GroupEntry(concept=7, class_name=class_name, carried=True, images=20, accuracy=0.8)
    values = {
        "step": step,
        "time": TIME,
        "verdict": f"concept 7 pulls towards {class_name}.",
        "numbers": {"probe/top1": 0.8, "probe/worst_group": 0.5},
        "images": 100,
        "errors": 20,
        "concepts": (concept,),
        "groups": (group,),
        "found": 8,
    }
    return RoundEntry(**{**values, **changes})


def act(step: int) -> ActEntry:
    return ActEntry(step=step, time=TIME, act="erase", concepts=(7,), text="concept 7 is erased")


def picture(shade: int = 100, kind: str = "JPEG") -> bytes:
    """Return an image file of one shade."""
    whole = io.BytesIO()
    Image.new("RGB", (192, 64), (shade, 100, 150)).save(whole, kind)
    return whole.getvalue()


def kept(entry: AnyEntry | bytes) -> proto.Summary.Value:
    """Return what holds an entry, with the class of data without which TensorBoard drops it."""
    data = entry if isinstance(entry, bytes) else dumped(entry)
    value = proto.Summary.Value(tag="concept_guard/history")
    value.metadata.plugin_data.plugin_name = "concept_guard"
    value.metadata.data_class = proto.DATA_CLASS_TENSOR
    value.tensor.dtype = DT_STRING
    value.tensor.string_val.append(data)
    return value


def card(data: bytes, slot: int = SLOT) -> proto.Summary.Value:
    image = proto.Summary.Image(height=64, width=192, colorspace=3, encoded_image_string=data)
    return proto.Summary.Value(tag=f"concept_guard/cards/slot_{slot}", image=image)


def write(folder: Path, *events: tuple[int, proto.Summary.Value], name: str = "0.host") -> Path:
    """Append values at their steps to an event file, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"events.out.tfevents.{name}"
    with path.open("ab") as file:
        writer = RecordWriter(file)
        if not file.tell():
            writer.write(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        for step, value in events:
            summary = proto.Summary(value=[value])
            writer.write(
                Event(wall_time=2.0 + step, step=step, summary=summary).SerializeToString()
            )
        writer.flush()
    return path


def write_round(folder: Path, step: int, class_name: str = "cat", *, shade: int = 100) -> Path:
    """Append a round with its card, and at step 1 what a guard begins with."""
    before = [(step, kept(start()))] if step == 1 else []
    after = [(step, kept(act(step))), (step, kept(round_entry(step, class_name)))]
    return write(folder, *before, (step, card(picture(shade))), *after)
