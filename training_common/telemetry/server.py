"""A server's telemetry: what it counts, where it is told, and how that starts and ends with the server."""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import structlog
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder

from training_common.release import release_of
from training_common.rpc.audit import AuditLog
from training_common.rpc.certificates import ServerCertificates
from training_common.rpc.health import HealthMonitor
from training_common.rpc.policy import MethodPolicy, streams_of
from training_common.settings import ServiceSettings
from training_common.store.database import Database
from training_common.telemetry.admin import AdminListener
from training_common.telemetry.calls import CallTelemetry
from training_common.telemetry.instruments import Instruments
from training_common.telemetry.probe import Probe
from training_common.telemetry.readings import Reading, families
from training_common.telemetry.spans import Tracer, require_otel
from training_common.telemetry.store_state import Part, StoreState

log = structlog.get_logger(__name__)

# How often job events are counted where nobody asks: what is read at once stays little.
_COUNT_EVERY_S = 10.0
# Gives what is known without asking anybody.
Live = Callable[[], Iterable[Reading]]


class ServerTelemetry:
    """Metrics and traces of one server. `watch` says what there is to look at, before `start`."""

    def __init__(self, settings: ServiceSettings, table: Mapping[str, MethodPolicy]) -> None:
        """table: the RPCs, by "/package.Service/Method". Errors: SettingsError, without what OTLP needs."""
        require_otel(settings.telemetry)
        self._settings = settings
        self._service = settings.SERVICE
        methods = [method[1:] for method in table]
        self.instruments = Instruments(self._service, methods=methods, streams=streams_of(methods))
        told = settings.telemetry
        self.tracer = Tracer(told, service=self._service, instance=settings.server_name) if told.otlp_endpoint else None
        self.calls = CallTelemetry(self.instruments, self.tracer) if self.wanted else None
        self._live: list[Live] = []
        self._probes: list[Probe] = []
        self.store: Probe | None = None
        self.database: Database | None = None
        self._admin: AdminListener | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def wanted(self) -> bool:
        """Whether anybody is told anything."""
        return bool(self._settings.telemetry.address or self._settings.telemetry.otlp_endpoint)

    @property
    def address(self) -> str:
        """Where the admin listener is, or nothing."""
        return self._admin.address if self._admin is not None else ""

    def trace_process(self) -> None:
        """Make this server's tracer that of the process, so that its calls of other services are traced too."""
        if self.tracer is not None:
            self.tracer.install()

    def sender(self, method: str) -> Callable[[int], None]:
        """Return what counts the bytes of artifacts that a method sends."""
        return self.instruments.sender(method).inc

    def watch(
        self,
        database: Database,
        *,
        live: Sequence[Live],
        stored: Sequence[Part],
        recoveries: Iterable[tuple[str, str]] = (),
    ) -> None:
        """Say what to look at. live: what costs nothing to ask. stored: what is read off the store.

        recoveries: pairs of detector and action that the service's recovery manager may take.
        """
        if not self.wanted:
            return
        self.instruments.expect_recoveries(recoveries)
        database.on_write = self.instruments.write_ended
        self._live += live
        self.database = database
        self.store = Probe("store", StoreState(database, self.instruments, stored).read)
        self._probes = [Probe("disk", functools.partial(_disks, self._settings))]

    async def start(self, *, health: HealthMonitor, audit: AuditLog, certificates: ServerCertificates | None) -> None:
        """Listen and send, as the settings say. Errors: RuntimeError, when the address cannot be used."""
        if not self.wanted:
            return
        self._live.append(lambda: _own(health, audit, certificates))
        told = self._settings.telemetry
        if told.address:
            self._admin = AdminListener(told.address, metrics=self.page, probes=_probes(health))
            await self._admin.start()
        self._tasks.append(asyncio.create_task(self._count()))
        if told.otlp_endpoint:
            from training_common.telemetry.otlp import send_forever

            instance = self._settings.server_name
            self._tasks.append(
                asyncio.create_task(send_forever(told, self.collect, service=self._service, instance=instance))
            )

    async def stop(self) -> None:
        """Tell no more, after the last spans were sent or a bound has passed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._admin is not None:
            await self._admin.stop()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Let go of threads and connections. Also where nothing was started."""
        for probe in (*self._probes, *([self.store] if self.store else [])):
            probe.close()
        if self.tracer is not None:
            self.tracer.close()

    async def page(self, accept: str) -> tuple[bytes, str]:
        """Return the exposition in the best form that is accepted, and its content type."""
        found = await self.collect()
        try:
            encode, kind = choose_encoder(accept)
        except Exception:  # a version that is no number, of which the library makes whatever error
            encode, kind = choose_encoder("")

        class Found:
            def collect(self) -> Sequence[Metric]:
                return found

        # With 50 jobs this is some thousand lines, which takes tens of milliseconds.
        return await asyncio.to_thread(encode, Found()), kind

    async def collect(self) -> list[Metric]:
        """Return every family as it stands. What cannot be looked at is absent."""
        readings = [Reading("forge_build_info", 1, (release_of(self._service),))]
        for live in self._live:
            readings += live()
        stored, *others = await asyncio.gather(*(probe.readings() for probe in (self._required_store, *self._probes)))
        readings += [reading for found in (stored, *others) if found is not None for reading in found]
        up = stored is not None and self.instruments.store_takes_writes
        readings.append(Reading("forge_store_up", float(up)))
        # In a thread: every method has a dozen of buckets, and calls go on meanwhile.
        return await asyncio.to_thread(self._families, readings)

    def _families(self, readings: Sequence[Reading]) -> list[Metric]:
        found = [*self.instruments.collect(), *families(self._service, readings)]
        return sorted(found, key=lambda family: family.name)

    @property
    def _required_store(self) -> Probe:
        if self.store is None:
            raise RuntimeError("telemetry has nothing to look at: call watch first")
        return self.store

    async def _count(self) -> None:
        """Count what happens to jobs, until cancelled; also where nobody scrapes."""
        while True:
            await self._required_store.readings()
            await asyncio.sleep(_COUNT_EVERY_S)


def _probes(health: HealthMonitor) -> dict[str, Callable[[], tuple[bool, str]]]:
    """What probes of a server can ask for: all that it does, whether calls reach it, whether a restart would help."""
    return {
        "/healthz": lambda: (health.serving, health.word),
        "/readyz": lambda: (health.ready, "READY" if health.ready else "NOT_READY"),
        "/livez": lambda: (health.alive, "ALIVE" if health.alive else "GIVEN_UP"),
    }


def _own(health: HealthMonitor, audit: AuditLog, certificates: ServerCertificates | None) -> Iterable[Reading]:
    yield Reading("forge_serving", float(health.word == "SERVING"))
    yield Reading("forge_audit_failures_total", audit.failures)
    if certificates is not None:
        yield Reading("forge_certificate_expiry_timestamp_seconds", certificates.expire_s)


def _disks(settings: ServiceSettings) -> list[Reading]:
    folders: dict[str, Path] = {"data_dir": settings.data_dir}
    if settings.shared_dir is not None:
        folders["shared_dir"] = settings.shared_dir
    found = []
    for name, folder in folders.items():
        usage = shutil.disk_usage(folder)
        found += [
            Reading("forge_disk_free_bytes", usage.free, (name,)),
            Reading("forge_disk_size_bytes", usage.total, (name,)),
        ]
    return found
