"""A run as TensorBoard's event files: scalars by step, histograms, and texts for what happened.

Needs the package tensorboard (extra `tensorboard`), which is loaded when a file is opened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cognateforge.exceptions import ClientSetupError

REMEDY = "pip install 'cognateforge[tensorboard]'"

Value = float | int | Sequence[float]


def require_tensorboard() -> None:
    """Make sure that event files can be written. Errors: ClientSetupError, with the remedy."""
    if find_spec("tensorboard") is None:
        raise ClientSetupError(f"event files need the package tensorboard: {REMEDY}")


class EventFile:
    """One file of a run: what one attempt reported. Its folder is what TensorBoard calls a run.

    attempt: files are read in its order. from_step: finished steps that the attempt goes on from: what the folder's
    other files hold of later ones is void, and TensorBoard drops it. Errors: ClientSetupError, OSError.
    """

    def __init__(self, folder: Path, *, attempt: int, from_step: int, at_s: float) -> None:
        require_tensorboard()
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2.Event
        folder.mkdir(parents=True, exist_ok=True)
        # Not by time: a clock that goes back would change their order.
        self._file = (folder / f"events.out.tfevents.{attempt:010d}").open("wb")
        self._records: Any = RecordWriter(self._file)
        self._step = from_step
        self._write(at_s, file_version="brain.Event:2")
        self._go_on_after(from_step, at_s)

    def log(self, step: int, metrics: Mapping[str, Value], *, at_s: float) -> None:
        """Write what was measured at a step. A list is the shares of 1, 2, ..., as a histogram's."""
        if step < self._step:
            self._go_on_after(step - 1, at_s)
        self._step = step
        summary: Any = _summary()
        for tag, value in metrics.items():
            if not isinstance(value, Sequence):
                if math.isfinite(value):
                    summary.value.add(tag=tag, simple_value=value)
            elif value and all(map(math.isfinite, value)):
                _fill(summary.value.add(tag=tag).histo, value)
        if summary.value:
            self._write(at_s, step=step, summary=summary)

    def text(self, tag: str, text: str, *, at_s: float, step: int | None = None) -> None:
        """Write a text at a step; None: at the newest one."""
        from tensorboard.compat.proto import types_pb2

        summary: Any = _summary()
        value = summary.value.add(tag=tag)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = types_pb2.DT_STRING
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(text.encode("utf-8", "replace"))
        self._write(at_s, step=self._step if step is None else step, summary=summary)

    def _go_on_after(self, step: int, at_s: float) -> None:
        """Void what is known of later steps: TensorBoard drops scalars and histograms from this mark's step on.

        Texts stay, and they tell why training went back.
        """
        from tensorboard.compat.proto import event_pb2

        mark = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(at_s, step=step + 1, session_log=mark)

    def _write(self, at_s: float, **fields: Any) -> None:
        self._records.write(self._event(wall_time=at_s, **fields).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """End the file."""
        self._file.close()


def _summary() -> Any:
    from tensorboard.compat.proto import summary_pb2

    return summary_pb2.Summary()


def _fill(histogram: Any, shares: Sequence[float]) -> None:
    """Make a histogram of the shares of 1, 2, ...: each number has a bucket of its own around it."""
    numbers = range(1, len(shares) + 1)
    histogram.min, histogram.max, histogram.num = 0.5, len(shares) + 0.5, sum(shares)
    histogram.sum = sum(number * share for number, share in zip(numbers, shares, strict=True))
    histogram.sum_squares = sum(number**2 * share for number, share in zip(numbers, shares, strict=True))
    histogram.bucket_limit.extend(number + 0.5 for number in numbers)
    histogram.bucket.extend(shares)
