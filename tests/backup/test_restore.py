"""Restores: into an empty place only, whole or never served, and what was under way goes on."""

import asyncio
import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from agent_server.tables import descents
from cognateforge.exceptions import ArtifactCorruptError, PreconditionError
from tests.backup.stores import fill, opened, publish, service_of, settings_of
from tests.backup.test_backup import killed
from tests.support.postgres import PostgresServer
from tests.support.toy_service import ToyService, ended
from tests.support.toy_worker import expected_result
from training_common.artifacts.blobs import BlobStore
from training_common.backup import restore as restoring
from training_common.backup.create import back_up
from training_common.backup.destination import FolderDestination, object_key
from training_common.backup.locks import PRUNE, at_work
from training_common.backup.manifest import newest_backup
from training_common.backup.prune import prune
from training_common.backup.restore import restore
from training_common.backup.rows import Shape, decode, shape_of
from training_common.backup.settle import settle
from training_common.digests import canonical_json, sha256_bytes
from training_common.jobs.states import JobState
from training_common.jobs.store import JobStore
from training_common.settings import ServiceSettings, SettingsError
from training_common.store import revisions
from training_common.store import tables as t
from training_common.store.database import Database

COGNATE = service_of("cognate")


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    settings = settings_of("cognate", tmp_path / "service")
    with opened(settings) as registry:
        publish(registry, tmp_path / "made", b"first")
    return settings


@pytest.fixture
def place(tmp_path: Path, settings: ServiceSettings) -> FolderDestination:
    """A place with a backup of Cognate."""
    place = FolderDestination(tmp_path / "backups")
    back_up(COGNATE, settings, place)
    return place


