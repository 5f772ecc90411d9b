"""A service as the pages ask it: the calls that both have under the same names, in different packages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from cognateforge.agent.v1 import training_pb2
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from cognateforge.client import AsyncAgentClient, AsyncCognateClient

COGNATE, AGENT = "cognate", "agent"
ENDED = (job_pb2.JOB_STATE_SUCCEEDED, job_pb2.JOB_STATE_FAILED, job_pb2.JOB_STATE_CANCELLED)
OPEN = tuple(number for number in job_pb2.JobState.values() if number and number not in ENDED)
# What a list's page may hold at most, by the contract.
PAGE = 500
# The service reads every step of a job for its metrics, which of a million takes longer than other calls.
METRICS_TIMEOUT_S = 120.0

Page = tuple[list[Any], str]


@dataclass(frozen=True)
class Upstream:
    """One service. contract: the generated module of its job calls. stub: their stub."""

    name: str
    client: AsyncCognateClient | AsyncAgentClient
    contract: Any
    stub: Any

    def _request(self, kind: str, /, **fields: Any) -> Any:
        return getattr(self.contract, f"{kind}Request")(**fields)

    async def info(self) -> job_pb2.ServerInfo:
        """Return the server's version, capabilities and circuits."""
        return cast("job_pb2.ServerInfo", (await self.stub.GetServerInfo(self._request("GetServerInfo"))).info)

    async def job(self, name: str) -> Any:
        """Return the service's own job message: `job`, `plan` and more."""
        return (await self.stub.GetJob(self._request("GetJob", name=name))).job

    async def page(self, states: Sequence[int], size: int, token: str = "") -> Page:
        """Return a page of jobs, newest first, and the token of the next one."""
        request = self._request("ListJobs", states=states, page_size=size, page_token=token)
        answer = await self.stub.ListJobs(request)
        return list(answer.jobs), answer.next_page_token

    async def metrics(self, name: str, most: int) -> list[job_pb2.MetricSeries]:
        """Return a job's metrics, each thinned to `most` points by the service."""
        request = self._request("GetMetrics", name=name, max_points=most)
        return list((await self.stub.GetMetrics(request, timeout=METRICS_TIMEOUT_S)).series)

    async def checkpoints(self, name: str) -> list[job_pb2.Checkpoint]:
        """Return a job's checkpoints, newest first."""
        return list((await self.stub.ListCheckpoints(self._request("ListCheckpoints", name=name))).checkpoints)

    async def steer(self, verb: str, name: str, request_id: str) -> Any:
        """Pause, Resume or Cancel a job, and return it."""
        request = self._request(f"{verb}Job", name=name, request_id=request_id)
        return (await getattr(self.stub, f"{verb}Job")(request)).job

    def watch(self, name: str, after_sequence: int, progress_every: int = 1) -> AsyncIterator[job_pb2.WatchFrame]:
        """Yield a job's events and its end; a broken stream is the caller's to take up again.

        progress_every: above 1, of progress one event of so many.
        """
        return self.client.watch_job(name, after_sequence, progress_every=progress_every, give_up_after_s=0)

    def logs(self, name: str, attempt: int, position: int) -> AsyncIterator[job_pb2.LogFrame]:
        """Yield what a job's workers write, to the job's end; a broken stream is the caller's to take up again."""
        return self.client.watch_logs(name, attempt=attempt, position=position, follow=True, give_up_after_s=0)


@dataclass(frozen=True)
class Upstreams:
    """Both services."""

    cognate_client: AsyncCognateClient
    agent_client: AsyncAgentClient

    @property
    def cognate(self) -> Upstream:
        """The Cognate service."""
        return Upstream(COGNATE, self.cognate_client, pretraining_pb2, self.cognate_client.pretraining)

    @property
    def agent(self) -> Upstream:
        """The agent service."""
        return Upstream(AGENT, self.agent_client, training_pb2, self.agent_client.training)

    def __iter__(self) -> Any:
        return iter((self.cognate, self.agent))

    def of(self, name: str) -> Upstream | None:
        """Return the service of that name."""
        return next((one for one in self if one.name == name), None)

    async def open(self) -> None:
        """Find both services and dial them."""
        await asyncio.gather(self.cognate_client.open(), self.agent_client.open())

    async def close(self) -> None:
        """End every call."""
        await asyncio.gather(self.cognate_client.close(), self.agent_client.close())
