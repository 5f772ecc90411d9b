"""What this project relies on in Consul: one suite, for the double and for the agent that CONSUL_HTTP_ADDR names."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import consul
import pytest

from tests.support.consul_double import ConsulDouble, FakeClock

pytestmark = pytest.mark.timeout(600)


@dataclass
class Backend:
    """An agent, and how time passes for it."""

    api: Any
    advance: Callable[[float], None]
    double: ConsulDouble | None

    def register(self, name: str, **more: Any) -> str:
        """Register an instance with a TTL of 10 s, and return its id."""
        service_id = f"{name}-{uuid.uuid4().hex[:8]}"
        check = {"CheckID": f"service:{service_id}", "TTL": "10s", **more.pop("check", {})}
        values = {"address": "127.0.0.1", "port": 7101, "check": check, **more}
        assert self.api.agent.service.register(name, service_id=service_id, **values)
        return service_id

    def passing(self, name: str, **query: Any) -> list[str]:
        """Return the ids of the passing instances."""
        _, nodes = self.api.health.service(name, passing=True, **query)
        return sorted(node["Service"]["ID"] for node in nodes)

    def index(self, name: str) -> int:
        """Return the service's index."""
        return int(self.api.health.service(name)[0])


@pytest.fixture(params=["double", "agent"])
def agent(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The double with a clock that is turned, or the real agent and real time."""
    if request.param == "agent":
        if not os.environ.get("CONSUL_HTTP_ADDR"):
            pytest.skip("CONSUL_HTTP_ADDR is not set: no real agent to hold the double to")
        yield Backend(consul.Consul(), time.sleep, None)
        return
    clock = FakeClock()
    double = ConsulDouble(clock=clock)

    def advance(seconds: float) -> None:
        clock.now += seconds

    yield Backend(consul.Consul(host="127.0.0.1", port=double.port), advance, double)
    double.close()


@pytest.fixture
def name(agent: Backend) -> Iterator[str]:
    """A service name of the test's own; what it registered is removed."""
    made = f"contract-{uuid.uuid4().hex[:12]}"
    yield made
    for service_id, service in agent.api.agent.services().items():
        if service["Service"] == made:
            agent.api.agent.service.deregister(service_id)


def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Wait for what the agent does by itself."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_ttl_check_starts_critical_and_follows_what_it_is_told(agent: Backend, name: str) -> None:
    """Pass, warn and fail; only passing counts as passing."""
    one = agent.register(name)
    assert agent.passing(name) == []
    check, expected = (
        agent.api.agent.check,
        [("ttl_pass", [one]), ("ttl_warn", []), ("ttl_pass", [one]), ("ttl_fail", [])],
    )
    for verb, found in expected:
        assert getattr(check, verb)(f"service:{one}", notes="why")
        until(lambda found=found: agent.passing(name) == found)  # type: ignore[misc]
    _, nodes = agent.api.health.service(name)
    assert ["critical"] == [c["Status"] for c in nodes[0]["Checks"] if c["CheckID"] == f"service:{one}"]


def test_silence_turns_a_ttl_check_critical(agent: Backend, name: str) -> None:
    """A beat within the TTL keeps it passing, a TTL without one does not."""
    one = agent.register(name)
    for _ in range(3):
        agent.api.agent.check.ttl_pass(f"service:{one}")
        agent.advance(6)
        assert agent.passing(name) == [one]
    agent.advance(6)
    until(lambda: agent.passing(name) == [])


def test_a_beat_for_an_unknown_check_is_404(agent: Backend, name: str) -> None:
    """py-consul tells it as False; so does the deregistration of an unknown service."""
    assert agent.api.agent.check.ttl_pass(f"service:{name}") is False
    assert agent.api.agent.service.deregister(name) is False


def test_registering_again_keeps_the_status(agent: Backend, name: str) -> None:
    """An instance that registers once more is not critical for a moment, and tags and port are the new ones."""
    one = agent.register(name)
    agent.api.agent.check.ttl_pass(f"service:{one}")
    until(lambda: agent.passing(name) == [one])
    check = {"CheckID": f"service:{one}", "TTL": "10s"}
    agent.api.agent.service.register(name, service_id=one, address="127.0.0.1", port=7102, tags=["b"], check=check)
    assert agent.passing(name) == [one]
    until(lambda: [7102] == [node["Service"]["Port"] for node in agent.api.health.service(name)[1]])
    assert agent.passing(name, tag="b") == [one]


def test_tags_narrow_the_answer(agent: Backend, name: str) -> None:
    """Only instances with the tag."""
    blue, green = agent.register(name, tags=["blue", "eu"]), agent.register(name, tags=["green"])
    for one in (blue, green):
        agent.api.agent.check.ttl_pass(f"service:{one}")
    until(lambda: agent.passing(name) == sorted([blue, green]))
    assert (agent.passing(name, tag="blue"), agent.passing(name, tag="red")) == ([blue], [])


def test_deregistration_is_seen_at_once(agent: Backend, name: str) -> None:
    """The instance and its check are gone."""
    one = agent.register(name)
    agent.api.agent.check.ttl_pass(f"service:{one}")
    until(lambda: agent.passing(name) == [one])
    assert agent.api.agent.service.deregister(one)
    until(lambda: agent.api.health.service(name)[1] == [])
    assert agent.api.agent.check.ttl_pass(f"service:{one}") is False


def test_the_index_only_grows(agent: Backend, name: str) -> None:
    """With every change of the service, its end included; never 0, which would not block."""
    seen = [agent.index(name)]
    one = agent.register(name)
    until(lambda: agent.index(name) > seen[-1])
    seen.append(agent.index(name))
    agent.api.agent.check.ttl_pass(f"service:{one}")
    until(lambda: agent.index(name) > seen[-1])
    seen.append(agent.index(name))
    agent.api.agent.service.deregister(one)
    until(lambda: agent.index(name) > seen[-1])
    assert seen[0] >= 1


def test_a_blocking_query_returns_with_the_change(agent: Backend, name: str) -> None:
    """It waits while nothing happens, and holds the news when it returns."""
    one = agent.register(name)
    index = agent.index(name)
    answers: list[tuple[float, list[str]]] = []
    started = time.monotonic()

    def ask() -> None:
        _, nodes = agent.api.health.service(name, passing=True, index=index, wait="30s")
        answers.append((time.monotonic() - started, [node["Service"]["ID"] for node in nodes]))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    agent.api.agent.check.ttl_pass(f"service:{one}")
    thread.join(10)
    assert [[one]] == [ids for _, ids in answers]
    assert answers[0][0] < 10


def test_a_blocking_query_ends_with_its_wait(agent: Backend, name: str) -> None:
    """Without news, after `wait` and at most a sixteenth more, with the index that was asked with."""
    index = agent.index(agent.register(name) and name)
    started = time.monotonic()
    answer, _ = agent.api.health.service(name, index=index, wait="800ms")
    took_s = time.monotonic() - started
    assert int(answer) == index
    assert 0.8 <= took_s < 0.8 * (1 + 1 / 16) + 0.5


def test_an_instance_that_stays_critical_is_dropped(agent: Backend, name: str) -> None:
    """Not before a minute, however little was asked for; a reaper comes twice a minute."""
    one = agent.register(name, check={"DeregisterCriticalServiceAfter": "1s"})
    agent.api.agent.check.ttl_fail(f"service:{one}")
    agent.advance(40)
    assert one in agent.api.agent.services()
    agent.advance(55)
    until(lambda: one not in agent.api.agent.services(), timeout_s=30)


@pytest.mark.parametrize("broken", [{"index": "x"}, {"index": 1, "wait": "soon"}])
def test_a_query_that_makes_no_sense_is_refused(agent: Backend, name: str, broken: dict[str, Any]) -> None:
    """With 400."""
    with pytest.raises(consul.exceptions.BadRequest):
        agent.api.health.service(name, **broken)


def test_a_registration_that_makes_no_sense_is_refused(agent: Backend, name: str) -> None:
    """With 400: no name, or a TTL that is none."""
    with pytest.raises(consul.exceptions.BadRequest):
        agent.api.agent.service.register("", check={"TTL": "10s"})
    with pytest.raises(consul.exceptions.BadRequest):
        agent.api.agent.service.register(name, check={"TTL": "often"})


def test_compare_and_set(agent: Backend, name: str) -> None:
    """0 means: only if it is not there."""
    kv, key = agent.api.kv, f"{name}/cas"
    assert kv.get(key)[1] is None
    assert kv.put(key, "1", cas=0) is True
    assert kv.put(key, "2", cas=0) is False
    index = kv.get(key)[1]["ModifyIndex"]
    assert kv.put(key, "3", cas=index) is True
    assert kv.put(key, "4", cas=index) is False
    assert kv.get(key)[1]["Value"] == b"3"
    assert kv.delete(key, cas=index) is False
    assert kv.delete(key) is True
    assert kv.get(key)[1] is None


def test_a_key_is_watched_with_its_folder(agent: Backend, name: str) -> None:
    """A blocking query on a prefix returns with a change below it."""
    kv = agent.api.kv
    kv.put(f"{name}/a/b", "1")
    index, _ = kv.get(f"{name}/", recurse=True)
    timer = threading.Timer(0.2, lambda: kv.put(f"{name}/a/c", "2"))
    timer.start()
    later, entries = kv.get(f"{name}/", recurse=True, index=index, wait="30s")
    assert int(later) > int(index)
    assert [f"{name}/a/b", f"{name}/a/c"] == [entry["Key"] for entry in entries]
    timer.join()
    kv.delete(f"{name}/", recurse=True)


def test_one_session_holds_a_lock(agent: Backend, name: str) -> None:
    """Acquire and release; the lock's index counts its holders; a session that is none is refused."""
    kv, key = agent.api.kv, f"{name}/lock"
    first, second = (agent.api.session.create(name=name, lock_delay=0, ttl=60) for _ in range(2))
    assert kv.put(key, "1", acquire=first) is True
    assert kv.put(key, "1", acquire=first) is True
    assert kv.put(key, "2", acquire=second) is False
    assert kv.put(key, "2", release=second) is False
    held = kv.get(key)[1]
    assert (held["Session"], held["LockIndex"]) == (first, 1)
    assert kv.put(key, "1", release=first) is True
    assert "Session" not in kv.get(key)[1]
    assert kv.put(key, "2", acquire=second) is True
    assert kv.get(key)[1]["LockIndex"] == 2
    with pytest.raises(consul.ConsulException, match="invalid session"):
        kv.put(key, "3", acquire=str(uuid.uuid4()))
    for session in (first, second):
        assert agent.api.session.destroy(session)
    kv.delete(key)


def test_a_lock_that_was_lost_rests_for_its_delay(agent: Backend, name: str) -> None:
    """After its session was destroyed nobody gets it for the lock-delay; then the next one does."""
    kv, key = agent.api.kv, f"{name}/delay"
    first = agent.api.session.create(name=name, lock_delay=5, ttl=60)
    second = agent.api.session.create(name=name, lock_delay=5, ttl=60)
    assert kv.put(key, "1", acquire=first) is True
    agent.api.session.destroy(first)
    assert "Session" not in kv.get(key)[1]
    assert kv.put(key, "2", acquire=second) is False
    agent.advance(5.5)
    assert kv.put(key, "2", acquire=second) is True
    agent.api.session.destroy(second)
    kv.delete(key)


def test_a_session_that_is_not_renewed_ends(agent: Backend, name: str) -> None:
    """At twice its TTL at the latest, not before the TTL; `delete` takes its keys along."""
    kv, key = agent.api.kv, f"{name}/ephemeral"
    session = agent.api.session.create(name=name, lock_delay=0, ttl=10, behavior="delete")
    assert kv.put(key, "1", acquire=session) is True
    agent.advance(9)
    assert agent.api.session.renew(session)["ID"] == session
    agent.advance(9)
    assert kv.get(key)[1]["Session"] == session
    agent.advance(16)
    until(lambda: kv.get(key)[1] is None, timeout_s=10)
    with pytest.raises(consul.exceptions.NotFound):
        agent.api.session.renew(session)


def test_tokens_are_refused() -> None:
    """With ACLs: a wrong token nothing, no token an empty answer and no write, the right one everything."""
    double = ConsulDouble(token="right")  # noqa: S106
    try:
        right, none, wrong = (
            consul.Consul(host="127.0.0.1", port=double.port, token=token) for token in ("right", None, "wrong")
        )
        assert right.agent.service.register("s", check={"TTL": "10s"})
        assert right.agent.check.ttl_pass("service:s")
        assert len(right.health.service("s", passing=True)[1]) == 1
        assert none.health.service("s", passing=True)[1] == []
        for other in (none, wrong):
            with pytest.raises(consul.ACLPermissionDenied):
                other.agent.service.register("s")
        with pytest.raises(consul.ACLPermissionDenied):
            wrong.health.service("s")
    finally:
        double.close()
