"""A gRPC server of this project: its options, its standing tasks, and a drain that loses no call."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from training_common.devices import DeviceLocks
from training_common.discovery import Registration, register
from training_common.engines.processes import exit_at_once
from training_common.folder_lock import FolderLock
from training_common.rpc.address import require_free
from training_common.rpc.audit import AuditLog
from training_common.rpc.certificates import ServerCertificates
from training_common.rpc.health import HealthMonitor
from training_common.rpc.identity import MAX_NAME_CHARS, SPIFFE_ID, Callers
from training_common.rpc.interceptor import ContractInterceptor
from training_common.rpc.limits import CallerLimits
from training_common.rpc.policy import policies, role_names
from training_common.settings import ServiceSettings, SettingsError, require_data_folder
from training_common.store.database import Database
from training_common.telemetry.server import ServerTelemetry

HEALTH = "grpc.health.v1.Health"
log = structlog.get_logger(__name__)

# Time for clients that watch health to take their next call elsewhere, before this server stops taking any.
_DRAIN_NOTICE_S = 0.5
# What runs on a connection that has reached its age may end: longer than the client library lets a stream live.
_AGE_GRACE_MS = 360_000


@dataclass(frozen=True, kw_only=True)
class Listener:
    """A server that is not up yet, and what it listens and audits with."""

    server: grpc.aio.Server
    audit: AuditLog
    telemetry: ServerTelemetry
    certificates: ServerCertificates | None

    def bind(self, address: str) -> int:
        """Open the address and return its port. Errors: RuntimeError, when it cannot be bound."""
        if self.certificates is None:
            return self.server.add_insecure_port(address)
        return self.server.add_secure_port(address, self.certificates.credentials())


def create_server(settings: ServiceSettings, services: Sequence[str]) -> Listener:
    """Return a server with the contract's interceptor.

    Errors: SettingsError for a role that the contract lacks, a name that is no SPIFFE id, certificates that cannot be
    used, a data folder that is not there, or telemetry without the packages that it needs.
    """
    require_data_folder(settings)
    if settings.workers.devices:
        DeviceLocks(settings.workers.device_folder)  # refused here rather than in every worker
    security, limits = settings.security, settings.limits
    _require_roles("security.local_roles", security.local_roles)
    for name, roles in security.roles.items():
        if not SPIFFE_ID.fullmatch(name) or len(name) > MAX_NAME_CHARS:
            raise SettingsError(
                f"security.roles: {name!r} is no SPIFFE id of at most {MAX_NAME_CHARS} characters; write "
                "spiffe://TRUST_DOMAIN/PATH"
            )
        _require_roles(f"security.roles: {name}", roles)
    certificates = ServerCertificates(security.tls) if security.tls else None
    try:
        audit = AuditLog(settings.data_dir / "audit", settings.audit)
    except OSError as error:
        raise SettingsError(f"data_dir: {settings.data_dir} cannot be used: {error.strerror}") from error
    table = policies(services)
    telemetry = ServerTelemetry(settings, table)
    interceptor = ContractInterceptor(
        table,
        callers=Callers(security.roles, local_roles=security.local_roles, tls=security.tls is not None),
        limits=CallerLimits(calls_per_s=limits.caller_calls_per_s, open_calls=limits.caller_open_calls),
        audit=audit,
        max_streams=max_streams(limits.max_concurrent_rpcs),
        telemetry=telemetry.calls,
    )
    # Of one connection. With TLS a caller may not have as many, but who is above the bound should be told and not wait.
    per_connection = limits.max_concurrent_rpcs
    if security.tls and limits.caller_open_calls:
        per_connection = min(per_connection, 2 * limits.caller_open_calls)
    options: list[tuple[str, Any]] = [
        # Two servers on one port would share its calls in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        # gRPC refuses at random between the two sizes; here they are one.
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        ("grpc.max_concurrent_streams", per_connection),
    ]
    if security.tls:
        options += [
            # gRPC adds up to a tenth, so that connections do not all end together.
            ("grpc.max_connection_age_ms", round(security.tls.connection_age_s * 1000 / 1.1)),
            ("grpc.max_connection_age_grace_ms", _AGE_GRACE_MS),
        ]
    server = grpc.aio.server(
        interceptors=[interceptor], maximum_concurrent_rpcs=limits.max_concurrent_rpcs, options=options
    )
    return Listener(server=server, audit=audit, telemetry=telemetry, certificates=certificates)


def _require_roles(key: str, roles: Sequence[str]) -> None:
    unknown = set(roles) - set(role_names())
    if unknown:
        raise SettingsError(f"{key}: {', '.join(sorted(unknown))} is no role; choose from {', '.join(role_names())}")


def max_streams(max_concurrent_rpcs: int) -> int:
    """Return how many streams may be open, so that a tenth of the calls stays for short ones, health among them."""
    return max(1, max_concurrent_rpcs - max(1, max_concurrent_rpcs // 10))


class RunningServer:
    """A server that listens, with its standing tasks, until it is drained."""

    def __init__(
        self,
        listener: Listener,
        *,
        settings: ServiceSettings,
        services: Sequence[str],
        health: HealthMonitor,
        database: Database,
        lock: FolderLock,
        tasks: Sequence[Coroutine[Any, Any, None]],
        hand_over: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """hand_over: called when the server is drained, beside the end of its calls; None: its workers go on."""
        self._listener = listener
        self._server = server = listener.server
        self._settings = settings
        self._health = health
        self._database = database
        self._lock = lock
        self._standing = tasks
        self._hand_over = hand_over
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""
        # Set when the server has ended by itself: only another process can serve then.
        self.ended = asyncio.Event()
        self._stopping = False
        self._registration: Registration | None = None
        health_pb2_grpc.add_HealthServicer_to_server(health.servicer, server)
        reflection.enable_server_reflection([*services, HEALTH, reflection.SERVICE_NAME], server)

    async def start(self) -> None:
        """Listen. `address` then holds the real port. Errors: RuntimeError, when the address is taken."""
        wanted = self._settings.address
        try:
            require_free(wanted)
            port = self._listener.bind(wanted)
        except RuntimeError:
            await self._let_go()
            raise
        self.address = wanted if wanted.startswith("unix:") else f"{wanted.rpartition(':')[0]}:{port}"
        self._health.watch_audit(self._listener.audit)
        await self._health.check()
        try:
            await self._listener.telemetry.start(
                health=self._health, audit=self._listener.audit, certificates=self._listener.certificates
            )
        except RuntimeError:
            await self._let_go()
            raise
        await self._server.start()
        self._tasks = [asyncio.create_task(self._stand(task)) for task in (self._health.run(), *self._standing)]
        self._tasks.append(asyncio.create_task(self._guard()))
        self._registration = register(self._settings.consul, self.address, lambda: self._health.serving)

    async def _guard(self) -> None:
        """Notice when gRPC's server ends by itself. It does so on a path that is no UTF-8, and never listens again."""
        try:
            await self._server.wait_for_termination()
        except Exception:
            log.critical("the gRPC server failed", exc_info=True)
        if not self._stopping:
            await self._health.give_up()
            self.ended.set()

    async def _stand(self, task: Coroutine[Any, Any, None]) -> None:
        """Run a standing task. One that ends by itself takes health with it: jobs or watches would wait in vain."""
        name = getattr(task, "__qualname__", "task")
        try:
            await task
            log.critical("a standing task ended", task=name)
        except Exception:
            log.critical("a standing task failed", task=name, exc_info=True)
        await self._health.give_up()

    async def stop(self) -> None:
        """Drain: leave Consul, tell health watchers, take no new call, let running ones end, stop.

        Workers go on, or are handed over to other servers meanwhile.
        """
        self._stopping = True
        if self._registration is not None:
            await asyncio.to_thread(self._registration.close)
        await self._health.drain()
        handing_over = asyncio.create_task(self._let_workers_go())
        await asyncio.sleep(_DRAIN_NOTICE_S)
        if not self.ended.is_set():
            await self._server.stop(self._settings.drain_grace_s)
        await handing_over
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._let_go()

    async def _let_workers_go(self) -> None:
        if self._hand_over is not None and self._settings.workers.on_drain == "hand_over":
            await self._hand_over()

    @property
    def admin_address(self) -> str:
        """Where metrics and the pages of probes are, or nothing."""
        return self._listener.telemetry.address

    @property
    def telemetry(self) -> ServerTelemetry:
        """What the server tells of itself."""
        return self._listener.telemetry

    async def _let_go(self) -> None:
        await self._listener.telemetry.stop()
        for task in self._standing:
            task.close()
        await asyncio.to_thread(self._database.close)
        self._listener.audit.close()
        self._lock.release()


