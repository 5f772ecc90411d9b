"""Backups: complete or not there, what is there already not copied again, everything held against its digest."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from cognateforge.exceptions import ArtifactCorruptError, NotFoundError, PreconditionError
from tests.backup.stores import FIRST, contents, fill, opened, publish, service_of, settings_of
from training_common.artifacts.blobs import BlobStore
from training_common.backup import create
from training_common.backup.create import back_up
from training_common.backup.destination import FolderDestination, object_digits, object_key
from training_common.backup.locks import BACKUP, PRUNE, at_work
from training_common.backup.manifest import backup_ids, newest_backup, open_backup
from training_common.backup.prune import prune
from training_common.backup.restore import restore
from training_common.backup.snapshot import take_snapshot
from training_common.backup.verify import verify
from training_common.settings import ServiceSettings
from training_common.store import tables as t

COGNATE = service_of("cognate")


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    """Settings of a Cognate service with two published versions."""
    settings = settings_of("cognate", tmp_path / "service")
    with opened(settings) as registry:
        publish(registry, tmp_path / "made", b"first")
        publish(registry, tmp_path / "made", b"second" * 1000)
    return settings


@pytest.fixture
def place(tmp_path: Path) -> FolderDestination:
    return FolderDestination(tmp_path / "backups")


def restored(place: FolderDestination, folder: Path, name: str = "") -> ServiceSettings:
    """Restore Cognate's newest backup, or the named one, below a folder."""
    settings = settings_of("cognate", folder)
    backup = open_backup(place, name) if name else newest_backup(place, "cognate")
    restore(COGNATE, settings, place, backup)
    return settings


def names(settings: ServiceSettings) -> dict[str, str]:
    """Return the digest of every version, all of whose bytes are read."""
    with opened(settings) as registry:
        rows = registry.page(limit=100)
        for row in rows:
            assert row.size_bytes == sum(len(piece) for _, piece in registry.blobs.open_payload(row.files, 0))
        return {row.name: row.digest for row in rows}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("service", ["cognate", "agent"])
def test_every_row_of_every_table_comes_back(service: str, seed: int, tmp_path: Path) -> None:
    """NULL, infinities, -0.0, 64 bits, bytes, any JSON and any text are what they were, from SQLite to SQLite."""
    settings, place = settings_of(service, tmp_path / "a"), FolderDestination(tmp_path / "backups")
    with opened(settings) as registry, registry.database.write() as connection:
        fill(service, connection, seed=seed)
    back_up(service_of(service), settings, place)
    other = settings_of(service, tmp_path / "b")
    restore(service_of(service), other, place, newest_backup(place, service))
    expected = contents(service, settings.database_url)
    assert all(len(rows) >= 12 for rows in expected.values())
    assert expected == contents(service, other.database_url)


