"""`forge doctor` from the client's side: what it tells, that it names remedies, and its exit codes."""

from __future__ import annotations

import datetime
import json
import socket
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from cognateforge import exceptions
from cognateforge.certificates import Authority
from cognateforge.cli.app import app
from cognateforge.cognate.v1 import pretraining_pb2
from cognateforge.diagnostics import environment, plugins, services
from cognateforge.diagnostics.checks import Area, Check, Level
from cognateforge.diagnostics.identity import check_authority, check_identity
from cognateforge.diagnostics.services import check_listening
from cognateforge.job.v1 import job_pb2
from tests.client.fakes import Fake, FakePretraining, fail

AREA = Area("here")


def run(fake: Fake, *args: str) -> Result:
    env = {"FORGE_COGNATE": fake.address, "FORGE_AGENT": fake.address}
    return CliRunner().invoke(app, ["doctor", *args], env=env, catch_exceptions=False)


def levels(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.level.value for check in checks}


def test_two_services_that_serve_are_well(fake: Fake) -> None:
    """Every check is told as JSON with its level; another release of a service is a warning with a remedy."""
    result = run(fake, "--json")
    checks = [json.loads(line) for line in result.stdout.splitlines()]
    assert 0 == result.exit_code, result.stdout
    found = {(check["area"], check["name"]): check for check in checks}
    for service in ("cognate service", "agent service"):
        for name in ("discovery", "port", "health", "release"):
            assert "ok" == found[service, name]["level"]
    assert ("warn", f"client {version('cognateforge')}, cognate 9.9, agent 9.9") == (
        found["releases", "skew"]["level"],
        found["releases", "skew"]["detail"],
    )
    assert all(check["remedy"] for check in checks if check["level"] in ("warn", "fail"))


