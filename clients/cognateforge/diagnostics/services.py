"""Checks over the wire: where a service is said to be, whether it answers there, and which release it is."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from cognateforge.client.channel import split_address
from cognateforge.client.discovery import discovery_for
from cognateforge.diagnostics.checks import Area, Check
from cognateforge.diagnostics.environment import release_numbers
from cognateforge.exceptions import ForbiddenError, ForgeError
from cognateforge.job.v1 import job_pb2

if TYPE_CHECKING:
    from cognateforge.cli.jobs import JobService

_CONNECT_S = 3.0
# A clock that is wrong by more lets leases of a few seconds end early on one side. Network delay is far below.
_SKEW_S = 2.0
_ELSEWHERE = "name where it listens: --cognate, --agent-server, FORGE_COGNATE or FORGE_AGENT"


@dataclass
class Wire:
    """The services as they were met. versions: of those that answered, by name."""

    versions: dict[str, str]

    def check(self, jobs: JobService, where: str) -> Iterator[Check]:
        """Look at one service, from its name to its answers. `where` is what the caller was told."""
        area = Area(f"{jobs.service.value} service")
        try:
            addresses = self._find(where, min(jobs.session.timeout_s, _CONNECT_S))
        except ForgeError as error:
            yield area.fail("discovery", error.message, f"start the service or its Consul, or {_ELSEWHERE}")
            return
        yield area.ok("discovery", f"{where} is {', '.join(addresses)}")
        for address in addresses:
            yield check_listening(area, address)
        yield from self._answers(area, jobs)

    @staticmethod
    def _find(where: str, patience_s: float) -> tuple[str, ...]:
        discovery = discovery_for(where, first_answer_s=patience_s)
        try:
            return discovery.addresses()
        finally:
            discovery.close()

    def _answers(self, area: Area, jobs: JobService) -> Iterator[Check]:
        try:
            health = jobs.health()
        except ForgeError as error:
            yield area.fail("health", error.message, "see the checks above; with TLS, give --tls-ca, -cert and -key")
            return
        if health == "SERVING":
            yield area.ok("health", health)
        else:
            yield area.fail("health", f"it says {health}", "its log tells what it lacks: store, scheduler or audit log")
        try:
            info = jobs.info()
        except ForbiddenError as error:
            yield area.warn("role", error.message, "have security.roles of the service give this identity a role")
            return
        except ForgeError as error:
            yield area.fail("answers", error.message, "its log tells why, by the call id")
            return
        self.versions[jobs.service.value] = info.version
        yield area.ok("release", info.version)
        if info.damaged_artifacts:
            yield area.fail(
                "artifacts", f"{info.damaged_artifacts} versions are damaged", "forge artifacts verify names the files"
            )
        for peer in info.peers:
            if peer.circuit == job_pb2.CIRCUIT_CLOSED:
                yield area.ok(f"circuit to {peer.name}", f"closed; {peer.failed} of {peer.admitted} calls failed")
            else:
                told = f"it holds calls to {peer.name} back; {peer.failed} of {peer.admitted} failed"
                yield area.warn(f"circuit to {peer.name}", told, f"see whether {peer.name} serves, from that machine")
        yield from self._clock(area, jobs)

    @staticmethod
    def _clock(area: Area, jobs: JobService) -> Iterator[Check]:
        """A job that was made in the future tells of a clock that is ahead."""
        try:
            newest = next(jobs.newest([], 1), None)
        except ForgeError:
            return
        if newest is None:
            return
        ahead_s = newest.job.create_time.ToMicroseconds() / 1e6 - time.time()
        if ahead_s > _SKEW_S:
            yield area.warn(
                "clock",
                f"its newest job was made {ahead_s:.1f} s ahead of this machine's clock",
                "keep both machines in time by NTP",
            )

    def skew(self) -> Check:
        """Compare the contracts of the services and of this client.

        A version's first two numbers are those of the contract that its distribution was made with. Neighbouring
        contracts understand each other, and what comes after the two numbers is each distribution's own.
        """
        area = Area("releases")
        here = version("cognateforge")
        told = ", ".join([f"client {here}", *(f"{name} {found}" for name, found in self.versions.items())])
        if not self.versions:
            return area.skip("skew", f"{told}; no service answered")
        contracts = {release_numbers(one)[:2] for one in (here, *self.versions.values())}
        majors, minors = {numbers[:1] for numbers in contracts}, [numbers[1:] for numbers in contracts]
        if len(majors) > 1 or not all(minors) or max(minors)[0] - min(minors)[0] > 1:
            return area.warn(
                "skew", told, "upgrade the older ones: neighbouring releases understand each other, others need not"
            )
        return area.ok("skew", told)


def check_listening(area: Area, address: str) -> Check:
    """Tell whether something takes connections at an address."""
    try:
        if address.startswith("unix:"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
                one.settimeout(_CONNECT_S)
                one.connect(address.removeprefix("unix:").removeprefix("//"))
        else:
            with socket.create_connection(split_address(address), timeout=_CONNECT_S):
                pass
    except socket.gaierror as error:
        return area.fail("port", f"{address}: the name cannot be resolved: {error.strerror}", _ELSEWHERE)
    except OSError as error:
        why = error.strerror or "no answer in time"
        return area.fail("port", f"{address}: {why}", f"start the service, open the port, or {_ELSEWHERE}")
    return area.ok("port", f"{address} takes connections")
