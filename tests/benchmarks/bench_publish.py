"""MB/s of publishing, fetching and verifying a model, over those of the least that could do it.

folder: a publication, over a copy of the same files that is flushed to the disk and hashed; reading the payload into
files, over a plain copy with its sha256. bucket: the same, over obstore's own put and get of the same bytes, on a real
S3 server of this machine. verify: every stored byte checked, over sha256 of the same file.
The first of these is the bench's own figure; the others stand beside it.
Usage: python tests/benchmarks/bench_publish.py [runs] [megabytes]
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import sqlalchemy as sa
from obstore.store import S3Store

from cognate_server import migrations
from tests.benchmarks.cognate_process import clean_up_on_sigterm
from tests.benchmarks.common import interleave, median_ratio, report
from tests.support.s3 import S3Server
from tests.support.stored import Stored
from training_common.artifacts.blobs import BlobStore, StoredFile
from training_common.artifacts.registry import ArtifactRegistry
from training_common.digests import files_under, sha256_file, sync_tree
from training_common.store.database import Database

SMALL_FILES = {"config.json": 700, "data.json": 3_000, "tokenizer.json": 900_000}
BLOCK_BYTES = 1 << 20


class Model:
    """A folder to publish, whose weights are others every time: bytes that are there are not stored again."""

    def __init__(self, folder: Path, weights_bytes: int) -> None:
        self.folder = folder
        folder.mkdir()
        content = random.Random(0)  # noqa: S311
        for name, size_bytes in {**SMALL_FILES, "model.safetensors": weights_bytes}.items():
            (folder / name).write_bytes(content.randbytes(size_bytes))
        self.files = files_under(folder)
        self.size_bytes = sum(path.stat().st_size for path in self.files)

    def renew(self) -> None:
        """Change some bytes of every file, and let the disk come to rest."""
        for path in self.files:
            with path.open("r+b") as file:
                file.write(uuid.uuid4().bytes)
        sync_tree(self.folder)

    def mb_per_s(self, work: Callable[[], object]) -> float:
        """Return how fast work goes through the files' bytes."""
        start_s = time.perf_counter()
        work()
        return self.size_bytes / (time.perf_counter() - start_s) / 1e6


def publisher(registry: ArtifactRegistry, model: Model) -> Callable[[], tuple[StoredFile, ...]]:
    """Return a function that publishes the folder as the next version, and returns its files."""

    def publish() -> tuple[StoredFile, ...]:
        files = [registry.blobs.put(path, path.name) for path in model.files]
        with registry.database.write() as connection:
            row = registry.publish(
                connection, family="cognate-25m", state="READY", job="jobs/x", files=files, body={"kind": "foundation"}
            )
        return row.files

    return publish


def copy_and_hash(sources: list[Path], target: Path, *, durable: bool) -> None:
    """Copy files into a new folder, hash what is copied and, for equal durability, flush each and the folder."""
    target.mkdir()
    for source in sources:
        sha256 = hashlib.sha256()
        with source.open("rb", buffering=0) as read, (target / source.name).open("wb", buffering=0) as written:
            while block := read.read(BLOCK_BYTES):
                sha256.update(block)
                written.write(block)
            if durable:
                os.fsync(written.fileno())
        sha256.hexdigest()
    if durable:
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def unpack(blobs: BlobStore, files: tuple[StoredFile, ...], target: Path) -> None:
    """Read a payload into files and hash it, as an evaluation does."""
    target.mkdir()
    for file in files:
        sha256 = hashlib.sha256()
        with (target / file.path).open("wb", buffering=0) as written:
            for _, piece in blobs.open_payload((file,), 0):
                sha256.update(piece)
                written.write(piece)
        if f"sha256:{sha256.hexdigest()}" != file.digest:
            raise AssertionError(file.path)


def verify(blobs: BlobStore, files: tuple[StoredFile, ...]) -> None:
    """Read every stored byte."""
    for file in files:
        blobs.check(file)


