"""The server's side of `forge doctor`: it tells what the settings name, and leaves everything as it was."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sqlalchemy as sa

from cognate_server.stored import SERVICE
from cognateforge.certificates import Authority
from cognateforge.diagnostics.checks import Area, Check, Level
from training_common import diagnosis
from training_common.artifacts import bucket
from training_common.jobs.folders import jobs_dir
from training_common.store.database import Database


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """Settings of a service whose database is at its newest revision."""
    data = tmp_path / "data"
    data.mkdir()
    file = tmp_path / "cognate.toml"
    file.write_text(f'address = "127.0.0.1:0"\ndata_dir = "{data}"\n')
    database = Database(SERVICE.load_settings(file).database_url)
    database.upgrade(SERVICE.migrations)
    database.close()
    return file


def looked_at(file: Path) -> dict[str, Check]:
    return {f"{check.area.partition(' ')[2]} {check.name}": check for check in SERVICE.diagnose(file)}


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what is in a folder, with times and sizes."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.lstat().st_size, path.lstat().st_mode)
        for path in (folder, *folder.rglob("*"))
    }


def test_a_service_that_is_well(settings_file: Path) -> None:
    """Every check passes, and no file was made, changed or touched: not even SQLite's own beside the database."""
    before = everything(settings_file.parent)
    found = looked_at(settings_file)
    assert [] == [check for check in found.values() if check.level is not Level.OK]
    assert {"settings settings", "settings address", "folders data_dir", "store database", "store revision"} <= set(
        found
    )
    assert before == everything(settings_file.parent)


