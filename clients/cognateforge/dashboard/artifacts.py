"""Models and agents: lists, one with its card and its chain, and two side by side."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any

from cognateforge.agent.v1 import agent_pb2
from cognateforge.cli.diff import agent_facts, compare, model_facts
from cognateforge.cli.plain import enum_word, to_plain
from cognateforge.dashboard.plain import error_json, seconds
from cognateforge.dashboard.upstream import Upstreams
from cognateforge.exceptions import ForgeError, NotFoundError, NotImplementedByServerError
from cognateforge.exchange.v1 import model_pb2

PAGE = 50
# Agents made of agents, from the newest on: a longer chain is told as far as this.
_CHAIN = 32
_DEPENDENTS = 100

Node = dict[str, Any]


class Artifacts:
    """What both services have published."""

    def __init__(self, upstreams: Upstreams) -> None:
        self._models = upstreams.cognate_client.models
        self._agents = upstreams.agent_client.agents

    async def models(self, token: str) -> dict[str, Any]:
        """Return a page of models, newest first."""
        answer = await self._models.ListModels(model_pb2.ListModelsRequest(page_size=PAGE, page_token=token))
        return {"items": [_model_row(one) for one in answer.models], "next_page_token": answer.next_page_token}

    async def agents(self, token: str) -> dict[str, Any]:
        """Return a page of agents, newest first."""
        answer = await self._agents.ListAgents(agent_pb2.ListAgentsRequest(page_size=PAGE, page_token=token))
        return {"items": [_agent_row(one) for one in answer.agents], "next_page_token": answer.next_page_token}

    async def model(self, name: str) -> dict[str, Any]:
        """Return a model with its card, its chain and what was made of it."""
        model = (await self._models.GetModel(model_pb2.GetModelRequest(name=name))).model
        card, dependents = await asyncio.gather(self._model_card(model.name), self._dependents(model.name))
        chain = {**_model_node(model), "made": dependents}
        return {"kind": "model", "item": to_plain(model), "card": card, "lineage": chain}

    async def agent(self, name: str) -> dict[str, Any]:
        """Return an agent with its card and its chain down to its data."""
        agent = (await self._agents.GetAgent(agent_pb2.GetAgentRequest(name=name))).agent
        card, chain = await asyncio.gather(self._agent_card(agent.name), self._chain(agent))
        return {"kind": "agent", "item": to_plain(agent), "card": card, "lineage": chain}

    async def compare(self, kind: str, a: str, b: str) -> dict[str, Any]:
        """Return two versions of a kind field by field, with their cards and the jobs that made them."""
        one, other = await asyncio.gather(self._side(kind, a), self._side(kind, b))
        differences = [asdict(difference) for difference in compare(one.pop("facts"), other.pop("facts"))]
        return {"kind": kind, "a": one, "b": other, "differences": differences}

    async def _side(self, kind: str, name: str) -> dict[str, Any]:
        if kind == "models":
            model = (await self._models.GetModel(model_pb2.GetModelRequest(name=name))).model
            request = model_pb2.GetModelProvenanceRequest(name=model.name)
            manifest, card = await asyncio.gather(
                _manifest(lambda: self._models.GetModelProvenance(request)), self._model_card(model.name)
            )
            return {"name": model.name, "job": model.job, "card": card, "facts": model_facts(model, manifest)}
        agent = (await self._agents.GetAgent(agent_pb2.GetAgentRequest(name=name))).agent
        wanted = agent_pb2.GetAgentProvenanceRequest(name=agent.name)
        manifest, card = await asyncio.gather(
            _manifest(lambda: self._agents.GetAgentProvenance(wanted)), self._agent_card(agent.name)
        )
        return {"name": agent.name, "job": agent.job, "card": card, "facts": agent_facts(agent, manifest)}

    async def _model_card(self, name: str) -> str:
        request = model_pb2.GetModelCardRequest(name=name)
        return await _card(lambda: self._models.GetModelCard(request))

    async def _agent_card(self, name: str) -> str:
        request = agent_pb2.GetAgentCardRequest(name=name)
        return await _card(lambda: self._agents.GetAgentCard(request))

    async def _dependents(self, name: str) -> list[Node]:
        request = model_pb2.ListDependentsRequest(name=name, page_size=_DEPENDENTS)
        try:
            answer = await self._models.ListDependents(request)
        except ForgeError as error:
            return [_unknown("agent", "what was made of it", error)]
        return [
            {
                "kind": "job" if one.name.startswith("jobs/") else "agent",
                "name": one.name,
                "digest": one.digest,
                "detail": f"known to {one.owner}" if one.owner else "",
            }
            for one in answer.dependents
        ]

    async def _chain(self, agent: agent_pb2.Agent) -> Node:
        """Return an agent with what it was made of below it: agents, the foundation, their data."""
        first = node = _agent_node(agent)
        seen = {agent.name}
        while agent.parent and agent.parent not in seen and len(seen) < _CHAIN:
            seen.add(agent.parent)
            try:
                agent = (await self._agents.GetAgent(agent_pb2.GetAgentRequest(name=agent.parent))).agent
            except ForgeError as error:
                node["made_of"].append(_unknown("agent", agent.parent, error))
                return first
            below = _agent_node(agent)
            node["made_of"].append(below)
            node = below
        if agent.foundation:
            node["made_of"].append(await self._foundation(agent.foundation, agent.foundation_digest))
        return first

    async def _foundation(self, name: str, digest: str) -> Node:
        try:
            model = (await self._models.GetModel(model_pb2.GetModelRequest(name=name))).model
        except ForgeError as error:
            return {**_unknown("model", name, error), "digest": digest}
        node = _model_node(model)
        if digest and digest != model.digest:
            node["detail"] = f"has another digest than the agent names: {digest}"
        return node


async def _manifest(ask: Callable[[], Awaitable[Any]]) -> Mapping[str, Any]:
    try:
        raw = (await ask()).provenance.manifest
    except NotImplementedByServerError:
        return {}
    found: Mapping[str, Any] = json.loads(raw) if raw else {}
    return found


async def _card(ask: Callable[[], Awaitable[Any]]) -> str:
    """Return a card, "" of a version that has none."""
    try:
        return str((await ask()).markdown)
    except (NotFoundError, NotImplementedByServerError):
        return ""


def _unknown(kind: str, name: str, error: ForgeError) -> Node:
    return {"kind": kind, "name": name, "digest": "", "detail": "", "error": error_json(error)}


def _sources(data: Any) -> list[Node]:
    return [
        {"kind": "data", "name": one.name, "digest": one.digest, "detail": f"{one.kind}, {one.rows} rows"}
        for one in data
    ]


def _signed(storage: Any) -> str:
    return f"signed with {storage.key}" if storage.key else "not signed"


def _model_node(model: model_pb2.FoundationModel) -> Node:
    return {
        "kind": "model",
        "name": model.name,
        "digest": model.digest,
        "job": model.job,
        "detail": _signed(model.storage),
        "made_of": _sources(model.data),
    }


def _agent_node(agent: agent_pb2.Agent) -> Node:
    return {
        "kind": "agent",
        "name": agent.name,
        "digest": agent.digest,
        "job": agent.job,
        "detail": _signed(agent.storage),
        "made_of": _sources(agent.data),
    }


def _row(item: Any) -> dict[str, Any]:
    return {
        "name": item.name,
        "digest": item.digest,
        "create_time": seconds(item.create_time),
        "size_bytes": item.size_bytes,
        "job": item.job,
        "damage": item.storage.damage,
        "pinned": item.storage.pinned,
    }


def _model_row(model: model_pb2.FoundationModel) -> dict[str, Any]:
    state = enum_word(model_pb2.ModelState.DESCRIPTOR, model.state)
    results = [to_plain(one) for one in model.results]
    failed = [check.name for check in model.checks if not check.passed]
    return {**_row(model), "state": state, "steps": model.steps, "results": results, "failed_checks": failed}


def _agent_row(agent: agent_pb2.Agent) -> dict[str, Any]:
    return {
        **_row(agent),
        "state": enum_word(agent_pb2.Lifecycle.DESCRIPTOR, agent.lifecycle),
        "task": agent.task,
        "architecture": agent.architecture,
        "foundation": agent.foundation,
        "aliases": list(agent.aliases),
        "results": [to_plain(one) for one in agent.evaluations],
    }
