"""The dashboard's HTTP side over real services, without a browser."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from cognateforge.cli.app import app
from cognateforge.dashboard import app as dashboard
from cognateforge.dashboard import serve as serving
from cognateforge.dashboard.app import PAGES, POINTS, STATIC
from cognateforge.dashboard.guard import HostGuard, is_loopback
from cognateforge.dashboard.history import Past
from tests.support.published import publish_model
from tests.support.stage import RECOVERY, Stage, begin, pretraining, seeded_series, stage, submit, tell
from training_common.jobs.states import JobState
from training_common.store import tables as t

UUID = "3f0e6d1c-1111-4222-8333-444455556666"


def ask(
    url: str, *, headers: Mapping[str, str] | None = None, body: Any = None, method: str | None = None
) -> tuple[int, Any, Mapping[str, str]]:
    """Return the status, the body, as JSON where it is, and the headers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=dict(headers or {}), method=method)  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310
            status, text, told = response.status, response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        status, text, told = error.code, error.read().decode(), error.headers
    is_json = told.get_content_type() == "application/json"
    return status, json.loads(text) if is_json else text, told


def read(running: Stage, path: str) -> Any:
    status, body, _ = ask(running.url + path)
    assert 200 == status, body
    return body


def events(url: str, **headers: str) -> Iterator[tuple[str, Any, str]]:
    """Yield a stream's events: kind, data, id."""
    request = urllib.request.Request(url, headers={"accept": "text/event-stream", **headers})  # noqa: S310
    with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310
        told: dict[str, str] = {}
        for raw in response:
            line = raw.decode().rstrip("\r\n")
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                told[name] = value
            elif told.get("data"):
                yield told["event"], json.loads(told["data"]), told.get("id", "")
                told = {}


@pytest.fixture
def reading(tmp_path: Path) -> Iterator[Stage]:
    """Yield both services and a dashboard that only reads."""
    with stage(tmp_path) as running:
        yield running


def test_every_page_is_one_file_that_asks_nobody_else(reading: Stage) -> None:
    """The same document for every path, under a policy without inline scripts; no file names another host."""
    for path in PAGES:
        url = reading.url + re.sub(r"\{\w+\}", "x", path)
        status, text, headers = ask(url)
        assert 200 == status
        assert text == (STATIC / "index.html").read_text()
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert "nosniff" == headers["x-content-type-options"]
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=", (STATIC / "index.html").read_text())
    ours = [file for file in STATIC.rglob("*") if file.is_file() and "vendor" not in file.parts]
    assert len(ours) > 15
    for file in ours:
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", file.read_text()), file
        assert 200 == ask(f"{reading.url}/static/{file.relative_to(STATIC)}")[0]
    status, _, headers = ask(f"{reading.url}/elsewhere")
    assert (404, "text/html") == (status, headers.get_content_type())  # type: ignore[attr-defined]
    assert "there is no /api/elsewhere" == ask(f"{reading.url}/api/elsewhere")[1]["error"]["message"]


