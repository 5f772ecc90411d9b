"""The floors hold where a linter cannot look: in running processes."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("cognate_server.server", {"torch", "datasets", "pyarrow", "transformers", "tensorboard", "agent_server"}),
        (
            "agent_server.server",
            {"torch", "datasets", "pyarrow", "transformers", "peft", "tensorboard", "cognate_server"},
        ),
        (
            "cognateforge.cli",
            {
                "torch",
                "sqlalchemy",
                "datasets",
                "tensorboard",
                "training_common",
                "cognateforge.alerts",
                "smtplib",
                "opentelemetry",
            },
        ),
        ("cognateforge.alerts", {"torch", "sqlalchemy", "datasets", "training_common", "pydantic"}),
        ("cognateforge.client", {"torch", "sqlalchemy", "datasets", "tensorboard", "training_common", "opentelemetry"}),
    ],
)
def test_a_process_loads_only_its_floor(module: str, absent: set[str]) -> None:
    """A server process must not carry torch, and neither service the other one; listing architectures included."""
    code = (
        f"import sys, {module}\n"
        "if 'agent_server.server' in sys.modules:\n"
        "    list(sys.modules['agent_server.server'].AgentArchitectureFactory())\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set() == absent & set(done.stdout.split())
