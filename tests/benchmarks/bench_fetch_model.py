"""MB/s of `CognateClient.fetch_model` over those of a plain TCP socket that carries the same bytes between processes.

The model is of real size and was published as a worker publishes. Ours includes what the yardstick lacks: look-up,
manifest, offsets, gRPC. Both hash sha256 while they write to the same disk, and both have flushed the file to it at the
end; the yardstick's sender is the kernel's sendfile. A second figure is over a yardstick that does not flush.
Usage: python tests/benchmarks/bench_fetch_model.py [runs]
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from cognate_server import migrations
from cognate_server.artifacts import CognateArtifactManager, TrainedModel
from cognateforge.client import CognateClient
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import interleave, median_ratio, report
from training_common.artifacts.blobs import BlobStore
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.digests import sha256_file
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.store.database import Database
from training_common.worker import WorkerAttempt

# Cognate-25M's weights in float32.
WEIGHTS_BYTES = 100_000_000
SMALL_FILES = {"config.json": 700, "data.json": 3_000, "tokenizer.json": 900_000}
BUFFER_BYTES = 1 << 20


def publish(data_dir: Path, scratch: Path) -> ArtifactRow:
    """Take a job to its published model, by the steps of a worker that trained nothing."""
    generator = random.Random(0)  # noqa: S311
    folder = scratch / "model"
    folder.mkdir()
    for name, size in {**SMALL_FILES, "model.safetensors": WEIGHTS_BYTES}.items():
        (folder / name).write_bytes(generator.randbytes(size))
    database = Database(f"sqlite:///{data_dir / 'store.db'}")
    try:
        database.upgrade(Path(migrations.__file__).parent)
        store = JobStore(database)
        with database.write() as connection:
            store.submit(connection, plan=b"", total_steps=1, caller="bench")
        job = store.begin_attempt("bench")
        if job is None:
            raise AssertionError("the submitted job is gone")
        attempt = WorkerAttempt(store.attempt(job.name, job.attempt, job.fencing_token), workdir=scratch / "work")
        attempt.move(JobState.RUNNING)
        attempt.trained()
        model = TrainedModel(
            folder=folder,
            state="READY",
            architecture={
                "name": "cognate_v1",
                "fingerprint": f"sha256:{'a' * 64}",
                "parameter_count": WEIGHTS_BYTES // 4,
                "act_version": 1,
                "ltm_version": 1,
            },
            tokenizer_digest=sha256_file(folder / "tokenizer.json"),
            sources=[],
            checks=[],
            results=[],
            training={
                "steps": 1,
                "tokens": 512,
                "batch_size": 1,
                "sequence_length": 512,
                "peak_learning_rate": 1e-3,
                "warmup_steps": 0,
                "precision": "float32",
                "seed": 0,
            },
            grokfast={"alpha": 0.98, "lambda": 2.0, "departures": []},
            recovery=[],
        )
        registry = ArtifactRegistry(database, BlobStore(data_dir / "artifacts"))
        return CognateArtifactManager(registry).publish(model, attempt)
    finally:
        database.close()


def make_ours(client: CognateClient, published: ArtifactRow, destination: Path) -> Callable[[], float]:
    """Return a function that fetches the model into a new folder and returns MB/s."""

    def mb_per_s() -> float:
        start_s = time.perf_counter()
        fetched = client.fetch_model(published.name, destination)
        seconds = time.perf_counter() - start_s
        if (fetched.digest, fetched.bytes_received) != (published.digest, published.size_bytes):
            raise AssertionError(f"fetched {fetched.bytes_received} bytes of {fetched.digest}")
        shutil.rmtree(destination)
        return published.size_bytes / seconds / 1e6

    return mb_per_s


def send_forever(path: Path, port: Connection) -> None:
    """Send the file to everybody who connects. Runs in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port.send(listener.getsockname()[1])
        while True:
            peer, _ = listener.accept()
            with peer, path.open("rb") as payload:
                peer.sendfile(payload)


@contextmanager
def sender(path: Path) -> Iterator[int]:
    """Yield the port of a process that sends the file."""
    context = multiprocessing.get_context("spawn")
    port, theirs = context.Pipe(duplex=False)
    process = context.Process(target=send_forever, args=(path, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield int(port.recv())
    finally:
        process.kill()
        process.join()


def make_yardstick(port: int, payload: Path, destination: Path, *, durable: bool) -> Callable[[], float]:
    """Return a function that receives the same bytes over a plain socket into a file and returns MB/s.

    durable: the file is flushed to the disk, as a fetched model is.
    """
    size_bytes, digest = payload.stat().st_size, sha256_file(payload)
    buffer = memoryview(bytearray(BUFFER_BYTES))

    def mb_per_s() -> float:
        start_s = time.perf_counter()
        sha256 = hashlib.sha256()
        with socket.create_connection(("127.0.0.1", port)) as peer, destination.open("wb", buffering=0) as file:
            while count := peer.recv_into(buffer):
                sha256.update(buffer[:count])
                file.write(buffer[:count])
            if durable:
                os.fsync(file.fileno())
        found = f"sha256:{sha256.hexdigest()}"
        seconds = time.perf_counter() - start_s
        if found != digest:
            raise AssertionError(f"received {found}, not {digest}")
        destination.unlink()
        return size_bytes / seconds / 1e6

    return mb_per_s


def main(runs: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-fetch-model-") as name:
        scratch = Path(name)
        data_dir = scratch / "data"
        data_dir.mkdir()
        published = publish(data_dir, scratch)
        payload = scratch / "payload"
        with payload.open("wb") as file:
            for entry in published.files:
                file.write((scratch / "model" / entry.path).read_bytes())
        with cognate_process(data_dir) as address, CognateClient(address) as client, sender(payload) as port:
            ours = make_ours(client, published, scratch / "fetched")
            quick, durable = (
                make_yardstick(port, payload, scratch / "received", durable=durable) for durable in (False, True)
            )
            pairs = interleave(ours, durable, runs=runs)
            hasty = interleave(ours, quick, runs=runs)
    report("fetch_model", pairs, unit="MB/s", ratio_to_one_that_is_not_durable=round(median_ratio(hasty), 3))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