def test_a_bucket_that_does_not_answer_is_told_in_bounded_time(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written to it, a server that hangs is given up, and no secret is told."""
    monkeypatch.setattr(bucket, "_LOOK_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        port = hangs.getsockname()[1]
        settings_file.write_text(
            settings_file.read_text() + '[artifacts]\nurl = "s3://models/forge"\n[artifacts.options]\n'
            f'endpoint = "http://127.0.0.1:{port}"\nregion = "here"\nallow_http = "true"\n'
            'access_key_id = "me"\nsecret_access_key = "s3cret-of-the-house"\n'
        )
        began_s = time.monotonic()
        found = looked_at(settings_file)["artifacts artifacts.url"]
        assert time.monotonic() - began_s < 30
    assert Level.FAIL is found.level
    assert "s3://models/forge cannot be used" in found.detail
    assert "s3cret" not in found.detail + found.remedy


def test_a_bucket_is_listed_and_not_written_to(settings_file: Path) -> None:
    """One GET of a list is all that the service is asked."""
    asked: list[str] = []

    class Listing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            body = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Listing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        settings_file.write_text(
            settings_file.read_text() + '[artifacts]\nurl = "s3://models/forge"\n[artifacts.options]\n'
            f'endpoint = "http://127.0.0.1:{server.server_address[1]}"\nregion = "here"\nallow_http = "true"\n'
            'access_key_id = "me"\nsecret_access_key = "secret"\n'
        )
        found = looked_at(settings_file)["artifacts bucket"]
        server.shutdown()
    assert (Level.OK, "s3://models/forge answers, and can be listed") == (found.level, found.detail)
    [only] = asked
    assert only.startswith("GET /models?")


def test_a_service_at_work_is_looked_at_too(settings_file: Path) -> None:
    """Its database has a log beside it, which is read and not folded in."""
    database = Database(SERVICE.load_settings(settings_file).database_url)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = version_num"))
    before = everything(settings_file.parent / "data")
    assert Level.OK is looked_at(settings_file)["store revision"].level
    after = everything(settings_file.parent / "data")
    database.close()
    assert [name for name in before if name.endswith("-wal")]
    assert {name: facts for name, facts in before.items() if not name.endswith("-shm")} == {
        name: facts for name, facts in after.items() if not name.endswith("-shm")
    }


def test_a_first_start_has_nothing_to_fear(tmp_path: Path) -> None:
    """What is not there yet is made by the first start, and not by looking."""
    file = tmp_path / "cognate.toml"
    file.write_text(f'address = "127.0.0.1:0"\ndata_dir = "{tmp_path / "new" / "data"}"\n')
    found = looked_at(file)
    assert {Level.OK} == {check.level for check in found.values()}
    assert "is not there yet" in found["store database"].detail
    assert [file] == list(tmp_path.iterdir())


@pytest.mark.parametrize(("revision", "level"), [("0001", Level.WARN), ("9999", Level.OK)], ids=["older", "newer"])
def test_a_revision_that_is_not_the_newest(settings_file: Path, revision: str, level: Level) -> None:
    """An older store is upgraded by the next start; a later release told that its own fits this one too."""
    database = Database(SERVICE.load_settings(settings_file).database_url)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :to"), {"to": revision})
    database.close()
    assert level is looked_at(settings_file)["store revision"].level


def test_a_revision_that_this_release_cannot_work_on(settings_file: Path) -> None:
    """The store does not name this release's revision among those whose code it fits."""
    database = Database(SERVICE.load_settings(settings_file).database_url)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
        connection.execute(sa.text("DELETE FROM fitting_revisions"))
    database.close()
    assert Level.FAIL is looked_at(settings_file)["store revision"].level


def test_what_cannot_be_used_is_told_with_its_key(settings_file: Path, tmp_path: Path) -> None:
    """A typing error in the file, a folder that is not there, an address of another machine."""
    text = settings_file.read_text()
    settings_file.write_text(text + "no_such_key = 1\n")
    [only] = SERVICE.diagnose(settings_file)
    assert (Level.FAIL, True) == (only.level, "no_such_key" in only.detail)
    settings_file.write_text(text + f'[data]\nfolder = "{tmp_path / "nowhere"}"\n')
    assert Level.FAIL is looked_at(settings_file)["settings data.folder"].level
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        settings_file.write_text(text.replace("127.0.0.1:0", f"127.0.0.1:{port}"))
        held.listen()
        assert "is taken" in looked_at(settings_file)["settings address"].detail
    database = tmp_path / "not-a-database"
    database.write_text("text")
    settings_file.write_text(text + f'store_url = "sqlite:///{database}"\n')
    assert Level.FAIL is looked_at(settings_file)["store database"].level


def test_a_password_of_the_store_is_not_told(settings_file: Path) -> None:
    """Neither where the database is away."""
    text = settings_file.read_text()
    settings_file.write_text(text + 'store_url = "postgresql+psycopg://forge:hunter2hunter2@127.0.0.1:1/forge"\n')
    checks = list(SERVICE.diagnose(settings_file))
    assert Level.FAIL is next(check.level for check in checks if check.name == "database")
    assert not [check for check in checks if "hunter2" in check.detail + check.remedy]


def test_the_servers_certificate_is_looked_at(settings_file: Path, tmp_path: Path) -> None:
    """As a client's is."""
    authority = Authority.create(tmp_path / "pki", "example.org")
    issued = authority.issue("cognate", hosts=["localhost"], days=3)
    with settings_file.open("a") as file:
        tls = {"cert_file": issued.cert, "key_file": issued.key, "client_ca_file": tmp_path / "pki/ca.pem"}
        file.write("[security.tls]\n" + "".join(f'{key} = "{path}"\n' for key, path in tls.items()))
    found = looked_at(settings_file)
    assert (Level.WARN, Level.OK) == (found["certificate certificate"].level, found["certificate chain"].level)


def test_devices_are_those_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By index or UUID; a driver that is not there fails only where devices are named."""
    here = ["GPU-11111111-1111-1111-1111-111111111111"]

    def found(wanted: list[str]) -> Iterator[Level]:
        return (check.level for check in diagnosis._devices(Area("x"), wanted))

    monkeypatch.setattr(diagnosis, "_nvidia", lambda: here)
    assert [Level.OK, Level.OK, Level.FAIL] == [*found(["0"]), *found(here), *found(["1"])]
    monkeypatch.setattr(diagnosis, "_nvidia", lambda: None)
    assert [Level.OK, Level.FAIL] == [*found([]), *found(["0"])]


def test_little_room_is_told_in_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None fits: a failure. A few fit: a warning."""

    class Usage:
        free = 0

    monkeypatch.setattr("shutil.disk_usage", lambda _folder: Usage)
    for free, level in ((399_999_999, Level.FAIL), (400_000_000, Level.WARN), (4_000_000_000, Level.OK)):
        Usage.free = free
        assert level is diagnosis._space(Area("x"), "data_dir", tmp_path).level


def test_the_nearest_mount_tells_the_file_system(tmp_path: Path) -> None:
    """Names with blanks included; where nobody tells, nothing is made up."""
    mounts = tmp_path / "mounts"
    place = tmp_path / "a disk" / "data"
    place.mkdir(parents=True)
    blank = str(place.parent).replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {blank} nfs4 rw 0 0\n")
    assert ("nfs4", "ext4") == (
        diagnosis.file_system_of(place, mounts),
        diagnosis.file_system_of(tmp_path, mounts),
    )
    assert "" == diagnosis.file_system_of(place, tmp_path / "none")


def test_the_evidence_of_a_job_is_its_logs_and_the_settings(settings_file: Path) -> None:
    """With what must be hidden of them."""
    text = settings_file.read_text()
    settings_file.write_text(text + '[consul]\ntoken = "a-token-of-consul"\n')
    job = "jobs/00000000-0000-4000-8000-000000000001"
    logs = jobs_dir(SERVICE.load_settings(settings_file)) / job.removeprefix("jobs/") / "logs"
    logs.mkdir(parents=True)
    (logs / "attempt-1.log").write_text("x")
    found = SERVICE.evidence(settings_file, job)
    assert ["a-token-of-consul"] == list(found.secrets)
    assert [("cognate/logs/attempt-1.log", logs / "attempt-1.log")] == list(found.files)
    assert "127.0.0.1:0" == found.settings["address"]
