"""FetchModel of a real model from a real service over bad connections, crashes and full disks.

Whatever happens, a fetch ends with the published digest or with a clear error, and never leaves a wrong artifact.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from cognate_server import migrations
from cognateforge.client import CognateClient, FetchedArtifact, deadline_within
from cognateforge.exceptions import ForgeError
from tests.benchmarks.cognate_process import cognate_process
from tests.support.outbox import open_database
from tests.support.proxy import FaultyProxy, flip_bits
from tests.support.published import publish_model
from training_common.artifacts.blobs import CHUNK_BYTES
from training_common.artifacts.registry import ArtifactRow

PAYLOAD = random.Random(1).randbytes(3_000_000)  # noqa: S311
# What a stream sends besides the payload: HTTP/2's settings and frames, headers, the manifest, the look-up before.
OVERHEAD_BYTES = 64 << 10
# A file's largest size, in the midst of a chunk.
LIMIT_BYTES = 1_200_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a service with one model."""
    folder = tmp_path_factory.mktemp("cognate")
    database = open_database(folder)
    database.upgrade(Path(migrations.__file__).parent)
    database.close()
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ArtifactRow:
    """The model, published by the registry."""
    return publish_model(folder, payload=PAYLOAD)


@pytest.fixture(scope="module")
def port(folder: Path, model: ArtifactRow) -> Iterator[int]:
    """The port of the service, in a process of its own."""
    with cognate_process(folder) as address:
        yield int(address.rpartition(":")[2])


def assert_whole(got: FetchedArtifact, model: ArtifactRow) -> None:
    """The folder holds what was published and nothing else lies beside it."""
    assert model.digest == got.digest
    assert PAYLOAD == (got.path / "model.safetensors").read_bytes()
    assert model.manifest == (got.path / "manifest.json").read_bytes()
    assert [] == list(got.path.parent.glob(".partial-*"))


@pytest.mark.slow
def test_random_cuts_cost_no_more_than_the_missing_bytes_and_a_chunk(
    port: int, model: ArtifactRow, tmp_path: Path
) -> None:
    """60 fetches over connections that are reset at random bytes: each payload byte is taken once, digests hold."""
    cuts = 0
    for seed in range(60):
        pick = random.Random(seed)  # noqa: S311
        after = [pick.randint(1_000, 1_500_000) for _ in range(pick.randint(1, 6))]
        proxy = FaultyProxy(port, after_bytes=after)
        had = {0: 0}  # the newest offset that was reached over each connection

        def progress(done: int, total: int, proxy: FaultyProxy = proxy, had: dict[int, int] = had) -> None:
            had[proxy.cut] = done

        try:
            with CognateClient(proxy.address) as client:
                got = client.fetch_model(model.name, tmp_path / str(seed), progress, give_up_after_s=20)
        finally:
            proxy.close()
        assert_whole(got, model)
        assert len(PAYLOAD) == got.bytes_received, seed
        made = max(had)
        before = max(done for cut, done in had.items() if cut < made) if made else 0
        # What the last connection brought. The ones before it were reset after so many bytes as was asked for.
        resumed_bytes = proxy.bytes_from_server - sum(after[:made])
        assert resumed_bytes <= len(PAYLOAD) - before + CHUNK_BYTES + OVERHEAD_BYTES, seed
        cuts += made
        shutil.rmtree(got.path)
    print(f"{cuts} cuts")
    assert cuts > 60


