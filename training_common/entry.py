"""The command line of a service: settings file, address file, then serve until a signal."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from training_common import logs
from training_common.rpc.server import RunningServer, serve_until_signal
from training_common.settings import ServiceSettings, SettingsError

S = TypeVar("S", bound=ServiceSettings)

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 32 << 20


def main(
    name: str, *, load_settings: Callable[[Path | None], S], build: Callable[[S, Path | None], RunningServer]
) -> None:
    """Run a service. Exit status 2 tells of settings that cannot be used, 1 of an address that is taken."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {name}", allow_abbrev=False, description=f"Runs {name} until SIGTERM."
    )
    parser.add_argument("--settings", type=Path, metavar="FILE", help="TOML file; the environment goes over it")
    parser.add_argument("--address-file", type=Path, metavar="FILE", help="gets the bound address once it is up")
    options = parser.parse_args()
    logs.configure()
    _keep_freed_memory()
    settings_file = options.settings.resolve() if options.settings else None

    async def serve() -> None:
        settings = load_settings(settings_file)
        running = build(settings, settings_file)
        running.telemetry.trace_process()
        await serve_until_signal(running, name=name, address_file=options.address_file)

    try:
        asyncio.run(serve())
    except SettingsError as error:
        sys.exit(_complain(f"{name}: {error}", status=2))
    except RuntimeError as error:  # gRPC's own, when it cannot bind
        sys.exit(_complain(f"{name}: {error}", status=1))


def _keep_freed_memory() -> None:
    """Let malloc reuse what it freed. By default glibc gives buffers of a stream's size back to the kernel at once.

    Every chunk of a fetch then takes fresh pages for each of its copies, which is most of what a fetch costs a server.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def _complain(message: str, *, status: int) -> int:
    sys.stderr.write(f"{message}\n")
    return status