def test_the_plotting_library_comes_with_its_licence() -> None:
    """uPlot is shipped as it was published."""
    vendor = STATIC / "vendor"
    assert "uPlot (v1.6.32)" in (vendor / "uPlot.iife.min.js").read_text()[:300]
    assert "MIT License" in (vendor / "uPlot-LICENSE").read_text()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:1", 200),
        ("127.0.0.1", 200),
        ("[::1]:7180", 200),
        ("192.0.2.7:7180", 200),
        ("attacker.example", 421),
        ("attacker.example:7180", 421),
        ("127.0.0.1.attacker.example", 421),
        ("", 421),
    ],
)
def test_a_name_that_another_site_made_point_here_is_refused(shared: Stage, host: str, status: int) -> None:
    """DNS rebinding needs a name of the attacker's; an address names this machine."""
    assert status == ask(f"{shared.url}/api/session", headers={"host": host})[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Yield a stage for tests that leave it as it is."""
    with stage(tmp_path_factory.mktemp("http")) as running:
        yield running


def test_only_named_hosts_are_let_in_besides_addresses() -> None:
    """--allow-host, in any case."""
    guard = HostGuard(lambda *_: None, ["Forge.Example"])  # type: ignore[arg-type]
    assert guard._names == {"localhost", "forge.example"}
    assert [True, True, True, False, False] == [
        is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "192.0.2.7", "forge.example")
    ]


def test_a_page_that_only_reads_changes_nothing(reading: Stage) -> None:
    """403 with the remedy, and no token is told."""
    store = reading.store()
    job = submit(store, pretraining())
    assert {"actions": False, "token": ""}.items() <= read(reading, "/api/session").items()
    status, body, _ = ask(f"{reading.url}/api/jobs/cognate/{job[5:]}/cancel", body={"request_id": UUID})
    assert (403, True) == (status, "forge dashboard --actions" in body["error"]["message"])
    assert "QUEUED" == store.get(job).state
    store.database.close()


def test_an_action_is_the_pages_own(here: Stage) -> None:
    """Without the token, from another site, by GET or with no request id nothing happens; the same wish acts once."""
    store = here.store()
    job = submit(store, pretraining())
    url = f"{here.url}/api/jobs/cognate/{job[5:]}/cancel"
    token = {"x-forge-token": read(here, "/api/session")["token"]}
    wish = {"request_id": UUID}
    assert 403 == ask(url, body=wish)[0]
    assert 403 == ask(url, body=wish, headers={"x-forge-token": "guess"})[0]
    assert 403 == ask(url, body=wish, headers={**token, "sec-fetch-site": "cross-site"})[0]
    assert 404 == ask(url, headers=token)[0]
    assert 400 == ask(url, body={}, headers=token)[0]
    status, body, _ = ask(url, body={"request_id": "no UUID"}, headers=token)
    assert (400, "request_id") == (status, body["error"]["violations"][0]["field"])
    assert 404 == ask(url.replace("/cancel", "/destroy"), body=wish, headers=token)[0]
    assert "QUEUED" == store.get(job).state
    assert [(200, "CANCELLED")] * 2 == [
        (status, body["state"]) for status, body, _ in (ask(url, body=wish, headers=token) for _ in range(2))
    ]
    store.database.close()


def test_jobs_are_listed_by_state_and_page(reading: Stage) -> None:
    """The service's own paging: a token leads on, one of another query is refused, and so is an unknown state."""
    store = reading.store()
    for _ in range(51):
        submit(store, pretraining())
    attempt = begin(store)
    first = read(reading, "/api/jobs?service=cognate&state=QUEUED")
    assert (50, "") == (len(first["items"]), first["next_page_token"])
    every = read(reading, "/api/jobs?service=cognate")
    rest = read(reading, f"/api/jobs?service=cognate&token={every['next_page_token']}")
    assert [attempt.job.name[5:]] == [item["id"] for item in rest["items"]]
    assert "RUNNING" == rest["items"][0]["state"]
    status, body, _ = ask(f"{reading.url}/api/jobs?state=RUNNING&token={every['next_page_token']}")
    assert (400, "INVALID_PAGE_TOKEN") == (status, body["error"]["reason"])
    assert (400, True) == ((answer := ask(f"{reading.url}/api/jobs?state=LOST"))[0], "LOST" in str(answer[1]))
    assert 404 == ask(f"{reading.url}/api/jobs?service=other")[0]
    status, body, _ = ask(f"{reading.url}/api/jobs/cognate/{UUID}")
    assert (404, "JOB_NOT_FOUND") == (status, body["error"]["reason"])
    store.database.close()


def test_streams_are_bounded_and_freed(reading: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound one is refused, with why; each that ends makes room."""
    monkeypatch.setattr(dashboard, "STREAMS", 3)
    held = [urllib.request.urlopen(f"{reading.url}/api/board", timeout=20) for _ in range(3)]  # noqa: S310
    status, body, _ = ask(f"{reading.url}/api/board")
    assert (503, "3 streams are open: close pages of this dashboard") == (status, body["error"]["message"])
    held[0].close()
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        try:
            held[0] = urllib.request.urlopen(f"{reading.url}/api/board", timeout=20)  # noqa: S310
            break
        except urllib.error.HTTPError:
            time.sleep(0.05)  # the server sees the end a moment later
    assert 200 == held[0].status
    for one in held:
        one.close()


def dial(running: Stage) -> socket.socket:
    host, _, port = running.url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_connections_that_ask_nothing_are_closed(reading: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while, also in the middle of a request; a stream stays."""
    monkeypatch.setattr(serving, "REQUEST_S", 0.3)
    with urllib.request.urlopen(f"{reading.url}/api/board", timeout=20) as stream:  # noqa: S310
        for sent in (b"", b"GET /api/bo"):
            with dial(reading) as silent, contextlib.suppress(ConnectionResetError):
                silent.sendall(sent)
                assert b"" == silent.recv(100)
        assert stream.readline()


def test_whoever_holds_connections_open_takes_the_page_from_nobody(
    reading: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the bound one that asks nothing gives way to the next."""
    monkeypatch.setattr(serving, "CONNECTIONS", 4)
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(dial(reading)) for _ in range(40)]
        assert 200 == ask(f"{reading.url}/api/session")[0]
        for one in held:
            one.settimeout(0.5)
        closed = 0
        for one in held:
            try:
                closed += one.recv(1) == b""
            except ConnectionResetError:
                closed += 1
            except TimeoutError:
                pass
        assert closed >= len(held) - 4


@pytest.mark.parametrize(("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200)])
def test_pages_of_another_site_ask_nothing(shared: Stage, site: str, status: int) -> None:
    """They could not read the answer, and could hold streams open."""
    assert status == ask(f"{shared.url}/api/session", headers={"sec-fetch-site": site})[0]
    assert 200 == ask(f"{shared.url}/", headers={"sec-fetch-site": site})[0], "a link to a page is followed"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/api/jobs/cognate/{UUID}/logs?attempt=3000000000", 400),
        (f"/api/jobs/cognate/{UUID}/logs?position=9999999999999999999", 400),
        (f"/api/jobs/cognate/{UUID}/events?after=%D9%A3", 400),
        ("/api/jobs/cognate/%00", 400),
        ("/static/%00", 404),
        ("/static/..%2fapp.py", 404),
        ("/static/../../app.py", 404),
        ("/static//etc/passwd", 404),
        ("/api/models/%FF%00", 400),
    ],
)
def test_what_makes_no_sense_is_refused_and_breaks_nothing(shared: Stage, path: str, status: int) -> None:
    """No number of the contract's, no name, no file: an error of the caller, not of the dashboard."""
    assert status == ask(shared.url + path)[0]


def test_a_long_jobs_curves_come_thinned_by_the_service(reading: Stage) -> None:
    """No more points than a plot can show, with the one that stands out."""
    store = reading.store()
    job = submit(store, pretraining(20_000))
    seeded_series(store, job, 20_000, spike_step=7_777)
    series = {one["name"]: one for one in read(reading, f"/api/jobs/cognate/{job[5:]}/metrics")["series"]}
    loss = series["loss"]
    assert len(loss["steps"]) <= POINTS
    assert (1, 20_000) == (loss["steps"][0], loss["steps"][-1])
    assert (7_777, 99.0) in set(zip(loss["steps"], loss["values"], strict=True))
    past = read(reading, f"/api/jobs/cognate/{job[5:]}/history")
    assert ["state_change"] == [event["kind"] for event in past["events"]]
    assert 256 <= len(past["moments"]) <= 512
    store.database.close()


def test_a_long_jobs_past_is_read_without_most_of_its_progress(reading: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that happened is marked within a pixel of its step; of 20,000 progress events an eighth or so is sent."""
    store = reading.store()
    job = submit(store, pretraining(20_000))
    attempt = begin(store)
    seeded_series(store, job, 10_000)
    attempt.append("note", {"kind": "data_ready", "message": "rows", "facts": {}})
    seeded_series(store, job, 10_000)
    tell(attempt, 19_990, 20_000, {"halting_histogram": [0.25, 0.75]})
    attempt.append("note", RECOVERY)
    taken: list[int] = []
    take = Past.take

    def counted(past: Past, event: Any) -> None:
        taken.append(event.sequence)
        take(past, event)

    monkeypatch.setattr(Past, "take", counted)
    past = read(reading, f"/api/jobs/cognate/{job[5:]}/history")
    notes = [event for event in past["events"] if event["kind"] == "note"]
    assert ["data_ready", "recovery"] == [note["note"] for note in notes]
    assert 9_990 <= notes[0]["step"] <= 10_000
    assert {"step": 19_990, "bins": {"halting_histogram": [0.25, 0.75]}} == past["newest_bins"]
    assert past["sequence"] == store.get(job).last_sequence == taken[-1]
    assert len(taken) < 4_000
    with store.database.write() as connection:
        connection.execute(sa.delete(t.events).where(t.events.c.sequence < 20_300))
        connection.execute(sa.update(t.jobs).values(first_sequence=20_300, last_sequence=20_310))
        row = {"job_id": 1, "time_us": 1, "attempt": 1, "kind": "note", "payload": RECOVERY}
        connection.execute(sa.insert(t.events), [{**row, "sequence": one} for one in range(20_300, 20_311)])
    assert 20_310 == read(reading, f"/api/jobs/cognate/{job[5:]}/history")["sequence"], "it goes on behind the hole"
    store.database.close()


def test_a_jobs_past_is_marked_at_its_steps_and_read_on(reading: Stage) -> None:
    """What has no step of its own stands where training was; the second look reads only what is new."""
    store = reading.store()
    job = submit(store, pretraining())
    attempt = begin(store)
    tell(attempt, 3, 400, {"loss": 2.0, "halting_histogram": [0.5, 0.5]})
    attempt.append("note", {"kind": "data_ready", "message": "rows", "facts": {}})
    path = f"/api/jobs/cognate/{job[5:]}/history"
    first = read(reading, path)
    assert [(0, "state_change"), (0, "state_change"), (0, "attempt_started"), (0, "state_change"), (3, "note")] == [
        (event["step"], event["kind"]) for event in first["events"]
    ]
    assert {"step": 3, "bins": {"halting_histogram": [0.5, 0.5]}} == first["newest_bins"]
    attempt.append("note", RECOVERY)
    attempt.add_checkpoint(step=4, digest=f"sha256:{'c' * 64}", size_bytes=1, folder="c")
    second = read(reading, path)
    assert first["events"] == second["events"][:5]
    assert [(180, "recovery"), (4, None)] == [(event["step"], event.get("note")) for event in second["events"][5:]]
    store.database.close()


def test_a_stream_goes_on_where_it_broke_off_and_ends_with_the_job(reading: Stage) -> None:
    """By the query at first and by Last-Event-ID after a break; what JSON cannot say is null."""
    store = reading.store()
    job = submit(store, pretraining())
    attempt = begin(store)
    tell(attempt, 1, 400, {"loss": float("nan")})
    tell(attempt, 2, 400, {"loss": 0.5})
    last = store.get(job).last_sequence
    url = f"{reading.url}/api/jobs/cognate/{job[5:]}/events"
    told: list[Any] = []
    for kind, more, place in events(f"{url}?after={last - 2}"):
        told += more
        assert ("events", str(told[-1]["sequence"])) == (kind, place)
        if told[-1]["sequence"] == last:
            break
    assert [None, 0.5] == [event["metrics"]["loss"] for event in told]
    _, told, _ = next(events(f"{url}?after=0", **{"last-event-id": str(last - 1)}))
    assert [2] == [event["step"] for event in told]
    attempt.move(JobState.FAILED, message="enough")
    kinds = [
        (kind, data.get("state") if kind == "end" else len(data)) for kind, data, _ in events(f"{url}?after={last}")
    ]
    assert [("events", 1), ("end", "FAILED")] == kinds
    missing = f"{reading.url}/api/jobs/cognate/{UUID}/events"
    assert [("refused", "JOB_NOT_FOUND")] == [(kind, data["reason"]) for kind, data, _ in events(missing)]
    assert 400 == ask(f"{url}?after=-1")[0]
    store.database.close()


def test_the_board_tells_since_when_a_service_is_away(reading: Stage) -> None:
    """One that does not answer takes nothing of the other one with it, and is there again when it is."""
    board = events(f"{reading.url}/api/board")

    def until(health: str) -> Any:
        for _, seen, _ in board:
            services = {one["service"]: one for one in seen["services"]}
            assert "SERVING" == services["agent"]["health"]
            if services["cognate"]["health"] == health:
                return services["cognate"]
        raise AssertionError("the board's stream ended")

    until("SERVING")
    address = reading.run(reading.stop_service("cognate"))
    away = until("AWAY")
    assert away["away_since"] > 1.7e9
    assert away["error"]["message"]
    assert 503 == ask(f"{reading.url}/api/jobs")[0]
    reading.run(reading.start_service("cognate", address))
    assert "away_since" not in until("SERVING")


def test_two_versions_side_by_side(reading: Stage) -> None:
    """The fields of `forge models diff`; a version that is not there is told."""
    for steps in (10, 30):
        publish_model(reading.folder / "cognate", payload=b"%d" % steps, training={"steps": steps, "tokens": 1})
    found = read(reading, "/api/compare/models?a=cognate-25m@1&b=cognate-25m@2")
    [steps] = [one for one in found["differences"] if (one["section"], one["field"]) == ("training", "steps")]
    assert (10, 30, "changed", 20) == (steps["a"], steps["b"], steps["change"], steps["difference"])
    assert 404 == ask(f"{reading.url}/api/compare/models?a=cognate-25m@1&b=cognate-25m@9")[0]
    assert 400 == ask(f"{reading.url}/api/compare/models?a=cognate-25m@1&b=")[0]
    assert 404 == ask(f"{reading.url}/api/compare/jobs?a=1&b=2")[0]
    lineage = read(reading, "/api/models/cognate-25m@2")["lineage"]
    assert ("model", "cognate-25m@2", []) == (lineage["kind"], lineage["name"], lineage["made"])


def test_actions_stay_on_this_machine() -> None:
    """The page has no sign-in: whoever reaches it would act as its owner."""
    result = CliRunner().invoke(app, ["dashboard", "--host", "192.0.2.7", "--port", "0", "--actions"])
    assert 13 == result.exit_code
    assert "ssh -L" in result.stderr


def test_the_command_tells_where_the_page_is_and_ends_in_order() -> None:
    """One line, at once, and exit code 0 on Ctrl-C; it starts without any service."""
    command = [sys.executable, "-m", "cognateforge.cli", "dashboard", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        assert 200 == ask(f"{url}api/session")[0]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (0, "") == (process.returncode, errors)


def test_plain_forge_does_not_carry_a_web_server() -> None:
    """The client library stays light, and the command says which extra it needs."""
    code = (
        "import sys\n"
        "sys.modules.update(starlette=None, uvicorn=None, sse_starlette=None)\n"
        "from typer.testing import CliRunner\n"
        "from cognateforge.cli.app import app\n"
        "result = CliRunner().invoke(app, ['dashboard'])\n"
        "print(result.exit_code, result.stderr)"
    )
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert told.startswith("13 ")
    assert "cognateforge[dashboard]" in told
