"""Collection, tiers and the periodic verification over the store itself: races, cuts, clocks and several servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import cognate_server.migrations
from cognate_server.models import find_model
from cognateforge.exceptions import ArtifactInUseError
from training_common.artifacts.blobs import BlobStore, StoreAwayError
from training_common.artifacts.collect import ArtifactCollector
from training_common.artifacts.keeping import ARCHIVE, STANDARD, ArtifactKeeper, LiveFiles
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import Damage, Scrubber
from training_common.settings import ArtifactSettings
from training_common.store import tables as t
from training_common.store.database import Database, Turn, now_us

FAMILY = "cognate-25m"
DAY_US = 86_400 * 10**6


class NoHolds:
    """Nothing depends on anything."""

    def reasons(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, str]:
        return {}

    def counts(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> Mapping[int, int]:
        return {}

    def collected(self, connection: sa.Connection, rows: Sequence[ArtifactRow]) -> None:
        return


def open_registry(folder: Path, store_url: str) -> ArtifactRegistry:
    return ArtifactRegistry(Database(store_url), BlobStore(folder / "artifacts", folder / "archive"))


def keeper_of(registry: ArtifactRegistry, **settings: object) -> ArtifactKeeper:
    return ArtifactKeeper(
        registry, ArtifactSettings.model_validate({"keep_newest": 1, **settings}), NoHolds(), find_model
    )


@pytest.fixture
def registry(tmp_path: Path, store_url: str) -> Iterator[ArtifactRegistry]:
    found = open_registry(tmp_path, store_url)
    found.database.upgrade(Path(cognate_server.migrations.__file__).parent)
    yield found
    found.database.close()


def publish(registry: ArtifactRegistry, folder: Path, *contents: bytes) -> ArtifactRow:
    """Publish a version with so many files."""
    files = []
    for number, content in enumerate(contents):
        (folder / "source").write_bytes(content)
        files.append(registry.blobs.put(folder / "source", f"part-{number}.bin"))
    with registry.database.write() as connection:
        return registry.publish(connection, family=FAMILY, state="READY", job="jobs/x", files=files, body={})


def age(folder: Path) -> None:
    """Make stored files look two days old."""
    then = time.time() - 2 * 86_400
    for path in [*(folder / "artifacts").rglob("*"), *(folder / "archive").rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # it was staged, or swept, just now
            os.utime(path, (then, then))


def stored(registry: ArtifactRegistry, folder: Path) -> dict[bytes, bool]:
    """Return the bytes of every blob, and whether it is archived."""
    found = {}
    for blob in registry.blobs.blobs():
        hexadecimal = blob.digest.removeprefix("sha256:")
        place = folder / ("archive" if blob.archived else "artifacts") / "blobs" / "sha256"
        found[(place / hexadecimal[:2] / hexadecimal).read_bytes()] = blob.archived
    return found


def payload(registry: ArtifactRegistry, row: ArtifactRow) -> bytes:
    return b"".join(piece for _, piece in registry.blobs.open_payload(row.files, 0))


def collect(collector: ArtifactCollector, registry: ArtifactRegistry, *rows: ArtifactRow) -> list[ArtifactRow]:
    with registry.database.write() as connection:
        return collector.mark(connection, [(row, "asked for") for row in rows])


def live(registry: ArtifactRegistry) -> Collection[int]:
    return {row.version for row in registry.page(limit=100)}


# --- collection


def test_bytes_that_are_published_while_they_are_swept_stay(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """The sweep has listed them as nobody's; a version that names them by the time of their turn keeps them."""
    (tmp_path / "source").write_bytes(b"orphan")
    file = registry.blobs.put(tmp_path / "source", "part.bin")
    age(tmp_path)
    collector = ArtifactCollector(keeper_of(registry), clock=now_us)
    listed, in_turn = collector._registry.blobs.blobs, registry.database.in_turn
    assert [file.digest] == [blob.digest for blob in listed()]

    def late(connection: sa.Connection, turn: Turn) -> None:
        registry.database.in_turn = in_turn  # type: ignore[method-assign]
        in_turn(connection, turn)
        # As whoever had the turn before.
        registry.publish(connection, family=FAMILY, state="READY", job="jobs/x", files=[file], body={})

    registry.database.in_turn = late  # type: ignore[method-assign]
    collector.sweep()
    assert b"orphan" == payload(registry, find_model(registry, FAMILY))


