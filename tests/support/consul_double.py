"""A Consul agent in this process, over real HTTP: as much of it as this project uses, with the same corners.

The contract suite `tests/client/test_consul_contract.py` holds it to a real agent where there is one. What it imitates
on purpose: one index that only grows and a topic's own index; blocking queries that end up to a sixteenth late; TTL
checks that start critical and turn critical in silence; a floor of one minute, and a reaper that comes every half
minute, under deregister-critical; sessions that live up to twice their TTL, and a lock-delay after they were
invalidated; an anonymous reader who sees nothing, and a wrong token that is refused.
"""

from __future__ import annotations

import base64
import json
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DEFAULT_WAIT_S, _LONGEST_WAIT_S = 300.0, 600.0
_DEREGISTER_FLOOR_S, _REAP_EVERY_S = 60.0, 30.0
_TICK_S = 0.02
_NODE = {"ID": str(uuid.UUID(int=1)), "Node": "double", "Address": "127.0.0.1", "Datacenter": "dc1", "Meta": {}}

Query = dict[str, list[str]]


class Refusal(Exception):  # noqa: N818 - an answer
    """An answer that is not 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


class FakeClock:
    """A clock that a test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Check:
    """A TTL check."""

    id: str
    name: str
    service_id: str
    ttl_s: float
    deregister_after_s: float | None
    status: str = "critical"
    output: str = ""
    due: float = 0.0
    critical_since: float | None = None


@dataclass
class Service:
    """An instance of a service."""

    id: str
    name: str
    address: str
    port: int
    tags: list[str]
    meta: dict[str, str]
    checks: dict[str, Check] = field(default_factory=dict)


@dataclass
class Session:
    """A session, which holds locks."""

    id: str
    name: str
    ttl_s: float | None
    lock_delay_s: float
    behavior: str
    create_index: int
    due: float | None = None