def _main_loops() -> list[asyncio.Task[Any]]:
    """Return the tasks in which gRPC's servers of this process take calls; gRPC has no public name for them."""
    return [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__name__", "") == "_server_main_loop"]


async def serve_until_signal(running: RunningServer, *, name: str, address_file: Path | None) -> None:
    """Serve until SIGTERM or SIGINT, then drain. The bound address is logged, and written to `address_file`.

    Where gRPC's server has ended by itself, this process ends at once, with status 1: what is left of it writes into
    memory that is not its own, and of forty processes that went on one crashed. As after a kill, workers go on and the
    next server finds them.
    Errors: RuntimeError, when the address is taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    await running.start()
    admin = {"admin": running.admin_address} if running.admin_address else {}
    log.info("serving", service=name, address=running.address, **admin)
    if address_file is not None:
        await asyncio.to_thread(_announce, address_file, running.address)

    def end(main_loop: asyncio.Task[Any] | None) -> None:
        if stop.is_set():
            return
        error = None if main_loop is None or main_loop.cancelled() else main_loop.exception()
        log.critical(
            "the gRPC server ended by itself, this or what was logged before tells why: start the service again",
            exc_info=error,
        )
        if address_file is not None:
            address_file.unlink(missing_ok=True)
        exit_at_once(1)

    # Its main loop tells of its end at once, and nothing else may run after it. What gRPC has in public tells of it
    # 20 s later, and calls wait until then.
    for task in _main_loops():
        task.add_done_callback(end)
    waits = [asyncio.create_task(event.wait()) for event in (stop, running.ended)]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if running.ended.is_set():
        end(None)
    log.info("draining", service=name)
    await running.stop()
    if address_file is not None:
        await asyncio.to_thread(address_file.unlink, missing_ok=True)
    log.info("stopped", service=name)


def _announce(address_file: Path, address: str) -> None:
    # Renamed into place, so that a reader finds the whole address or no file.
    scratch = address_file.with_suffix(".tmp")
    scratch.write_text(address)
    scratch.rename(address_file)
