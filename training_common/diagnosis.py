"""The server's side of `forge doctor` and `forge debug-bundle`: what the settings name, looked at and never changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import sqlalchemy as sa

from cognateforge.diagnostics.checks import Area, Check
from cognateforge.diagnostics.identity import check_identity
from cognateforge.exceptions import ClientSetupError
from training_common.artifacts.open import look_at_store
from training_common.artifacts.signing import require_signing_key
from training_common.jobs.folders import folder_name, jobs_dir
from training_common.masking import secrets_of
from training_common.settings import ServiceSettings, SettingsError, require_data_folder
from training_common.store import revisions

if TYPE_CHECKING:
    from training_common.backup.service import StoredService

# A checkpoint of Cognate-25M: 25 million parameters, AdamW's two moments and the gradients' mean, 4 bytes each.
_CHECKPOINT_BYTES = 25_000_000 * 4 * 4
# Two are always kept and a third is written beside them; with pinned ones and agents' files that is soon ten.
_FEW_CHECKPOINTS, _NO_CHECKPOINTS = 10, 1
_CONNECT_S = 5
# File systems by what they lack. SQLite's locks need a file system of this machine.
_WITHOUT_LINKS = frozenset({"vfat", "msdos", "exfat"})
_NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "lustre"})


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What of a job lies on a server's machine: see `cognateforge.diagnostics.plugins`."""

    settings: dict[str, Any]
    secrets: Sequence[str]
    files: Sequence[tuple[str, Path]]


def evidence(service: StoredService, file: Path | None, job: str) -> Evidence:
    """Return settings, secrets and workers' logs. Errors: ClientSetupError."""
    try:
        settings = service.load_settings(file)
    except SettingsError as error:
        raise ClientSetupError(str(error)) from error
    folder = jobs_dir(settings) / folder_name(job) / "logs"
    files = [(f"{service.name}/logs/{path.name}", path) for path in sorted(folder.glob("*.log"))]
    return Evidence(settings=settings.model_dump(mode="json"), secrets=secrets_of(settings), files=files)


def diagnose(service: StoredService, file: Path | None) -> Iterator[Check]:
    """Look at all that a service's settings name."""
    area = Area(f"{service.name} settings")
    try:
        settings = service.load_settings(file)
    except SettingsError as error:
        yield area.fail("settings", str(error), "correct each key that is named; README.md lists them")
        return
    yield area.ok("settings", f"{file or 'defaults'} and the environment")
    yield _port(area, settings.address)
    for check in (require_data_folder, require_signing_key):
        try:
            check(settings)
        except SettingsError as error:
            key, _, told = str(error).partition(": ")
            yield area.fail(key, told or key, "correct the path, or leave the key out")
    yield from _folders(Area(f"{service.name} folders"), settings)
    yield from _buckets(Area(f"{service.name} artifacts"), settings)
    yield from _store(Area(f"{service.name} store"), service, settings)
    yield from _devices(Area(f"{service.name} devices"), settings.workers.devices)
    if settings.security.tls is not None:
        tls = settings.security.tls
        yield from check_identity(
            Area(f"{service.name} certificate"), cert=tls.cert_file, key=tls.key_file, ca=tls.client_ca_file
        )
    if settings.consul.service:
        yield _registered(Area(f"{service.name} discovery"), settings)


def _port(area: Area, address: str) -> Check:
    """Tell whether the address can be listened on. A socket that is bound and does not listen takes no connection."""
    if address.startswith("unix:"):
        folder = Path(address.removeprefix("unix:").removeprefix("//")).parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            return area.fail("address", f"{folder} cannot be written", "make the folder, or give another path")
        return area.ok("address", f"{address}: its folder can be written")
    host, _, number = address.rpartition(":")
    host = host.strip("[]")
    try:
        port = int(number)
        family, kind, protocol, _, where = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(where)
    except ValueError:
        return area.fail("address", f"{address} has no port", "write host:port or unix:PATH")
    except OSError as error:
        with contextlib.suppress(OSError), socket.create_connection((host or "localhost", port), timeout=_CONNECT_S):
            return area.ok("address", f"{address} is taken; the checks of the service tell whether by this one")
        return area.fail("address", f"{address}: {error.strerror}", "give an address and a free port of this machine")
    return area.ok("address", f"{address} is free")


def _folders(area: Area, settings: ServiceSettings) -> Iterator[Check]:
    named = {"data_dir": settings.data_dir, "shared_dir": settings.shared_dir}
    for key, folder in named.items():
        if folder is None:
            continue
        if not folder.is_dir():
            parent = next(one for one in folder.resolve().parents if one.is_dir())
            if os.access(parent, os.W_OK):
                yield area.ok(key, f"{folder} is not there yet: the first start makes it")
            else:
                yield area.fail(
                    key, f"{folder} is not there, and {parent} cannot be written", "make it, or name another"
                )
            folder = parent
        elif os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            yield area.ok(key, f"{folder} can be written")
        else:
            yield area.fail(key, f"{folder} cannot be written", "give it to the user that the service runs as")
        yield _space(area, key, folder)
        yield _file_system(area, key, folder)


def _buckets(area: Area, settings: ServiceSettings) -> Iterator[Check]:
    """Tell whether the buckets of artifacts can be read. That they can be written to is tried by a start alone."""
    try:
        for url in look_at_store(settings):
            yield area.ok("bucket", f"{url} answers, and can be listed")
    except SettingsError as error:
        key, _, told = str(error).partition(": ")
        yield area.fail(key, told, "mend what is named, for no version can be published or fetched without it")


