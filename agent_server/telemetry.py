"""What the agent service tells of itself beside what both services tell: how its calls to Cognate fare."""

from __future__ import annotations

from collections.abc import Iterator

from agent_server.foundation import CognateLink
from agent_server.recovery import LADDER
from agent_server.rl.recovery import RESYNCHRONIZE, Detector
from training_common.recovery import RETURN
from training_common.telemetry.readings import Reading

# What the recovery manager may do about what.
RECOVERIES = (
    *((str(d), str(a)) for d, actions in LADDER.items() for a in dict.fromkeys(actions)),
    *((str(detector), RESYNCHRONIZE) for detector in Detector),
    ("", RETURN),
)


def of_link(link: CognateLink) -> Iterator[Reading]:
    """Yield where the circuit to Cognate stands, and what became of this server's own calls. Workers have their own."""
    seen = link.snapshot()
    yield Reading("forge_circuit_open", float(seen.state != "closed"), (seen.name,))
    for outcome, count in (("sent", seen.admitted), ("failed", seen.failed), ("held_back", seen.refused)):
        yield Reading("forge_peer_calls_total", count, (seen.name, outcome))
