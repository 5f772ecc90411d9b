"""`forge backup`, `forge backups` and `forge restore`: found by entry points, quick to list, told in exit codes."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cognateforge.cli import plugins
from cognateforge.cli.app import app
from cognateforge.cli.exits import Exit
from tests.backup.conftest import entry_points
from tests.backup.stores import opened, publish, settings_of
from training_common.backup import service
from training_common.backup import verify as verifying
from training_common.backup.destination import Destination, FolderDestination
from training_common.backup.manifest import Backup, delete_manifest
from training_common.backup.service import StoredService
from training_common.backup.verify import Checked

MODULES = ("sqlalchemy", "alembic", "pydantic", "obstore", "torch", "cognate_server", "agent_server")


def forge(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)


def lines(result: Result) -> list[dict[str, Any]]:
    assert Exit.OK == result.exit_code, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """The settings file of a Cognate service with one version."""
    with opened(settings_of("cognate", tmp_path / "a")) as registry:
        publish(registry, tmp_path / "made", b"weights")
    path = tmp_path / "a.toml"
    path.write_text(f'data_dir = "{tmp_path / "a"}"\n')
    return path


def test_entry_points_lead_to_commands_and_services() -> None:
    """What pyproject.toml names can be loaded and is of the kind that is expected."""
    assert {"backup", "backups", "restore"} == entry_points(plugins.GROUP).keys()
    for entry in entry_points(plugins.GROUP).values():
        assert callable(entry.load())
    for name, entry in entry_points(service.GROUP).items():
        found = entry.load()
        assert isinstance(found, StoredService)
        assert (name, True) == (found.name, (found.migrations / "env.py").exists())


def test_help_lists_the_commands_and_stays_light() -> None:
    """To list them imports neither a database nor a service."""
    listed = {line.split()[0] for line in forge("--help").stdout.splitlines() if line.startswith("  ")}
    assert {"backup", "backups", "restore", "jobs"} <= listed
    code = (
        "import sys\n"
        "from importlib.metadata import EntryPoint\n"
        "from cognateforge.cli import plugins\n"
        f"table = {[(entry.name, entry.value, entry.group) for entry in entry_points(plugins.GROUP).values()]!r}\n"
        "plugins.entry_points = lambda: {name: EntryPoint(name, *rest) for name, *rest in table}\n"
        "from cognateforge.cli.app import app\n"
        "app(['--help'], standalone_mode=False)\n"
        "print('loaded', *sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded")[2].split())
    assert "training_common.backup.command" in loaded
    assert set() == set(MODULES) & loaded


def test_other_commands_do_not_look_for_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the client library has itself is found without them."""
    monkeypatch.setattr(plugins, "entry_points", lambda: pytest.fail("looked for entry points"))
    assert Exit.OK == forge("version").exit_code


def test_a_service_is_backed_up_listed_verified_and_restored(settings_file: Path, tmp_path: Path) -> None:
    """Each command tells counts, sizes and time as one JSON object a line; the restored store has the version."""
    place = tmp_path / "backups"
    wish = ("backup", "--service", "cognate", "--settings", settings_file, "--to", place, "--json")
    [made] = lines(forge(*wish))
    assert (1, 2, 32, True) == (made["versions"], made["blobs"], made["blob_bytes"], made["whole"])
    assert made["seconds"] > 0
    again, verified, pruned = lines(forge(*wish, "--verify", "--prune", 1))
    assert (0, 0, 1) == (again["copied_bytes"], verified["damaged"], pruned["removed_backups"])
    assert [again["backup"]] == [one["backup"] for one in lines(forge("backups", "list", "--from", place, "--json"))]
    assert [0] == [one["damaged"] for one in lines(forge("backups", "verify", "--from", place, "--json"))]
    other = tmp_path / "b.toml"
    other.write_text(f'data_dir = "{tmp_path / "b"}"\n')
    wish_back = ("restore", "--service", "cognate", "--settings", other, "--from", place, "--backup", again["backup"])
    [restored] = lines(forge(*wish_back, "--json"))
    assert (1, 0, []) == (restored["versions"], restored["jobs_cut"], restored["versions_damaged"])
    with opened(settings_of("cognate", tmp_path / "b")) as registry:
        assert "cognate-25m@1" == registry.page(limit=1)[0].name
    refused = forge(*wish_back)
    assert (Exit.PRECONDITION, True) == (refused.exit_code, "is not empty" in refused.stderr)
    removed = lines(forge("backups", "prune", "--from", place, "--service", "cognate", "--keep", 1, "--json"))
    assert [0] == [one["removed_backups"] for one in removed]


def test_what_is_wrong_is_told_in_exit_codes(settings_file: Path, tmp_path: Path) -> None:
    """Another service, no such place, no backup, settings of no use, damage."""
    place = tmp_path / "backups"
    wish = ("backup", "--settings", settings_file, "--to", place, "--service")
    unknown = forge(*wish, "kognate")
    assert (Exit.USAGE, True) == (unknown.exit_code, "name one of agent, cognate" in unknown.stderr)
    assert Exit.USAGE == forge("backups", "list", "--from", tmp_path / "nowhere").exit_code
    assert Exit.USAGE == forge("backups", "list", "--from", "foo://bucket").exit_code
    place.mkdir()
    wish_back = ("restore", "--service", "cognate", "--settings", settings_file, "--from", place)
    assert Exit.NOT_FOUND == forge(*wish_back).exit_code
    broken = tmp_path / "broken.toml"
    broken.write_text("no_such_key = 1\n")
    refused = forge("backup", "--service", "cognate", "--settings", broken, "--to", place)
    assert (Exit.LOCAL, True) == (refused.exit_code, "no_such_key" in refused.stderr)
    assert Exit.OK == forge(*wish, "cognate").exit_code
    for path in (place / "objects").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damage")
    damaged = forge("backups", "verify", "--from", place)
    assert (Exit.CORRUPT, True) == (damaged.exit_code, "damaged: " in damaged.stderr)


