"""The synchronous clients: thin classes over the generated stubs."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2

from cognateforge.agent.v1 import agent_pb2, agent_pb2_grpc, training_pb2, training_pb2_grpc
from cognateforge.artifact.v1 import storage_pb2_grpc
from cognateforge.client import fetch, frames, services, watch
from cognateforge.client.breaker import BreakerSnapshot, BreakerState, CallBreaker
from cognateforge.client.channel import Addresses, Dialer, SwappingChannel
from cognateforge.client.discovery import FIRST_ANSWER_S, Discovery, discovery_for
from cognateforge.client.fetch import FetchedArtifact, Landing, OnProgress, Reader, Wanted
from cognateforge.client.interceptors import CallGuard
from cognateforge.client.patience import GIVE_UP_AFTER_S
from cognateforge.client.tls import TlsFiles
from cognateforge.cognate.v1 import pretraining_pb2, pretraining_pb2_grpc
from cognateforge.exchange.v1 import model_pb2, model_pb2_grpc, resource_pb2_grpc
from cognateforge.job.v1 import job_pb2

# Enough for every unary call of the contract on a busy machine, little enough to notice a server that hangs.
DEFAULT_TIMEOUT_S = 10.0


class _ServiceClient:
    """A channel that follows discovery and whose calls pass the guard.

    where: "host:port", several of them with commas or as a list, "unix:path", "consul://SERVICE" with or without
        "?tag=TAG", or a Discovery, which stays the caller's.
    tls: credentials of the channel, or their files, which are read again when they change. Without them only loopback
    and unix addresses are dialled.
    timeout_s: deadline of unary calls that set none.
    """

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
        discovery = discovery_for(where, first_answer_s=min(timeout_s, FIRST_ANSWER_S))
        self._own_discovery = None if discovery is where else discovery
        try:
            self._channel = SwappingChannel(dialer.dial, discovery.addresses(), dialer.rotation())
        except BaseException:
            self._close_discovery()
            raise
        self._unsubscribe = discovery.subscribe(self._channel.swap)
        self._channel.swap(discovery.addresses())  # a change between the first look and the subscription
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

    def health(self, service: str = "") -> str:
        """Return the service's own word: SERVING, NOT_SERVING, SERVICE_UNKNOWN, or UNKNOWN for any other.

        service: the full name of one gRPC service, "" for the server as a whole.
        """
        status = self._check_health(health_pb2.HealthCheckRequest(service=service)).status
        return services.health_word(status)

    def close(self) -> None:
        """End every call and let go of the connections."""
        self._unsubscribe()
        self._close_discovery()
        self._channel.close()

    def _close_discovery(self) -> None:
        if self._own_discovery is not None:
            self._own_discovery.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class CognateClient(_ServiceClient):
    """The Cognate service: pretraining jobs, foundation models, capacity. Every failure is a ForgeError."""

    _services = services.COGNATE

    @cached_property
    def pretraining(self) -> pretraining_pb2_grpc.CognatePretrainingServiceStub:
        """Pretraining jobs."""
        return pretraining_pb2_grpc.CognatePretrainingServiceStub(self._channel)

    @cached_property
    def models(self) -> model_pb2_grpc.ModelServiceStub:
        """Foundation models."""
        return model_pb2_grpc.ModelServiceStub(self._channel)

    @cached_property
    def resources(self) -> resource_pb2_grpc.ResourceServiceStub:
        """Capacity and leases."""
        return resource_pb2_grpc.ResourceServiceStub(self._channel)

    @cached_property
    def storage(self) -> storage_pb2_grpc.StorageServiceStub:
        """How the service keeps its models."""
        return storage_pb2_grpc.StorageServiceStub(self._channel)

    def watch_job(
        self,
        name: str,
        after_sequence: int = 0,
        *,
        progress_every: int = 1,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> Iterator[job_pb2.WatchFrame]:
        """Yield a job's events, each once and in order, and then the frame with its end.

        Broken streams are followed by new ones from the last sequence, until nothing came for `give_up_after_s`.
        progress_every: above 1, of progress those events alone whose sequence is a multiple of it.
        Errors: JobNotFoundError, SequenceOutOfRangeError; UnavailableError or the like when the patience is spent.
        """
        stub = self.pretraining

        def open_stream(after: int, timeout_s: float) -> watch.Stream[pretraining_pb2.WatchJobResponse]:
            request = pretraining_pb2.WatchJobRequest(name=name, after_sequence=after, progress_every=progress_every)
            return stub.WatchJob(request, timeout=timeout_s)

        return watch.watch(open_stream, watch.JobPosition(after_sequence, give_up_after_s, progress_every))

    def watch_logs(
        self,
        name: str,
        *,
        attempt: int = 0,
        position: int = 0,
        follow: bool = False,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> Iterator[job_pb2.LogFrame]:
        """Yield what a job's workers write: lines, gaps where a log's middle is no longer kept, and then the end.

        attempt: where to begin; 0 means the newest. position: where in its log, 0 or a frame's next_position.
        follow: go on with what is written later, and with later attempts, until the job has ended. Broken streams are
        followed by new ones, every byte once, until nothing came for `give_up_after_s`.
        Errors: JobNotFoundError, AttemptNotFoundError, LogGoneError, OffsetOutOfRangeError; UnavailableError or the
        like when the patience is spent.
        """
        stub = self.pretraining

        def open_stream(place: tuple[int, int], timeout_s: float) -> watch.Stream[pretraining_pb2.WatchLogsResponse]:
            request = pretraining_pb2.WatchLogsRequest(name=name, attempt=place[0], position=place[1], follow=follow)
            return stub.WatchLogs(request, timeout=timeout_s)

        return watch.watch(open_stream, watch.LogPosition(attempt, position, give_up_after_s))

    def watch_models(
        self, after_sequence: int = 0, *, give_up_after_s: float = GIVE_UP_AFTER_S
    ) -> Generator[watch.ModelNews, None, None]:
        """Yield what happens to foundation models, each event once and in order, for as long as it is read.

        Where the service no longer keeps the oldest events, a watch from 0 yields a ModelSnapshot first. Broken streams
        are followed by new ones from the last sequence, until nothing came for `give_up_after_s`; a snapshot that broke
        off is taken anew, and nothing of it was yielded.
        Errors: SequenceOutOfRangeError, when the position is beyond the last event, or the events after it are no
        longer kept: then its metadata hold `oldest_sequence`; UnavailableError or the like when the patience is spent.
        """
        stub = self.models

        def open_stream(after: int, timeout_s: float) -> watch.Stream[model_pb2.WatchModelsResponse]:
            return stub.WatchModels(model_pb2.WatchModelsRequest(after_sequence=after), timeout=timeout_s)

        return watch.watch(open_stream, watch.ModelPosition(after_sequence, give_up_after_s))

    def fetch_model(
        self,
        name: str,
        destination_dir: Path | str,
        on_progress: OnProgress | None = None,
        *,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> FetchedArtifact:
        """Bring a model into `destination_dir`: its files, manifest.json and, if it is signed, model.sig.

        on_progress: called with the payload bytes that are here, and all of them.
        Errors: ModelNotFoundError, ArtifactCorruptError, LocalStorageError; UnavailableError or the like when nothing
        came for `give_up_after_s`: then the next fetch goes on where this one stopped.
        """
        stub = self.models
        model = stub.GetModel(model_pb2.GetModelRequest(name=name)).model

        frames_of = self._channel.unary_stream(**frames.FETCH_MODEL)

        def open_stream(offset: int, timeout_s: float) -> fetch.FetchStream:
            return frames_of(model_pb2.FetchModelRequest(name=model.name, offset_bytes=offset), timeout=timeout_s)

        landing = Landing(Wanted(name=model.name, digest=model.digest), Path(destination_dir))
        return fetch.fetch(landing, open_stream, Reader(landing, on_progress, give_up_after_s))


class AgentClient(_ServiceClient):
    """The agent service: training jobs and agents. Every failure is a ForgeError."""

    _services = services.AGENT

    @cached_property
    def training(self) -> training_pb2_grpc.AgentForgeTrainingServiceStub:
        """Training jobs."""
        return training_pb2_grpc.AgentForgeTrainingServiceStub(self._channel)

    @cached_property
    def agents(self) -> agent_pb2_grpc.AgentServiceStub:
        """Agents and their aliases."""
        return agent_pb2_grpc.AgentServiceStub(self._channel)

    @cached_property
    def storage(self) -> storage_pb2_grpc.StorageServiceStub:
        """How the service keeps its agents."""
        return storage_pb2_grpc.StorageServiceStub(self._channel)

    def watch_job(
        self,
        name: str,
        after_sequence: int = 0,
        *,
        progress_every: int = 1,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> Iterator[job_pb2.WatchFrame]:
        """Yield a job's events and its end, as `CognateClient.watch_job` does."""
        stub = self.training

        def open_stream(after: int, timeout_s: float) -> watch.Stream[training_pb2.WatchJobResponse]:
            request = training_pb2.WatchJobRequest(name=name, after_sequence=after, progress_every=progress_every)
            return stub.WatchJob(request, timeout=timeout_s)

        return watch.watch(open_stream, watch.JobPosition(after_sequence, give_up_after_s, progress_every))

    def watch_logs(
        self,
        name: str,
        *,
        attempt: int = 0,
        position: int = 0,
        follow: bool = False,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> Iterator[job_pb2.LogFrame]:
        """Yield what a job's workers write, as `CognateClient.watch_logs` does."""
        stub = self.training

        def open_stream(place: tuple[int, int], timeout_s: float) -> watch.Stream[training_pb2.WatchLogsResponse]:
            request = training_pb2.WatchLogsRequest(name=name, attempt=place[0], position=place[1], follow=follow)
            return stub.WatchLogs(request, timeout=timeout_s)

        return watch.watch(open_stream, watch.LogPosition(attempt, position, give_up_after_s))

    def fetch_agent(
        self,
        name: str,
        destination_dir: Path | str,
        on_progress: OnProgress | None = None,
        *,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> FetchedArtifact:
        """Bring an agent into `destination_dir`, as `CognateClient.fetch_model` does for models."""
        stub = self.agents
        agent = stub.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent

        frames_of = self._channel.unary_stream(**frames.FETCH_AGENT)

        def open_stream(offset: int, timeout_s: float) -> fetch.FetchStream:
            return frames_of(agent_pb2.FetchAgentRequest(name=agent.name, offset_bytes=offset), timeout=timeout_s)

        landing = Landing(Wanted(name=agent.name, digest=agent.digest), Path(destination_dir))
        return fetch.fetch(landing, open_stream, Reader(landing, on_progress, give_up_after_s))