def _space(area: Area, key: str, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    told = f"{free / 1e9:.1f} GB are free, and a checkpoint of Cognate-25M takes {_CHECKPOINT_BYTES / 1e9:.1f}"
    remedy = "make room: shorter retention, forge artifacts collect, or a larger disk"
    if free < _NO_CHECKPOINTS * _CHECKPOINT_BYTES:
        return area.fail(f"{key} space", told, remedy)
    if free < _FEW_CHECKPOINTS * _CHECKPOINT_BYTES:
        return area.warn(f"{key} space", told, remedy)
    return area.ok(f"{key} space", told)


def _file_system(area: Area, key: str, folder: Path) -> Check:
    """Tell whether files can have several names there: artifacts and exports link what they would otherwise copy."""
    kind = file_system_of(folder)
    name = f"{key} hard links"
    if not kind:
        return area.skip(name, "this system does not tell what file system it is")
    if kind in _WITHOUT_LINKS:
        return area.warn(name, f"{kind} has none: files are copied", "use a folder on ext4, xfs or btrfs")
    return area.ok(name, f"{kind} has them")


def file_system_of(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> str:
    """Return the kind of file system that a folder lies on, "" where nobody tells."""
    try:
        lines = [line.split() for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    place = folder.resolve()
    best: tuple[int, str] = (-1, "")
    for fields in lines:
        if len(fields) < 3:
            continue
        # The kernel writes blanks and backslashes of names as octal numbers.
        point = Path(fields[1].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= best[0]:
            best = (len(point.parts), fields[2])
    return best[1]


def _store(area: Area, service: StoredService, settings: ServiceSettings) -> Iterator[Check]:
    url = sa.make_url(settings.database_url)
    path = Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None
    if path is not None:
        if not path.exists():
            yield area.ok("database", f"{path} is not there yet: the first start makes it")
            return
        if (kind := file_system_of(path.parent)) in _NETWORK:
            yield area.warn("file system", f"{path} is on {kind}, where SQLite's locks may fail", "use PostgreSQL")
    shown = url.render_as_string(hide_password=True)
    try:
        with _connected(url, path) as connection:
            current, unfinished = revisions.current(connection), revisions.restoring(connection)
            fits = revisions.fits(connection, service.migrations)
    except (sa.exc.SQLAlchemyError, ImportError) as error:
        told = str(getattr(error, "orig", None) or error).splitlines()[0][:300]
        yield area.fail("database", f"{shown}: {told}", "start the database, and see store_url and its password")
        return
    yield area.ok("database", shown)
    if unfinished:
        yield area.fail(
            "restore", f"backup {unfinished} is half restored", "let forge restore finish, or restore again"
        )
    newest = revisions.head(service.migrations)
    if current is None:
        yield area.ok("revision", f"none yet: the first start makes {newest}")
    elif current == newest:
        yield area.ok("revision", current)
    elif revisions.is_known(service.migrations, current):
        yield area.warn(
            "revision", f"{current}; this release has {newest}", "the next start of the service upgrades it"
        )
    elif fits:
        yield area.ok("revision", f"{current} of a later release, which this one can work on")
    else:
        yield area.fail(
            "revision", f"{current} is not known to this release", "run the release that wrote it, or newer"
        )


@contextlib.contextmanager
def _connected(url: sa.URL, path: Path | None) -> Iterator[sa.Connection]:
    """Connect without making a file: where SQLite has no log beside its database, nobody is writing."""
    if path is not None:
        log = path.with_name(path.name + "-wal")
        mode = "mode=ro" if log.exists() else "mode=ro&immutable=1"
        where = f"file:{quote(str(path.resolve()))}?{mode}"
        engine = sa.create_engine(
            "sqlite://", creator=lambda: sqlite3.connect(where, uri=True), poolclass=sa.pool.NullPool
        )
    else:
        engine = sa.create_engine(url, poolclass=sa.pool.NullPool, connect_args={"connect_timeout": _CONNECT_S})
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _devices(area: Area, wanted: Sequence[str]) -> Iterator[Check]:
    found = _nvidia()
    if found is None:
        if wanted:
            told = f"workers.devices names {', '.join(wanted)}, and nvidia-smi cannot be run"
            yield area.fail("devices", told, "install NVIDIA's driver, or leave workers.devices out")
        else:
            yield area.ok("devices", "none: workers train on the processor")
        return
    missing = [one for one in wanted if one not in found and not (one.isdecimal() and int(one) < len(found))]
    if missing:
        yield area.fail("devices", f"{', '.join(missing)} are not here", "name those that nvidia-smi -L lists")
    else:
        yield area.ok(
            "devices", f"{len(found)} here; workers use {', '.join(wanted) or 'what their environment shows'}"
        )


def _nvidia() -> list[str] | None:
    """Return the UUIDs of this machine's devices, None without a driver. Parts of a device (MIG) follow it."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    return [part.rpartition("UUID: ")[2].rstrip(")") for part in done.stdout.splitlines() if "UUID: " in part]


def _registered(area: Area, settings: ServiceSettings) -> Check:
    import consul

    one = settings.consul
    where = {"host": one.host or None, "port": one.port or None, "scheme": one.scheme or None}
    try:
        client = consul.Consul(**where, connections_timeout=_CONNECT_S)
        client.http.session.max_redirects = 0
        _, nodes = client.health.service(one.service, token=one.token or None)
    except Exception as error:  # whatever stands between answers as it likes
        told = f"{type(error).__name__}: {error}"[:300]
        return area.fail("consul", told, "start the Consul agent, and see consul.host, port, scheme and token")
    passing = [node for node in nodes if all(check["Status"] == "passing" for check in node["Checks"])]
    told = f"{one.service}: {len(passing)} of {len(nodes)} instances pass"
    return area.ok("consul", told) if passing else area.warn("consul", told, "start the service; its log tells more")
