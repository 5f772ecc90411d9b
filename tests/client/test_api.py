"""The public face of the client library."""

from __future__ import annotations

import subprocess
import sys

import cognateforge.client


def test_exported_names_are_frozen() -> None:
    """A name that programs import does not vanish by accident, and none appears unreviewed."""
    assert cognateforge.client.__all__ == [
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


def test_clients_stand_on_the_first_floor() -> None:
    """Neither library nor command line imports what only servers and workers need."""
    code = (
        "import sys, cognateforge.client, cognateforge.cli.app, cognateforge.cli.follow\n"
        "banned = {'torch', 'sqlalchemy', 'datasets', 'training_common', 'cognate_server', 'agent_server'}\n"
        "print(sorted(banned & {name.partition('.')[0] for name in sys.modules}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_help_does_not_wait_for_grpc() -> None:
    """`forge --help` imports neither grpc nor protobuf."""
    code = (
        "import sys, cognateforge.cli.app\n"
        "print(sorted({'grpc', 'google', 'pybreaker', 'consul'} & {n.partition('.')[0] for n in sys.modules}))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
