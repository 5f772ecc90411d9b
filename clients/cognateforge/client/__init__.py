"""The client library: sync and asyncio clients of both services.

    with CognateClient("127.0.0.1:7101") as cognate:
        model = cognate.fetch_model("cognate-25m", "models/cognate-25m")

Every call has a deadline and a request id, passes a circuit breaker, is repeated only where the contract allows it, and
fails with a class of `cognateforge.exceptions`.
"""

from cognateforge.client.aio import AsyncAgentClient, AsyncCognateClient
from cognateforge.client.breaker import BreakerSnapshot, CallBreaker
from cognateforge.client.deadline import deadline_budget, deadline_within, remaining_budget_s
from cognateforge.client.discovery import ConsulDiscovery, Discovery, StaticDiscovery
from cognateforge.client.fetch import FetchedArtifact
from cognateforge.client.sync import AgentClient, CognateClient
from cognateforge.client.tls import TlsFiles
from cognateforge.client.watch import ModelNews, ModelSnapshot

__all__ = [
    "AgentClient",
    "AsyncAgentClient",
    "AsyncCognateClient",
    "BreakerSnapshot",
    "CallBreaker",
    "CognateClient",
    "ConsulDiscovery",
    "Discovery",
    "FetchedArtifact",
    "ModelNews",
    "ModelSnapshot",
    "StaticDiscovery",
    "TlsFiles",
    "deadline_budget",
    "deadline_within",
    "remaining_budget_s",
]