@pytest.mark.parametrize(
    ("here", "cognate", "agent", "level"),
    [
        ("0.2.0", "0.2.0", "0.2.7", Level.OK),
        ("0.3.0.dev0", "0.2.1", "0.3.0", Level.OK),
        ("0.2.0", "0.1.0", "0.3.0", Level.WARN),
        ("0.9.0", "0.10.0", "0.10.0", Level.OK),
        ("1.0.0", "0.9.0", "1.0.0", Level.WARN),
        ("0.2.0", "unknown", "0.2.0", Level.WARN),
    ],
)
def test_versions_may_differ_as_long_as_contracts_are_neighbours(
    here: str, cognate: str, agent: str, level: Level, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each service is released by itself: what counts is the contract, whose numbers come first in every version."""
    monkeypatch.setattr(services, "version", lambda _name: here)
    found = services.Wire({"cognate": cognate, "agent": agent}).skew()
    assert (level, f"client {here}, cognate {cognate}, agent {agent}") == (found.level, found.detail)


def test_a_service_that_is_away_fails_with_a_remedy(fake: Fake) -> None:
    """Its port and its health are told, the other service is looked at all the same, and the exit code is 5."""
    fake.stop()
    gone = fake.address
    other = Fake()
    env = {"FORGE_COGNATE": gone, "FORGE_AGENT": other.address}
    result = CliRunner().invoke(app, ["doctor", "--timeout", "2"], env=env)
    other.stop()
    assert 5 == result.exit_code
    lines = result.stdout.splitlines()
    [port] = [number for number, line in enumerate(lines) if line.startswith(f"  fail  port: {gone}: ")]
    assert "start the service" in lines[port + 1]
    assert lines.count("  ok    health: SERVING") == 1


def test_a_caller_without_a_role_is_told_so(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health answers everybody; that the rest is refused is a matter of roles, not of the service."""

    def refuse(_self: object, _request: object, context: grpc.ServicerContext) -> None:
        fail(context, exceptions.RoleMissingError("viewer is needed"))

    monkeypatch.setattr(FakePretraining, "GetServerInfo", refuse)
    fake.stop()
    fake.start()
    checks = [json.loads(line) for line in run(fake, "--json").stdout.splitlines()]
    found = {check["name"]: check for check in checks if check["area"] == "cognate service"}
    assert ("ok", "warn") == (found["health"]["level"], found["role"]["level"])


def test_a_clock_that_is_ahead_is_seen_by_the_newest_job(fake: Fake) -> None:
    """It was made in the future."""
    fake.pretraining.job.job.create_time.GetCurrentTime()
    ahead = fake.pretraining.job.job.create_time.ToSeconds() + 3600
    fake.pretraining.job.job.create_time.FromSeconds(ahead)
    checks = [json.loads(line) for line in run(fake, "--json").stdout.splitlines()]
    [clock] = [check for check in checks if (check["area"], check["name"]) == ("cognate service", "clock")]
    assert "warn" == clock["level"]


def test_ports_tell_refused_unresolved_and_open(fake: Fake, tmp_path: Path) -> None:
    """Each with the system's own words."""
    assert Level.OK is check_listening(AREA, fake.address).level
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        refused = check_listening(AREA, f"127.0.0.1:{held.getsockname()[1]}")
    assert (Level.FAIL, True) == (refused.level, "refused" in refused.detail)
    assert Level.FAIL is check_listening(AREA, f"unix:{tmp_path / 'none.sock'}").level


def test_an_identity_that_is_whole(tmp_path: Path) -> None:
    """Dates, SPIFFE id, key and chain; the authority's own dates too."""
    issued = Authority.create(tmp_path, "example.org").issue("operator")
    checks = list(check_identity(AREA, cert=issued.cert, key=issued.key, ca=tmp_path / "ca.pem"))
    assert {"ok"} == {check.level.value for check in checks}
    assert ["certificate", "spiffe id", "key", "authority", "chain"] == [check.name for check in checks]
    assert "spiffe://example.org/operator" in [check.detail for check in checks]


def test_an_identity_that_is_not(tmp_path: Path) -> None:
    """One that ends soon, one that ended, another's key, another's authority, a key that others can read, no files."""
    ours = Authority.create(tmp_path / "ours", "example.org")
    other = Authority.create(tmp_path / "other", "example.net")
    mine, theirs = ours.issue("operator", days=30), other.issue("operator")
    now = datetime.datetime.now(datetime.UTC)

    def found(*, key: Path = mine.key, ca: str = "ours", later: float = 0.0) -> dict[str, str]:
        moment = now + datetime.timedelta(days=later)
        return levels(list(check_identity(AREA, cert=mine.cert, key=key, ca=tmp_path / ca / "ca.pem", now=moment)))

    for later, level in ((20, "ok"), (25, "warn"), (31, "fail")):
        assert level == found(later=later)["certificate"], later
    assert "fail" == found(later=-1)["certificate"]
    assert "fail" == found(key=theirs.key)["key"]
    assert "fail" == found(ca="other")["chain"]
    mine.key.chmod(0o644)
    assert "warn" == found()["key file"]
    nothing = tmp_path / "nothing.pem"
    assert {"certificate": "fail"} == levels(list(check_identity(AREA, cert=nothing, key=nothing, ca=None)))
    assert "fail" == found(key=nothing)["key"]
    assert {"authority": "fail"} == levels(list(check_authority(AREA, nothing)))
    nothing.write_text("no certificate")
    assert {"certificate": "fail"} == levels(list(check_identity(AREA, cert=nothing, key=nothing, ca=None)))


def test_a_certificate_without_a_spiffe_id_is_nobodys(tmp_path: Path) -> None:
    """The services take a caller's name from nowhere else: an authority's own certificate is the example."""
    Authority.create(tmp_path, "example.org")
    found = levels(list(check_identity(AREA, cert=tmp_path / "ca.pem", key=tmp_path / "ca.key", ca=None)))
    assert "ok" == found["spiffe id"]


def test_what_is_installed_is_held_against_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing package fails, an old one of an extra warns, and an extra that is not whole is absent."""
    versions = {"grpcio": "1.90.0", "rich": "1.0", "torch": "2.13.0+cpu", "numpy": "1.9"}
    versions |= {"cognateforge": "0.2.3", "cognateforge-cognate": "0.2.0", "cognateforge-common": "0.2.1"}
    asked = {
        "cognateforge": [
            "grpcio>=1.85.1",
            "cognateforge-cognate[worker]>=0.2.0; extra == 'cognate'",
            "cognateforge-agent[worker]>=0.2.0; extra == 'agent'",
            "ray[default,train]>=2.60 ; extra == 'ray'",
        ],
        "cognateforge-common": ["cognateforge~=0.2.0", "typer>=0.29", 'torch>=2.13; extra == "worker"'],
        "cognateforge-cognate": [
            "cognateforge-common~=0.2.0.dev0",
            "cognateforge-common[worker]; extra == 'worker'",
            "numpy>=2; extra == 'worker'",
        ],
    }
    monkeypatch.setattr(environment, "requires", asked.__getitem__)
    monkeypatch.setattr(environment, "_installed", versions.get)
    monkeypatch.setattr(environment, "tested_versions", lambda: {"torch": "2.13.0", "grpcio": "1.91.0", "rich": "0.9"})
    found = {check.name: check for check in environment.check_environment()}
    assert (Level.FAIL, "typer is not installed") == (found["packages"].level, found["packages"].detail)
    assert (Level.WARN, "cognate: numpy 1.9 is not >=2") == (found["extras"].level, found["extras"].detail)
    assert "older than what this release was tested with: grpcio 1.90.0 (tested 1.91.0)" == (
        found["tested versions"].detail
    )
    versions["numpy"], versions["typer"], versions["grpcio"] = "2.1", "0.30", "1.91.0"
    found = {check.name: check for check in environment.check_environment()}
    assert "installed: cognate; not installed: agent, ray" == found["extras"].detail
    assert "cognateforge 0.2.3, cognateforge-common 0.2.1, cognateforge-cognate 0.2.0, and the 2 packages needed" == (
        found["packages"].detail
    )
    assert {Level.OK} == {found[name].level for name in ("packages", "extras", "tested versions")}
    versions["cognateforge"] = "0.3.0"
    found = {check.name: check for check in environment.check_environment()}
    assert (Level.FAIL, "cognateforge 0.3.0 is not ~=0.2.0") == (found["packages"].level, found["packages"].detail)
    versions["torch"] = "2.1"
    assert "cognate: torch 2.1 is not >=2.13" == {c.name: c for c in environment.check_environment()}["extras"].detail


@pytest.mark.parametrize(
    ("here", "floor", "fits"),
    [
        ("1.10", ">=1.9", True),
        ("1.9", ">=1.10", False),
        ("2", ">=2.0.0", True),
        ("1.4.1", "==1.4", False),
        ("0.2.9", "~=0.2.1", True),
        ("0.2.0", "~=0.2.1", False),
        ("1!1.0", ">=2.0", True),
        ("1!1.0", ">=1!1.1", False),
    ],
)
def test_versions_are_compared_by_their_numbers(here: str, floor: str, fits: bool) -> None:
    """Not as texts."""
    assert fits == environment._at_least(here, floor)


def test_the_release_tells_what_it_was_tested_with() -> None:
    """A source tree has its constraints beside it, and a wheel brings them."""
    pins = environment.tested_versions()
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text().split()
    assert {f"{name}=={pin}" for name, pin in pins.items()} <= set(constraints), "each is read whole"
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"constraints.txt" = "cognateforge/constraints.txt"' in pyproject


def test_a_client_alone_cannot_look_at_a_servers_side(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says what to install, and everything else is looked at all the same."""
    monkeypatch.setattr(plugins, "GROUP", "cognateforge.nothing")
    checks = [
        json.loads(line)
        for line in run(fake, "--json", "--agent-settings", str(tmp_path / "a.toml")).stdout.splitlines()
    ]
    assert ("agent settings", "skip") == (checks[-1]["area"], checks[-1]["level"])
    assert "pip install 'cognateforge[agent]'" in checks[-1]["detail"]


def test_a_failure_without_a_remedy_cannot_be_written() -> None:
    """Whoever adds a check says what to do."""
    with pytest.raises(ValueError, match="needs a remedy"):
        AREA.fail("x", "is broken", "")


def test_texts_of_others_cannot_steer_the_terminal(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service's own words are text."""
    peer = job_pb2.Peer(name="\x1b[2J", circuit=job_pb2.CIRCUIT_OPEN)
    answer = pretraining_pb2.GetServerInfoResponse(info=job_pb2.ServerInfo(version="0.1.0", peers=[peer]))
    monkeypatch.setattr(FakePretraining, "GetServerInfo", lambda _self, _request, _context: answer)
    fake.stop()
    fake.start()
    result = run(fake)
    assert "it holds calls to" in result.stdout
    assert "\x1b" not in result.stdout


def test_an_unkept_clock_is_no_failure() -> None:
    """Machines without NTP work, and are told of it."""
    assert environment.check_clock().level in (Level.OK, Level.WARN, Level.SKIP)
