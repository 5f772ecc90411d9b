"""Publications that are killed at each of their steps: python -m tests.support.publish_killed ORDER

The steps are counted, not chosen: every call of the operating system that changes a folder, every request to a bucket,
every statement and every commit of the database, in the order in which a publication makes them. The k-th publication
is killed right before its k-th step, in the middle of it where that is a write, until one comes to its end. After each,
a new process looks at what is there and lets the job go on. Writes, as JSON, the steps and what was found wrong.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import obstore
import sqlalchemy as sa

from cognate_server import migrations
from cognateforge.cognate.v1.pretraining_pb2 import PretrainingPlan
from tests.support.stored import Stored
from training_common.artifacts import bucket
from training_common.artifacts.places import ChangedError
from training_common.artifacts.publish import publish_and_succeed
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.store.database import Database
from training_common.worker import WorkerAttempt

FAMILY = "cognate-25m"
_FOLDER = ("write", "fsync", "link", "unlink", "mkdir")
_BUCKET = ("put", "head", "get_range", "list", "delete")


class Steps:
    """Counts steps from `begin` on, and ends this process before the step of a number."""

    def __init__(self, last: int, told: Connection) -> None:
        self._left, self._told, self._counts = last, told, False
        for name in _FOLDER:
            setattr(os, name, self._counted(f"os.{name}", getattr(os, name)))
        for name in _BUCKET:
            setattr(obstore, name, self._counted(f"obstore.{name}", getattr(obstore, name)))
        verified = bucket._verified

        def parts(pieces: Iterable[bytes], digest: str, changed: ChangedError) -> Iterator[bytes]:
            for piece in verified(pieces, digest, changed):
                self.pass_by("part of obstore.put")
                yield piece

        bucket._verified = parts
        sa.event.listen(sa.Engine, "before_cursor_execute", self._statement)
        sa.event.listen(sa.Engine, "commit", lambda _connection: self.pass_by("commit"))

    def begin(self) -> None:
        """Count from here on."""
        self._counts = True

    def pass_by(self, name: str, *, half: Callable[[], object] = lambda: None) -> None:
        """Note a step, or end the process half-way through it."""
        if not self._counts:
            return
        self._told.send(name)
        if not self._left:
            self._counts = False
            half()
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            def half() -> None:
                if name == "os.write":
                    call(args[0], args[1][: len(args[1]) // 2])

            self.pass_by(name, half=half)
            return call(*args, **options)

        return counted

    def _statement(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        self.pass_by(" ".join(statement.split()[:3]))


class Service:
    """A service's stores in this process."""

    def __init__(self, stored: Stored, store_url: str) -> None:
        self.database = Database(store_url)
        self.registry = ArtifactRegistry(self.database, stored.open())
        self.jobs = JobStore(self.database)

    def attempt(self, scratch: Path) -> WorkerAttempt:
        """Begin an attempt of the job that is due, and bring it to where it publishes."""
        job = self.jobs.begin_attempt("tests")
        if job is None:
            raise AssertionError("no job is due")
        attempt = WorkerAttempt(self.jobs.attempt(job.name, job.attempt, job.fencing_token), workdir=scratch / "work")
        attempt.move(JobState.RUNNING)
        attempt.trained()
        return attempt

    def submit(self) -> str:
        """Queue a job and return its name."""
        with self.database.write() as connection:
            return self.jobs.submit(connection, plan=b"", total_steps=1, caller="tests").name

    def publish(self, attempt: WorkerAttempt, folder: Path) -> ArtifactRow:
        """Publish a folder as a worker does."""
        return publish_and_succeed(
            self.registry,
            attempt,
            folder=folder,
            family=FAMILY,
            state="READY",
            body={"kind": "foundation", "data": [], "recovery": []},
            service="cognate",
            code=("training_common",),
            plan=PretrainingPlan(),
        )


def _service(order: dict[str, Any], number: int) -> Service:
    """Return the service. A folder is new for each publication, so that all make the same steps."""
    files_dir = Path(order["stored"]["files_dir"]) / str(number)
    return Service(Stored(**{**order["stored"], "files_dir": files_dir}), order["store_url"])


