"""Reading stored artifacts again: every byte of them is what was published, or an alarm tells which file is not.

The alarm is a line of the log at error level, an entry of the outbox, the version's own `damage`, by which every fetch
of it is refused, and `damaged`, which GetServerInfo tells. It ends when the stored bytes are whole again.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
import structlog

from cognateforge.exceptions import ArtifactCorruptError
from cognateforge.layout import MANIFEST_NAME, SIGNATURE_NAME
from training_common.artifacts.blobs import BlobStore, StoreAwayError
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.signing import ArtifactSigner, SigningKeyError
from training_common.digests import sha256_bytes
from training_common.settings import ArtifactSettings
from training_common.store import tables as t
from training_common.store.database import Turn, now_us

log = structlog.get_logger(__name__)

# The contract's bounds on Storage.damage and Damage.detail.
_TEXT_CHARS = 500
_HOUR_US = 3600 * 10**6
# How often a server looks whether anything is due, and counts what is damaged.
_TICK_S = 60.0
_BATCH = 100


@dataclass(frozen=True, kw_only=True)
class Damage:
    """A stored file that is not what was published. problem: as in artifact.v1.Problem, without its prefix."""

    name: str
    path: str
    digest: str
    problem: str
    detail: str


@dataclass(kw_only=True)
class Verified:
    """What was read."""

    versions: int = 0
    files: int = 0
    size_bytes: int = 0


def manifest_damage(blobs: BlobStore, row: ArtifactRow) -> Damage | None:
    """Return what is wrong with a version's stored manifest, or None."""
    try:
        found = sha256_bytes(blobs.read_manifest(row.family, row.version))
    except FileNotFoundError:
        detail = f"{MANIFEST_NAME}: it is not stored"
    except (OSError, ArtifactCorruptError) as error:
        detail = f"{MANIFEST_NAME}: it cannot be read: {error}"
    else:
        if found == row.digest:
            return None
        detail = f"{MANIFEST_NAME}: its stored bytes are {found}, not {row.digest}"
    return Damage(name=row.name, path=MANIFEST_NAME, digest=row.digest, problem="MANIFEST", detail=detail[:_TEXT_CHARS])


def signature_damage(signer: ArtifactSigner | None, row: ArtifactRow) -> Damage | None:
    """Return what is wrong with a version's signature, or None; also where it is not of the service's own key."""
    if signer is None or row.signature is None:
        return None
    try:
        problem = signer.refuted(row.signature, row.manifest, row.files)
    except SigningKeyError as error:  # a matter of the machine, which publications tell of
        log.warning("signature not verified", artifact=row.name, error=str(error))
        return None
    if not problem:
        return None
    detail = f"{SIGNATURE_NAME}: {problem}"
    return Damage(name=row.name, path=SIGNATURE_NAME, digest="", problem="SIGNATURE", detail=detail[:_TEXT_CHARS])


def damages(blobs: BlobStore, row: ArtifactRow) -> Iterator[tuple[int, Damage | None]]:
    """Read a version's stored bytes, and yield for each file its size and what is wrong with it: the manifest first."""
    yield len(row.manifest), manifest_damage(blobs, row)
    for file in row.files:
        try:
            blobs.check(file)
        except ArtifactCorruptError as error:
            yield file.size_bytes, damage_of(row, error, path=file.path, digest=file.digest)
        else:
            yield file.size_bytes, None


def damage_of(row: ArtifactRow, error: ArtifactCorruptError, *, path: str = "", digest: str = "") -> Damage:
    """Return what an error tells of a version's stored bytes."""
    problem = error.metadata.get("problem", "UNREADABLE")
    path, digest = path or error.metadata.get("path", ""), digest or error.metadata.get("digest", "")
    return Damage(name=row.name, path=path, digest=digest, problem=problem, detail=error.message[:_TEXT_CHARS])


def record(registry: ArtifactRegistry, row: ArtifactRow, found: list[Damage]) -> None:
    """Write down what was found of a version, and raise the alarm or end it.

    Errors: StoreAwayError, where nothing at all is stored: that tells of this server's view, and others may see all.
    """
    if found and registry.blobs.is_empty():
        raise StoreAwayError(
            f"{row.name} was published, and where this server looks for artifacts there is nothing at all: mount "
            "shared_dir, or correct it or the artifacts' store in the settings"
        )
    text = "; ".join(damage.detail for damage in found)[:_TEXT_CHARS]
    with registry.database.write() as connection:
        registry.database.in_turn(connection, Turn.PUBLISH)
        before = connection.execute(sa.select(t.artifacts.c.damage).filter_by(id=row.id, collect_us=None)).scalar()
        if before is None:  # collected meanwhile
            return
        values = {"damage": text} if text else {"damage": "", "verify_us": now_us()}
        connection.execute(sa.update(t.artifacts).filter_by(id=row.id).values(**values))
        if bool(text) != bool(before):
            registry.tell(connection, row.id, "damaged" if text else "mended")
    if text:
        log.error("stored artifact is damaged", artifact=row.name, files=[d.path for d in found], detail=text)
    elif before:
        log.warning("stored artifact is whole again", artifact=row.name)


def require_whole(registry: ArtifactRegistry, row: ArtifactRow) -> None:
    """Refuse a version that is known to be damaged, or whose stored manifest is not its own: nothing of it is used.

    Errors: ArtifactCorruptError, which names the file; StoreAwayError.
    """
    text = row.damage
    if not text:
        found = manifest_damage(registry.blobs, row)
        if found is None:
            return
        record(registry, row, [found])
        text = found.detail
    raise ArtifactCorruptError(
        f"{row.name} is damaged: {text}; restore the stored file from a backup, then verify it (forge artifacts verify)"
    )


