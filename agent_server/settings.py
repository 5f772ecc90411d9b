"""Settings of the agent service."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from training_common.settings import Section, ServiceSettings, SettingsError, load

ENVIRONMENT_PREFIX = "AGENT_SERVER_"
TENANT = "^[a-z][a-z0-9-]{0,47}$"


class CognateTls(Section):
    """The files of mutual TLS with Cognate, in PEM form. They are read again whenever they change."""

    ca_file: Path = Field(description="who signs Cognate's certificate")
    cert_file: Path = Field(description="this service's certificate, whose SPIFFE id has the role agent_service there")
    key_file: Path = Field(description="the certificate's key")
    server_name: str = Field(default="", description="name in Cognate's certificate; empty: the address's host")


class CognateEndpoint(Section):
    """Where Cognate is. Only agent_server.foundation goes there."""

    address: str = Field(default="127.0.0.1:7101", description="host:port of the Cognate service, or unix:PATH")
    consul_service: str = Field(
        default="", description="service name in Consul; when given, it takes the place of the address"
    )
    tls: CognateTls | None = Field(default=None, description="needed where Cognate is not on this machine")
    ask_within_s: float = Field(
        default=1.0, ge=0, le=60, description="time for Cognate to speak for a plan's foundation; 0: it is not asked"
    )
    hold_slot_s: float = Field(
        default=10.0,
        ge=0,
        le=3600,
        description="how long a worker waits for Cognate before its job goes back to the queue and frees the slot",
    )
    give_up_after_s: float = Field(
        default=0.0, ge=0, description="how long a job waits for Cognate before it has failed; 0: as long as it takes"
    )
    provenance: Literal["ignore", "require"] = Field(
        default="ignore", description="require: only models with a statement, signed with one of public_key_files"
    )
    public_key_files: tuple[Path, ...] = Field(
        default=(), description="public keys (PEM, P-256), any of which may have signed a model"
    )

    @model_validator(mode="after")
    def _requires_a_key(self) -> Self:
        if self.provenance == "require" and not self.public_key_files:
            raise ValueError(
                "public_key_files is missing, and provenance is required: name the public key that Cognate's models "
                "are signed with, or leave provenance out"
            )
        return self


class BorrowSettings(Section):
    """Processor cores of Cognate's host that it leaves idle, for jobs that find no slot of our own.

    The local engine starts workers on this host, so borrow only where it is Cognate's as well.
    """

    cores: int = Field(default=0, ge=0, le=1024, description="cores to borrow for one more worker; 0 borrows nothing")
    workers: int = Field(default=1, ge=1, le=64, description="workers on borrowed cores at the same time")
    ttl_s: float = Field(default=30.0, ge=3, le=86_400, description="length of a lease; it is renewed at a third of it")


class PreemptionSettings(Section):
    """Whether a running job is stopped for a waiting one that matters more, and goes on later from its checkpoint."""

    least_difference: int = Field(
        default=0, ge=0, le=200, description="points of priority by which the waiting one must be higher; 0: never"
    )
    grace_s: float = Field(
        default=120.0, gt=0, le=3600, description="time to save and let go, before the worker is killed"
    )


class EvaluationSettings(Section):
    """Evaluations of agents on request. Each is a process beside the workers of jobs, and takes no slot of theirs."""

    at_once: int = Field(default=1, ge=1, le=64, description="evaluations at the same time; further ones are refused")
    threads: int = Field(default=1, ge=1, le=1024, description="torch threads of each")


class ModelSettings(Section):
    """Where model folders of `transformers` come from, in this order: folder, hub."""

    folder: Path | None = Field(default=None, description="folder with model folders; none: no plan can name one")
    hub: bool = Field(
        default=False,
        description="whether a folder that is not there may be loaded from the hub, into the folder above",
    )

    @model_validator(mode="after")
    def _hub_has_a_folder(self) -> Self:
        if self.hub and self.folder is None:
            raise ValueError("hub: models of the hub have no place to be kept: set folder beside it")
        return self


class TenantSettings(Section):
    """Who shares a part of this service's capacity, how large that part is, and bounds that it never passes."""

    callers: tuple[str, ...] = Field(
        default=(), description='names of its callers, which are SPIFFE ids with TLS and "local" without'
    )
    weight: float = Field(default=1.0, gt=0, le=1000, description="its share, relative to the other tenants' weights")
    slots: int | None = Field(default=None, ge=0, description="most workers at the same time; none: no bound")
    cores: int | None = Field(default=None, ge=0, description="most cores at the same time; none: no bound")
    memory_bytes: int | None = Field(
        default=None, ge=0, description="most memory at the same time, as estimated; none: no bound"
    )


class EnvironmentSettings(Section):
    """Where environments come from, beside the registries of Gymnasium and PettingZoo."""

    modules: tuple[str, ...] = Field(
        default=("mpe2",), description="packages whose environments a plan may name; a worker imports them"
    )


class AgentSettings(ServiceSettings):
    """What the agent service is told."""

    SERVICE: ClassVar[str] = "agent"
    address: str = "127.0.0.1:7102"
    data_dir: Path = Path("var/agent")
    cognate: CognateEndpoint = CognateEndpoint()
    borrow: BorrowSettings = BorrowSettings()
    preemption: PreemptionSettings = PreemptionSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    models: ModelSettings = ModelSettings()
    environments: EnvironmentSettings = EnvironmentSettings()
    tenants: dict[str, TenantSettings] = Field(default={}, description="tenants by name")
    default_tenant: str = Field(
        default="default", pattern=TENANT, description="tenant of callers that no tenant names; may be in tenants"
    )

    @model_validator(mode="after")
    def _callers_have_one_tenant(self) -> Self:
        seen: dict[str, str] = {}
        for name, tenant in self.tenants.items():
            if not re.fullmatch(TENANT, name):
                raise ValueError(f"tenants.{name}: a tenant's name is lower-case letters, digits and -, at most 48")
            for caller in tenant.callers:
                other = seen.setdefault(caller, name)
                if other != name:
                    raise ValueError(f"tenants: {caller} is a caller of {other} and of {name}: name it in one of them")
        return self


def require_model_folder(models: ModelSettings) -> None:
    """Refuse a folder of models that is not there. Errors: SettingsError."""
    if models.folder is not None and not models.folder.is_dir():
        raise SettingsError(
            f"models.folder: {models.folder} is no folder; correct the path, create it, or leave the key out"
        )


def load_settings(file: Path | None) -> AgentSettings:
    """Read the settings. Errors: SettingsError."""
    return load(AgentSettings, file=file, prefix=ENVIRONMENT_PREFIX)
