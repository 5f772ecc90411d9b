"""The chain from data to agent, asked step by step, and back from a foundation model to what was made of it.

Every step is one version: its data, its code, what it was made of, and whether its signature holds. A step that cannot
be asked for is still a step, with what the one above it knows of it.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cognateforge.agent.v1 import agent_pb2
from cognateforge.artifact.v1.artifact_pb2 import DataSource, Provenance
from cognateforge.client.provenance import verify_provenance
from cognateforge.client.sync import AgentClient, CognateClient
from cognateforge.exceptions import (
    ArtifactCorruptError,
    ForbiddenError,
    NotFoundError,
    NotImplementedByServerError,
    ProvenanceRefusedError,
    UnavailableError,
)
from cognateforge.exchange.v1 import model_pb2

# What keeps a service from telling of a version; the version is then known by what others say of it.
_SILENT = (ForbiddenError, NotFoundError, NotImplementedByServerError, UnavailableError)
_PAGE = 500


class Trust(enum.StrEnum):
    """What is known of a step's signature. UNSIGNED and SIGNED are told where no key is given to verify with."""

    VERIFIED = "verified"
    REFUSED = "refused"
    UNSIGNED = "unsigned"
    SIGNED = "signed"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """What a version says that it was made of. statement: the digest of its statement, where that is told."""

    role: str
    name: str
    digest: str
    statement: str = ""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One version of a chain.

    kind: "model", "agent", "model_folder" or "job". trust_detail: the key, or why it is refused or not known.
    code: version and digest. data: name, kind, rows and digest of each source.
    made_of: what it was made of, the nearest alone: that one tells what is below. made: what was made of it.
    """

    kind: str
    name: str
    digest: str
    trust: Trust = Trust.UNKNOWN
    trust_detail: str = ""
    job: str = ""
    code: dict[str, Any] = field(default_factory=dict)
    data: list[dict[str, Any]] = field(default_factory=list)
    made_of: tuple[Step, ...] = ()
    made: tuple[Step, ...] = ()

    def steps(self) -> Iterator[Step]:
        """Yield this step and every other one of its chain."""
        yield self
        for step in (*self.made_of, *self.made):
            yield from step.steps()


class Lineage:
    """Asks both services for chains. public_keys: what signatures are held against; without one, none is looked at."""

    def __init__(self, cognate: CognateClient, agents: AgentClient, public_keys: Sequence[Path] = ()) -> None:
        self._cognate, self._agents, self._keys = cognate, agents, tuple(public_keys)

    def of_model(self, name: str) -> Step:
        """Return a foundation model's chain and, as far as is known, everything that was made of it.

        Errors: ModelNotFoundError; UnavailableError and its kin.
        """
        model = self._cognate.models.GetModel(model_pb2.GetModelRequest(name=name)).model
        return replace(self._model(model), made=tuple(self._made_of(model.name)))

    def of_agent(self, name: str) -> Step:
        """Return an agent's chain down to its data and its foundation's. Errors: AgentNotFoundError; as above."""
        return self._agent(self._agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=name)).agent, frozenset())

    def _model(self, model: model_pb2.FoundationModel, expected: Ancestor | None = None) -> Step:
        step = Step(kind="model", name=model.name, digest=model.digest, job=model.job, data=_sources(model.data))
        try:
            request = model_pb2.GetModelProvenanceRequest(name=model.name)
            provenance = self._cognate.models.GetModelProvenance(request).provenance
        except (*_SILENT, ArtifactCorruptError) as error:
            return _untold(step, error)
        return self._judged(step, provenance, expected)

    def _agent(self, agent: agent_pb2.Agent, seen: frozenset[str], expected: Ancestor | None = None) -> Step:
        step = Step(kind="agent", name=agent.name, digest=agent.digest, job=agent.job, data=_sources(agent.data))
        ancestors = _told_by(agent)
        try:
            provenance = self._provenance(agent.name)
        except (*_SILENT, ArtifactCorruptError) as error:
            step = _untold(step, error)
        else:
            step = self._judged(step, provenance, expected)
            ancestors = _told_in(provenance) or ancestors
        # A version cannot be made of itself, whatever a service says.
        if agent.name in seen:
            return step
        below = [self._ancestor(one, seen | {agent.name}) for one in ancestors[:1]]
        return replace(step, made_of=tuple(below))

    def _provenance(self, name: str) -> Provenance:
        return self._agents.agents.GetAgentProvenance(agent_pb2.GetAgentProvenanceRequest(name=name)).provenance

    def _ancestor(self, one: Ancestor, seen: frozenset[str]) -> Step:
        kind = "model" if one.role == "foundation" else one.role
        step = Step(kind=kind, name=one.name, digest=one.digest)
        try:
            if kind == "model":
                found = self._cognate.models.GetModel(model_pb2.GetModelRequest(name=one.name)).model
                return self._model(found, one)
            if kind == "agent":
                agent = self._agents.agents.GetAgent(agent_pb2.GetAgentRequest(name=one.name)).agent
                return self._agent(agent, seen, one)
        except _SILENT as error:
            return _untold(step, error)
        return replace(step, trust=Trust.UNSIGNED, trust_detail="no version of a service")

    def _judged(self, step: Step, provenance: Provenance, expected: Ancestor | None) -> Step:
        """Return a step with its code, and what its signature is worth."""
        step = replace(step, code=_document(provenance.manifest).get("code") or {})
        if expected is not None and expected.digest not in ("", step.digest):
            return replace(step, trust=Trust.REFUSED, trust_detail=f"what was used is {expected.digest}")
        if not self._keys:
            return replace(step, trust=Trust.SIGNED if provenance.signature else Trust.UNSIGNED)
        try:
            found = verify_provenance(provenance, name=step.name, digest=step.digest, public_keys=self._keys)
        except ProvenanceRefusedError as error:
            return replace(step, trust=Trust.REFUSED, trust_detail=error.message)
        if expected is not None and expected.statement not in ("", found.statement_digest):
            detail = f"its statement is {found.statement_digest}, and what was used had {expected.statement}"
            return replace(step, trust=Trust.REFUSED, trust_detail=detail)
        return replace(step, trust=Trust.VERIFIED, trust_detail=found.key)

    def _made_of(self, model: str) -> list[Step]:
        """Return what was made of a model; an agent that was made of another one stands below that."""
        try:
            agents = list(self._list_agents(model))
        except _SILENT:
            agents = []
        known = {agent.name for agent in agents}
        children: dict[str, list[agent_pb2.Agent]] = {}
        for agent in agents:
            children.setdefault(agent.parent if agent.parent in known else "", []).append(agent)
        made = [self._with_children(agent, children) for agent in children.get("", [])]
        return [*made, *(step for step in self._dependents(model) if step.name not in known)]

    def _with_children(self, agent: agent_pb2.Agent, children: dict[str, list[agent_pb2.Agent]]) -> Step:
        step = Step(kind="agent", name=agent.name, digest=agent.digest, job=agent.job, data=_sources(agent.data))
        if self._keys:
            try:
                step = self._judged(step, self._provenance(agent.name), None)
            except (*_SILENT, ArtifactCorruptError) as error:
                step = _untold(step, error)
        elif agent.HasField("storage"):  # there may be thousands, and one call for each would only say this
            step = replace(step, trust=Trust.SIGNED if agent.storage.key else Trust.UNSIGNED)
        # Taken out, so that a circle of names ends.
        below = children.pop(agent.name, [])
        return replace(step, made=tuple(self._with_children(child, children) for child in below))

    def _list_agents(self, model: str) -> Iterator[agent_pb2.Agent]:
        token = ""
        while True:
            request = agent_pb2.ListAgentsRequest(page_size=_PAGE, page_token=token, foundation=model)
            page = self._agents.agents.ListAgents(request)
            # A service that does not know the filter lists all of them.
            yield from (agent for agent in page.agents if agent.foundation == model)
            token = page.next_page_token
            if not token:
                return

    def _dependents(self, model: str) -> Iterator[Step]:
        """Yield what Cognate was told of: agents and jobs of other agent services too."""
        token = ""
        while True:
            request = model_pb2.ListDependentsRequest(name=model, page_size=_PAGE, page_token=token)
            try:
                page = self._cognate.models.ListDependents(request)
            except _SILENT:
                return
            for one in page.dependents:
                kind = "job" if one.name.startswith("jobs/") else "agent"
                yield Step(kind=kind, name=one.name, digest=one.digest, trust_detail=f"told by {one.owner}")
            token = page.next_page_token
            if not token:
                return


def _untold(step: Step, error: Exception) -> Step:
    trust = Trust.REFUSED if isinstance(error, ArtifactCorruptError) else Trust.UNKNOWN
    return replace(step, trust=trust, trust_detail=str(error))


def _told_by(agent: agent_pb2.Agent) -> list[Ancestor]:
    """Return the nearest version that an agent was made of, as its registry tells."""
    if agent.parent:
        return [Ancestor(role="agent", name=agent.parent, digest="")]
    if agent.foundation:
        return [Ancestor(role="foundation", name=agent.foundation, digest=agent.foundation_digest)]
    return []


def _told_in(provenance: Provenance) -> list[Ancestor]:
    """Return what an agent was made of, the nearest first, as its statement or else its manifest tells."""
    try:
        told = _document(provenance.statement).get("predicate", {}).get("made_of", [])
        if told:
            return [
                Ancestor(**{part: str(one[part]) for part in ("role", "name", "digest", "statement")}) for one in told
            ]
        manifest = _document(provenance.manifest)
        kinds = {"agent_version": "agent", "foundation": "foundation", "model_folder": "model_folder"}
        made_of = manifest.get("made_of", {})
        if made_of.get("kind") in kinds:
            role = kinds[made_of["kind"]]
            return [Ancestor(role=role, name=str(made_of["name"]), digest=str(made_of["digest"]))]
    except (AttributeError, KeyError, TypeError):  # a statement of another make; what else is known still counts
        return []
    return []


def _document(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sources(sources: Sequence[DataSource]) -> list[dict[str, Any]]:
    return [{"name": one.name, "kind": one.kind, "rows": one.rows, "digest": one.digest} for one in sources]
