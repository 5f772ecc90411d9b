"""Who gets a lease when 64 callers want one device at once, over real connections, a thousand times.

Every round must have exactly one winner, with a fencing token above all before it. The value is rounds/s; the yardstick
are rounds of the same number of GetAvailability calls, which change nothing; they are made in the first rounds only.
Usage: python tests/benchmarks/bench_leases.py [rounds]
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
import uuid
from pathlib import Path

from google.protobuf import duration_pb2

from cognateforge.client import AsyncCognateClient
from cognateforge.exceptions import CapacityTakenError
from cognateforge.exchange.v1 import resource_pb2 as pb
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import print_result

CALLERS = 64
CONNECTIONS = 4
TIMEOUT_S = 60
READ_ROUNDS = 20


async def want(client: AsyncCognateClient) -> pb.Lease | None:
    """Return a lease of the only device, or None where somebody else has it."""
    request = pb.AcquireLeaseRequest(
        request_id=str(uuid.uuid4()), kind=pb.RESOURCE_KIND_GPU, amount=1, ttl=duration_pb2.Duration(seconds=600)
    )
    try:
        return (await client.resources.AcquireLease(request, timeout=TIMEOUT_S)).lease
    except CapacityTakenError:
        return None


async def measure(address: str, rounds: int) -> None:
    """Run the rounds and print. Errors: AssertionError, in a round without exactly one winner."""
    clients = [AsyncCognateClient(address) for _ in range(CONNECTIONS)]
    for client in clients:
        await client.open()
    last, spent_s, read_s = 0, 0.0, 0.0
    for turn in range(rounds):
        start_s = time.perf_counter()
        answers = await asyncio.gather(*(want(clients[n % CONNECTIONS]) for n in range(CALLERS)))
        spent_s += time.perf_counter() - start_s
        won = [lease for lease in answers if lease is not None]
        if len(won) != 1 or won[0].fencing_token <= last:
            raise AssertionError(f"round {turn}: {len(won)} winners, tokens {[lease.fencing_token for lease in won]}")
        last = won[0].fencing_token
        release = pb.ReleaseLeaseRequest(request_id=str(uuid.uuid4()), name=won[0].name, fencing_token=last)
        await clients[0].resources.ReleaseLease(release, timeout=TIMEOUT_S)
        if turn >= READ_ROUNDS:
            continue
        start_s = time.perf_counter()
        reads = (
            clients[n % CONNECTIONS].resources.GetAvailability(pb.GetAvailabilityRequest(), timeout=TIMEOUT_S)
            for n in range(CALLERS)
        )
        await asyncio.gather(*reads)
        read_s += time.perf_counter() - start_s
    for client in clients:
        await client.close()
    read_rounds = min(rounds, READ_ROUNDS)
    print_result(
        "leases",
        rounds / spent_s,
        read_rounds / read_s,
        unit="rounds/s",
        callers=CALLERS,
        rounds=rounds,
        winners_per_round=1,
    )


def main(rounds: int) -> None:
    """Start a server that has one device, and measure."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-leases-") as name:
        settings = Path(name) / "settings.toml"
        settings.write_text("[lending]\ngpus = 1\n")
        with cognate_process(Path(name) / "server", settings) as address:
            asyncio.run(measure(address, rounds))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
