"""The asyncio clients: the same as the synchronous ones, call for call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar, Self

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from cognateforge.agent.v1 import agent_pb2, agent_pb2_grpc, training_pb2, training_pb2_grpc
from cognateforge.artifact.v1 import storage_pb2_grpc
from cognateforge.client import fetch, frames, services, watch
from cognateforge.client.breaker import BreakerSnapshot, BreakerState, CallBreaker
from cognateforge.client.channel import Addresses, AioSwappingChannel, Dialer
from cognateforge.client.discovery import FIRST_ANSWER_S, Discovery, StaticDiscovery, discovery_for
from cognateforge.client.fetch import FetchedArtifact, Landing, OnProgress, Reader, Wanted
from cognateforge.client.interceptors import CallGuard
from cognateforge.client.patience import GIVE_UP_AFTER_S
from cognateforge.client.sync import DEFAULT_TIMEOUT_S
from cognateforge.client.tls import TlsFiles
from cognateforge.cognate.v1 import pretraining_pb2, pretraining_pb2_grpc
from cognateforge.exchange.v1 import model_pb2, model_pb2_grpc, resource_pb2_grpc
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from cognateforge.agent.v1.agent_pb2_grpc import AgentServiceAsyncStub
    from cognateforge.agent.v1.training_pb2_grpc import AgentForgeTrainingServiceAsyncStub
    from cognateforge.artifact.v1.storage_pb2_grpc import StorageServiceAsyncStub
    from cognateforge.cognate.v1.pretraining_pb2_grpc import CognatePretrainingServiceAsyncStub
    from cognateforge.exchange.v1.model_pb2_grpc import ModelServiceAsyncStub
    from cognateforge.exchange.v1.resource_pb2_grpc import ResourceServiceAsyncStub


class _AsyncServiceClient:
    """The arguments are those of the synchronous client. Use it with `async with`, or await open() and close()."""

    _services: ClassVar[Sequence[ServiceDescriptor]]

    def __init__(
        self,
        where: str | Sequence[str] | Discovery,
        *,
        tls: grpc.ChannelCredentials | TlsFiles | None = None,
        tls_server_name: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        breaker: CallBreaker | None = None,
    ) -> None:
        self._breaker = breaker or CallBreaker(", ".join(s.name for s in self._services[:1]))
        guard = CallGuard(breaker=self._breaker, timeout_s=timeout_s)
        dialer = Dialer(services=self._services, guard=guard, tls=tls, tls_server_name=tls_server_name)
        self._discovery = discovery_for(where, first_answer_s=min(timeout_s, FIRST_ANSWER_S))
        self._owns_discovery = self._discovery is not where
        self._channel = AioSwappingChannel(dialer.dial_aio, dialer.rotation())
        self._unsubscribe: Callable[[], None] = lambda: None
        self._check_health = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    @property
    def addresses(self) -> Addresses:
        """Where new calls go."""
        return self._channel.addresses

    @property
    def breaker_state(self) -> BreakerState:
        """Where the circuit breaker stands: closed, open or half-open."""
        return self._breaker.state

    def breaker_snapshot(self) -> BreakerSnapshot:
        """Return the circuit breaker's state and counts, for metrics."""
        return self._breaker.snapshot()

    async def open(self) -> Self:
        """Find the service and dial it."""
        loop = asyncio.get_running_loop()
        static = isinstance(self._discovery, StaticDiscovery)
        try:
            first = self._discovery.addresses() if static else await asyncio.to_thread(self._discovery.addresses)
        except BaseException:
            self._close_discovery()
            raise
        self._channel.swap(first)

        def on_change(addresses: Addresses) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._channel.swap, addresses)

        self._unsubscribe = self._discovery.subscribe(on_change)
        self._channel.swap(self._discovery.addresses())  # a change between the first look and the subscription
        return self

    async def health(self, service: str = "") -> str:
        """Return the service's own word: SERVING, NOT_SERVING, SERVICE_UNKNOWN, or UNKNOWN for any other.

        service: the full name of one gRPC service, "" for the server as a whole.
        """
        status = (await self._check_health(health_pb2.HealthCheckRequest(service=service))).status
        return services.health_word(status)

    async def close(self) -> None:
        """End every call and let go of the connections."""
        self._unsubscribe()
        self._close_discovery()
        await self._channel.close()

    def _close_discovery(self) -> None:
        if self._owns_discovery:
            self._discovery.close()

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