@pytest.mark.parametrize("service", ["cognate", "agent"])
@pytest.mark.parametrize("direction", ["to PostgreSQL", "to SQLite"])
def test_a_backup_of_one_database_restores_into_the_other(
    service: str, direction: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The rows are the same, the order of texts included, and what is added afterwards gets keys of its own."""
    postgres = request.getfixturevalue("postgres")
    urls = ["", postgres.new_database()] if direction == "to PostgreSQL" else [postgres.new_database(), ""]
    settings, other = (settings_of(service, tmp_path / name, url) for name, url in zip(("a", "b"), urls, strict=True))
    place = FolderDestination(tmp_path / "backups")
    with opened(settings) as registry:
        version = publish(registry, tmp_path / "made", b"weights", family="model")
        with registry.database.write() as connection:
            fill(service, connection, seed=7)
    back_up(service_of(service), settings, place)
    restore(service_of(service), other, place, newest_backup(place, service))
    assert contents(service, settings.database_url) == contents(service, other.database_url)
    with opened(other) as registry:
        assert version == registry.find("model", 1)
        assert FIRST + 12 == publish(registry, tmp_path / "made", b"next", family="model").id
    again = back_up(service_of(service), other, place).backup.manifest
    before = open_backup(place, backup_ids(place)[0]).manifest
    unchanged = {table.name: table.rows.digest for table in before.tables if not table.name.startswith("artifact")}
    assert unchanged.items() <= {table.name: table.rows.digest for table in again.tables}.items()


def test_a_number_that_sqlite_lacks_is_refused(tmp_path: Path, postgres: object) -> None:
    """NaN would become NULL: the error names the column and the remedy, and nothing is served."""
    settings = settings_of("cognate", tmp_path / "a", postgres.new_database())  # type: ignore[attr-defined]
    place = FolderDestination(tmp_path / "backups")
    with opened(settings) as registry, registry.database.write() as connection:
        fill("cognate", connection, seed=1, rows=1)
        connection.execute(sa.update(t.checkpoints).values(score=float("nan")))
    back_up(COGNATE, settings, place)
    with pytest.raises(PreconditionError, match=r"checkpoints: column score of a row is NaN.*PostgreSQL"):
        restored(place, tmp_path / "b")
    other = settings_of("cognate", tmp_path / "c", postgres.new_database())  # type: ignore[attr-defined]
    restore(COGNATE, other, place, newest_backup(place, "cognate"))
    assert contents("cognate", settings.database_url) == contents("cognate", other.database_url)


def test_the_second_backup_copies_only_what_is_new(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """Blobs are there by digest, and so are the rows of tables that nobody has touched."""
    first = back_up(COGNATE, settings, place)
    unchanged = back_up(COGNATE, settings, place)
    assert (first.copied.objects, unchanged.copied.objects, unchanged.copied.size_bytes) == (7, 0, 0)
    with opened(settings) as registry:
        publish(registry, tmp_path / "made", b"third" * 1000)
    second = back_up(COGNATE, settings, place)
    # The new weights, rows of artifacts and of the outbox, and the list of files.
    assert (4, 3) == (second.copied.objects, second.backup.manifest.versions)
    assert 3 == len(backup_ids(place))
    assert 2 == len(names(restored(place, tmp_path / "b", unchanged.backup.id)))
    assert names(settings) == names(restored(place, tmp_path / "c"))


def test_rows_that_change_leave_most_segments_as_they_are(settings: ServiceSettings, place: FolderDestination) -> None:
    """Of a long table only the segments with added, changed or removed rows are copied again."""
    with opened(settings) as registry:
        with registry.database.write() as connection:
            fill("cognate", connection, seed=1, rows=1)
            row = dict(connection.execute(sa.select(t.events)).mappings().one())
            more = [{**row, "id": 1000 + n, "sequence": 1000 + n} for n in range(40_000)]
            connection.execute(sa.insert(t.events), more)
        events = back_up(COGNATE, settings, place).backup.manifest.table("events").rows
        assert (40_001, True) == (events.lines, len(events.segments) >= 5)
        with registry.database.write() as connection:
            connection.execute(sa.delete(t.events).where(t.events.c.id.between(1011, 1020)))
            connection.execute(sa.update(t.events).filter_by(id=40_000).values(kind="changed"))
    after = back_up(COGNATE, settings, place)
    assert len(events.segments) - 2 <= len({*events.segments} & {*after.backup.manifest.table("events").rows.segments})
    assert after.copied.objects <= 3


def test_only_the_owner_can_read_a_backup(settings: ServiceSettings, place: FolderDestination, tmp_path: Path) -> None:
    """Files are 0600 and folders 0700: rows tell who did what."""
    back_up(COGNATE, settings, place)
    for path in [tmp_path / "backups", *(tmp_path / "backups").rglob("*")]:
        assert (0o700 if path.is_dir() else 0o600) == stat.S_IMODE(path.stat().st_mode), path


def test_nothing_of_the_settings_is_in_a_backup(tmp_path: Path, place: FolderDestination) -> None:
    """Neither keys nor passwords: not in a manifest either."""
    settings = settings_of("cognate", tmp_path / "service", consul={"token": "very-secret"})
    with opened(settings):
        pass
    back_up(COGNATE, settings, place)
    held = b"".join(path.read_bytes() for path in (tmp_path / "backups").rglob("*") if path.is_file())
    assert b"very-secret" not in held


def test_damage_is_named_object_by_object(settings: ServiceSettings, place: FolderDestination, tmp_path: Path) -> None:
    """A flipped bit, a lost object and a lost segment are each told with their file, by one look at everything."""
    backup = back_up(COGNATE, settings, place).backup
    assert (0, []) == ((whole := verify(place, backup)).damaged, whole.problems)
    with opened(settings) as registry:
        [first, second] = [row.files[0].digest for row in registry.page(limit=9)]
    root = tmp_path / "backups"
    flipped = root / object_key(first)
    flipped.write_bytes(b"S" + flipped.read_bytes()[1:])
    (root / object_key(second)).unlink()
    segment = backup.manifest.table("artifact_events").rows.segments[0].digest
    (root / object_key(segment)).write_bytes(b"short")
    found = verify(place, backup)
    assert 3 == found.damaged
    for digest, told in ((first, "cognate-25m@2: weights"), (second, "cognate-25m@1: weights"), (segment, "table")):
        assert any(told in problem and object_key(digest) in problem for problem in found.problems), found.problems


def test_a_damaged_manifest_is_no_backup(settings: ServiceSettings, place: FolderDestination, tmp_path: Path) -> None:
    """Its id holds its digest. An id that is none, or that is not there, is told as such."""
    backup = back_up(COGNATE, settings, place).backup
    path = tmp_path / "backups" / "backups" / f"{backup.id}.json"
    path.write_bytes(path.read_bytes().replace(b'"revision":"', b'"revision":"9'))
    with pytest.raises(ArtifactCorruptError, match="does not have the digest in its name"):
        newest_backup(place, "cognate")
    with pytest.raises(NotFoundError, match="no backup of the agent service"):
        newest_backup(place, "agent")
    for name in ("../secret", backup.id.replace("cognate", "agent")):
        with pytest.raises(NotFoundError, match="there is no backup"):
            open_backup(place, name)


def test_a_version_that_is_damaged_where_it_is_stored_does_not_hinder_the_others(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """The backup tells what it lacks, a restore marks the version, and what an earlier backup has is no loss."""
    with opened(settings) as registry:
        [_, row] = registry.page(limit=9)
    stored = settings.files_dir / "artifacts" / object_key(row.files[0].digest).replace("objects", "blobs")
    whole = stored.read_bytes()
    stored.write_bytes(b"S" + whole[1:])
    made = back_up(COGNATE, settings, place).backup
    assert ([row.files[0].digest], False) == ([one.digest for one in made.manifest.missing], made.manifest.whole)
    other = settings_of("cognate", tmp_path / "b")
    assert ("cognate-25m@1",) == restore(COGNATE, other, place, made).settled.damaged
    with opened(other) as registry:
        [second, first] = registry.page(limit=9)
        assert ("", True) == (second.damage, first.damage.startswith("weights: not in backup cognate-"))
        assert list(registry.blobs.open_payload(second.files, 0))
    stored.write_bytes(whole)
    back_up(COGNATE, settings, place)
    stored.unlink()
    assert back_up(COGNATE, settings, place).backup.manifest.whole
    assert names(restored(place, tmp_path / "c"))


def test_a_version_that_is_collected_meanwhile_is_not_in_the_backup(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row says so before its bytes go: another snapshot is taken, and the backup is whole."""
    with opened(settings) as registry:
        [second, first] = registry.page(limit=9)
        read = BlobStore.open_payload

        def collects_first(self, files, offset_bytes):  # type: ignore[no-untyped-def]
            if files[0].digest == first.files[0].digest:
                with registry.database.write() as connection:
                    connection.execute(sa.update(t.artifacts).filter_by(id=first.id).values(collect_us=1))
                (settings.files_dir / "artifacts" / object_key(files[0].digest).replace("objects", "blobs")).unlink()
            return read(self, files, offset_bytes)

        monkeypatch.setattr(BlobStore, "open_payload", collects_first)
        manifest = back_up(COGNATE, settings, place).backup.manifest
    monkeypatch.undo()
    assert (1, ()) == (manifest.versions, manifest.missing)
    assert {second.name: second.digest} == names(restored(place, tmp_path / "b"))


def test_there_is_no_backup_of_what_is_no_store(tmp_path: Path, place: FolderDestination) -> None:
    """A mistyped path neither makes a database nor an empty backup."""
    with pytest.raises(PreconditionError, match=r"there is no database .*store\.db: correct --settings"):
        back_up(COGNATE, settings_of("cognate", tmp_path / "mistyped"), place)
    assert not (tmp_path / "mistyped" / "store.db").exists()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "store.db").touch()
    with pytest.raises(PreconditionError, match="holds no store of a service"):
        back_up(COGNATE, settings_of("cognate", tmp_path / "empty"), place)
    assert [] == backup_ids(place)


