"""Stage 5: values, pictures, texts and entries as the messages that TensorBoard stores.

TensorBoard is imported when the first of them is made. Nothing here knows what they mean.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from concept_guard.entries import PLUGIN, AnyEntry, dumped

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary


def scalars(values: Mapping[str, float | None]) -> "list[Summary]":
    """Return values as scalars; one that is missing or not finite is left out.

    Args:
        values: By tag.

    Returns:
        One message per value.
    """
    from torch.utils.tensorboard.summary import scalar

    finite = {t: v for t, v in values.items() if v is not None and math.isfinite(v)}
    return [scalar(tag, value) for tag, value in finite.items()]


def text(tag: str, words: str) -> "Summary":
    """Return Markdown.

    Args:
        tag: Its tag.
        words: The Markdown.

    Returns:
        A message.
    """
    from torch.utils.tensorboard.summary import text as summary

    return summary(tag, words)


def picture(tag: str, file: bytes, size: tuple[int, int]) -> "Summary":
    """Return a picture as it was encoded.

    Args:
        tag: Its tag.
        file: A JPEG or PNG file.
        size: Height and width in pixels.

    Returns:
        A message.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width = size
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def kept(tag: str, entry: AnyEntry) -> "Summary":
    """Return an entry of the history; without its class of data TensorBoard would drop it.

    Args:
        tag: Its tag.
        entry: What to keep.

    Returns:
        A message.
    """
    from tensorboard.compat.proto.summary_pb2 import (
        DATA_CLASS_TENSOR,
        Summary,
        SummaryMetadata,
    )
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN)
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    tensor = TensorProto(dtype=DT_STRING, string_val=[dumped(entry)])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def hyperparameters(
    given: Mapping[str, object], metrics: Mapping[str, float]
) -> "tuple[list[Summary], Summary]":
    """Return settings for the HParams page.

    They go into the file of the run: `SummaryWriter.add_hparams` opens a second, newer one, after
    which a running TensorBoard stops reading the first.

    Args:
        given: Settings; what is no number or text becomes text.
        metrics: Tags of scalars whose last values are the result of the run.

    Returns:
        The messages that begin a run, and the one that ends it.
    """
    from torch.utils.tensorboard.summary import hparams

    plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in given.items()}
    *begin, end = hparams(plain, dict(metrics))
    return begin, end