def test_only_an_empty_place_is_restored_into(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """What is there is named, and stays as it is."""
    backup = newest_backup(place, "cognate")
    with pytest.raises(PreconditionError, match=r"database .*store\.db is not empty, it has \d+ tables: .*artifacts"):
        restore(COGNATE, settings, place, backup)
    other = settings_of("cognate", tmp_path / "b")
    stored = tmp_path / "b" / "artifacts" / "blobs" / "sha256" / "ab" / ("ab" * 32)
    stored.parent.mkdir(parents=True)
    stored.write_bytes(b"somebody's")
    with pytest.raises(PreconditionError, match=f"store of artifacts is not empty, it holds sha256:{'ab' * 32}"):
        restore(COGNATE, other, place, backup)
    assert b"somebody's" == stored.read_bytes()
    stored.unlink()
    manifest = tmp_path / "b" / "artifacts" / "manifests" / "cognate-25m" / "7.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(b"{}")
    with pytest.raises(PreconditionError, match="store of artifacts is not empty, it has manifests of cognate-25m@7"):
        restore(COGNATE, other, place, backup)
    manifest.unlink()
    restore(COGNATE, other, place, backup)
    with pytest.raises(PreconditionError, match="of the cognate service, not of agent"):
        restore(service_of("agent"), settings_of("agent", tmp_path / "c"), place, backup)


def test_a_backup_that_lacks_an_object_is_refused_before_anything_is_written(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path
) -> None:
    """A lost file of a version, and a lost segment, are named with what they are of."""
    backup = newest_backup(place, "cognate")
    other = settings_of("cognate", tmp_path / "b")
    with opened(settings) as registry:
        [row] = registry.page(limit=9)
    for digest, what in (
        (row.files[0].digest, "cognate-25m@1: weights"),
        (backup.manifest.table("artifacts").rows.segments[0].digest, "rows"),
    ):
        (tmp_path / "backups" / object_key(digest)).unlink()
        with pytest.raises(ArtifactCorruptError, match=rf"lacks 1 objects.*{object_key(digest)} \({what}\)"):
            restore(COGNATE, other, place, backup)
        assert not (tmp_path / "b" / "store.db").exists()


def test_a_prune_waits_for_a_restore(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would remove what a restore of an older backup is about to read. A prune that was cut is in nobody's way."""
    tried = []

    def settle_and_prune(*arguments):  # type: ignore[no-untyped-def]
        with pytest.raises(PreconditionError, match=rf"a restore is at work .* \(process {os.getpid()} on") as refused:
            prune(place, "cognate", keep=1)
        tried.append(refused)
        return settle(*arguments)

    monkeypatch.setattr(restoring, "settle", settle_and_prune)
    backup = newest_backup(place, "cognate")
    restore(COGNATE, settings_of("cognate", tmp_path / "b"), place, backup)
    assert 1 == len(tried)
    assert [] == list(place.entries("locks"))
    monkeypatch.setattr(restoring, "settle", settle)
    with at_work(place, PRUNE, alone=True):
        restore(COGNATE, settings_of("cognate", tmp_path / "c"), place, backup)


def test_a_place_that_cannot_be_written_is_restored_from(
    place: FolderDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a bucket whose credentials read alone."""

    def refused(*_arguments: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FolderDestination, "put", refused)
    monkeypatch.setattr(FolderDestination, "delete", refused)
    other = settings_of("cognate", tmp_path / "b")
    assert 0 == restore(COGNATE, other, place, newest_backup(place, "cognate")).settled.cut


def test_a_damaged_object_is_never_served(settings: ServiceSettings, place: FolderDestination, tmp_path: Path) -> None:
    """It is found on the way: the error names it, and the place stays marked until it is emptied."""
    with opened(settings) as registry:
        [row] = registry.page(limit=9)
    path = tmp_path / "backups" / object_key(row.files[0].digest)
    path.write_bytes(path.read_bytes()[:-1] + b"X")
    other, backup = settings_of("cognate", tmp_path / "b"), newest_backup(place, "cognate")
    with pytest.raises(ArtifactCorruptError, match=r"cognate-25m@1: weights .*: its 5 bytes have digest"):
        restore(COGNATE, other, place, backup)
    with pytest.raises(SettingsError, match=f"half restored from backup {backup.id}"), opened(other):
        pass


@pytest.mark.parametrize(
    ("point", "count"),
    [("claimed", 1), ("blob", 1), ("upgraded", 1), ("table", 5), ("version", 1), ("committed", 1), ("settled", 1)],
)
def test_a_restore_that_is_killed_is_never_served(
    settings: ServiceSettings, place: FolderDestination, tmp_path: Path, point: str, count: int
) -> None:
    """No server takes the store, no restore goes over it; emptied, it is restored as if nothing had been."""
    killed("restore", point, count, tmp_path)
    other, backup = settings_of("cognate", tmp_path / "b"), newest_backup(place, "cognate")
    with pytest.raises(SettingsError, match=f"half restored from backup {backup.id}"), opened(other):
        pass
    with pytest.raises(PreconditionError, match=f"half restored from backup {backup.id}: empty the database"):
        restore(COGNATE, other, place, backup)
    with pytest.raises(PreconditionError, match="there is nothing to back up yet"):
        back_up(COGNATE, other, FolderDestination(tmp_path / "more"))
    shutil.rmtree(tmp_path / "b")
    restore(COGNATE, other, place, backup)
    with opened(settings) as registry, opened(other) as again:
        assert registry.page(limit=9) == again.page(limit=9)


def test_a_backup_of_an_older_release_is_brought_up_to_date(tmp_path: Path) -> None:
    """Its rows go into the schema that they are of, and the migrations since then run over them."""
    settings, place = settings_of("cognate", tmp_path / "a"), FolderDestination(tmp_path / "backups")
    database = Database(settings.database_url)
    with database.write() as connection:
        revisions.upgrade_to(connection, COGNATE.migrations, "0007")
        old = {"payload_sha256": "0" * 64, "answer": b"\x00", "create_us": 1, "method": "m"}
        connection.execute(sa.insert(t.requests).values(caller="c", request_id="r", **old))
    database.close()
    backup = back_up(COGNATE, settings, place).backup
    assert "0007" == backup.manifest.revision
    other = settings_of("cognate", tmp_path / "b")
    restore(COGNATE, other, place, backup)
    with opened(other) as registry, registry.database.read() as connection:
        assert revisions.head(COGNATE.migrations) == revisions.current(connection)
        assert b"\x00" == connection.execute(sa.select(t.requests.c.answer)).scalar_one()
        assert 0 == connection.execute(sa.text("SELECT count(*) FROM results")).scalar_one()


def test_a_backup_of_a_newer_release_is_refused(settings: ServiceSettings, tmp_path: Path) -> None:
    """Both revisions and the release that is needed are named, and nothing is written."""
    place = FolderDestination(tmp_path / "newer")
    with opened(settings) as registry, registry.database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    backup = back_up(COGNATE, settings, place).backup
    head = revisions.head(COGNATE.migrations)
    with pytest.raises(PreconditionError, match=rf"revision 9999, and this release knows none after {head}: install"):
        restore(COGNATE, settings_of("cognate", tmp_path / "b"), place, backup)
    assert not (tmp_path / "b" / "store.db").exists()


def test_rows_that_are_not_those_of_the_backup_are_noticed(
    place: FolderDestination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every table is read again after it was written: a database that changes a value is told."""

    def changing(row: list[Any], shape: Shape) -> list[Any]:
        return ["ready" if value == "READY" else value for value in decode(row, shape)]

    monkeypatch.setattr("training_common.backup.restore.decode", changing)
    with pytest.raises(ArtifactCorruptError, match="table artifacts: the rows that were written are not those"):
        restore(COGNATE, settings_of("cognate", tmp_path / "b"), place, newest_backup(place, "cognate"))


def test_open_jobs_go_on_as_after_the_loss_of_their_workers(settings: ServiceSettings, tmp_path: Path) -> None:
    """Each state comes to what the loss of its worker leads to; budgets stay, and fencing tokens go far beyond."""
    with opened(settings) as registry:
        store = JobStore(registry.database)
        names = {}
        for state in ("QUEUED", "PREPARING", "RUNNING", "PAUSING", "CANCELLING", "SUCCEEDED"):
            with registry.database.write() as connection:
                job = store.submit(connection, plan=b"", total_steps=1, caller="test")
            if state != "QUEUED":
                while (job.state, job.name) != (JobState.PREPARING, job.name):
                    job = store.begin_attempt("local", "server") or job
                with registry.database.write() as connection:
                    connection.execute(sa.update(t.jobs).filter_by(id=job.id).values(state=state))
            names[job.name] = state
            with registry.database.write() as connection:  # so that the next one is the only one that waits
                connection.execute(sa.update(t.jobs).filter_by(name=job.name, state="QUEUED").values(queue_us=None))
        before = {name: store.get(name) for name in names}
    place = FolderDestination(tmp_path / "backups")
    backup = back_up(COGNATE, settings, place).backup
    other = settings_of("cognate", tmp_path / "b")
    assert 4 == restore(COGNATE, other, place, backup).settled.cut
    with opened(other) as registry:
        store = JobStore(registry.database)
        after = {state: store.get(name) for name, state in names.items()}
        events = store.events_after(after["RUNNING"].id, 0, 100)
    expected = {"PREPARING": "RECOVERING", "RUNNING": "RECOVERING", "PAUSING": "PAUSED", "CANCELLING": "CANCELLED"}
    assert {**{state: state for state in names.values()}, **expected} == {s: job.state for s, job in after.items()}
    assert all(job.retries_without_progress == job.kills_without_progress == 0 for job in after.values())
    assert f"the store is restored from backup {backup.id}" in str(events[-1].payload["message"])
    for name, state in names.items():
        if after[state].state not in ("SUCCEEDED", "CANCELLED"):
            assert after[state].fencing_token > before[name].fencing_token + 10**9


@pytest.mark.parametrize("checkpoints", [True, False], ids=["with checkpoints", "without"])
async def test_a_job_that_was_at_work_comes_to_its_end_in_the_restored_place(checkpoints: bool, tmp_path: Path) -> None:
    """It goes on from the checkpoint in the backup, or begins again, and says which; the result is the same."""
    (tmp_path / "toy").mkdir()
    toy = ToyService(tmp_path / "toy", slots=1)
    job = toy.submit(steps=40, checkpoint_every=10, step_s=0.02)
    await toy.until(job, lambda now: len(toy.store.checkpoints(now.id)) >= 2)
    settings = settings_of("cognate", toy.settings.data_dir)
    place = FolderDestination(tmp_path / "backups")
    made = await asyncio.to_thread(lambda: back_up(COGNATE, settings, place, checkpoints=checkpoints))
    await toy.until(job, ended)
    toy.database.close()
    shutil.rmtree(toy.settings.data_dir, ignore_errors=True)  # its worker is still leaving

    (tmp_path / "again").mkdir()
    other = settings_of("cognate", tmp_path / "again" / "data")
    settled = restore(COGNATE, other, place, made.backup).settled
    assert (1, 0 if checkpoints else 1) == (settled.cut, settled.anew)
    again = ToyService(tmp_path / "again", slots=1)
    done = await again.until(job, ended)
    assert (JobState.SUCCEEDED, 2) == (done.state, done.attempt), again.log(job)
    assert [expected_result(40)] == again.result(job)
    with again.database.read() as connection:
        first = connection.execute(sa.select(t.attempts.c.first_step).filter_by(number=2)).scalar_one()
    assert (first >= 20) is checkpoints
    again.database.close()


def test_a_checkpoint_that_went_away_meanwhile_is_told(tmp_path: Path, settings: ServiceSettings) -> None:
    """Its job would begin again: the backup counts it, and is whole all the same."""
    with opened(settings) as registry:
        store = JobStore(registry.database)
        with registry.database.write() as connection:
            job = store.submit(connection, plan=b"", total_steps=9, caller="test")
            row = {"attempt": 1, "step": 3, "digest": f"sha256:{'0' * 64}", "size_bytes": 1, "folder": "step-3.1"}
            connection.execute(sa.insert(t.checkpoints).values(job_id=job.id, create_us=1, **row))
    place = FolderDestination(tmp_path / "backups")
    made = back_up(COGNATE, settings, place, checkpoints=True)
    assert (1, True) == (made.copied.passed_over, made.backup.manifest.whole)


def test_a_path_never_leads_out_of_the_folder_of_jobs(tmp_path: Path) -> None:
    """A manifest of a checkpoint is data of a worker: its names are not trusted."""
    settings, place = settings_of("cognate", tmp_path / "service"), FolderDestination(tmp_path / "backups")
    with opened(settings) as registry:
        store = JobStore(registry.database)
        with registry.database.write() as connection:
            job = store.submit(connection, plan=b"", total_steps=9, caller="test")
        root = settings.files_dir / "jobs" / job.name.removeprefix("jobs/") / "checkpoints" / "step-3.1"
        root.mkdir(parents=True)
        (tmp_path / "service" / "outside").write_bytes(b"x")
        facts = {"size_bytes": 1, "digest": sha256_bytes(b"x")}
        data = canonical_json({"step": 3, "files": {"../../../../outside": facts}})
        (root / "checkpoint.json").write_bytes(data)
        row = {"attempt": 1, "step": 3, "digest": sha256_bytes(data), "size_bytes": 1, "folder": "step-3.1"}
        with registry.database.write() as connection:
            connection.execute(sa.insert(t.checkpoints).values(job_id=job.id, create_us=1, **row))
    back_up(COGNATE, settings, place, checkpoints=True)
    with pytest.raises(ArtifactCorruptError, match=r"leads out of the folder of jobs"):
        restore(COGNATE, settings_of("cognate", tmp_path / "b"), place, newest_backup(place, "cognate"))
    assert not (tmp_path / "b" / "outside").exists()


def test_a_database_of_another_service_is_told(settings: ServiceSettings, tmp_path: Path) -> None:
    """So is one with tables of somebody else: they are named, and no backup bears the wrong service's name."""
    place = FolderDestination(tmp_path / "backups")
    agent = settings_of("agent", settings.data_dir)
    with pytest.raises(PreconditionError, match=r"not that of the agent service alone, .* agents, .* leases"):
        back_up(service_of("agent"), agent, place)
    with opened(settings) as registry, registry.database.write() as connection:
        connection.execute(sa.text("CREATE TABLE theirs (id INTEGER PRIMARY KEY)"))
    with pytest.raises(PreconditionError, match="they differ in the tables theirs: correct --service or --settings"):
        back_up(COGNATE, settings, place)
    with pytest.raises(PreconditionError, match=r"column theirs\.day has type DATE"):
        shape_of(sa.Table("theirs", sa.MetaData(), sa.Column("day", sa.Date)))


def test_all_of_a_filled_store_is_restored_into_an_older_file(tmp_path: Path) -> None:
    """An empty database file is an empty place."""
    settings, place = settings_of("agent", tmp_path / "a"), FolderDestination(tmp_path / "backups")
    with opened(settings) as registry, registry.database.write() as connection:
        fill("agent", connection, seed=5)
    back_up(service_of("agent"), settings, place)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "store.db").touch()
    other = settings_of("agent", tmp_path / "b")
    restore(service_of("agent"), other, place, newest_backup(place, "agent"))
    with opened(other) as registry, registry.database.read() as connection:
        assert 12 == connection.execute(sa.select(sa.func.count()).select_from(t.jobs)).scalar_one()


def test_cognate_is_told_again_what_descends_from_its_models(tmp_path: Path) -> None:
    """Which descents it was told of after the snapshot, a restored agent service cannot know."""
    settings, place = settings_of("agent", tmp_path / "a"), FolderDestination(tmp_path / "backups")
    with opened(settings) as registry, registry.database.write() as connection:
        row = {"model": "cognate-25m@1", "name": "router@1", "digest": f"sha256:{'a' * 64}", "holds": True}
        connection.execute(sa.insert(descents).values(told=True, **row))
    back_up(service_of("agent"), settings, place)
    other = settings_of("agent", tmp_path / "b")
    restore(service_of("agent"), other, place, newest_backup(place, "agent"))
    with opened(other) as registry, registry.database.read() as connection:
        assert [(True, False)] == [(r.holds, r.told) for r in connection.execute(sa.select(descents))]


def test_versions_in_an_archive_are_restored_beside_what_is_at_hand(settings: ServiceSettings, tmp_path: Path) -> None:
    """All bytes are put into the service's own store, so no version says that it is archived."""
    with opened(settings) as registry, registry.database.write() as connection:
        connection.execute(sa.update(t.artifacts).values(tier="ARCHIVE"))
    place = FolderDestination(tmp_path / "backups")
    other = settings_of("cognate", tmp_path / "b")
    restore(COGNATE, other, place, back_up(COGNATE, settings, place).backup)
    with opened(other) as registry:
        [row] = registry.page(limit=9)
        assert "STANDARD" == row.tier
        assert row.size_bytes == sum(len(piece) for _, piece in registry.blobs.open_payload(row.files, 0))


def test_a_database_that_ends_idle_transactions_waits_for_slow_objects(
    settings: ServiceSettings,
    place: FolderDestination,
    tmp_path: Path,
    postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PostgreSQL is told that this transaction may rest, however short its patience is with others."""
    monkeypatch.setattr("training_common.store.database._IDLE_TRANSACTION_S", 1)
    put_manifest = BlobStore.put_manifest

    def slowly(self: BlobStore, family: str, version: int, manifest: bytes) -> None:
        time.sleep(1.5)
        put_manifest(self, family, version, manifest)

    monkeypatch.setattr(BlobStore, "put_manifest", slowly)
    other = settings_of("cognate", tmp_path / "b", postgres.new_database())
    restore(COGNATE, other, place, newest_backup(place, "cognate"))
    with opened(other) as registry:
        assert "cognate-25m@1" == registry.page(limit=9)[0].name
