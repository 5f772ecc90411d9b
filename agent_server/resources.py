"""Whose turn it is: tenants share this service's capacity by dominant-resource fairness, within their quotas.

ADR 0025. A tenant's dominant share is the larger one of its shares of cores and of memory, of what its running jobs
take. The next worker goes to the tenant whose dominant share over its weight is the least, and of its jobs to the first
of the queue. Source: Ghodsi et al. 2011, Dominant Resource Fairness, NSDI.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import sqlalchemy as sa

from agent_server.settings import AgentSettings, TenantSettings
from cognateforge.exceptions import FieldViolation, QuotaTooSmallError
from training_common.compute import share_of
from training_common.jobs.queue import ORDER, Demand, is_due
from training_common.jobs.states import HELD
from training_common.jobs.store import JobRow, first_due
from training_common.jobs.waits import HeldBack, WaitReason
from training_common.store import tables as t
from training_common.store.database import Database, Turn

_HELD = t.jobs.c.state.in_([state.value for state in HELD])


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """What jobs take together. memory_bytes: as estimated."""

    slots: int = 0
    cores: int = 0
    memory_bytes: int = 0


def host_capacity() -> Amounts:
    """Return what this host has. Servers of one store are taken to be alike."""
    return Amounts(cores=os.cpu_count() or 1, memory_bytes=int(psutil.virtual_memory().total))


class AgentResourceManager:
    """The capacity of the agent service, and how its tenants share it. It keeps nothing: what runs is in the store."""

    def __init__(self, database: Database, settings: AgentSettings, capacity: Amounts | None = None) -> None:
        self._database = database
        self._tenants: Mapping[str, TenantSettings] = settings.tenants
        self._default = settings.default_tenant
        self._threads = settings.workers.threads
        self._capacity = capacity or host_capacity()
        self._by_caller = {caller: name for name, tenant in self._tenants.items() for caller in tenant.callers}

    def demand(self, caller: str, memory_bytes: int, *, processes: int = 1, nodes: int = 1) -> Demand:
        """Return what a caller's job takes here, and of whose share. memory_bytes: of each process.

        Errors: QuotaTooSmallError, when it can never start.
        """
        tenant = self._by_caller.get(caller, self._default)
        # Without a setting the processes of a job share all cores.
        here = share_of(processes, nodes, 0)
        need = Demand(
            tenant=tenant,
            processes=processes,
            nodes=nodes,
            cores=self._threads * here or max(1, self._capacity.cores),
            memory_bytes=memory_bytes * here,
        )
        beyond = self._beyond(tenant, Amounts(), need)
        if beyond:
            description = f"the job can never start: {beyond}; make it smaller, or have the quota raised"
            raise QuotaTooSmallError(
                f"plan: {description}", violations=[FieldViolation(field="plan", description=description)]
            )
        return need

    def next_due(
        self, connection: sa.Connection, *, most: int | None = None, most_nodes: int | None = None
    ) -> JobRow | None:
        """Return the job that is the next to get a worker: the first that its tenant's quota allows, by fairness.

        A job for which another one was stopped goes first. Servers take turns, so that no two of them fill the last
        place of a quota.
        """
        if not self._tenants:
            return first_due(connection, most=most, most_nodes=most_nodes)
        if connection.get_execution_options().get("forge_write"):
            self.in_turn(connection)
        held, heads = self.held(connection), self._heads(connection)

        def turn(tenant: str) -> tuple[bool, float, tuple[int, int]]:
            claims = heads[tenant].place[0] < 0
            return not claims, self.share(tenant, held), heads[tenant].place

        for tenant in sorted(heads, key=turn):
            # Within a tenant nothing passes a job that its quota keeps back: small ones would do so for ever.
            job = first_due(connection, t.jobs.c.tenant.in_(heads[tenant].names), most=most, most_nodes=most_nodes)
            if job is not None and not self._beyond(tenant, held.get(tenant, Amounts()), _need(job)):
                return job
        return None

    def held_back(self, connection: sa.Connection, jobs: Sequence[JobRow]) -> Mapping[int, HeldBack]:
        """Return which of the waiting jobs their tenant's quota keeps from free places."""
        if not self._tenants:
            return {}
        held, found = self.held(connection), {}
        for job in jobs:
            tenant = self.tenant(job)
            beyond = self._beyond(tenant, held.get(tenant, Amounts()), _need(job))
            if beyond:
                found[job.id] = HeldBack(reason=WaitReason.QUOTA, message=beyond)
        return found

    def held(self, connection: sa.Connection) -> dict[str, Amounts]:
        """Return what the running jobs of every tenant take, over all servers of the store."""
        sums = [sa.func.sum(column) for column in (t.jobs.c.slots, t.jobs.c.cores, t.jobs.c.memory_bytes)]
        rows = connection.execute(sa.select(t.jobs.c.tenant, *sums).where(_HELD).group_by(t.jobs.c.tenant))
        found: dict[str, Amounts] = {}
        for name, slots, cores, memory_bytes in rows:
            # Two may be one: jobs of a tenant that the settings no longer have are the default one's.
            tenant = self._known(name)
            found[tenant] = plus(
                found.get(tenant, Amounts()),
                Amounts(slots=int(slots), cores=int(cores), memory_bytes=int(memory_bytes)),
            )
        return found

    def share(self, tenant: str, held: Mapping[str, Amounts]) -> float:
        """Return a tenant's dominant share over its weight."""
        amounts = held.get(tenant, Amounts())
        cores = amounts.cores / max(1, self._capacity.cores)
        memory = amounts.memory_bytes / max(1, self._capacity.memory_bytes)
        return max(cores, memory) / self._settings(tenant).weight

    def tenant(self, job: JobRow) -> str:
        """Return whose share a job counts for."""
        return self._known(job.tenant)

    def in_turn(self, connection: sa.Connection) -> None:
        """Wait until no other server decides who gets capacity, until the caller's transaction ends."""
        self._database.in_turn(connection, Turn.CAPACITY)

    def may_replace(self, waiting: JobRow, running: JobRow, held: Mapping[str, Amounts]) -> bool:
        """Whether a waiting job could start in a running one's place without passing a quota or a fairer share.

        Of another tenant's jobs only those of one that has more than the waiting job's tenant would have.
        """
        mine, others = self.tenant(waiting), self.tenant(running)
        before = held.get(mine, Amounts())
        if mine == others:
            return not self._beyond(mine, minus(before, _taken(_need(running))), _need(waiting))
        with_it = {**held, mine: plus(before, _taken(_need(waiting)))}
        return not self._beyond(mine, before, _need(waiting)) and self.share(mine, with_it) < self.share(others, held)

    def _known(self, tenant: str) -> str:
        return tenant if tenant in self._tenants else self._default

    def _settings(self, tenant: str) -> TenantSettings:
        return self._tenants.get(tenant) or TenantSettings()

    def _heads(self, connection: sa.Connection) -> dict[str, _Head]:
        """Return, of every tenant that waits, the place of its first job, by a step of the index for each."""
        found: dict[str, _Head] = {}
        waits, name = t.jobs.c.queue_us.is_not(None), None
        while True:
            after = waits if name is None else waits & (t.jobs.c.tenant > name)
            query = sa.select(t.jobs.c.tenant).where(after).order_by(t.jobs.c.tenant).limit(1)
            name = connection.execute(query).scalar_one_or_none()
            if name is None:
                return found
            first = sa.select(t.jobs.c.queue_us, t.jobs.c.id).where(t.jobs.c.tenant == name, is_due())
            row = connection.execute(first.order_by(*ORDER).limit(1)).one_or_none()
            if row is not None:
                tenant, place = self._known(name), (row.queue_us, row.id)
                other = found.get(tenant, _Head(names=(), place=place))
                found[tenant] = _Head(names=(*other.names, name), place=min(other.place, place))

    def _beyond(self, tenant: str, held: Amounts, need: Demand) -> str:
        """Return which quota of a tenant one more job would pass, in words, or nothing."""
        quota, after = self._settings(tenant), plus(held, _taken(need))
        for name, unit in (("slots", ""), ("cores", ""), ("memory_bytes", " bytes")):
            most, wanted = getattr(quota, name), getattr(_taken(need), name)
            if most is not None and getattr(after, name) > most:
                what = name.removesuffix("_bytes")
                return (
                    f"it takes {wanted}{unit} of {what}, and tenant {tenant} holds {getattr(held, name)} of its quota "
                    f"of {most}{unit}"
                )
        return ""


@dataclass(frozen=True, kw_only=True)
class _Head:
    """The first job of a tenant. names: under which its jobs are stored."""

    names: tuple[str, ...]
    place: tuple[int, int]


def plus(one: Amounts, other: Amounts) -> Amounts:
    """Return what both take."""
    return Amounts(
        slots=one.slots + other.slots,
        cores=one.cores + other.cores,
        memory_bytes=one.memory_bytes + other.memory_bytes,
    )


def minus(one: Amounts, other: Amounts) -> Amounts:
    """Return what is left of one without the other."""
    return Amounts(
        slots=one.slots - other.slots,
        cores=one.cores - other.cores,
        memory_bytes=one.memory_bytes - other.memory_bytes,
    )


def _need(job: JobRow) -> Demand:
    return Demand(
        tenant=job.tenant,
        processes=job.processes,
        nodes=job.nodes,
        cores=job.cores,
        memory_bytes=job.memory_bytes,
    )


def _taken(need: Demand) -> Amounts:
    return Amounts(slots=need.slots, cores=need.cores, memory_bytes=need.memory_bytes)
