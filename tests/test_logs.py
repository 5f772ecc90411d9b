"""Logs that cannot be written."""

import io
import json
import logging
import sys
import warnings

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


def test_what_libraries_log_is_json_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the standard library, and as warnings; with the job's ids, and without secrets."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    logs.configure(secrets=["hunter2"])
    logs.configure(secrets=["hunter2"])
    with structlog.contextvars.bound_contextvars(job="jobs/1"):
        logging.getLogger("exporter").error("no answer of %s in %d s", "http://u:hunter2@c", 3)
    logging.getLogger("exporter").info("not worth a line")
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        logging.getLogger("asyncio").exception("task failed")
    warnings.warn_explicit("this is old", DeprecationWarning, "f.py", 7)
    told = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["logger"], line["level"], line["event"]) for line in told] == [
        ("exporter", "error", "no answer of http://u:*******@c in 3 s"),
        ("asyncio", "error", "task failed"),
        ("py.warnings", "warning", "f.py:7: DeprecationWarning: this is old\n"),
    ]
    assert told[0]["job"] == "jobs/1"
    assert all(line["timestamp"] for line in told)
    assert "RuntimeError: boom" in told[1]["exception"]
