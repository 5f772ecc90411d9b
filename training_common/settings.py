"""Settings of a service: a TOML file, then the environment, and an error for every key that neither knows.

Precedence: environment over file over default. A nested key is written with two underscores in the environment:
`COGNATE_SERVER_WORKERS__SLOTS=2`. `COGNATE_SERVER_FILE__STORE_URL=/run/secrets/url` gives a key the content of a file,
for secrets. Relative paths count from the working directory.
"""

from __future__ import annotations

import ipaddress
import math
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_SEPARATOR = "__"
# Before a key in the environment: the variable names a file that holds the value.
_FROM_FILE = f"FILE{_SEPARATOR}"
_WILDCARDS = frozenset({"", "0.0.0.0", "::", "*"})  # noqa: S104 - told apart here, never bound
_DEVICE = re.compile(r"\d{1,3}|(GPU|MIG)-[A-Za-z0-9-]{1,80}")
# Workers that may share one device.
MOST_SHARES = 64
_PORT = re.compile(r"(?:^[^:]+|\]):\d+$")
# Keys that hold lists: comma-separated in the environment.
_LISTS = ("roles", "tags", "callers", "devices", "public_key_files", "names")
S = TypeVar("S", bound="ServiceSettings")


class SettingsError(Exception):
    """The settings cannot be used. The message names every key that is wrong, and where it was set."""


