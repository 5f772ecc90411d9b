"""Logs that cannot be written."""

import sys
from typing import Any

import pytest
import structlog

from training_common import logs


class BrokenStream:
    """A pipe that nobody reads any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_log_that_cannot_be_written_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or a closed pipe must not break the call that is logged."""
    before: dict[str, Any] = structlog.get_config()
    monkeypatch.setattr(sys, "stderr", BrokenStream())
    try:
        logs.configure()
        structlog.get_logger("test").error("nobody reads this")
    finally:
        structlog.configure(**before)