class Scrubber:
    """Verifies one service's versions, on request and periodically.

    damaged: of how many versions stored bytes are known to be damaged: a gauge, up to date after every verification of
    this server and at least once a minute.
    """

    def __init__(self, registry: ArtifactRegistry, settings: ArtifactSettings) -> None:
        self._registry = registry
        self._settings = settings
        self._stop = threading.Event()
        # When versions were last read by this process that stay due: damaged ones are not verified.
        self._looked: dict[int, int] = {}
        self.damaged = 0
        # The longest ago that stored bytes of a version were found whole, or published; None where there is no version.
        self.oldest_look_us: int | None = None
        self.verified = Verified()

    async def run(self) -> None:
        """Verify what is due, until cancelled. Of servers that share a store one does at a time."""
        try:
            while True:
                try:
                    await asyncio.to_thread(self.scrub)
                except Exception as error:  # a store is away: that is no damage
                    log.warning("artifacts not verified", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(_TICK_S)
        finally:
            self._stop.set()

    def scrub(self) -> int:
        """Verify every version that is due, the longest unverified first, and return how many."""
        count = 0
        self.count_damaged()
        if not self._settings.scrub_interval_hours:
            return count
        with self._registry.database.alone(Turn.SCRUB) as mine:
            while mine and (due := self._due()):
                for key in due:
                    if self._stop.is_set():
                        return count
                    row = self._row(key)
                    if row is None:  # collected since
                        continue
                    if self.verify(row, self._stop, bytes_per_s=self._settings.scrub_bytes_per_s):
                        self._looked[key] = now_us()
                    count += 1
        return count

    def _due(self) -> list[int]:
        """Return ids of some versions that are due, the longest unverified first."""
        before = now_us() - round(self._settings.scrub_interval_hours * _HOUR_US)
        self._looked = {key: time_us for key, time_us in self._looked.items() if time_us >= before}
        a = t.artifacts.c
        last = sa.func.coalesce(a.verify_us, a.create_us)
        query = sa.select(a.id).where(a.collect_us.is_(None), last < before).order_by(last, a.id)
        with self._registry.database.read() as connection:
            keys = connection.execute(query.limit(len(self._looked) + _BATCH)).scalars()
            return [key for key in keys if key not in self._looked][:_BATCH]

    def _row(self, key: int) -> ArtifactRow | None:
        with self._registry.database.read() as connection:
            row = connection.execute(sa.select(t.artifacts).filter_by(id=key, collect_us=None)).mappings().first()
        return None if row is None else ArtifactRow(**row)

    def verify(
        self,
        row: ArtifactRow,
        stop: threading.Event,
        *,
        bytes_per_s: int = 0,
        total: Verified | None = None,
    ) -> list[Damage]:
        """Read a version's stored bytes, and write down what was found, unless `stop` is set meanwhile.

        bytes_per_s: a pause after each file keeps the mean below it; 0: no bound. total: is counted up.
        """
        found = []
        for size_bytes, damage in damages(self._registry.blobs, row):
            for counts in (self.verified, total):
                if counts is not None:
                    counts.files += 1
                    counts.size_bytes += size_bytes
            if damage is not None:
                found.append(damage)
            if stop.wait(size_bytes / bytes_per_s if bytes_per_s else 0.0):
                return found
        if damage := signature_damage(self._registry.signer, row):
            found.append(damage)
        for counts in (self.verified, total):
            if counts is not None:
                counts.versions += 1
        record(self._registry, row, found)
        if found or row.damage:
            self.count_damaged()
        return found

    def count_damaged(self) -> None:
        """Bring `damaged` and `oldest_look_us` up to date."""
        query = sa.select(sa.func.count()).select_from(t.artifacts).where(t.artifacts.c.damage != "")
        a = t.artifacts.c
        oldest = sa.select(sa.func.min(sa.func.coalesce(a.verify_us, a.create_us))).where(a.collect_us.is_(None))
        with self._registry.database.read() as connection:
            self.damaged = connection.execute(query.filter_by(collect_us=None)).scalar_one()
            self.oldest_look_us = connection.execute(oldest).scalar()

    # --- on request

    def count(self, family: str, version: int | None) -> int:
        """Return how many versions there are to verify. family: "" means all of them."""
        query = sa.select(sa.func.count()).select_from(t.artifacts).where(_wanted(family, version))
        with self._registry.database.read() as connection:
            return connection.execute(query).scalar_one()

    def page(self, family: str, version: int | None, after_id: int) -> list[ArtifactRow]:
        """Return the versions to verify that follow one, oldest first."""
        query = sa.select(t.artifacts).where(_wanted(family, version), t.artifacts.c.id > after_id)
        with self._registry.database.read() as connection:
            rows = connection.execute(query.order_by(t.artifacts.c.id).limit(_BATCH)).mappings()
            return [ArtifactRow(**row) for row in rows]


def _wanted(family: str, version: int | None) -> sa.ColumnElement[bool]:
    of_family = t.artifacts.c.family == family if family else sa.true()
    of_version = t.artifacts.c.version == version if version is not None else sa.true()
    return t.artifacts.c.collect_us.is_(None) & of_family & of_version