def _files(scratch: Path, number: int) -> Path:
    """Return a folder with files that no publication before had, two of them alike. One is sent in parts."""
    folder = scratch / "model"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.bin").write_bytes(b"%08d" % number * 140_000)
    (folder / "config.json").write_bytes(b'{"number": %d}' % number)
    (folder / "copy.json").write_bytes((folder / "config.json").read_bytes())
    return folder


def _killed(order: dict[str, Any], number: int, told: Connection) -> None:
    bucket._WHOLE_BYTES = 1 << 20
    bucket._PART_BYTES = 5 << 20  # S3's least
    scratch, steps = Path(order["scratch"]), Steps(number, told)
    service = _service(order, number)
    service.submit()
    attempt = service.attempt(scratch)
    folder = _files(scratch, number)
    steps.begin()
    service.publish(attempt, folder)
    steps.pass_by("end")
    told.send("")


def _looked_at(order: dict[str, Any], number: int, told: Connection) -> None:
    """Tell what is wrong with the newest job and what it published, then let it, or another one, publish."""
    service, scratch = _service(order, number), Path(order["scratch"])
    wrong = list(_contradictions(service))
    [job] = service.jobs.page(states=(), before_id=None, limit=1)
    before = service.registry.find(FAMILY, None)
    if job.state is not JobState.SUCCEEDED:
        row = service.jobs.attempt_row(job.id, job.attempt)
        if row is None or service.jobs.cut(job, row, message="killed") is None:
            wrong.append("its job cannot go on")
    else:
        service.submit()
    published = service.publish(service.attempt(scratch), _files(scratch, number))
    if before is not None and published.version <= before.version:
        wrong.append(f"{published.name} was published after {before.name}")
    told.send([*wrong, *_contradictions(service)])


def _contradictions(service: Service) -> Iterator[str]:
    """Yield what is not as it must be: a version has all of its parts, and what has no row has none that counts."""
    registry = service.registry
    [job] = service.jobs.page(states=(), before_id=None, limit=1)
    rows = [row for row in registry.page(limit=1000) if row.job == job.name]
    events = [event for event in registry.events_after(0, 10_000) if event.artifact.job == job.name]
    told = [event for event in service.jobs.events_after(job.id, 0, 100) if event.kind == "artifact_published"]
    if not rows:
        if job.state is JobState.SUCCEEDED or job.artifact or events or told:
            yield f"{job.state} {job.artifact} with {len(events)} and {len(told)} events, but no version"
        return
    [row] = rows
    if (job.state, job.artifact, len(events), len(told)) != (JobState.SUCCEEDED, row.name, 1, 1):
        yield f"{row.name} of a job that is {job.state} {job.artifact}, with {len(events)} and {len(told)} events"
    if registry.blobs.read_manifest(row.family, row.version) != row.manifest:
        yield f"{row.name}: another manifest is stored"
    for file in row.files:
        registry.blobs.check(file)


def _run(work: Callable[..., None], *args: Any) -> tuple[int, list[Any]]:
    """Run in a forked process; return how it ended and what it told."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*args, theirs))
    process.start()
    theirs.close()
    told = []
    while True:
        try:
            told.append(ours.recv())
        except EOFError:
            break
    process.join()
    return process.exitcode or 0, told


def _upgrade(order: dict[str, Any], _told: Connection) -> None:
    Database(order["store_url"]).upgrade(Path(migrations.__file__).parent)


def main(order: dict[str, Any]) -> None:
    """Kill at each step in turn, and print what was seen."""
    status, _ = _run(_upgrade, order)
    steps: list[str] = []
    wrong: list[str] = []
    while not status:
        status, passed = _run(_killed, order, len(steps))
        if not status:
            break
        if status != -signal.SIGKILL:
            raise AssertionError(f"step {len(steps)}: ended with {status} after {passed[-3:]}")
        status, [found] = _run(_looked_at, order, len(steps))
        steps.append(passed[-1])
        wrong += [f"step {len(steps)}, {steps[-1]}: {text}" for text in found]
    print(json.dumps({"steps": steps, "wrong": wrong, "status": status}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
