"""A real pretraining on an open page: real services, a real worker, the real command, a real browser."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cognateforge.client import CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from deploy.services import Services
from tests.dashboard.browser import Browser

STEPS = 10


@contextmanager
def dashboard(cognate: str, agent: str) -> Iterator[str]:
    """Yield the address of a dashboard in a process of its own."""
    options = ["--cognate", cognate, "--agent-server", agent, "--port", "0", "--actions", "--json"]
    command = [sys.executable, "-m", "cognateforge.cli", "dashboard", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


def worker_of(job: str) -> psutil.Process:
    return next(one for one in psutil.process_iter(["cmdline"]) if job in (one.info["cmdline"] or ()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_jobs_curve_grows_and_the_loss_of_its_worker_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chromium_session: Browser
) -> None:
    """Steps, a killed worker, its recovery, the next attempt and a cancel: on one page, never loaded anew."""
    monkeypatch.delenv("FORGE_DATA", raising=False)
    services, browser = Services(tmp_path), chromium_session
    browser.reset()
    try:
        settings = {"WORKERS__SLOTS": "1", "WORKERS__THREADS": "1"}
        service = services.start("cognate_server", address="127.0.0.1:0", settings=settings)
        # No agent service: its part of the page says so, and nothing else depends on it.
        with dashboard(service.address, "127.0.0.1:9") as url, CognateClient(service.address) as cognate:
            plan = pb.PretrainingPlan(
                total_steps=STEPS, seed=5, batch_size=2, sequence_length=64, checkpoint_interval_steps=2
            )
            request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=plan)
            job = cognate.pretraining.StartPretraining(request).job.job.name
            browser.open(f"{url}jobs/cognate/{job.removeprefix('jobs/')}")
            browser.until_text("Preparing")
            browser.js("window.sameDocument = true")

            def newest() -> int:
                label = browser.js("return document.querySelector('.plot')?.getAttribute('aria-label') ?? ''")
                return int(label.partition(" to ")[2].partition(",")[0] or 0) if " to " in label else 0

            browser.until(lambda: newest() >= 2, "two steps", wait_s=120)
            browser.until_text("Checkpoint of", wait_s=120)
            worker_of(job).kill()
            browser.until_text("Recovering", ".timeline", wait_s=60)
            browser.until_text("Attempt 2", ".timeline", wait_s=60)
            seen = newest()
            browser.until(lambda: newest() > seen, "the curve of the second attempt", wait_s=180)
            browser.find(".title .actions button.danger").click()
            browser.find("dialog button.danger").click()
            browser.until_text("Cancelled", ".title", wait_s=60)
            assert browser.js("return window.sameDocument")
            browser.open("about:blank")
            assert [] == browser.errors()
    finally:
        services.stop()
