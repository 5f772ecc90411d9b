"""Run both services until Ctrl-C, with their state in var/: `make up`."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from rich.console import Console

from deploy.services import Services

COGNATE, AGENT = "127.0.0.1:7101", "127.0.0.1:7102"
ADMIN = ("127.0.0.1:7111", "127.0.0.1:7112")


def main() -> int:
    """Start, say where, wait, drain."""
    console = Console(soft_wrap=True)
    stop = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())
    services = Services(Path("var"))
    try:
        services.start_both(cognate=COGNATE, agent=AGENT, admin=ADMIN)
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False)
        services.stop()
        return 1
    for service, admin in zip(services.running, ADMIN, strict=True):
        console.print(f"{service.name:15} {service.address:18} http://{admin}/metrics  log {service.log}")
    console.print("try: .venv/bin/forge status      stop with Ctrl-C")
    while not stop.wait(1.0):
        ended = next((s for s in services.running if s.process.poll() is not None), None)
        if ended is not None:
            console.print(f"[red]{ended.name} ended by itself; see {ended.log}[/red]")
            services.running.remove(ended)
            services.stop()
            return 1
    console.print("draining")
    services.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