def seconds(duration: str) -> float:
    """Return the seconds of a Go duration. Errors: ValueError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)", duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise ValueError(f"time: invalid duration {duration!r}")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class ConsulDouble:
    """The agent. `queries` has every request as (method, path, query).

    token: what writers must bring; None stands for an agent without ACLs, which ignores tokens.
    clock: what TTLs, sessions and delays are measured by. Blocking queries wait in real time.
    """

    def __init__(self, *, token: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.token = token
        self.queries: list[tuple[str, str, dict[str, str]]] = []
        self.broken = False
        self._clock = clock
        self._changed = threading.Condition(threading.RLock())
        self._stopping = threading.Event()
        self._forget()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()
        self._ticker = threading.Thread(target=self._tick_along, daemon=True)
        self._ticker.start()

    # --- what a test does to it

    def start(self) -> None:
        """Listen, on the same port as before."""
        double = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                double.handle(self)

            do_GET = do_PUT = do_DELETE = handle_any

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._serving = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._serving.start()

    def stop(self) -> None:
        """Listen no more; what it knows stays, as on the disk of an agent that restarts."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._serving.join(5)
        self._server = None

    def close(self) -> None:
        """End it."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        self.stop()
        self._ticker.join(5)

    def forget(self) -> None:
        """Lose everything, the index too: a new agent at the old address."""
        with self._changed:
            self._forget()
            self._changed.notify_all()

    @contextmanager
    def breakage(self) -> Iterator[None]:
        """Answer 500 to everything, as an agent without a leader does."""
        with self._changed:
            self.broken = True
            self._changed.notify_all()
        try:
            yield
        finally:
            self.broken = False

    def put_instances(self, name: str, *addresses: str) -> None:
        """Let exactly these be the instances of a service, passing for an hour."""
        with self._changed:
            wanted = {f"{name}-{address}": address.rpartition(":") for address in addresses}
            for gone in [one for one in self.services.values() if one.name == name and one.id not in wanted]:
                self._drop(gone)
            for service_id, (host, _, port) in wanted.items():
                check = {"CheckID": f"service:{service_id}", "TTL": "3600s"}
                body = {"Name": name, "ID": service_id, "Address": host, "Port": int(port), "Check": check}
                self._register(body)
                self._update(f"service:{service_id}", "passing", "")

    def status_of(self, service_id: str) -> str:
        """Return the status of a service's checks, "" where the service is unknown."""
        with self._changed:
            self._tick()
            service = self.services.get(service_id)
            return "" if service is None else next((check.status for check in service.checks.values()), "passing")

    # --- HTTP

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        url = urlparse(handler.path)
        query = parse_qs(url.query, keep_blank_values=True)
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        path = unquote(url.path)
        self.queries.append((handler.command, path, {key: values[0] for key, values in query.items()}))
        status, index = 200, None
        try:
            index, answer = self._answer(handler.command, path, query, body, handler.headers.get("X-Consul-Token", ""))
            payload = b"" if answer is None else json.dumps(answer).encode()
        except Refusal as refusal:
            status, payload = refusal.status, refusal.text.encode()
            index = self._index if status == 404 and path.startswith("/v1/kv/") else None
        with suppress(OSError):
            handler.send_response(status)
            if index is not None:
                handler.send_header("X-Consul-Index", str(index))
            handler.send_header("Content-Length", str(len(payload)))
            handler.end_headers()
            handler.wfile.write(payload)

    def _answer(self, method: str, path: str, query: Query, body: bytes, token: str) -> tuple[int | None, Any]:
        with self._changed:
            self._tick()
            if self.broken:
                raise Refusal(500, "No cluster leader")
            if self.token is not None and token and token != self.token:
                raise Refusal(403, "ACL not found")
            may = self.token is None or token == self.token
            if method != "GET" and not may:
                raise Refusal(403, "Permission denied: token with AccessorID '00000000-0000-0000-0000-000000000002'")
            parts = path.removeprefix("/v1/").split("/")
            if parts[:2] == ["health", "service"] and method == "GET":
                return self._blocking(
                    f"service/{parts[2]}", query, lambda: self._health(parts[2], query) if may else []
                )
            if parts[0] == "kv":
                return self._kv(method, "/".join(parts[1:]), query, body)
            if parts[0] == "session":
                return self._session(parts[1], parts[2] if len(parts) > 2 else "", body)
            if parts[0] == "agent":
                return None, self._agent(parts[1:], query, body)
            if path == "/v1/status/leader":
                return None, "127.0.0.1:8300"
            raise Refusal(404, f"Invalid URL path: {path}")

    def _blocking(self, topic: str, query: Query, read: Callable[[], Any]) -> tuple[int, Any]:
        """Wait until the topic's index passes the query's, or until `wait` and up to a sixteenth of it are over."""
        try:
            index = int(query["index"][0]) if "index" in query else 0
        except ValueError:
            raise Refusal(400, "Invalid index") from None
        try:
            wait_s = min(seconds(query["wait"][0]), _LONGEST_WAIT_S) if query.get("wait") else _DEFAULT_WAIT_S
        except ValueError:
            raise Refusal(400, "Invalid wait time") from None
        if index > 0:
            until = time.monotonic() + wait_s * (1 + random.uniform(0, 1 / 16))  # noqa: S311 - jitter
            while self._topic(topic) <= index and not self._stopping.is_set() and not self.broken:
                left_s = until - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    break
            if self.broken or self._stopping.is_set():
                raise Refusal(500, "No cluster leader")
        return self._topic(topic), read()

    # --- state

    def _forget(self) -> None:
        self._index = 1
        self._topics: dict[str, int] = {}
        self.services: dict[str, Service] = {}
        self.sessions: dict[str, Session] = {}
        self.kv: dict[str, dict[str, Any]] = {}
        self._lock_delays: dict[str, float] = {}
        self._reap_at = self._clock() + _REAP_EVERY_S

    def _topic(self, topic: str) -> int:
        return self._topics.get(topic, 1)

    def _touch(self, topic: str) -> int:
        self._index += 1
        self._topics[topic] = self._index
        self._changed.notify_all()
        return self._index

    def _tick_along(self) -> None:
        while not self._stopping.wait(_TICK_S):
            with self._changed:
                self._tick()

    def _tick(self) -> None:
        now = self._clock()
        for service in list(self.services.values()):
            for check in service.checks.values():
                if check.status != "critical" and now > check.due:
                    self._set_status(check, service, "critical", "TTL expired")
        if now >= self._reap_at:
            self._reap_at = now + _REAP_EVERY_S
            for service in list(self.services.values()):
                if any(_is_overdue(check, now) for check in service.checks.values()):
                    self._drop(service)
        for session in list(self.sessions.values()):
            if session.due is not None and now > session.due:
                self._invalidate(session)

    # --- agent

    def _agent(self, parts: list[str], query: Query, body: bytes) -> Any:
        name = "/".join(parts[2:])
        match parts[:2]:
            case ["service", "register"]:
                return self._register(_lowered(_loads(body)))
            case ["service", "deregister"]:
                if name not in self.services:
                    told = "Ensure that the service ID is passed, not the service name."
                    raise Refusal(404, f'Unknown service ID "{name}". {told}')
                return self._drop(self.services[name])
            case ["check", "pass" | "warn" | "fail" as verb]:
                status = {"pass": "passing", "warn": "warning", "fail": "critical"}[verb]
                return self._update(name, status, query.get("note", [""])[0])
            case ["services"]:
                return {one.id: _service(one) for one in self.services.values()}
            case ["checks"]:
                return {c.id: _check(c, s) for s in self.services.values() for c in s.checks.values()}
            case ["self"]:
                return {"Config": {"NodeName": _NODE["Node"], "Version": "double"}}
        raise Refusal(404, f"Invalid URL path: {'/'.join(parts)}")

    def _register(self, given: dict[str, Any]) -> None:
        body = _lowered(given)
        if not body.get("name"):
            raise Refusal(400, "Missing service name")
        service = Service(
            id=body.get("id") or body["name"],
            name=body["name"],
            address=body.get("address") or "",
            port=body.get("port") or 0,
            tags=list(body.get("tags") or []),
            meta=dict(body.get("meta") or {}),
        )
        before = self.services.get(service.id)
        given_checks = [body["check"]] if body.get("check") else list(body.get("checks") or [])
        for number, one in enumerate(map(_lowered, given_checks), start=1):
            suffix = f":{number}" if len(given_checks) > 1 else ""
            check = _new_check(one, service, one.get("checkid") or f"service:{service.id}{suffix}", self._clock())
            # An agent keeps the status of a check that it knows.
            if before is not None and check.id in before.checks:
                known = before.checks[check.id]
                check.status, check.output, check.due = known.status, known.output, known.due
                check.critical_since = known.critical_since
            service.checks[check.id] = check
        if before is not None and before.name != service.name:
            self._drop(before)
        self.services[service.id] = service
        self._touch(f"service/{service.name}")

    def _drop(self, service: Service) -> None:
        del self.services[service.id]
        self._touch(f"service/{service.name}")

    def _update(self, check_id: str, status: str, note: str) -> None:
        for service in self.services.values():
            if check_id in service.checks:
                check = service.checks[check_id]
                check.due = self._clock() + check.ttl_s
                self._set_status(check, service, status, note)
                return
        told = "Ensure that the check ID is passed, not the check name."
        raise Refusal(404, f'Unknown check ID "{check_id}". {told}')

    def _set_status(self, check: Check, service: Service, status: str, output: str) -> None:
        if (check.status, check.output) == (status, output):
            return
        if status == "critical":
            check.critical_since = self._clock() if check.status != "critical" else check.critical_since
        else:
            check.critical_since = None
        check.status, check.output = status, output
        self._touch(f"service/{service.name}")

    def _health(self, name: str, query: Query) -> list[dict[str, Any]]:
        found = []
        for service in self.services.values():
            checks = list(service.checks.values())
            if service.name != name or not set(query.get("tag", [])) <= set(service.tags):
                continue
            if "passing" in query and any(check.status != "passing" for check in checks):
                continue
            serf = {"Node": _NODE["Node"], "CheckID": "serfHealth", "Status": "passing", "ServiceID": ""}
            found.append(
                {
                    "Node": _NODE,
                    "Service": _service(service),
                    "Checks": [serf, *(_check(check, service) for check in checks)],
                }
            )
        return found

    # --- KV and sessions

    def _kv(self, method: str, key: str, query: Query, body: bytes) -> tuple[int | None, Any]:
        if method == "GET":
            found = self._blocking(f"kv/{key}", query, lambda: self._entries(key, "recurse" in query))
            if not found[1]:
                raise Refusal(404, "")
            return found
        if method == "DELETE":
            return None, self._delete(key, query)
        return None, self._put(key, query, body)

    def _entries(self, key: str, recurse: bool) -> list[dict[str, Any]]:
        return [entry for name, entry in sorted(self.kv.items()) if name == key or (recurse and name.startswith(key))]

    def _delete(self, key: str, query: Query) -> bool:
        if "cas" in query:
            entry = self.kv.get(key)
            if entry is not None and int(query["cas"][0]) != entry["ModifyIndex"]:
                return False
        for entry in self._entries(key, "recurse" in query):
            del self.kv[entry["Key"]]
            self._touch_key(entry["Key"])
        return True

    def _put(self, key: str, query: Query, body: bytes) -> bool:
        entry = self.kv.get(key)
        holder = entry.get("Session") if entry else None
        locks = 0 if entry is None else entry["LockIndex"]
        if "cas" in query and int(query["cas"][0]) != (entry["ModifyIndex"] if entry else 0):
            return False
        if "acquire" in query:
            session = query["acquire"][0]
            if session not in self.sessions:
                raise Refusal(500, f'rpc error making call: invalid session "{session}"')
            if (holder and holder != session) or self._clock() < self._lock_delays.get(key, 0.0):
                return False
            locks += holder != session
            holder = session
        if "release" in query:
            if holder != query["release"][0]:
                return False
            holder = None
        index = self._touch_key(key)
        self.kv[key] = {
            "Key": key,
            "Value": base64.b64encode(body).decode() if body else None,
            "Flags": int(query.get("flags", ["0"])[0]),
            "LockIndex": locks,
            "CreateIndex": entry["CreateIndex"] if entry else index,
            "ModifyIndex": index,
            **({"Session": holder} if holder else {}),
        }
        return True

    def _touch_key(self, key: str) -> int:
        index = self._touch(f"kv/{key}")
        for end in range(len(key)):  # every prefix is a topic of its own
            self._topics[f"kv/{key[:end]}"] = index
        return index

    def _session(self, verb: str, name: str, body: bytes) -> tuple[int | None, Any]:
        match verb:
            case "create":
                return None, {"ID": self._new_session(_lowered(_loads(body or b"{}"))).id}
            case "destroy":
                if name in self.sessions:
                    self._invalidate(self.sessions[name])
                return None, True
            case "renew":
                if name not in self.sessions:
                    raise Refusal(404, f'Session id "{name}" not found')
                self._extend(self.sessions[name])
                return None, [_session(self.sessions[name])]
            case "info":
                return self._index, [_session(one) for one in self.sessions.values() if one.id == name]
            case "list":
                return self._index, [_session(one) for one in self.sessions.values()]
        raise Refusal(404, f"Invalid URL path: session/{verb}")

    def _new_session(self, body: dict[str, Any]) -> Session:
        try:
            ttl_s = seconds(body["ttl"]) if body.get("ttl") else None
            delay_s = seconds(body["lockdelay"]) if body.get("lockdelay") else 15.0
        except ValueError as error:
            raise Refusal(400, f"Request decode failed: {error}") from error
        if ttl_s is not None and not 10 <= ttl_s <= 86400:
            raise Refusal(400, f"Invalid Session TTL '{ttl_s:g}', must be between [10s=24h0m0s]")
        made = Session(
            id=str(uuid.uuid4()),
            name=body.get("name", ""),
            ttl_s=ttl_s,
            lock_delay_s=delay_s,
            behavior=body.get("behavior") or "release",
            create_index=self._touch("sessions"),
        )
        self._extend(made)
        self.sessions[made.id] = made
        return made

    def _extend(self, session: Session) -> None:
        # A session is given up at twice its TTL: a holder who renews late keeps its locks.
        session.due = None if session.ttl_s is None else self._clock() + 2 * session.ttl_s

    def _invalidate(self, session: Session) -> None:
        del self.sessions[session.id]
        self._touch("sessions")
        for key, entry in list(self.kv.items()):
            if entry.get("Session") != session.id:
                continue
            if session.behavior == "delete":
                del self.kv[key]
            else:
                self.kv[key] = {name: value for name, value in entry.items() if name != "Session"}
                self.kv[key]["ModifyIndex"] = self._index + 1
            self._touch_key(key)
            self._lock_delays[key] = self._clock() + session.lock_delay_s