@pytest.mark.slow
def test_flipped_bits_end_in_the_right_digest_or_a_clear_error(
    port: int, model: ArtifactRow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 fetches with bits that flip on the way, in payload, frames and headers, and resets besides."""
    # A flipped length can leave a stream waiting for bytes that never come: its life ends that.
    monkeypatch.setattr("cognateforge.client.fetch.STREAM_LIFE_S", 1.0)
    ends: Counter[str] = Counter()
    for seed in range(60):
        pick = random.Random(seed)  # noqa: S311
        damage = flip_bits(seed, one_in_bytes=pick.choice((100_000, 1_000_000, 10_000_000)))
        after = [pick.randint(1_000, 3_000_000) for _ in range(pick.randint(0, 3))]
        proxy = FaultyProxy(port, after_bytes=after, damage=damage)
        destination, whole = tmp_path / str(seed) / "model", False
        try:
            with CognateClient(proxy.address, timeout_s=1.0) as client, deadline_within(6.0):
                got = client.fetch_model(model.name, destination, give_up_after_s=3)
            assert_whole(got, model)
            whole = True
            ends["whole"] += 1
        except ForgeError as error:
            ends[type(error).__name__] += 1
        finally:
            proxy.close()
        assert destination.exists() == whole, f"seed {seed}"
    print(dict(ends))
    assert ends["whole"] > 0
    assert ends["ArtifactCorruptError"] > 0


@pytest.mark.slow
def test_a_service_that_is_killed_costs_no_byte_twice(folder: Path, model: ArtifactRow, tmp_path: Path) -> None:
    """kill -9 in the midst of a fetch, and a new process on the same port: the fetch goes on at its offset."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    data_dir = tmp_path / "data"
    shutil.copytree(folder, data_dir)
    kills = [500_000, 1_500_000, 2_500_000]
    with ExitStack() as stack:

        def start() -> None:
            (data_dir / "address").unlink(missing_ok=True)
            stack.enter_context(cognate_process(data_dir, COGNATE_SERVER_ADDRESS=address))

        def progress(done: int, total: int) -> None:
            if kills and done >= kills[0]:
                kills.pop(0)
                for process in psutil.Process().children():
                    # A child of another test may have ended and not been waited for: it has no environment.
                    with suppress(psutil.Error, ProcessLookupError):
                        if str(data_dir) in process.environ().get("COGNATE_SERVER_DATA_DIR", ""):
                            process.send_signal(signal.SIGKILL)
                            process.wait(10)
                start()

        start()
        with CognateClient(address) as client:
            got = client.fetch_model(model.name, tmp_path / "model", progress)
    assert_whole(got, model)
    assert ([], len(PAYLOAD)) == (kills, got.bytes_received)


FULL = """
import json, resource, signal, sys
from pathlib import Path
from cognateforge.client import CognateClient
from cognateforge.exceptions import LocalStorageError

address, name, folder, how = sys.argv[1:]
folder = Path(folder)
filler = folder / "filler"
had = 0

def fill(done, total):
    global had
    had = done
    if how == "disk" and not filler.exists():
        try:
            with filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass

if how == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MOST, resource.RLIM_INFINITY))
with CognateClient(address) as client:
    try:
        client.fetch_model(name, folder / "model", fill)
        raise SystemExit("the disk was not full")
    except LocalStorageError as error:
        message = error.message
    left = (folder / "model").exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    filler.unlink(missing_ok=True)
    got = client.fetch_model(name, folder / "model")
bytes_there = (got.path / "model.safetensors").read_bytes()
print(json.dumps([message, left, had, got.bytes_received, got.digest, len(bytes_there)]))
"""


@pytest.mark.parametrize(("how", "told"), [("limit", "File too large"), ("disk", "No space left on device; free some")])
def test_a_full_disk_is_a_clear_error_and_the_next_fetch_goes_on(
    port: int, model: ArtifactRow, tmp_path: Path, how: str, told: str
) -> None:
    """A limit of the process, and a real file system that fills up: what was written is not fetched again."""
    command = [
        sys.executable,
        "-c",
        FULL.replace("MOST", str(LIMIT_BYTES)),
        f"127.0.0.1:{port}",
        model.name,
        str(tmp_path),
        how,
    ]
    if how == "disk":
        mount = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=4m none "$0" && exec "$@"', str(tmp_path)]
        if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
            pytest.skip("this machine lets nobody mount a small file system of their own")
        command = [*mount, *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    message, left, had, received, digest, size = json.loads(done.stdout)
    assert told in message
    assert (False, model.digest, len(PAYLOAD)) == (left, digest, size)
    # The write that met the end was a short one: its part lies there too, and counts as no more than that.
    assert 0 < received <= len(PAYLOAD) - had
    assert how == "disk" or received == len(PAYLOAD) - LIMIT_BYTES
