"""Calls/s of GetJob on a real Cognate service over those of a bare grpc.aio server that sends the same bytes.

Ours includes what the yardstick lacks: mutual TLS, the contract's interceptor with identity, policy, limits and rules,
a row read from the store, its conversion, a line in the log. The same bare grpc.aio client drives both with the same
bytes. A second figure leaves TLS out.
Usage: python tests/benchmarks/bench_unary_rpc.py [runs]
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from cognateforge.certificates import CA_CERT, Authority
from cognateforge.client import CognateClient, TlsFiles
from cognateforge.cognate.v1 import pretraining_pb2 as pb
from tests.benchmarks.cognate_process import clean_up_on_sigterm, cognate_process
from tests.benchmarks.common import interleave, report

SERVICE, METHOD = "cognateforge.cognate.v1.CognatePretrainingService", "GetJob"
CALLERS = 16
CALLS = 640
TIMEOUT_S = 10


def submit(client: CognateClient) -> tuple[bytes, bytes]:
    """Store a job, which ends as CANCELLED, and return the request that gets it, and its answer.

    Of one that waits its place in the queue would be looked up as well.
    """
    start = pb.StartPretrainingRequest(request_id=str(uuid.uuid4()), plan=pb.PretrainingPlan(total_steps=9))
    request = pb.GetJobRequest(name=client.pretraining.StartPretraining(start).job.job.name)
    client.pretraining.CancelJob(pb.CancelJobRequest(request_id=str(uuid.uuid4()), name=request.name))
    return request.SerializeToString(), client.pretraining.GetJob(request).SerializeToString()


def write_settings(folder: Path) -> tuple[Path, TlsFiles]:
    """Make an authority, and settings for a server that knows one operator, who may call as often as he can."""
    made = Authority.create(folder, "bench.test")
    server, operator = made.issue("server", hosts=["127.0.0.1"]), made.issue("operator")
    settings = folder / "settings.toml"
    settings.write_text(
        f'[security.tls]\ncert_file = "{server.cert}"\nkey_file = "{server.key}"\n'
        f'client_ca_file = "{folder / CA_CERT}"\n'
        f'[security.roles]\n"{operator.spiffe_id}" = ["operator"]\n[limits]\ncaller_calls_per_s = 0\n'
    )
    return settings, TlsFiles(ca=folder / CA_CERT, cert=operator.cert, key=operator.key)


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


def make_driver(
    runner: asyncio.Runner, address: str, tls: TlsFiles | None, request: bytes, answer: bytes
) -> Callable[[], float]:
    """Return a function that calls GetJob from concurrent callers and returns calls/s."""

    async def calls() -> float:
        if tls is None:
            dial = grpc.aio.insecure_channel(address)
        else:
            dial = grpc.aio.secure_channel(address, tls.credentials())
        async with dial as channel:
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
    with tempfile.TemporaryDirectory(prefix="bench-unary-rpc-") as name, ExitStack() as stack:
        folder = Path(name)
        settings, tls = write_settings(folder / "certs")
        secured = stack.enter_context(cognate_process(folder / "secured", settings))
        plain = stack.enter_context(cognate_process(folder / "plain"))
        with CognateClient(secured, tls=tls) as client:
            request, answer = submit(client)
        with CognateClient(plain) as client:
            plain_request, plain_answer = submit(client)
        bare = stack.enter_context(echo_process(answer))
        runner = stack.enter_context(asyncio.Runner())
        yardstick = make_driver(runner, bare, None, request, answer)
        without = interleave(make_driver(runner, plain, None, plain_request, plain_answer), yardstick, runs=runs)
        pairs = interleave(make_driver(runner, secured, tls, request, answer), yardstick, runs=runs)
    ratio_plaintext = round(statistics.median(ours / theirs for ours, theirs in without), 3)
    report("unary_rpc", pairs, unit="calls/s", ratio_plaintext=ratio_plaintext)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 12)
