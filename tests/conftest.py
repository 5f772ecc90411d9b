"""Fixtures that several folders share."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import structlog

from tests.support.postgres import PostgresServer
from tests.support.s3 import S3Server
from tests.support.templates import copied_stores

# As for workers: threads of torch that spin for milliseconds make small models many times slower when anything else
# runs. Read when torch is loaded, so it stands before every import of it.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Several processes of tests share the cores: threads of torch in each of them would only be in each other's way.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow tests last, so that a broken unit is told in seconds, and the longest of them before the others."""
    items.sort(key=_place)


# Files of slow tests alone, the longest first. What is not named follows: a process that has begun a long file last
# would work on alone.
LONGEST = (
    "e2e/test_from_weights_to_agent.py",
    "e2e/test_two_processes.py",
    "jobs/test_two_nodes.py",
    "e2e/test_on_s3.py",
    "cognate/test_data_parallel.py",
    "backup/test_drill.py",
    "agent/test_data_parallel.py",
    "jobs/test_ten_tenants.py",
    "dashboard/test_real_job.py",
    "fuzz/test_fuzz.py",
    "agent/test_architectures_end_to_end.py",
    "upgrade/test_schema.py",
)


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("slow") is None:
        return 0
    file = item.path.relative_to(Path(__file__).parent).as_posix()
    return 1 + (LONGEST.index(file) if file in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Leave no test's logging to the next one: what sets a process up does it in this process too."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers = list(root.handlers)
    yield
    structlog.configure(**before)
    root.handlers = [handler for handler in root.handlers if handler in handlers]
    logging.captureWarnings(False)


@pytest.fixture
def no_drain_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let servers stop at once: no balancer watches their health here."""
    monkeypatch.setattr("training_common.rpc.server._DRAIN_NOTICE_S", 0.0)


@pytest.fixture(scope="session", autouse=True)
def _copied_stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with copied_stores(tmp_path_factory.mktemp("stores")):
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Yield a PostgreSQL server, started when a test first needs it."""
    server = PostgresServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """Yield an S3 server, started when a test first needs it."""
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty store, of each kind in turn: what is promised holds on both."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.new_database()


@pytest.fixture(autouse=True)
def no_worker_left_behind(tmp_path: Path) -> Iterator[None]:
    """End workers that a test has left running: they outlive their server by design."""
    began = time.time() - 1  # when processes began is known to a hundredth of a second
    yield
    for process in psutil.process_iter():
        # Processes end while they are looked at; a zombie has neither.
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if process.create_time() < began:
                continue
            given = [*process.cmdline(), *process.environ().values()]
            if process.pid != os.getpid() and any(str(tmp_path) in part for part in given):
                process.kill()