class AsyncCognateClient(_AsyncServiceClient):
    """The Cognate service: pretraining jobs, foundation models, capacity. Every failure is a ForgeError."""

    _services = services.COGNATE

    @cached_property
    def pretraining(self) -> CognatePretrainingServiceAsyncStub:
        """Pretraining jobs."""
        return pretraining_pb2_grpc.CognatePretrainingServiceStub(self._channel)

    @cached_property
    def models(self) -> ModelServiceAsyncStub:
        """Foundation models."""
        return model_pb2_grpc.ModelServiceStub(self._channel)

    @cached_property
    def resources(self) -> ResourceServiceAsyncStub:
        """Capacity and leases."""
        return resource_pb2_grpc.ResourceServiceStub(self._channel)

    @cached_property
    def storage(self) -> StorageServiceAsyncStub:
        """How the service keeps its models."""
        return storage_pb2_grpc.StorageServiceStub(self._channel)

    def watch_job(
        self,
        name: str,
        after_sequence: int = 0,
        *,
        progress_every: int = 1,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> AsyncIterator[job_pb2.WatchFrame]:
        """Yield a job's events and its end, as `CognateClient.watch_job` does."""
        stub = self.pretraining

        def open_stream(after: int, timeout_s: float) -> watch.AioStream[pretraining_pb2.WatchJobResponse]:
            request = pretraining_pb2.WatchJobRequest(name=name, after_sequence=after, progress_every=progress_every)
            return stub.WatchJob(request, timeout=timeout_s)

        return watch.watch_aio(open_stream, watch.JobPosition(after_sequence, give_up_after_s, progress_every))

    def watch_logs(
        self,
        name: str,
        *,
        attempt: int = 0,
        position: int = 0,
        follow: bool = False,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> AsyncIterator[job_pb2.LogFrame]:
        """Yield what a job's workers write, as `CognateClient.watch_logs` does."""
        stub = self.pretraining

        def open_stream(place: tuple[int, int], timeout_s: float) -> watch.AioStream[pretraining_pb2.WatchLogsResponse]:
            request = pretraining_pb2.WatchLogsRequest(name=name, attempt=place[0], position=place[1], follow=follow)
            return stub.WatchLogs(request, timeout=timeout_s)

        return watch.watch_aio(open_stream, watch.LogPosition(attempt, position, give_up_after_s))

    def watch_models(
        self, after_sequence: int = 0, *, give_up_after_s: float = GIVE_UP_AFTER_S
    ) -> AsyncGenerator[watch.ModelNews, None]:
        """Yield what happens to foundation models, as `CognateClient.watch_models` does."""
        stub = self.models

        def open_stream(after: int, timeout_s: float) -> watch.AioStream[model_pb2.WatchModelsResponse]:
            return stub.WatchModels(model_pb2.WatchModelsRequest(after_sequence=after), timeout=timeout_s)

        return watch.watch_aio(open_stream, watch.ModelPosition(after_sequence, give_up_after_s))

    async def fetch_model(
        self,
        name: str,
        destination_dir: Path | str,
        on_progress: OnProgress | None = None,
        *,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> FetchedArtifact:
        """Bring a model into `destination_dir`, as `CognateClient.fetch_model` does."""
        stub = self.models
        model = (await stub.GetModel(model_pb2.GetModelRequest(name=name))).model

        frames_of = self._channel.unary_stream(**frames.FETCH_MODEL)

        def open_stream(offset: int, timeout_s: float) -> fetch.AioFetchStream:
            return frames_of(model_pb2.FetchModelRequest(name=model.name, offset_bytes=offset), timeout=timeout_s)

        landing = Landing(Wanted(name=model.name, digest=model.digest), Path(destination_dir))
        reader = Reader(landing, on_progress, give_up_after_s)
        return await fetch.fetch_aio(landing, open_stream, reader)


class AsyncAgentClient(_AsyncServiceClient):
    """The agent service: training jobs and agents. Every failure is a ForgeError."""

    _services = services.AGENT

    @cached_property
    def training(self) -> AgentForgeTrainingServiceAsyncStub:
        """Training jobs."""
        return training_pb2_grpc.AgentForgeTrainingServiceStub(self._channel)

    @cached_property
    def agents(self) -> AgentServiceAsyncStub:
        """Agents and their aliases."""
        return agent_pb2_grpc.AgentServiceStub(self._channel)

    @cached_property
    def storage(self) -> StorageServiceAsyncStub:
        """How the service keeps its agents."""
        return storage_pb2_grpc.StorageServiceStub(self._channel)

    def watch_job(
        self,
        name: str,
        after_sequence: int = 0,
        *,
        progress_every: int = 1,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> AsyncIterator[job_pb2.WatchFrame]:
        """Yield a job's events and its end, as `CognateClient.watch_job` does."""
        stub = self.training

        def open_stream(after: int, timeout_s: float) -> watch.AioStream[training_pb2.WatchJobResponse]:
            request = training_pb2.WatchJobRequest(name=name, after_sequence=after, progress_every=progress_every)
            return stub.WatchJob(request, timeout=timeout_s)

        return watch.watch_aio(open_stream, watch.JobPosition(after_sequence, give_up_after_s, progress_every))

    def watch_logs(
        self,
        name: str,
        *,
        attempt: int = 0,
        position: int = 0,
        follow: bool = False,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> AsyncIterator[job_pb2.LogFrame]:
        """Yield what a job's workers write, as `CognateClient.watch_logs` does."""
        stub = self.training

        def open_stream(place: tuple[int, int], timeout_s: float) -> watch.AioStream[training_pb2.WatchLogsResponse]:
            request = training_pb2.WatchLogsRequest(name=name, attempt=place[0], position=place[1], follow=follow)
            return stub.WatchLogs(request, timeout=timeout_s)

        return watch.watch_aio(open_stream, watch.LogPosition(attempt, position, give_up_after_s))

    async def fetch_agent(
        self,
        name: str,
        destination_dir: Path | str,
        on_progress: OnProgress | None = None,
        *,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> FetchedArtifact:
        """Bring an agent into `destination_dir`, as `CognateClient.fetch_model` does for models."""
        stub = self.agents
        agent = (await stub.GetAgent(agent_pb2.GetAgentRequest(name=name))).agent

        frames_of = self._channel.unary_stream(**frames.FETCH_AGENT)

        def open_stream(offset: int, timeout_s: float) -> fetch.AioFetchStream:
            return frames_of(agent_pb2.FetchAgentRequest(name=agent.name, offset_bytes=offset), timeout=timeout_s)

        landing = Landing(Wanted(name=agent.name, digest=agent.digest), Path(destination_dir))
        reader = Reader(landing, on_progress, give_up_after_s)
        return await fetch.fetch_aio(landing, open_stream, reader)