class Section(BaseModel):
    """A part of the settings. Unknown keys are errors, and nothing changes after the start."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class KubernetesSettings(Section):
    """Where and how workers run on a cluster with Kubeflow Trainer."""

    namespace: str = Field(default="default", description="namespace of the TrainJobs")
    runtime: str = Field(
        default="torch-distributed",
        description="ClusterTrainingRuntime, which brings the image, the volumes and the environment of workers",
    )
    image: str = Field(default="", description="image of workers; empty: the runtime's")
    queue: str = Field(default="", description="Kueue's local queue; empty: workers are not queued")
    priority_class: str = Field(default="", description="Kueue's WorkloadPriorityClass of workers; empty: none")
    resources: dict[str, str] = Field(default={}, description="what each node asks for, such as cpu and memory")
    processes_per_node: int = Field(default=1, ge=1, le=64, description="most processes of a job on one node")
    settings_file: Path | None = Field(
        default=None, description="settings file of workers where they run; none: their environment alone"
    )
    kubeconfig: Path | None = Field(default=None, description="none: this server runs in the cluster itself")
    context: str = Field(default="", description="context of kubeconfig; empty: its current one")


class RaySettings(Section):
    """Where and how workers run on a Ray cluster."""

    address: str = Field(
        default="http://127.0.0.1:8265",
        pattern=r"^https?://[^/\s]+/?$",
        description="Ray's job server, which is the dashboard of the cluster's head: http://HOST:PORT",
    )
    resources: dict[str, float] = Field(
        default={"CPU": 1.0}, description="what each process asks for: CPU, GPU, and what the cluster itself names"
    )
    environment: dict[str, str] = Field(
        default={}, description="variables of workers; Ray shows them to whoever sees its jobs, so no secrets"
    )
    settings_file: Path | None = Field(
        default=None, description="settings file of workers where they run; none: their environment alone"
    )

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        for name, amount in self.resources.items():
            if not (math.isfinite(amount) and amount >= 0):
                raise ValueError(f"resources.{name}: {amount} is no amount: give 0 or more")
        if not any(self.resources.values()):
            # Ray would put any number of them on one node.
            raise ValueError("resources: a process that asks for nothing has no bound: give CPU, or another")
        return self


class WorkerSettings(Section):
    """How training processes are run."""

    engine: Literal["local", "kubernetes", "ray"] = Field(default="local", description="what starts the processes")
    kubernetes: KubernetesSettings = KubernetesSettings()
    ray: RaySettings = RaySettings()
    slots: int = Field(
        default=1, ge=0, le=64, description="processes that train at the same time; 0 takes jobs in and runs none"
    )
    threads: int = Field(default=0, ge=0, le=1024, description="torch threads of a process; 0 shares out all cores")
    heartbeat_interval_s: float = Field(default=1.0, gt=0, le=60, description="seconds between signs of life")
    lost_after_s: float = Field(default=30.0, gt=0, le=3600, description="silence that makes a job unobserved")
    silent_cut_s: float = Field(
        default=600.0,
        gt=0,
        le=86_400,
        description="silence after which a worker is given up, though its process may live",
    )
    start_timeout_s: float = Field(default=120.0, gt=0, le=3600, description="longest start of a worker process")
    retries_without_progress: int = Field(
        default=3, ge=0, le=100, description="lost workers in a row that finished no new checkpoint, before FAILED"
    )
    kills_without_progress: int = Field(
        default=30,
        ge=0,
        le=10_000,
        description="workers in a row that were ended from outside before a new checkpoint, before FAILED",
    )
    deadline_grace_s: float = Field(
        default=60.0, gt=0, le=3600, description="time to save and let go after finish_by, before the worker is killed"
    )
    cancel_grace_s: float = Field(
        default=60.0, gt=0, le=3600, description="time to end after a cancel, before the worker is killed"
    )
    on_drain: Literal["keep", "hand_over"] = Field(
        default="keep",
        description="workers of a server that is stopped: keep lets them go on until it is started again with its "
        "data_dir; hand_over has them save and end, so that other servers go on at once",
    )
    start_delay_s: float = Field(
        default=0.0,
        ge=0,
        le=3600,
        description="time after its start in which a server starts no worker: a smoke test may still find it unfit",
    )
    hand_over_grace_s: float = Field(
        default=60.0, gt=0, le=3600, description="time to save and let go for hand_over, before the worker is killed"
    )
    exchange_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        le=86_400,
        description="silence in an exchange of a job's processes after which they count as lost to each other",
    )
    devices: tuple[str, ...] = Field(
        default=(),
        description="indices (as nvidia-smi counts) or UUIDs of devices for workers; none: what the environment shows",
    )
    devices_per_worker: int = Field(
        default=1, ge=1, le=64, description="how many of the devices each process of a worker takes"
    )
    workers_per_device: int = Field(
        default=1,
        ge=1,
        le=MOST_SHARES,
        description="how many processes may share a device; each gets an even part of its memory",
    )
    rendezvous_host: str = Field(
        default="",
        description="engine local: this server's address for nodes, which jobs may be spread over; empty: no nodes",
    )
    node_lost_after_s: float = Field(
        default=30.0, ge=2, le=3600, description="silence of a node in the shared folder after which it counts as lost"
    )
    device_folder: Path | None = Field(
        default=None,
        description="folder of the devices' locks, the same for all services of a host; none: in the temporary folder",
    )
    checkpoints: Literal["async", "sync"] = Field(
        default="async",
        description="async writes beside training and holds one more copy of its state in memory; sync stops training",
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.rendezvous_host and self.engine != "local":
            raise ValueError(
                f"rendezvous_host: engine {self.engine} says itself where processes run: leave one of the two out"
            )
        if self.rendezvous_host in _WILDCARDS - {""}:
            raise ValueError(
                f"rendezvous_host: {self.rendezvous_host!r} is nothing that nodes can dial: give this machine's address"
            )
        return self

    @model_validator(mode="after")
    def _devices_suffice(self) -> Self:
        if len(set(self.devices)) != len(self.devices):
            raise ValueError("devices: a device is named twice: name each once")
        for device in self.devices:
            if not _DEVICE.fullmatch(device):
                raise ValueError(f"devices: {device!r} is neither an index nor a UUID")
        if self.workers_per_device > 1 and not self.devices:
            raise ValueError(
                f"workers_per_device: {self.workers_per_device} workers cannot share devices that are not named: set "
                "devices, or leave workers_per_device out"
            )
        if self.devices and self.devices_per_worker > len(self.devices):
            raise ValueError(
                f"devices_per_worker: a worker takes {self.devices_per_worker} of {len(self.devices)} devices: "
                "name more devices, or take fewer"
            )
        return self


class DataSettings(Section):
    """Where training data comes from, in this order: folder, hub, generator."""

    folder: Path | None = Field(default=None, description="folder with data sets")
    hub: bool = Field(default=False, description="whether sets may be loaded from the hub through `datasets`")


class TlsSettings(Section):
    """The files of mutual TLS, in PEM form. They are read again whenever they change."""

    cert_file: Path = Field(description="the server's certificate, and what leads from it to its authority")
    key_file: Path = Field(description="the certificate's key")
    client_ca_file: Path = Field(description="who signs the certificates of clients; every client must have one")
    connection_age_s: float = Field(
        default=900.0,
        ge=1,
        description="a connection is replaced at this age, so that no certificate is trusted for long after its end",
    )


class SecuritySettings(Section):
    """Who callers are, and which parts they play."""

    tls: TlsSettings | None = Field(default=None, description="mutual TLS; without it only local callers are served")
    roles: dict[str, tuple[str, ...]] = Field(
        default={}, description="with TLS: roles by the SPIFFE id of the caller's certificate"
    )
    local_roles: tuple[str, ...] = Field(
        default=("viewer", "operator", "agent_service"),
        description="without TLS: roles of callers on loopback and Unix sockets",
    )


class HourSettings(Section):
    """Prices of something for an hour."""

    on_demand: float | None = Field(default=None, ge=0, description="price for an hour that is kept; none: not offered")
    spot: float | None = Field(
        default=None, ge=0, description="price for an hour that may be cut short; none: not offered"
    )


class KindPrices(Section):
    """Prices by kind of resource, for offers that have none of their own."""

    core: HourSettings = HourSettings()
    memory_gib: HourSettings = HourSettings()
    gpu: HourSettings = HourSettings()


class OfferSettings(Section):
    """A machine that can be had, and its price."""

    cores: int = Field(ge=1, description="processor cores")
    memory_bytes: int = Field(ge=1, description="main memory")
    gpus: int = Field(default=0, ge=0, description="graphics processors")
    speed: float = Field(default=1.0, gt=0, description="steps a second there over those of this server, as measured")
    hour: HourSettings | None = Field(default=None, description="price for an hour; none: that of its parts, by kind")


class PriceSettings(Section):
    """What workers cost, for estimates. Without a price no cost is told."""

    worker_hour: float | None = Field(
        default=None, ge=0, description="price of a worker of this server for an hour; none: not counted"
    )
    currency: str = Field(default="", pattern="^([A-Z]{3})?$", description="ISO 4217 code of all prices, as EUR")
    kinds: KindPrices = KindPrices()
    offers: dict[str, OfferSettings] = Field(default={}, description="machines that can be had elsewhere, by name")

    @model_validator(mode="after")
    def _has_a_currency(self) -> Self:
        if (self.worker_hour is not None or self.offers) and not self.currency:
            raise ValueError("prices have no currency: set currency beside them")
        for name in self.offers:
            if not 1 <= len(name) <= 64:
                raise ValueError(f"offers.{name}: a name has 1 to 64 characters")
        return self


class AuditSettings(Section):
    """How much of the audit log is kept."""

    max_file_bytes: int = Field(default=64 << 20, ge=4096, description="size at which a new file is begun")
    keep_files: int = Field(default=16, ge=1, le=10_000, description="older files that are kept beside the newest")


class LogSettings(Section):
    """How much of each attempt's log is kept: its beginning and its end."""

    keep_first_bytes: int = Field(default=1 << 20, ge=0, le=1 << 30, description="beginning of a log that is kept")
    keep_last_bytes: int = Field(
        default=15 << 20, ge=64 << 10, le=1 << 34, description="end of a log that is kept; what lies between may go"
    )


