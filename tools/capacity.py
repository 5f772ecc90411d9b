"""How long jobs would wait, and what would be full first, at a scale that a person expects.

    make capacity ARGS="cluster"
    make capacity ARGS="cluster --set jobs_per_day=400 --set nodes=200"

The scale is a file of deploy/capacity, by its name, or any TOML file with the same keys; `--set` changes a key of it,
and `--keys` lists all of them. Jobs come at random and are simulated one by one; what they take of the servers follows
from figures that were measured (deploy/capacity/measured.toml). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tools import capacity_model as model
from tools.capacity_model import FOLDER, HOUR_S, MEASURED_FILE, Load, Measured, Scale
from tools.capacity_queue import Arrivals, Course, simulate
from training_common.jobs.scheduler import TICK_S

BUSY = 0.99
SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a scale comes to. course: None where more comes than can be run."""

    scale: Scale
    offered: float
    course: Course | None
    running: float
    running_busy: float
    mean: Sequence[Load]
    busy: Sequence[Load]
    full_at: Sequence[float]
    growth: dict[str, float]
    year: dict[str, float]
    memory_bytes: float
    warnings: Sequence[str]

    @property
    def first(self) -> tuple[str, float]:
        """Return what is full first when everything grows, nodes too, and at how many times the load."""
        factor, load = min(zip(self.full_at, self.mean, strict=True), key=lambda pair: pair[0])
        return load.name, factor

    @property
    def node_hours_per_day(self) -> tuple[float, float]:
        """Return the node hours of a day: those in use, and all of them."""
        share = min(1.0, self.offered)
        return 24 * self.scale.nodes * share, 24.0 * self.scale.nodes


