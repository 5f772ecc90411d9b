"""`forge top`: both services and their jobs, live."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated

import typer

from cognateforge.cli.exits import Exit
from cognateforge.cli.jobs import JobService, Service, state_word, wait_words
from cognateforge.cli.session import Session, command
from cognateforge.cli.terminal import can_draw, console, restored

if TYPE_CHECKING:
    from rich.console import Console, Group

    from cognateforge.cli.overview import Capacity, JobLine, Lookout, ServiceLine

_COLUMNS = ("job", "service", "state", "step", "done", "steps/s", "left", "loss", "waits for", "caller")
# A whole name beside the other columns takes about this much.
_WIDE = 150


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app)
    def top(
        session: Session,
        once: Annotated[
            bool,
            typer.Option("--once", help="Look once and end. So it does in a pipe, and where TERM is dumb."),
        ] = False,
        interval_s: Annotated[float, typer.Option("--interval", min=0.2, help="Seconds between two looks.")] = 2.0,
        ended: Annotated[int, typer.Option(min=0, max=500, help="How many ended jobs of each service.")] = 5,
    ) -> Exit:
        """Show both services and their jobs, live. A service that is away is shown with since when."""
        from cognateforge.cli.overview import Lookout

        lookouts = [Lookout(JobService(service, session), ended=ended) for service in Service]
        if once or not (session.as_json or can_draw(sys.stdout)):
            return _once(session, lookouts)
        if session.as_json:
            while True:
                _once(session, lookouts)
                time.sleep(interval_s)
        return _live(lookouts, interval_s)


def _once(session: Session, lookouts: Sequence[Lookout]) -> Exit:
    with ThreadPoolExecutor(len(lookouts)) as pool:
        lines = list(pool.map(lambda one: one.look(), lookouts))
    if session.as_json:
        for line in lines:
            session.emit(line.to_plain())
    else:
        # A pipe has no width: nothing is cut there.
        printed = console(pipe_width=400)
        printed.print(screen(lines, printed))
    return Exit.OK if all(line.well for line in lines) else Exit.UNAVAILABLE


def _live(lookouts: Sequence[Lookout], interval_s: float) -> Exit:
    """Draw until Ctrl-C. Each service has its own thread: one that hangs does not hold the other's picture up."""
    from rich.live import Live

    from cognateforge.cli.overview import ServiceLine

    lines = [ServiceLine(service=service) for service in Service]
    ended = threading.Event()

    def follow(index: int) -> None:
        while not ended.is_set():
            lines[index] = lookouts[index].look()
            ended.wait(interval_s)

    for index in range(len(lookouts)):
        threading.Thread(target=follow, args=(index,), name=f"top-{index}", daemon=True).start()
    drawn = console()
    try:
        with restored(drawn), Live(console=drawn, screen=True, auto_refresh=False) as live:
            while True:
                live.update(screen(lines, drawn, height=drawn.size.height), refresh=True)
                time.sleep(min(0.5, interval_s))
    except KeyboardInterrupt:
        return Exit.OK
    finally:
        ended.set()


def screen(
    lines: Sequence[ServiceLine], console: Console, *, height: int | None = None, now: float | None = None
) -> Group:
    """Return the picture. height: lines that there are; jobs beyond them are counted."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from cognateforge.cli.terminal import printable

    now = time.time() if now is None else now
    heads = [Text(printable(text), overflow="ellipsis", no_wrap=True) for line in lines for text in _head(line, now)]
    jobs = sorted((job for line in lines for job in line.jobs), key=lambda job: job.place)
    room = len(jobs) if height is None else max(1, height - len(heads) - 3)
    table = Table(*_COLUMNS, box=None, pad_edge=False)
    for job in jobs[:room]:
        cells = _cells(job, whole=console.width >= _WIDE)
        table.add_row(*(Text(printable(cell), overflow="ellipsis", no_wrap=True) for cell in cells))
    parts: list[Text | Table] = [*heads, Text(""), table]
    if len(jobs) > room:
        parts.append(Text(f"and {len(jobs) - room} more: forge jobs"))
    return Group(*parts)


def _head(line: ServiceLine, now: float) -> list[str]:
    from cognateforge.cli.curve import span

    if line.away:
        since = line.since or now
        moment = time.strftime("%H:%M:%S", time.localtime(since))
        told = [f"{line.service.value}: AWAY since {moment} ({span(now - since)}): {line.away}"]
        if line.seen is not None and line.jobs:
            told.append(f"  its jobs are as of {time.strftime('%H:%M:%S', time.localtime(line.seen))}")
        return told
    if line.seen is None:
        return [f"{line.service.value}: not looked at yet"]
    parts = [f"{line.service.value}: {line.health}", ", ".join(line.addresses), line.version]
    if line.slots:  # a service of before 0.2 does not tell
        parts.append(f"{line.slots_taken} of {line.slots} slots")
    parts.append(f"{line.running} at work, {line.waiting} waiting")
    parts += [f"circuit {name} {state}" for name, state in line.circuits.items() if state.lower() != "closed"]
    if line.damaged_artifacts:
        parts.append(f"{line.damaged_artifacts} DAMAGED: forge artifacts verify")
    held = [_capacity(one) for one in line.capacities]
    return ["  ".join(parts), *([f"  {', '.join(held)}"] if held else [])]


def _capacity(one: Capacity) -> str:
    unit, scale = (" GiB", 1 << 30) if one.kind == "memory" else ("", 1)
    lent = f", {one.lent / scale:.4g} lent" if one.lent else ""
    return f"{one.kind} {one.held / scale:.4g} of {one.total / scale:.4g}{unit} held{lent}"


def _cells(line: JobLine, *, whole: bool) -> tuple[str, ...]:
    from cognateforge.cli.curve import span

    job = line.job
    name = job.name.removeprefix("jobs/")
    return (
        name if whole else name[:8],
        line.service.value,
        state_word(job),
        f"{job.step}/{job.total_steps}",
        f"{job.step / job.total_steps:.0%}" if job.total_steps else "",
        "" if line.steps_per_s is None else f"{line.steps_per_s:.3g}",
        "" if line.seconds_left is None else span(line.seconds_left),
        "" if line.loss is None else f"{line.loss:.4g}",
        job.failure.reason if job.HasField("failure") else wait_words(job),
        job.caller,
    )