class RetentionSettings(Section):
    """For how long what an ended job leaves behind is kept. 0 days keeps it for good."""

    job_files_days: float = Field(
        default=90.0,
        ge=0,
        le=36_500,
        description="after a job's end, its folder: checkpoints that are not pinned, logs, scratch files",
    )
    job_events_days: float = Field(
        default=365.0, ge=0, le=36_500, description="after a job's end, its events and metrics, but for the last event"
    )
    request_ids_days: float = Field(
        default=30.0, ge=0, le=36_500, description="after a mutation, its request_id: a repeat is new from then on"
    )
    sweep_interval_s: float = Field(default=600.0, gt=0, le=86_400, description="seconds between two sweeps")


class ExporterSettings(Section):
    """Where workers pass their metrics on to, beside the service's own history."""

    names: tuple[str, ...] = Field(
        default=(), description="exporters: tensorboard, and what installed packages bring by entry point"
    )
    queue_length: int = Field(
        default=1000, ge=1, le=1_000_000, description="reports that wait for a slow exporter; later ones are lost to it"
    )
    tensorboard_folder: Path | None = Field(
        default=None, description="folder for a folder of each job; none: tensorboard in the job's own folder"
    )
    options: dict[str, dict[str, str]] = Field(
        default={}, repr=False, description="settings of exporters by packages, by the exporter's name"
    )

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.names)) != len(self.names):
            raise ValueError("names: an exporter is named twice: name each once")
        if unnamed := sorted(set(self.options) - set(self.names)):
            raise ValueError(f"options: {', '.join(unnamed)}: not among names: add it there, or leave its options out")
        return self


