"""Checks of this machine's side: Python, what is installed, the clock."""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

from cognateforge.diagnostics.checks import Area, Check
from cognateforge.parts import CLIENT, PARTS

_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)\s*(\[(?P<of>[\w,\s-]+)\])?\s*(?P<floor>(>=|==|~=)\s*[\w.]+)?"
    r"\s*(;\s*extra\s*==\s*['\"](?P<extra>[\w-]+)['\"])?"
)
# What only development needs.
_NOT_TOLD = frozenset({"dev", "bench", "plots"})
_AREA = Area("environment")
# adjtimex(2): what it returns where the clock is not kept in time, and room for its structure.
_TIME_ERROR, _TIMEX_BYTES = 5, 512


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """A package that a distribution asks for. floor: with its sign, as ">=1.4"; of: extras of that package."""

    name: str
    floor: str
    of: tuple[str, ...]


def check_environment() -> Iterator[Check]:
    """Look at Python, the packages of this release and its extras, and the clock."""
    yield _python()
    here = [part for part in PARTS if _installed(part)]
    yield _packages(here)
    yield _extras(requirements(CLIENT))
    yield _tested()
    yield check_clock()


def requirements(part: str) -> Mapping[str, tuple[Requirement, ...]]:
    """Return what one of our distributions asks for, by extra; "" for what it always needs."""
    found: dict[str, list[Requirement]] = {"": []}
    for text in requires(part) or []:
        match = _REQUIREMENT.fullmatch(text.strip())
        if match is None:
            continue
        of = tuple(part.strip() for part in (match["of"] or "").split(",") if part.strip())
        floor = (match["floor"] or "").replace(" ", "")
        found.setdefault(match["extra"] or "", []).append(Requirement(name=match["name"], floor=floor, of=of))
    return {extra: tuple(listed) for extra, listed in found.items()}


def installed_versions() -> dict[str, str]:
    """Return the versions of all packages that this release may use and that are here, by name."""
    parts = [part for part in PARTS if _installed(part)]
    names = {one.name for part in parts for listed in requirements(part).values() for one in listed} | {*parts}
    return {name: found for name in sorted(names) if (found := _installed(name))}


def _python() -> Check:
    floor = metadata(CLIENT)["Requires-Python"] or ""
    here = ".".join(map(str, sys.version_info[:3]))
    if floor and not _at_least(here, floor):
        return _AREA.fail("python", f"{here} is below {floor}", f"run with a Python {floor}")
    return _AREA.ok("python", f"{here} at {sys.executable}")


def _packages(parts: Sequence[str]) -> Check:
    """Look at what the installed parts of this project always need: each other, too, of one minor release."""
    needed = {one for part in parts for one in requirements(part)[""]}
    troubles = sorted({trouble for one in needed if (trouble := _trouble(one))})
    if troubles:
        return _AREA.fail("packages", "; ".join(troubles), f"pip install --upgrade {' '.join(parts)}")
    told = ", ".join(f"{part} {_installed(part)}" for part in parts)
    return _AREA.ok("packages", f"{told}, and the {len({one.name for one in needed} - {*PARTS})} packages needed")


def _extras(needed: Mapping[str, tuple[Requirement, ...]]) -> Check:
    here, absent, old = [], [], []
    for extra in sorted(set(needed) - _NOT_TOLD - {""}):
        wanted = _all_of(extra, needed)
        if any(_installed(one.name) is None for one in wanted):
            absent.append(extra)
            continue
        here.append(extra)
        old += [f"{extra}: {trouble}" for one in wanted if (trouble := _trouble(one))]
    told = f"installed: {', '.join(here) or 'none'}; not installed: {', '.join(absent) or 'none'}"
    if old:
        extras = ",".join(sorted({text.partition(":")[0] for text in old}))
        return _AREA.warn("extras", "; ".join(old), f"pip install --upgrade 'cognateforge[{extras}]'")
    return _AREA.ok("extras", told)


def _all_of(extra: str, needed: Mapping[str, tuple[Requirement, ...]], *, deep: int = 8) -> list[Requirement]:
    """Return what an extra needs, with what the extras and parts of this project need that it names."""
    found: list[Requirement] = []
    for one in needed.get(extra, ()):
        if one.name != CLIENT:
            found.append(one)
        if one.name in PARTS and deep and _installed(one.name):
            below = requirements(one.name)
            found += [other for name in one.of for other in _all_of(name, below, deep=deep - 1)]
    return found


def _tested() -> Check:
    pins = tested_versions()
    if not pins:
        return _AREA.skip("tested versions", "this installation does not tell what its release was tested with")
    older: list[str] = []
    newer: list[str] = []
    for name, pin in pins.items():
        here = _installed(name)
        if here is None or here.partition("+")[0] == pin:  # "+cpu" names a build, not another version
            continue
        (newer if _at_least(here, f">={pin}") else older).append(f"{name} {here} (tested {pin})")
    if older:
        return _AREA.warn(
            "tested versions",
            f"older than what this release was tested with: {', '.join(older)}",
            "pip install --upgrade them, or install with -c constraints.txt of the release",
        )
    beside = f"; newer: {', '.join(newer)}" if newer else ""
    return _AREA.ok("tested versions", f"nothing is older than what this release was tested with{beside}")


def tested_versions() -> dict[str, str]:
    """Return the versions that this release was tested with, by package."""
    package = Path(__file__).resolve().parent.parent
    source = package.parent.parent
    places = [package / "constraints.txt"]
    if (source / "pyproject.toml").exists():
        places.append(source / "constraints.txt")
    for place in places:
        try:
            text = place.read_text(encoding="utf-8")
        except OSError:
            continue
        return dict(re.findall(r"^([A-Za-z0-9._-]+)==([\w.+!]+)", text, re.MULTILINE))
    return {}


def check_clock() -> Check:
    """Tell whether the kernel's clock is kept in time. Leases, certificates and deadlines go by it."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    adjtimex = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    # All zero: it is asked and not set.
    state = -1 if adjtimex is None else adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    if state == -1:
        return _AREA.skip("clock", f"{now}; this system does not tell whether it is kept in time")
    if state == _TIME_ERROR:
        return _AREA.warn(
            "clock", f"{now}, and nothing keeps it in time", "run chrony, systemd-timesyncd or another NTP client"
        )
    return _AREA.ok("clock", f"{now}, kept in time")


def _trouble(one: Requirement) -> str:
    here = _installed(one.name)
    if here is None:
        return f"{one.name} is not installed"
    return "" if not one.floor or _at_least(here, one.floor) else f"{one.name} {here} is not {one.floor}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _at_least(here: str, floor: str) -> bool:
    """Whether a version is what ">=1.4", "==1.4" or "~=1.4" asks for. Only the numbers of a release count."""
    sign, wanted = floor[:2], _numbers(floor[2:])
    found = _numbers(here)
    width = max(len(found), len(wanted))
    padded = [(*numbers, *([0] * (width - len(numbers)))) for numbers in (found, wanted)]
    if sign == "~=" and found[: len(wanted) - 1] != wanted[:-1]:
        return False
    return padded[0] == padded[1] if sign == "==" else padded[0] >= padded[1]


def release_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with, behind an epoch; none of a text that is no version."""
    match = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else ()


def _numbers(text: str) -> tuple[int, ...]:
    # An epoch, as in "1!2.0", goes before every other number.
    epoch = re.match(r"(\d+)!", text)
    return (int(epoch[1]) if epoch else 0, *release_numbers(text))