def _new_check(body: dict[str, Any], service: Service, check_id: str, now: float) -> Check:
    try:
        ttl_s = seconds(body["ttl"])
        after = body.get("deregistercriticalserviceafter")
        after_s = max(seconds(after), _DEREGISTER_FLOOR_S) if after else None
    except (KeyError, ValueError) as error:
        raise Refusal(400, f"Invalid check: TTL must be > 0 for TTL checks ({error})") from error
    return Check(
        id=check_id,
        name=body.get("name") or f"Service '{service.name}' check",
        service_id=service.id,
        ttl_s=ttl_s,
        deregister_after_s=after_s,
        status=body.get("status") or "critical",
        due=now + ttl_s,
        critical_since=now,
    )


def _is_overdue(check: Check, now: float) -> bool:
    after_s, since = check.deregister_after_s, check.critical_since
    return check.status == "critical" and after_s is not None and since is not None and now - since > after_s


def _loads(body: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(body)
    except ValueError as error:
        raise Refusal(400, f"Request decode failed: {error}") from error
    if not isinstance(loaded, dict):
        raise Refusal(400, "Request decode failed: no object")
    return loaded


def _lowered(body: dict[str, Any]) -> dict[str, Any]:
    """Consul's JSON keys are read whatever their case."""
    return {key.lower(): value for key, value in body.items()}


def _service(service: Service) -> dict[str, Any]:
    return {
        "ID": service.id,
        "Service": service.name,
        "Address": service.address,
        "Port": service.port,
        "Tags": service.tags,
        "Meta": service.meta,
    }


def _check(check: Check, service: Service) -> dict[str, Any]:
    return {
        "Node": _NODE["Node"],
        "CheckID": check.id,
        "Name": check.name,
        "Status": check.status,
        "Output": check.output,
        "ServiceID": service.id,
        "ServiceName": service.name,
        "Type": "ttl",
    }


def _session(session: Session) -> dict[str, Any]:
    return {
        "ID": session.id,
        "Name": session.name,
        "Node": _NODE["Node"],
        "LockDelay": session.lock_delay_s * 1e9,
        "Behavior": session.behavior,
        "TTL": "" if session.ttl_s is None else f"{session.ttl_s:g}s",
        "CreateIndex": session.create_index,
    }