class ArtifactSettings(Section):
    """Where published artifacts are kept, for how long, and how they are looked after. 0 days keeps them for good."""

    url: str = Field(
        default="",
        description="store of their bytes: a folder, or s3://BUCKET/PREFIX; empty: the folder artifacts of shared_dir",
    )
    archive_url: str = Field(default="", description="store of archived versions' bytes; empty: there is no archive")
    options: dict[str, str] = Field(
        default={},
        repr=False,
        description="of the object store, such as endpoint and region; what is not here comes from the environment",
    )
    keep_newest: int = Field(default=5, ge=1, le=10_000, description="newest versions of a family that always stay")
    archive_after_days: float = Field(
        default=0.0, ge=0, le=36_500, description="after its publication, a version's bytes move to the archive"
    )
    collect_after_days: float = Field(
        default=0.0, ge=0, le=36_500, description="after its publication, a version that nothing depends on is removed"
    )
    orphan_hours: float = Field(
        default=24.0, ge=1, le=8760, description="age at which stored bytes that no version names are removed"
    )
    scrub_interval_hours: float = Field(
        default=24.0, ge=0, le=8760, description="hours between two verifications of everything; 0: only on request"
    )
    scrub_bytes_per_s: int = Field(
        default=64 << 20, ge=0, description="bytes that a periodic verification reads a second at most; 0: no bound"
    )
    signing_key_file: Path | None = Field(
        default=None, description="private key (PEM, P-256) that signs what is published; none: nothing is signed"
    )


class LimitSettings(Section):
    """Bounds of what one server takes on."""

    max_concurrent_rpcs: int = Field(default=1000, ge=1, description="calls and streams at once")
    max_request_bytes: int = Field(default=1 << 20, ge=1024, description="size of one request message")
    max_metadata_bytes: int = Field(default=8 << 10, ge=1024, description="size of one call's metadata")
    caller_calls_per_s: float = Field(
        default=500.0, ge=0, description="calls a second of one caller with an identity; 0 means no bound"
    )
    caller_open_calls: int = Field(
        default=300, ge=0, description="calls and streams at once of one caller with an identity; 0 means no bound"
    )


class ConsulSettings(Section):
    """Where the service is registered, for clients to find it. Without a service name it is not."""

    service: str = Field(default="", description="name to register under; empty: no registration")
    host: str = Field(default="", description="Consul agent's host; empty: CONSUL_HTTP_ADDR's, or 127.0.0.1")
    port: int = Field(default=0, ge=0, le=65535, description="Consul agent's port; 0: CONSUL_HTTP_ADDR's, or 8500")
    scheme: Literal["", "http", "https"] = Field(default="", description="empty: CONSUL_HTTP_ADDR's, or http")
    token: str = Field(default="", repr=False, description="ACL token with service:write; empty: CONSUL_HTTP_TOKEN's")
    ttl_s: float = Field(
        default=15.0, ge=1, le=3600, description="silence after which Consul calls this server critical"
    )
    deregister_critical_after_s: float = Field(
        default=600.0, ge=60, description="seconds of being critical after which Consul drops it; its floor is a minute"
    )
    tags: tuple[str, ...] = Field(default=(), description="tags of this instance")
    advertise: str = Field(
        default="", description="host or host:port that clients dial; empty: the address, if that is no wildcard"
    )