@pytest.mark.parametrize("command", ["backup", "restore"])
@pytest.mark.parametrize("kind", ["away", "garbage"])
def test_a_database_that_fails_is_told_in_a_line(settings_file: Path, tmp_path: Path, kind: str, command: str) -> None:
    """The hour of a restore is not one for a traceback: what is wrong, and with which setting; no password."""
    place, other, garbage = tmp_path / "backups", tmp_path / "other.toml", tmp_path / "garbage.db"
    assert Exit.OK == forge("backup", "--service", "cognate", "--settings", settings_file, "--to", place).exit_code
    garbage.write_bytes(b"nothing that a database would write" * 100)
    url = {"away": "postgresql+psycopg://u:secret@127.0.0.1:1/x", "garbage": f"sqlite:///{garbage}"}[kind]
    other.write_text(f'data_dir = "{tmp_path / "b"}"\nstore_url = "{url}"\n')
    where = {"backup": "--to", "restore": "--from"}[command]
    told = forge(command, "--service", "cognate", "--settings", other, where, place)
    assert Exit.LOCAL == told.exit_code
    assert "error: the database of the cognate service cannot be used: " in told.stderr
    assert "check store_url" in told.stderr
    assert "secret" not in told.stderr
    assert 1 == len(told.stderr.splitlines())


def test_a_disk_that_is_full_is_told_by_its_own_place(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write's error names no file: where a restore writes is not where its backup lies."""
    place, other = tmp_path / "backups", tmp_path / "other.toml"
    assert Exit.OK == forge("backup", "--service", "cognate", "--settings", settings_file, "--to", place).exit_code
    other.write_text(f'data_dir = "{tmp_path / "b"}"\n')

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    told = forge("restore", "--service", "cognate", "--settings", other, "--from", place)
    assert Exit.LOCAL == told.exit_code
    assert f"error: {tmp_path / 'b' / 'artifacts' / 'staged'}: No space left on device" in told.stderr


def test_a_backup_that_is_pruned_while_it_is_read_is_no_damage(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule prunes every quarter of an hour, and a verification of all backups takes longer."""
    place = tmp_path / "backups"
    wish = ("backup", "--service", "cognate", "--settings", settings_file, "--to", place, "--json")
    [first], [second] = lines(forge(*wish)), lines(forge(*wish))
    read = verifying.verify

    def pruned_meanwhile(destination: Destination, backup: Backup) -> Checked:
        if backup.id == first["backup"]:
            delete_manifest(destination, backup.id)
            for entry in list(destination.entries("objects")):
                destination.delete(entry.key)
        return read(destination, backup)

    monkeypatch.setattr(verifying, "verify", pruned_meanwhile)
    told = forge("backups", "verify", "--from", place, "--json")
    assert f"backup {first['backup']} was pruned while it was read" in told.stderr
    assert (Exit.CORRUPT, [second["backup"]]) == (
        told.exit_code,
        [json.loads(line)["verified"] for line in told.stdout.splitlines()],
    ), "what still is a backup and lacks objects is damaged"
    delete_manifest(FolderDestination(place), second["backup"])
    [third] = lines(forge(*wish))
    monkeypatch.setattr(verifying, "verify", lambda destination, backup: read(destination, backup))
    assert [third["backup"]] == [
        one["verified"] for one in lines(forge("backups", "verify", "--from", place, "--json"))
    ]


def test_a_backup_that_lacks_bytes_is_told_and_removes_nothing(settings_file: Path, tmp_path: Path) -> None:
    """The exit code says so, and older backups stay whatever --prune says."""
    place = tmp_path / "backups"
    wish = ("backup", "--service", "cognate", "--settings", settings_file, "--to", place, "--prune", 1)
    assert Exit.OK == forge(*wish).exit_code
    with opened(settings_of("cognate", tmp_path / "a")) as registry:
        row = publish(registry, tmp_path / "made", b"more")
    digest = row.files[0].digest.removeprefix("sha256:")
    (tmp_path / "a" / "artifacts" / "blobs" / "sha256" / digest[:2] / digest).unlink()
    lacking = forge(*wish)
    assert (Exit.CORRUPT, True) == (lacking.exit_code, "not in the backup: cognate-25m@2" in lacking.stderr)
    assert 2 == len(lines(forge("backups", "list", "--from", place, "--json")))


def test_a_host_without_the_services_is_told_what_is_missing(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client alone has the command, and not what it takes."""
    monkeypatch.setitem(sys.modules, "training_common.backup.service", None)
    refused = forge("backup", "--service", "cognate", "--settings", settings_file, "--to", tmp_path / "backups")
    assert Exit.LOCAL == refused.exit_code
    assert "is not installed: run this where the service is" in refused.stderr
