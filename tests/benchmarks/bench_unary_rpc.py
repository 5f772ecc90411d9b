"""Calls/s of GetJob on a real Cognate service over those of a bare grpc.aio server that sends the same bytes.

Ours includes what the yardstick lacks: the contract's interceptor, a row read from the store in a thread, its
conversion, a line in the log. The same bare grpc.aio client drives both with the same bytes, so its cost is equal.
Usage: python tests/benchmarks/bench_unary_rpc.py [runs]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from cognateforge.client import CognateClient
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import interleave, report

SERVICE, METHOD = "cognateforge.cognate.v1.CognatePretrainingService", "GetJob"
CALLERS = 16
CALLS = 640
TIMEOUT_S = 10


def submit(address: str) -> pb.GetJobRequest:
    """Store a job, which stays QUEUED, and return the request that gets it."""
    request = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
    with CognateClient(address) as client:
        return pb.GetJobRequest(name=client.pretraining.StartPretraining(request).job.job.name)


async def echo(answer: bytes, address: Connection) -> None:
    """Serve GetJob with one and the same answer, for ever."""

    async def get_job(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return answer

    server = grpc.aio.server()
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(get_job)
    server.add_registered_method_handlers(SERVICE, {METHOD: handler})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    address.send(f"127.0.0.1:{port}")
    await server.wait_for_termination()


def serve_echo(answer: bytes, address: Connection) -> None:
    """Run `echo`, in a process of its own."""
    asyncio.run(echo(answer, address))


@contextmanager
def echo_process(answer: bytes) -> Iterator[str]:
    """Yield the address of the bare server."""
    context = multiprocessing.get_context("spawn")
    address, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve_echo, args=(answer, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield address.recv()
    finally:
        process.kill()
        process.join()


def make_driver(runner: asyncio.Runner, address: str, request: bytes, answer: bytes) -> Callable[[], float]:
    """Return a function that calls GetJob from concurrent callers and returns calls/s."""

    async def calls() -> float:
        async with grpc.aio.insecure_channel(address) as channel:
            get_job: Any = channel.unary_unary(f"/{SERVICE}/{METHOD}")
            await get_job(request, timeout=TIMEOUT_S)  # connects

            async def caller() -> None:
                for _ in range(CALLS // CALLERS):
                    if await get_job(request, timeout=TIMEOUT_S) != answer:
                        raise AssertionError("the answer changed")

            start_s = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(CALLERS)))
            return CALLS / (time.perf_counter() - start_s)

    return lambda: runner.run(calls())


def main(runs: int) -> None:
    """Measure and print."""
    clean_up_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="bench-unary-rpc-") as name, cognate_process(Path(name)) as address:
        request = submit(address)
        with CognateClient(address) as client:
            answer = client.pretraining.GetJob(request).SerializeToString()
        with echo_process(answer) as bare, asyncio.Runner() as runner:
            ours, yardstick = (
                make_driver(runner, where, request.SerializeToString(), answer) for where in (address, bare)
            )
            pairs = interleave(ours, yardstick, runs=runs)
    report("unary_rpc", pairs, unit="calls/s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