class TelemetrySettings(Section):
    """What a service tells monitoring systems of itself. By default nothing."""

    address: str = Field(
        default="", description="host:port or unix:PATH of the HTTP listener of /metrics and /healthz; empty: none"
    )
    training_jobs: int = Field(
        default=50, ge=0, le=1000, description="newest running jobs that have series of their own; 0: none has"
    )
    otlp_endpoint: str = Field(
        default="",
        pattern=r"^(https?://[^/@\s]+/?)?$",
        description="OTLP collector over gRPC, http://HOST:PORT or https://; empty: no traces and metrics are sent",
    )
    otlp_interval_s: float = Field(default=15.0, ge=1, le=3600, description="seconds between two exports of metrics")
    # A span that is kept and sent costs about a third of a short call, one that is not next to nothing.
    trace_ratio: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of calls traced where the caller has not decided; starts of jobs always are",
    )
    allow_plaintext: bool = Field(
        default=False, description="whether both may leave this machine unencrypted: the listener, and http:// to OTLP"
    )

    @model_validator(mode="after")
    def _address_is_one(self) -> Self:
        if self.address and not self.address.startswith("unix:") and not _PORT.search(self.address):
            raise ValueError(f"address {self.address!r} is no address: write host:port, [ipv6]:port or unix:PATH")
        return self

    @model_validator(mode="after")
    def _plaintext_stays_local(self) -> Self:
        if self.allow_plaintext:
            return self
        if self.address and not is_local_address(self.address):
            raise ValueError(
                f"address {self.address!r} is not loopback, and the listener speaks plain HTTP: use 127.0.0.1, [::1], "
                "localhost or unix:PATH, or set allow_plaintext where only the monitoring system reaches it"
            )
        host = self.otlp_endpoint.removeprefix("http://").rstrip("/")
        if self.otlp_endpoint.startswith("http://") and not is_local_address(host if ":" in host else f"{host}:0"):
            raise ValueError(
                f"otlp_endpoint {self.otlp_endpoint!r} is not on this machine, and http:// is plaintext: use https://, "
                "or set allow_plaintext"
            )
        return self


class ServiceSettings(Section):
    """What both services are told."""

    # Its name where both are told of.
    SERVICE: ClassVar[str] = "service"

    address: str = Field(description="host:port or unix:PATH to listen on; port 0 takes a free one")
    data_dir: Path = Field(description="folder of this server alone: audit log, lock")
    shared_dir: Path | None = Field(
        default=None,
        description="folder of artifacts, checkpoints and workers' logs, for all servers of a store; none: data_dir",
    )
    store_url: str = Field(default="", description="SQLAlchemy URL; empty means SQLite in data_dir")
    drain_grace_s: float = Field(default=10.0, ge=0, le=600, description="seconds that calls get to end on SIGTERM")
    heartbeat_frame_s: float = Field(default=10.0, gt=0, le=600, description="silence of a watch before a heartbeat")
    workers: WorkerSettings = WorkerSettings()
    data: DataSettings = DataSettings()
    security: SecuritySettings = SecuritySettings()
    limits: LimitSettings = LimitSettings()
    consul: ConsulSettings = ConsulSettings()
    audit: AuditSettings = AuditSettings()
    price: PriceSettings = PriceSettings()
    logs: LogSettings = LogSettings()
    retention: RetentionSettings = RetentionSettings()
    exporters: ExporterSettings = ExporterSettings()
    artifacts: ArtifactSettings = ArtifactSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _plaintext_stays_local(self) -> Self:
        if self.security.tls is None and not is_local_address(self.address):
            raise ValueError(
                f"address {self.address!r} is not loopback, and plaintext stays on this machine: "
                "use 127.0.0.1, [::1], localhost or unix:PATH, or set security.tls"
            )
        return self

    @model_validator(mode="after")
    def _nodes_reach_all(self) -> Self:
        host = self.workers.rendezvous_host
        if host and not is_local_address(f"{host}:0"):
            if self.shared_dir is None:
                raise ValueError(
                    "shared_dir is missing, and nodes on other machines need it: give a folder that all of them reach, "
                    "or leave workers.rendezvous_host out"
                )
            if not self.store_url.startswith("postgresql"):
                raise ValueError(
                    "store_url is no PostgreSQL, and SQLite is for one machine: give one that nodes reach, or leave "
                    "workers.rendezvous_host out"
                )
        return self

    @model_validator(mode="after")
    def _can_be_found(self) -> Self:
        host = self.address.rpartition(":")[0].strip("[]")
        nowhere = self.address.startswith("unix:") or host in _WILDCARDS
        if self.consul.service and not self.consul.advertise and nowhere:
            raise ValueError(
                f"consul.advertise is missing: nobody can dial {self.address!r} from elsewhere; give the host or "
                "host:port under which clients reach this server"
            )
        if self.consul.service and self.address.startswith("unix:") and not _PORT.search(self.consul.advertise):
            raise ValueError(f"consul.advertise {self.consul.advertise!r} has no port, and {self.address!r} has none")
        return self

    @property
    def files_dir(self) -> Path:
        """Return the folder of artifacts and checkpoints."""
        return self.shared_dir or self.data_dir

    @property
    def server_name(self) -> str:
        """Return this server's name among those that share its store, the same after a restart."""
        return f"{socket.gethostname()}:{self.data_dir.resolve()}"[-255:]

    @property
    def database_url(self) -> str:
        """Return the store's URL with the default filled in."""
        return self.store_url or f"sqlite:///{self.data_dir.resolve() / 'store.db'}"


