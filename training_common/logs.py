"""JSON logs on standard error: a constant phrase, facts as fields, one line each."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from typing import TextIO, cast

import structlog
from structlog.typing import Processor

from training_common.masking import Mask, secrets_of_environment


class _Undisturbed:
    """A stream whose failures stay its own: a full disk or a closed pipe must not break the call that is logged."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


class _Others(logging.StreamHandler[TextIO]):
    """Writes what libraries log by the standard library, and what Python warns of, as lines like our own."""


def configure(level: str = "INFO", *, secrets: Sequence[str] = ()) -> None:
    """Set up structlog for this process. Context variables (request_id, job, attempt) are on every line.

    What libraries log by the standard library from WARNING on, and Python's warnings, are lines of the same form with
    the logger's name.

    secrets: what no line may show, beside the secrets of the environment and passwords in URLs.
    """
    mask = Mask([*secrets, *secrets_of_environment()])
    stream = cast("TextIO", _Undisturbed(sys.stderr))
    facts: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    rendering: list[Processor] = [
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
        lambda _logger, _method, line: mask.text(cast("str", line)),
    ]
    structlog.configure(
        processors=[*facts, *rendering],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=True,
    )
    others = _Others(stream)
    others.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*facts, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _Others)]
    root.addHandler(others)
    logging.captureWarnings(True)
