"""AgentService: the registry of agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import sqlalchemy as sa

from agent_server.agents import (
    find_agent,
    page_of_moves,
    set_alias,
    set_lifecycle,
    standings_in,
    standings_of,
    ways_to,
)
from agent_server.rpc import convert
from cognateforge.agent.v1 import agent_pb2 as pb
from cognateforge.agent.v1 import agent_pb2_grpc
from training_common.artifacts.cards import card_of
from training_common.artifacts.registry import ArtifactRegistry, ArtifactRow
from training_common.artifacts.scrub import require_whole
from training_common.rpc import fetch, listing, paging, provenance
from training_common.rpc.identity import current_caller
from training_common.rpc.jobs import Context
from training_common.rpc.mutations import mutate
from training_common.store.database import Turn


class AgentServicer(agent_pb2_grpc.AgentServiceServicer):
    """Agents over gRPC."""

    def __init__(self, registry: ArtifactRegistry, *, sent: Callable[[int], None] = lambda _size_bytes: None) -> None:
        """sent: told of the bytes of agents that were sent."""
        self._registry = registry
        self._sent = sent

    async def _find(self, name: str) -> ArtifactRow:
        return await self._registry.database.run_brief(find_agent, self._registry, name)

    async def _messages(self, rows: Sequence[ArtifactRow]) -> list[pb.Agent]:
        standings = await self._registry.database.run(standings_of, self._registry, rows)
        return [convert.agent(row, standings[row.name]) for row in rows]

    async def GetAgent(self, request: pb.GetAgentRequest, context: Context) -> Any:
        [agent] = await self._messages([await self._find(request.name)])
        return pb.GetAgentResponse(agent=agent)

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Context) -> Any:
        states = {convert.to_lifecycle(value) for value in request.lifecycles}
        ways = ways_to(task=request.task, foundation=request.foundation, lifecycles=states)
        rows, token = await listing.page(self._registry, request, ways=ways)
        agents = await self._messages(rows)
        for agent in agents:
            # The longest field by far: with it a page could be larger than a client takes.
            agent.ClearField("labels")
        return pb.ListAgentsResponse(agents=agents, next_page_token=token)

    async def FetchAgent(self, request: pb.FetchAgentRequest, context: Context) -> AsyncIterator[pb.FetchAgentResponse]:
        row = await self._find(request.name)
        fetch.check_offset(row, request.offset_bytes)
        await asyncio.to_thread(require_whole, self._registry, row)
        [agent] = await self._messages([row])
        header = pb.FetchAgentHeader(agent=agent, manifest=row.manifest, signature=row.signature or b"")
        yield pb.FetchAgentResponse(header=header)
        frames = fetch.frames(self._registry.blobs, row, request.offset_bytes, pb.FetchAgentResponse, self._sent)
        async for frame in fetch.guarded(self._registry, row, frames, find_agent):
            yield frame

    async def GetAgentCard(self, request: pb.GetAgentCardRequest, context: Context) -> Any:
        row = await self._find(request.name)
        card = await asyncio.to_thread(card_of, self._registry.blobs, row)
        return pb.GetAgentCardResponse(name=row.name, markdown=card)

    async def GetAgentProvenance(self, request: pb.GetAgentProvenanceRequest, context: Context) -> Any:
        row = await self._find(request.name)
        found = await provenance.of_version(self._registry.blobs, row)
        return pb.GetAgentProvenanceResponse(provenance=found)

    async def SetAlias(self, request: pb.SetAliasRequest, context: Context) -> Any:
        row = await self._find(request.name)
        made = {"caller": current_caller().name, "request_id": request.request_id}

        def move(connection: sa.Connection) -> pb.SetAliasResponse:
            self._registry.database.in_turn(connection, Turn.ALIASES)
            set_alias(connection, row, request.alias, **made)
            return pb.SetAliasResponse(agent=convert.agent(row, standings_in(connection, [row])[row.name]))

        answer = await mutate(self._registry.database, "SetAlias", request, move)
        return pb.SetAliasResponse.FromString(answer)

    async def SetLifecycle(self, request: pb.SetLifecycleRequest, context: Context) -> Any:
        row = await self._find(request.name)
        made = {"caller": current_caller().name, "request_id": request.request_id}

        def move(connection: sa.Connection) -> pb.SetLifecycleResponse:
            self._registry.database.in_turn(connection, Turn.ALIASES)
            set_lifecycle(connection, row, convert.to_lifecycle(request.lifecycle), **made)
            return pb.SetLifecycleResponse(agent=convert.agent(row, standings_in(connection, [row])[row.name]))

        answer = await mutate(self._registry.database, "SetLifecycle", request, move)
        return pb.SetLifecycleResponse.FromString(answer)

    async def ListMoves(self, request: pb.ListMovesRequest, context: Context) -> Any:
        before = paging.read_token(request, request.page_token)
        size = paging.page_size(request.page_size)
        rows = await self._registry.database.run(
            lambda: page_of_moves(self._registry, request.family, limit=size + 1, before_id=before)
        )
        token = paging.make_token(request, rows[size - 1].id) if len(rows) > size else ""
        return pb.ListMovesResponse(moves=map(convert.move, rows[:size]), next_page_token=token)