def is_local_address(address: str) -> bool:
    """Whether only this machine can reach the address."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_data_folder(settings: ServiceSettings) -> None:
    """Refuse a data folder that is not there: a mistyped one would otherwise look like a server without data.

    Errors: SettingsError.
    """
    folder = settings.data.folder
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"data.folder: {folder} is no folder; correct the path, create it, or leave the key out")


def load(cls: type[S], *, file: Path | None, environment: Mapping[str, str] | None = None, prefix: str) -> S:
    """Read settings from `file` and from the variables that start with `prefix`.

    Errors: SettingsError, with one line for each wrong key.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"settings file {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(f"settings file {file}: {error}") from error
    given = os.environ if environment is None else environment
    for variable, text in sorted(given.items()):
        if not variable.startswith(prefix):
            continue
        key = variable.removeprefix(prefix)
        if key.startswith(_FROM_FILE):
            key = key.removeprefix(_FROM_FILE)
            if f"{prefix}{key}" in given:
                raise SettingsError(f"variable {variable}: {prefix}{key} gives the same key: set one of the two")
            text = _content(variable, Path(text))
        if not _place(values, key.lower().split(_SEPARATOR), text):
            raise SettingsError(f"variable {variable}: a key above it has a value of its own: set one of the two")
    try:
        return cls.model_validate(values, strict=False)
    except ValidationError as error:
        lines = [_told(item["type"], item["loc"], item["msg"]) for item in error.errors(include_url=False)]
        raise SettingsError(f"settings from {file or 'defaults'} and {prefix}*: " + "; ".join(lines)) from error


def _content(variable: str, file: Path) -> str:
    """Return what a file holds, without the line's end that editors leave. Errors: SettingsError."""
    try:
        return file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise SettingsError(f"variable {variable}: file {file} cannot be read: {reason}") from error


def _told(kind: str, place: tuple[int | str, ...], message: str) -> str:
    """Return what is wrong with a key, in words of settings and not of pydantic's."""
    key = ".".join(str(part) for part in place)
    if kind == "extra_forbidden":
        return f"{key}: unknown key"
    text = message.removeprefix("Value error, ")
    return f"{key}: {text}" if key else text


def _place(values: dict[str, Any], path: list[str], text: str) -> bool:
    """Set a key, and return whether there was room for it: a value on the way to it is no section."""
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            return False
    # Every other type is parsed from its text by pydantic.
    values[path[-1]] = [part.strip() for part in text.split(",")] if path[-1].endswith(_LISTS) else text
    return True