def test_publishers_and_collectors_at_once_lose_nothing(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Each publication brings bytes of its own and shared ones; what is live afterwards is whole."""
    ended, errors = threading.Event(), []

    def collecting() -> None:
        own = open_registry(tmp_path, registry.database.url)
        collector = ArtifactCollector(keeper_of(own), clock=now_us)
        try:
            while not ended.is_set():
                age(tmp_path)
                rows = own.page(limit=100)
                for row in rows[3:]:
                    collect(collector, own, row)
                collector.sweep()
        except Exception as error:
            errors.append(error)
        finally:
            own.database.close()

    def publishing(number: int) -> None:
        """Publish as workers do: what was stored is looked for again in the turn, and stored anew where it went."""
        contents = (b"shared", b"own %d" % number)
        while True:
            files = []
            for name, content in zip(("a.bin", "b.bin"), contents, strict=True):
                (tmp_path / "source").write_bytes(content)
                files.append(registry.blobs.put(tmp_path / "source", name))
            with registry.database.write() as connection:
                registry.database.in_turn(connection, Turn.PUBLISH)
                if all(registry.blobs.has(file.digest) for file in files):
                    registry.publish(connection, family=FAMILY, state="READY", job="jobs/x", files=files, body={})
                    return

    publishing(0)
    thread = threading.Thread(target=collecting)
    thread.start()
    for number in range(1, 25):
        publishing(number)
    ended.set()
    thread.join()
    assert [] == errors
    for row in registry.page(limit=100):
        assert payload(registry, row).startswith(b"sharedown ")
    with registry.database.read() as connection:
        versions = list(connection.execute(sa.select(t.artifacts.c.version).order_by(t.artifacts.c.id)).scalars())
    assert list(range(1, 26)) == versions, "no number twice"


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from training_common.artifacts import collect, keeping
from tests.store.test_keeping import ARCHIVE, find_model, keeper_of, now_us, open_registry

folder, moment = Path(sys.argv[1]), sys.argv[2]
registry = open_registry(folder, sys.argv[3])
keeper = keeper_of(registry)
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
if moment in ("mark", "marked", "deleted"):
    collector = collect.ArtifactCollector(keeper, clock=now_us)
    first = find_model(registry, "cognate-25m@1")
    with registry.database.write() as connection:
        collector.mark(connection, [(first, "asked for")])
        if moment == "mark":
            die()
    if moment == "marked":
        die()
    delete, registry.blobs.delete = registry.blobs.delete, lambda digest: (delete(digest), die())
    collector.sweep()
else:
    with registry.database.write() as connection:
        keeper.set_tier(connection, "cognate-25m@1", ARCHIVE)
    if moment == "copying":  # before the copy has its name
        os.replace = os.rename = os.link = die
    if moment == "copied":
        Path.unlink = os.unlink = os.remove = die
    if moment == "tier":
        die()
    keeper.settle()
"""


@pytest.mark.parametrize("moment", ["mark", "marked", "deleted", "tier", "copying", "copied"])
def test_a_kill_at_any_moment_leaves_what_can_be_gone_on_with(
    registry: ArtifactRegistry, tmp_path: Path, moment: str
) -> None:
    """What is live can be read whole, before and after the next pass, and that pass finishes what was begun."""
    first = publish(registry, tmp_path, b"shared", b"first", b"more of it")
    second = publish(registry, tmp_path, b"shared", b"second")
    age(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, registry.database.url]
    died = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert -signal.SIGKILL == died.returncode, died.stderr.decode()
    for _ in range(2):
        assert b"sharedsecond" == payload(registry, second)
        if moment in ("mark", "tier", "copying", "copied"):
            assert b"sharedfirstmore of it" == payload(registry, first)
        collector = ArtifactCollector(keeper := keeper_of(registry), clock=now_us)
        collector.sweep()
        keeper.settle()
    here = {b"shared": False, b"second": False}
    own = {b"first", b"more of it"}
    if moment == "mark":
        assert ({1, 2}, here | dict.fromkeys(own, False)) == (live(registry), stored(registry, tmp_path))
    elif moment in ("marked", "deleted"):
        assert ({2}, here) == (live(registry), stored(registry, tmp_path))
    else:
        assert ({1, 2}, here | dict.fromkeys(own, True)) == (live(registry), stored(registry, tmp_path))


def test_a_clock_in_doubt_collects_nothing(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Nothing has an age then: neither versions nor bytes go."""
    rows = [publish(registry, tmp_path, b"%d" % n) for n in range(3)]
    (tmp_path / "source").write_bytes(b"orphan")
    registry.blobs.put(tmp_path / "source", "part.bin")
    age(tmp_path)
    with registry.database.write() as connection:
        connection.execute(sa.update(t.artifacts).values(create_us=now_us() - 9 * DAY_US))
    keeper = keeper_of(registry, collect_after_days=1)
    ArtifactCollector(keeper, clock=lambda: None).apply()
    assert ({1, 2, 3}, 4) == (live(registry), len(stored(registry, tmp_path)))
    ArtifactCollector(keeper, clock=now_us).apply()
    assert ({3}, {rows[2].files[0].digest}) == (live(registry), {blob.digest for blob in registry.blobs.blobs()})


def test_what_came_to_depend_since_is_not_collected(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """A version that was chosen, and pinned before its turn came, stays."""
    first, second, _ = (publish(registry, tmp_path, b"%d" % n) for n in range(3))
    keeper = keeper_of(registry)
    with registry.database.write() as connection:
        keeper.set_pin(connection, first.name, pinned=True)
    gone = collect(ArtifactCollector(keeper, clock=now_us), registry, first, second)
    assert ([second.name], {1, 3}) == ([row.name for row in gone], live(registry))


# --- tiers


def test_shared_bytes_are_archived_with_the_last_of_their_versions(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """And come back with the first; a publication that finds them in the archive brings them back too."""
    publish(registry, tmp_path, b"shared", b"first")
    publish(registry, tmp_path, b"shared", b"second")
    publish(registry, tmp_path, b"third")
    keeper = keeper_of(registry)

    def move(name: str, tier: str) -> None:
        with registry.database.write() as connection:
            keeper.set_tier(connection, name, tier)
        keeper.settle()

    move("cognate-25m@1", ARCHIVE)
    assert {b"shared": False, b"first": True, b"second": False, b"third": False} == stored(registry, tmp_path)
    move("cognate-25m@2", ARCHIVE)
    assert {b"shared": True, b"first": True, b"second": True, b"third": False} == stored(registry, tmp_path)
    with pytest.raises(ArtifactInUseError):
        move("cognate-25m@3", ARCHIVE)
    move("cognate-25m@1", STANDARD)
    assert {b"shared": False, b"first": False, b"second": True, b"third": False} == stored(registry, tmp_path)
    move("cognate-25m@1", ARCHIVE)
    fourth = publish(registry, tmp_path, b"shared")
    assert b"shared" == payload(registry, fourth)
    keeper.settle()
    assert not stored(registry, tmp_path)[b"shared"]


def test_old_versions_are_archived(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Those on which nothing depends."""
    for number in range(3):
        publish(registry, tmp_path, b"%d" % number)
    keeper = keeper_of(registry)
    assert 0 == keeper.archive_old(now_us() - DAY_US)
    assert 2 == keeper.archive_old(now_us() + 1)
    keeper.settle()
    assert {b"0": True, b"1": True, b"2": False} == stored(registry, tmp_path)


# --- the periodic verification


def test_of_several_servers_one_verifies(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """While one is at it, another one leaves it to that; whoever comes later finds nothing due."""
    other = open_registry(tmp_path, registry.database.url)
    if registry.database.url.startswith("sqlite"):
        other = registry  # a store of this kind has one server
    publish(registry, tmp_path, b"x")
    overdue(registry)
    settings = ArtifactSettings(scrub_interval_hours=1)
    with other.database.alone(Turn.SCRUB) as mine:
        assert mine
        assert 0 == Scrubber(registry, settings).scrub()
    assert 1 == Scrubber(registry, settings).scrub()
    assert 0 == Scrubber(other, settings).scrub()
    if other is not registry:
        other.database.close()


def overdue(registry: ArtifactRegistry) -> None:
    with registry.database.write() as connection:
        past = now_us() - 2 * 3600 * 10**6
        connection.execute(sa.update(t.artifacts).values(create_us=past, verify_us=None))


def test_what_is_longest_unverified_comes_first(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """A damaged one stays due, and is read once in each interval all the same."""
    rows = [publish(registry, tmp_path, b"%d" % n) for n in range(3)]
    overdue(registry)
    with registry.database.write() as connection:
        connection.execute(sa.update(t.artifacts).filter_by(id=rows[0].id).values(verify_us=now_us()))
        earlier = now_us() - 3 * 3600 * 10**6
        connection.execute(sa.update(t.artifacts).filter_by(id=rows[2].id).values(create_us=earlier))
    registry.blobs.delete(rows[2].files[0].digest)
    seen: list[str] = []
    scrubber = Scrubber(registry, ArtifactSettings(scrub_interval_hours=1))
    verify = scrubber.verify

    def noted(row: ArtifactRow, *args: Any, **options: Any) -> list[Damage]:
        seen.append(row.name)
        return verify(row, *args, **options)

    scrubber.verify = noted  # type: ignore[method-assign]
    assert 2 == scrubber.scrub()
    assert [rows[2].name, rows[1].name] == seen
    assert (0, 1) == (scrubber.scrub(), scrubber.damaged)
    assert 0 == Scrubber(registry, ArtifactSettings(scrub_interval_hours=0)).scrub()


def test_reading_is_bounded(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Bytes over the pauses between them are no more than the setting allows."""
    row = publish(registry, tmp_path, b"x" * 5000, b"y" * 3000)
    waits: list[float] = []

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0.0)
            return False

    scrubber = Scrubber(registry, ArtifactSettings())
    assert [] == scrubber.verify(row, Stop(), bytes_per_s=1000)
    assert sum(waits) == pytest.approx((8000 + len(row.manifest)) / 1000)
    assert (1, 3, 8000 + len(row.manifest)) == (
        scrubber.verified.versions,
        scrubber.verified.files,
        scrubber.verified.size_bytes,
    )


def test_a_verification_that_is_stopped_tells_nothing(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """A version that was read in part is neither whole nor damaged."""
    row = publish(registry, tmp_path, b"x", b"y")
    stop = threading.Event()
    stop.set()
    Scrubber(registry, ArtifactSettings()).verify(row, stop)
    assert row == registry.find(FAMILY, 1)


def test_a_store_that_is_away_damages_nothing(
    registry: ArtifactRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is read and is not what was published is damage."""
    row = publish(registry, tmp_path, b"x")

    def away(*_: object) -> None:
        raise ConnectionError("the store does not answer")

    monkeypatch.setattr(registry.blobs, "check", away)
    with pytest.raises(ConnectionError):
        Scrubber(registry, ArtifactSettings()).verify(row, threading.Event())
    assert row == registry.find(FAMILY, 1)


def test_a_folder_that_is_not_mounted_damages_nothing_whatever_the_archive_has(
    registry: ArtifactRegistry, tmp_path: Path
) -> None:
    """Nothing here tells of this server's view. As soon as there is something, what is missing is damage."""
    row = publish(registry, tmp_path, b"first")
    publish(registry, tmp_path, b"second")
    keeper_of(registry).archive_old(now_us() + 1)
    keeper_of(registry).settle()
    (tmp_path / "artifacts").rename(tmp_path / "away")
    scrubber = Scrubber(registry, ArtifactSettings())
    with pytest.raises(StoreAwayError, match="mount shared_dir"):
        scrubber.verify(row, threading.Event())
    found = registry.find(FAMILY, 1)
    assert found is not None
    assert "" == found.damage
    (tmp_path / "away").rename(tmp_path / "artifacts")
    registry.blobs.delete_manifest(FAMILY, 1)
    assert ["MANIFEST"] == [damage.problem for damage in scrubber.verify(row, threading.Event())]


def test_live_files_count_by_version(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """Bytes that two versions name are free when both are gone, and not before."""
    first = publish(registry, tmp_path, b"shared", b"shared", b"first")
    second = publish(registry, tmp_path, b"shared")
    files = LiveFiles(registry)
    assert {first.files[2].digest} == files.without([first])
    assert {first.files[0].digest, first.files[2].digest} == files.without([first, second])


def test_damaged_bytes_are_not_archived(registry: ArtifactRegistry, tmp_path: Path) -> None:
    """The move would lose what might yet be mended. It keeps no other version from the archive."""
    row = publish(registry, tmp_path, b"first")
    publish(registry, tmp_path, b"second")
    publish(registry, tmp_path, b"third")
    hexadecimal = row.files[0].digest.removeprefix("sha256:")
    (tmp_path / "artifacts" / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal).write_bytes(b"fi5st")
    keeper = keeper_of(registry)
    assert 1 == keeper.archive_old(now_us() + 1)
    keeper.settle()
    assert {b"fi5st": False, b"second": True, b"third": False} == stored(registry, tmp_path)
    with registry.database.write() as connection:
        connection.execute(sa.update(t.artifacts).filter_by(id=row.id).values(tier=ARCHIVE))
    keeper.settle()
    assert not stored(registry, tmp_path)[b"fi5st"], "as if it was damaged after its tier was settled"