def test_writers_go_on_while_a_backup_reads(store_url: str, place: FolderDestination, tmp_path: Path) -> None:
    """A backup holds no lock that a writer waits for, and is of one moment: every version with its outbox entry."""
    settings = settings_of("cognate", tmp_path / "service", store_url)
    stop, count = threading.Event(), [0]

    def write() -> None:
        with opened(settings) as registry:
            while not stop.is_set():
                publish(registry, tmp_path / "writer", b"%d" % count[0])
                count[0] += 1

    with opened(settings) as registry:
        publish(registry, tmp_path / "made", b"first")
    thread = threading.Thread(target=write)
    thread.start()
    made = [back_up(COGNATE, settings, place).backup for _ in range(5)]
    stop.set()
    thread.join()
    for backup in made:
        lines = {table.name: table.rows.lines for table in backup.manifest.tables}
        assert backup.manifest.versions == lines["artifacts"] == lines["artifact_events"]
        assert 0 == verify(place, backup).damaged
    assert made[0].manifest.versions < made[-1].manifest.versions, "writers went on"
    assert made[-1].manifest.versions == len(names(restored(place, tmp_path / "b")))


def test_old_backups_go_and_what_others_name_stays(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """Objects that only removed backups name go; another service's backups do not count."""
    agent = settings_of("agent", tmp_path / "agent")
    with opened(agent) as registry:
        publish(registry, tmp_path / "made", b"an agent", family="router")
    back_up(service_of("agent"), agent, place)
    for number in range(4):
        with opened(settings) as registry:
            publish(registry, tmp_path / "made", b"%d" % number * 100)
            with registry.database.write() as connection:  # as a collection does, without its care
                old = sa.select(sa.func.min(t.artifacts.c.id)).where(t.artifacts.c.collect_us.is_(None))
                connection.execute(sa.update(t.artifacts).filter_by(id=old.scalar_subquery()).values(collect_us=1))
        back_up(COGNATE, settings, place)
    before = sum(1 for _ in place.entries("objects"))
    pruned = prune(place, "cognate", keep=2)
    left = [open_backup(place, name) for name in backup_ids(place)]
    assert (2, ["agent", "cognate", "cognate"]) == (pruned.backups, sorted(b.manifest.service for b in left))
    assert pruned.objects == before - sum(1 for _ in place.entries("objects")) >= 4
    assert all(0 == verify(place, backup).damaged for backup in left)
    again = prune(place, "cognate", keep=2)
    assert (0, 0) == (again.backups, again.objects)


def test_a_prune_leaves_what_no_backup_has_written(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """A place that was named by mistake, or is shared, may have a folder `objects` of somebody else's."""
    back_up(COGNATE, settings, place)
    strangers = [f"objects/{'ab' * 20}", f"objects/sha256/{'ab' * 32}", "objects/pack/x.idx", "objects/cd/.tmp-x"]
    unnamed = [object_key(f"sha256:{'ab' * 32}"), "objects/sha256/cd/.tmp-x"]
    for key in (*strangers, *unnamed):
        place.put(key, iter([b"bytes"]), 5)
    assert 2 == prune(place, "cognate", keep=1).objects
    kept = {entry.key for entry in place.entries("objects")}
    assert set(strangers) <= kept
    assert not kept & set(unnamed)


def test_a_backup_that_lacks_bytes_does_not_replace_a_whole_one(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """Backups that are not whole do not count among those that are kept."""
    whole = back_up(COGNATE, settings, place).backup
    with opened(settings) as registry:
        row = publish(registry, tmp_path / "made", b"third" * 100)
    (settings.files_dir / "artifacts" / object_key(row.files[0].digest).replace("objects", "blobs")).unlink()
    lacking = [back_up(COGNATE, settings, place).backup.id for _ in range(2)]
    assert 0 == prune(place, "cognate", keep=1).backups
    assert [whole.id, *lacking] == backup_ids(place)


def test_a_prune_works_alone(settings: ServiceSettings, place: FolderDestination) -> None:
    """It would remove what a backup has copied and not named yet. Backups do not mind each other."""
    with at_work(place, BACKUP, alone=False):
        with pytest.raises(PreconditionError, match=rf"a backup is at work .* \(process {os.getpid()} on"):
            prune(place, "cognate", keep=1)
        back_up(COGNATE, settings, place)
    with at_work(place, PRUNE, alone=True), pytest.raises(PreconditionError, match="a prune is at work"):
        back_up(COGNATE, settings, place)
    assert 0 == prune(place, "cognate", keep=1).backups


def test_a_backup_that_was_taken_for_gone_does_not_come_to_an_end(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It slept through a prune: what it relied on may be gone, so no manifest is written."""

    def sleeps(*arguments):  # type: ignore[no-untyped-def]
        [lock] = (tmp_path / "backups" / "locks").iterdir()
        os.utime(lock, (0, 0))
        prune(place, "cognate", keep=1)
        return take_snapshot(*arguments)

    monkeypatch.setattr(create, "take_snapshot", sleeps)
    with pytest.raises(PreconditionError, match="stopped or cut off for too long"):
        back_up(COGNATE, settings, place)
    assert [] == backup_ids(place)


def test_prune_removes_nothing_while_a_backup_is_damaged(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """Nobody knows which objects it names. The error names the backup and the remedy."""
    backups = [back_up(COGNATE, settings, place).backup for _ in range(3)]
    path = tmp_path / "backups" / "backups" / f"{backups[1].id}.json"
    path.write_bytes(b"{}")
    with pytest.raises(PreconditionError, match=f"backup {backups[1].id} is damaged.*remove its manifest"):
        prune(place, "cognate", keep=2)
    assert 3 == len(backup_ids(place))
    path.unlink()
    assert 1 == prune(place, "cognate", keep=1).backups


CRASH = """
import sys
from pathlib import Path
from tests.backup import kill_points

kill_points.run(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
"""


def killed(work: str, point: str, count: int, folder: Path) -> None:
    """Let a process work, and die by SIGKILL at the so-many-th pass of a point."""
    died = subprocess.run(
        [sys.executable, "-c", CRASH, work, point, str(count), str(folder)],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert -signal.SIGKILL == died.returncode, died.stderr.decode()


@pytest.mark.parametrize(
    ("point", "count", "left"),
    [
        ("between objects", 1, 4),
        ("between objects", 3, 2),
        ("within an object", 1, 4),
        ("within an object", 4, 1),
        ("after an object", 2, 2),
        ("before the manifest", 1, 0),
    ],
)
def test_a_backup_that_is_killed_is_not_there(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path, point: str, count: int, left: int
) -> None:
    """Killed within or between objects or before its manifest, it leaves earlier backups whole; the next goes on."""
    first = back_up(COGNATE, settings, place).backup
    with opened(settings) as registry:
        publish(registry, tmp_path / "made", b"third" * 1000)
    killed("backup", point, count, tmp_path)
    assert [first.id] == backup_ids(place)
    assert 0 == verify(place, first).damaged
    made = back_up(COGNATE, settings, place)
    assert left == made.copied.objects
    assert 0 == verify(place, made.backup).damaged
    prune(place, "cognate", keep=1)
    assert 0 == verify(place, made.backup).damaged
    assert all(object_digits(entry.key) for entry in place.entries("objects")), "nothing half-written stays"
    assert names(settings) == names(restored(place, tmp_path / "b"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_prune_that_is_killed_leaves_whole_backups(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path, count: int
) -> None:
    """Whatever it got to, what is listed is whole, and the next prune goes on."""
    for number in range(3):
        with opened(settings) as registry:
            publish(registry, tmp_path / "made", b"%d" % number * 100)
        back_up(COGNATE, settings, place)
    killed("prune", "deleted", count, tmp_path)
    left = backup_ids(place)
    assert 3 - min(count, 2) == len(left)
    assert all(0 == verify(place, open_backup(place, name)).damaged for name in left)
    prune(place, "cognate", keep=1)
    [name] = backup_ids(place)
    named = 0
    for listing in open_backup(place, name).manifest.listings:
        named += len(listing.segments)
    assert sum(1 for _ in place.entries("objects")) <= named + open_backup(place, name).manifest.blobs.lines
    assert names(settings) == names(restored(place, tmp_path / "b"))


def test_a_manifest_tells_what_is_in_a_backup(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """It is JSON that people can read, with counts, sizes, revision and release."""
    backup = back_up(COGNATE, settings, place).backup
    body = json.loads((tmp_path / "backups" / "backups" / f"{backup.id}.json").read_text())
    assert ("cognate", "cognateforge.backup/1", 2) == (body["service"], body["schema"], body["versions"])
    assert 3 == body["blobs"]["lines"], "of two versions with two files each, one is the same"
    assert {"jobs", "events", "artifacts", "leases", "dependents"} <= {table["name"] for table in body["tables"]}


def test_a_place_that_fails_is_no_backup(settings: ServiceSettings, tmp_path: Path) -> None:
    """A file where a folder should be is told as the operating system tells it."""
    (tmp_path / "backups").mkdir()
    (tmp_path / "backups" / "objects").write_text("in the way")
    with pytest.raises(OSError, match="objects"):
        back_up(COGNATE, settings, FolderDestination(tmp_path / "backups"))
