"""Logs that cannot be written."""

import io
import json
import sys

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
    monkeypatch.setattr(sys, "stderr", BrokenStream())
    logs.configure()
    structlog.get_logger("test").error("nobody reads this")


def test_no_line_shows_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is named, nor one of the environment, nor a password in a URL, also in a traceback."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("HUB_TOKEN", "hf_verysecret")
    logs.configure(secrets=["consul-secret"])
    try:
        raise RuntimeError("no answer from postgresql://forge:hunter2@db/x with hf_verysecret")
    except RuntimeError:
        structlog.get_logger("test").exception("failed", token="consul-secret")  # noqa: S106
    told = json.loads(stream.getvalue())
    assert "*" * 13 == told["token"]
    assert "postgresql://forge:*******@db/x with *************" in told["exception"]