def forecast(scale: Scale, measured: Measured) -> Forecast:
    """Simulate the queue and work out what is taken of each resource."""
    holds_s = scale.job_hours * HOUR_S + measured["start_s"] + TICK_S / 2
    offered = scale.arrival_rate * holds_s * scale.job_slots / scale.slots
    most = float(scale.slots // scale.job_slots)
    course = None if offered >= 1 else _simulated(scale, holds_s)
    running = most if course is None else course.mean_running()
    busy = most if course is None else float(course.running_quantile(BUSY))
    mean, most_loads = model.loads(scale, measured, running), model.loads(scale, measured, busy)
    full = [f"{load.name}: more than full, {load.utilization:.0%}" for load in most_loads if load.utilization > 1]
    return Forecast(
        scale=scale,
        offered=offered,
        course=course,
        running=running,
        running_busy=busy,
        mean=mean,
        busy=most_loads,
        full_at=[model.saturation(scale, measured, busy, load.name) for load in mean],
        growth=model.growth(scale, measured),
        year=model.stock(scale, measured),
        memory_bytes=model.memory_bytes(scale, measured),
        warnings=[*full, *model.warnings(scale, measured, busy)],
    )


def _simulated(scale: Scale, holds_s: float) -> Course:
    spread = scale.job_hours_spread

    def holds(chance: random.Random) -> float:
        # Of gamma's distributions: with a spread of 1 exponential, with 0 all alike.
        return chance.gammavariate(1 / spread**2, holds_s * spread**2) if spread else holds_s

    arrivals = Arrivals(
        between_s=lambda chance: chance.expovariate(scale.arrival_rate), holds_s=holds, slots=scale.job_slots
    )
    return simulate(arrivals, slots=scale.slots, jobs=scale.simulated_jobs, seed=scale.seed)


# --- what is printed


def text(found: Forecast) -> str:
    """Return the table that people read."""
    scale, lines = found.scale, [found.scale.title] if found.scale.title else []
    lines.append(
        f"{plural(scale.nodes, 'node')}, {plural(scale.slots, 'slot')}, "
        f"{plural(scale.servers, 'server')} over {scale.store}; "
        f"{scale.jobs_per_day:,.10g} jobs a day of {scale.job_hours:g} h on {plural(scale.job_slots, 'slot')}"
    )
    lines += ["", *_queue(found), "", f"{'resource':<18}{'mean':>9}{'busy':>9}{'full at':>12}   taken when busy"]
    full_slots = 1 / found.offered
    taken = f"{found.running_busy * scale.job_slots:,.0f} of {scale.slots:,} slots"
    lines.append(f"{'slots':<18}{_share(found.offered):>9}{'':>9}{_times(full_slots):>12}   {taken}")
    for mean, busy, full in zip(found.mean, found.busy, found.full_at, strict=True):
        taken = (
            "" if busy.unit == "share" else f"{_amount(busy.taken, busy.unit)} of {_amount(busy.capacity, busy.unit)}"
        )
        row = f"{busy.name:<18}{_share(mean.utilization):>9}{_share(busy.utilization):>9}{_times(full):>12}   {taken}"
        lines.append(row.rstrip())
    name, factor = found.first
    lines += ["", f"full first with more jobs: slots, at {_times(full_slots)} the jobs"]
    lines.append(f"full first with more jobs and nodes: {name}, at {_times(factor)} the load")
    lines += ["", f"{'a day adds':<18}{'':>12}     after a year lie there"]
    added, year = list(found.growth.items()), list(found.year.items())
    for number in range(max(len(added), len(year))):
        left = f"{added[number][0]:<18}{size(added[number][1]):>12}" if number < len(added) else " " * 30
        right = f"     {year[number][0]:<14}{size(year[number][1]):>12}" if number < len(year) else ""
        lines.append((left + right).rstrip())
    used, kept = found.node_hours_per_day
    lines += ["", f"memory of a server's process: {size(found.memory_bytes)}"]
    lines.append(f"node hours a day: {used:,.0f} in use of {kept:,.0f}")
    if scale.price_node_hour is not None:
        price = scale.price_node_hour
        lines.append(f"cost a day: {used * price:,.2f} of {kept * price:,.2f} {scale.currency}")
    lines += [f"warning: {warning}" for warning in found.warnings]
    return "\n".join(lines)


def _queue(found: Forecast) -> list[str]:
    if found.course is None:
        fits = found.scale.jobs_per_day / found.offered
        return [f"more comes than can be run: at most {fits:,.0f} jobs a day end, and the queue grows without end"]
    course = found.course
    quantiles = ", ".join(f"{share:.0%} within {duration(course.wait_quantile_s(share))}" for share in SHARES)
    return [f"wait for slots: mean {duration(course.mean_wait_s)} (+- {duration(course.wait_error_s)}); {quantiles}"]


def result(found: Forecast) -> dict[str, Any]:
    """Return what the last line has."""
    course, (name, factor) = found.course, found.first
    used, kept = found.node_hours_per_day
    scale = found.scale
    waits = None
    if course is not None:
        waits = {
            "mean": course.mean_wait_s,
            "error": course.wait_error_s,
            **{f"p{round(100 * s)}": course.wait_quantile_s(s) for s in SHARES},
        }
    cost = (
        None
        if scale.price_node_hour is None
        else {"used": used * scale.price_node_hour, "all": kept * scale.price_node_hour}
    )
    values = {
        "name": "capacity",
        "title": scale.title,
        "slots": scale.slots,
        "offered": found.offered,
        "wait_s": waits,
        "running_jobs": {"mean": found.running, "busy": found.running_busy},
        "utilization": {
            mean.name: {"mean": mean.utilization, "busy": busy.utilization, "full_at": full}
            for mean, busy, full in zip(found.mean, found.busy, found.full_at, strict=True)
        },
        "first": {"name": name, "full_at": factor},
        "bytes_per_day": found.growth,
        "bytes_after_a_year": found.year,
        "server_memory_bytes": found.memory_bytes,
        "node_hours_per_day": {"used": used, "all": kept},
        "cost_per_day": cost,
        "currency": scale.currency,
        "warnings": list(found.warnings),
    }
    rounded: dict[str, Any] = _rounded(values)
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def plural(count: int, word: str) -> str:
    """Return a count with its word."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """Return a time as people write it, to two digits or so."""
    for unit, length in (("d", 86_400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def size(value: float) -> str:
    """Return bytes to three digits, in powers of 1000."""
    for unit, power in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= power:
            return f"{value / power:.3g} {unit}" if value < 999.5 * power else f"{value / power:.0f} {unit}"
    return f"{value:.0f} B"


def _amount(value: float, unit: str) -> str:
    if unit.startswith("bytes"):
        return size(value) + unit.removeprefix("bytes")
    return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _share(value: float) -> str:
    return f"{value:.1%}" if value < 10 else f"{value:,.0f} x"


def _times(factor: float) -> str:
    if math.isinf(factor):
        return "never"
    return f"{factor:.2f} x" if factor < 10 else f"{factor:,.0f} x"


# --- the command


def load_scale(name: str, changes: Sequence[str] = ()) -> Scale:
    """Return a scale of deploy/capacity or of a file, with changes KEY=VALUE. Errors: ValueError, OSError."""
    file = FOLDER / f"{name}.toml"
    if not file.is_file() and not (file := Path(name)).is_file():
        names = ", ".join(sorted({path.stem for path in FOLDER.glob("*.toml")} - {MEASURED_FILE.stem}))
        raise ValueError(f"{name!r} is neither a file nor a scale of deploy/capacity: name one of {names}")
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no TOML: {error}") from error
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--set {change}: write KEY=VALUE")
        values[key.strip()] = value.strip()
    try:
        return Scale.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_told(one) for one in error.errors())) from error


def _told(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":  # one of the scale as a whole, whose text begins with the key
        return str(error["ctx"]["error"])
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: a scale has no such key; --keys lists those that it has"
    return f"{key}: {error['msg']}"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("scale", nargs="?", default="machine", help="name of a file in deploy/capacity, or any file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the scale")
    parser.add_argument("--keys", action="store_true", help="list the keys of a scale and end")
    options = parser.parse_args(argv)
    if options.keys:
        for name, field in Scale.model_fields.items():
            default = "required" if field.is_required() else field.default
            print(f"{name:<26}{default!s:<14}{field.description}")
        return 0
    try:
        scale = load_scale(options.scale, options.set)
    except (ValueError, OSError) as error:
        print(f"capacity: {error}", file=sys.stderr)
        return 2
    found = forecast(scale, Measured.load())
    print(text(found))
    print(json.dumps(result(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