def measure_folder(blobs: BlobStore, database: Database, model: Model, scratch: Path, runs: int) -> dict[str, Any]:
    """Return the pairs of a folder: publish, fetch and verify."""
    publish, out = publisher(ArtifactRegistry(database, blobs), model), scratch / "out"

    def fresh(work: Callable[[], object]) -> float:
        model.renew()
        rate = model.mb_per_s(work)
        shutil.rmtree(out, ignore_errors=True)
        return rate

    def read(work: Callable[[], object]) -> float:
        rate = model.mb_per_s(work)
        shutil.rmtree(out, ignore_errors=True)
        return rate

    published = interleave(
        lambda: fresh(publish), lambda: fresh(lambda: copy_and_hash(model.files, out, durable=True)), runs=runs
    )
    files = publish()
    fetched = interleave(
        lambda: read(lambda: unpack(blobs, files, out)),
        lambda: read(lambda: copy_and_hash(model.files, out, durable=False)),
        runs=runs,
    )
    verified = interleave(
        lambda: read(lambda: verify(blobs, files)),
        lambda: read(lambda: [sha256_file(path) for path in model.files]),
        runs=runs,
    )
    return {"publish": published, "fetch": fetched, "verify": verified}


def measure_bucket(blobs: BlobStore, database: Database, model: Model, plain: S3Store, runs: int) -> dict[str, Any]:
    """Return the pairs of a bucket: publish, fetch and verify."""
    publish = publisher(ArtifactRegistry(database, blobs), model)

    def put() -> None:
        for path in model.files:
            obstore.put(plain, f"plain/{uuid.uuid4().hex}", path)

    def fresh(work: Callable[[], object]) -> float:
        model.renew()
        return model.mb_per_s(work)

    published = interleave(lambda: fresh(publish), lambda: fresh(put), runs=runs)
    files = publish()
    keys = [f"plain/{file.digest.removeprefix('sha256:')}" for file in files]
    for key, path in zip(keys, model.files, strict=True):
        obstore.put(plain, key, path)

    def get() -> Iterator[int]:
        for key in keys:
            yield len(obstore.get(plain, key).bytes())

    def get_and_hash() -> None:
        for key in keys:
            hashlib.sha256(obstore.get(plain, key).bytes()).hexdigest()

    fetched = interleave(
        lambda: model.mb_per_s(lambda: sum(len(piece) for _, piece in blobs.open_payload(files, 0))),
        lambda: model.mb_per_s(lambda: sum(get())),
        runs=runs,
    )
    verified = interleave(
        lambda: model.mb_per_s(lambda: verify(blobs, files)),
        lambda: model.mb_per_s(get_and_hash),
        runs=runs,
    )
    return {"publish": published, "fetch": fetched, "verify": verified}


def main(runs: int, megabytes: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    server = S3Server()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-publish-") as name:
            scratch = Path(name)
            model = Model(scratch / "model", megabytes * 1_000_000)
            database = Database(f"sqlite:///{scratch / 'store.db'}")
            database.upgrade(Path(migrations.__file__).parent)
            folder = measure_folder(Stored(files_dir=scratch).open(), database, model, scratch, runs)
            with database.write() as connection:  # so that both begin with an empty registry
                connection.execute(sa.text("DELETE FROM artifact_events"))
                connection.execute(sa.text("DELETE FROM artifacts"))
            server.start()
            url = server.new_url()
            own = {name: value for name, value in server.options.items() if name != "allow_http"}
            plain = S3Store.from_url(url, config=own, client_options={"allow_http": True})  # type: ignore[arg-type]
            stored = Stored(files_dir=scratch, url=url, options=server.options)
            bucket = measure_bucket(stored.open(), database, model, plain, runs)
            database.close()
    finally:
        server.stop()
    named = {**{f"folder_{name}": pairs for name, pairs in folder.items()}}
    named |= {f"bucket_{name}": pairs for name, pairs in bucket.items()}
    first = named.pop("folder_publish")
    beside = {f"{name}_ratio": round(median_ratio(pairs), 3) for name, pairs in named.items()}
    rates = {
        f"{name}_mb_per_s": round(sorted(ours for ours, _ in pairs)[len(pairs) // 2]) for name, pairs in named.items()
    }
    report("publish", first, unit="MB/s", model_mb=megabytes, **beside, **rates)


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*(arguments + [7, 100][len(arguments) :]))
