"""The built-in notifier tells each thing at least once and not again, over failures, restarts and absent receivers."""

from __future__ import annotations

import base64
import email
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email import policy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cognateforge.alerts import KINDS, Alert, Limits, Look
from cognateforge.alerts.message import fingerprint
from cognateforge.alerts.notifier import Notifier, Sent
from cognateforge.alerts.receivers import Mail, Receiver, Webhook
from cognateforge.alerts.settings import MailSettings, NotifySettings, WebhookSettings, load
from cognateforge.alerts.state import State
from cognateforge.cli.app import app
from cognateforge.cli.exits import Exit
from cognateforge.exceptions import ClientSetupError, LocalStorageError
from tests.support import certificates
from tests.support.listeners import WebhookServer, mail_server, webhook_server

START = datetime(2026, 12, 24, 18, 0, tzinfo=UTC)


def alert(name: str = "ForgeJobFailed", job: str = "jobs/1", service: str = "cognate") -> Alert:
    kind = KINDS[name]
    return Alert(
        name=name,
        severity=kind.severity,
        service=service,
        labels={"job": job} if job else {},
        summary=f"{job} is in trouble\nBcc: nobody",
        runbook=kind.runbook,
        since=START,
    )


class World:
    """A notifier with a clock and looks that a test decides."""

    def __init__(self, folder: Path, *receivers: Receiver, **settings: Any) -> None:
        self.receivers, self.wrong, self.unknown = receivers, [alert()], frozenset[str]()
        self.time = START
        self.asked_since: datetime | None = None
        self.settings = NotifySettings(state_file=folder / "notify" / "state.json", **settings)
        self.start()

    def start(self) -> None:
        """Begin anew, as after a restart."""
        self.notifier = Notifier(self, self.receivers, self.settings, now=lambda: self.time)

    async def look(self, *, failed_since: datetime | None = None) -> Look:
        """Return what the test wants."""
        self.asked_since = failed_since
        return Look(alerts=tuple(self.wrong), unknown=self.unknown)

    async def turns(self, count: int = 1, *, each_s: float = 15, restart: bool = False) -> list[Sent]:
        """Take some turns, each some seconds after the one before."""
        sent: list[Sent] = []
        for _ in range(count):
            self.time += timedelta(seconds=each_s)
            if restart:
                self.start()
            sent += await self.notifier.once()
        return sent


@pytest.fixture
def hook() -> Iterator[WebhookServer]:
    with webhook_server() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, hook: WebhookServer) -> World:
    return World(tmp_path, Webhook(WebhookSettings(name="chat", url=hook.url)))


FIRING, RESOLVED = ("ForgeJobFailed", "firing", "jobs/1"), ("ForgeJobFailed", "resolved", "jobs/1")


@pytest.mark.parametrize("restart", [False, True])
async def test_trouble_is_told_once_and_its_end_once(world: World, hook: WebhookServer, restart: bool) -> None:
    """Also by a process that is started anew before each look."""
    await world.turns(5, restart=restart)
    world.wrong = []
    await world.turns(5, restart=restart)
    assert [FIRING, RESOLVED] == hook.told()
    assert {} == world.notifier._file.load().records


async def test_what_goes_on_is_told_again_after_the_interval(world: World, hook: WebhookServer) -> None:
    """And not before."""
    await world.turns(3, each_s=4 * 3600 - 60)
    assert 2 == len(hook.bodies)
    await world.turns(1, each_s=30)
    assert 2 == len(hook.bodies)


async def test_the_payload_is_alertmanagers(world: World, hook: WebhookServer) -> None:
    """Version 4, with every key that Alertmanager sends: its receivers take it."""
    world.wrong = [alert(), alert(job="jobs/2")]
    await world.turns()
    [body] = hook.bodies
    common = {"alertname": "ForgeJobFailed", "service": "cognate", "severity": "warning"}
    assert {
        "version": "4",
        "groupKey": '{}:{alertname="ForgeJobFailed", service="cognate"}',
        "truncatedAlerts": 0,
        "status": "firing",
        "receiver": "chat",
        "groupLabels": {"alertname": "ForgeJobFailed", "service": "cognate"},
        "commonLabels": common,
        "commonAnnotations": {"runbook_url": "docs/runbooks/ForgeJobFailed.md"},
        "externalURL": "",
    } == {key: value for key, value in body.items() if key != "alerts"}
    labels = {**common, "job": "jobs/1"}
    assert {
        "status": "firing",
        "labels": labels,
        "annotations": {
            "summary": "jobs/1 is in trouble\nBcc: nobody",
            "runbook_url": "docs/runbooks/ForgeJobFailed.md",
        },
        "startsAt": "2026-12-24T18:00:00.000Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "",
        "fingerprint": fingerprint(labels),
    } == body["alerts"][0]


async def test_a_group_has_ended_when_all_of_it_has(world: World, hook: WebhookServer) -> None:
    """One message tells of all alerts of a name, with the state of each."""
    world.wrong = [alert(), alert(job="jobs/2")]
    await world.turns()
    world.wrong = [alert()]
    await world.turns(3)
    world.wrong = []
    await world.turns(3)
    assert ["firing", "firing", "resolved"] == [body["status"] for body in hook.bodies]
    assert [["firing", "firing"], ["firing", "resolved"], ["resolved"]] == [
        [one["status"] for one in body["alerts"]] for body in hook.bodies
    ]


async def test_a_condition_must_hold_before_it_is_told(world: World, hook: WebhookServer) -> None:
    """A restart that takes half a minute is no news, a service that is away for a minute is."""
    world.wrong = [alert("ForgeServiceDown", job="")]
    await world.turns(2, each_s=15)
    world.wrong = []
    await world.turns(3)
    assert [] == hook.bodies
    world.wrong = [alert("ForgeServiceDown", job="")]
    await world.turns(6, each_s=15)
    assert [("ForgeServiceDown", "firing", "")] == hook.told()


async def test_one_look_without_it_does_not_end_it(world: World, hook: WebhookServer) -> None:
    """Between two states a condition may be missed once."""
    await world.turns(2)
    for _ in range(3):
        world.wrong = []
        await world.turns()
        world.wrong = [alert()]
        await world.turns()
    assert [FIRING] == hook.told()


async def test_what_is_unknown_is_not_over(world: World, hook: WebhookServer) -> None:
    """While a service cannot be asked, nothing about its jobs is said to have ended."""
    await world.turns(2)
    world.wrong, world.unknown = [], frozenset({"cognate"})
    await world.turns(5)
    assert [FIRING] == hook.told()
    world.unknown = frozenset()
    await world.turns(3)
    assert [FIRING, RESOLVED] == hook.told()


async def test_a_receiver_that_is_away_is_told_when_it_is_back(world: World, hook: WebhookServer) -> None:
    """It is tried less and less often, and learns of what began and ended meanwhile too."""
    hook.answer = 503
    sent = await world.turns(40)
    assert {"HTTP status 503"} == {one.error for one in sent}
    assert 3 <= hook.tries <= 15
    world.wrong = []
    await world.turns(10)
    hook.answer = 200
    await world.turns(40)
    assert [RESOLVED] == hook.told()
    assert {} == world.notifier._file.load().records


async def test_a_receiver_that_is_away_is_tried_with_one_message_at_a_time(world: World, hook: WebhookServer) -> None:
    """Each further one would wait for the whole of its timeout, and hold up the next look."""
    world.wrong = [alert(), alert("ForgeTrainingDiverged"), alert("ForgeLossTrend")]
    hook.answer = 500
    await world.turns()
    assert 1 == hook.tries


async def test_a_restart_while_a_receiver_is_away_loses_nothing(world: World, hook: WebhookServer) -> None:
    """What it was owed stands in the file."""
    await world.turns()
    hook.answer, world.wrong = 500, []
    await world.turns(5, restart=True)
    hook.answer = 200
    await world.turns(2, restart=True)
    assert [FIRING, RESOLVED] == hook.told()


async def test_what_failed_while_no_notifier_ran_is_asked_for(world: World, hook: WebhookServer) -> None:
    """From the last look on at which both services answered, however long ago that is."""
    await world.turns()
    looked, world.unknown = world.time, frozenset({"agent"})
    await world.turns(1, each_s=36_000, restart=True)
    await world.turns(1, restart=True)
    assert looked == world.asked_since


async def test_one_receiver_that_is_away_keeps_nothing_from_the_others(tmp_path: Path, hook: WebhookServer) -> None:
    """Each has its own memory and its own pauses."""
    with webhook_server() as other:
        other.answer = 500
        world = World(
            tmp_path,
            Webhook(WebhookSettings(name="one", url=other.url)),
            Webhook(WebhookSettings(name="two", url=hook.url)),
        )
        await world.turns(3)
        assert [FIRING] == hook.told()
        other.answer = 200
        await world.turns(3, each_s=60)
        assert ([FIRING], [FIRING]) == (hook.told(), other.told())


async def test_a_message_that_was_sent_but_not_written_down_comes_again(world: World, hook: WebhookServer) -> None:
    """A process that is killed in between tells twice: at least once is what is promised."""
    save = world.notifier._file.save
    calls = 0

    def killed(state: State) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("killed")
        save(state)

    world.notifier._file.save = killed  # type: ignore[method-assign]
    world.time += timedelta(seconds=15)
    with pytest.raises(RuntimeError):
        await world.notifier.once()
    await world.turns(3, restart=True)
    assert [FIRING, FIRING] == hook.told()


async def test_a_receiver_for_what_is_critical_hears_nothing_else(tmp_path: Path, hook: WebhookServer) -> None:
    """min_severity decides."""
    world = World(tmp_path, Webhook(WebhookSettings(name="phone", url=hook.url, min_severity="critical")))
    world.wrong = [alert(), alert("ForgeTrainingDiverged")]
    await world.turns(2)
    assert [("ForgeTrainingDiverged", "firing", "jobs/1")] == hook.told()


async def test_a_redirect_is_a_failure(world: World, hook: WebhookServer) -> None:
    """It would lose the body, and take the token to somebody else."""
    hook.answer = 302
    [sent] = await world.turns()
    assert "HTTP status 302" == sent.error


async def test_an_answer_that_breaks_off_behind_its_status_was_an_answer(world: World, hook: WebhookServer) -> None:
    """What was taken is not told again, however the rest of the answer fares."""
    hook.breaks_off = True
    assert ["", ""] == [sent.error for sent in await world.turns(2)] + [""]
    await world.turns(2, each_s=600)
    assert [FIRING] == hook.told()


@pytest.mark.parametrize("restart", [False, True])
async def test_a_clock_that_was_ahead_holds_nothing_back(world: World, hook: WebhookServer, restart: bool) -> None:
    """A year, until it was set: conditions hold, repeats come, and receivers are tried as if it had not been."""
    world.wrong = [alert("ForgeServiceDown", job="")]  # which has to hold for a minute
    right = world.time
    world.time = right + timedelta(days=365)
    hook.answer = 503
    await world.turns(2)
    world.time = right
    hook.answer = 200
    await world.turns(4, each_s=400, restart=restart)
    assert 1 == len(hook.bodies)
    assert world.asked_since is not None
    assert world.asked_since < right + timedelta(days=1)
    world.wrong = []
    await world.turns(3, restart=restart)
    assert "resolved" == hook.bodies[-1]["status"]
    world.time += timedelta(days=400)
    world.wrong = [alert()]
    await world.turns(2)
    told = len(hook.bodies)
    world.time -= timedelta(days=300)
    await world.turns(2, each_s=5 * 3600, restart=restart)
    assert told + 1 <= len(hook.bodies), "repeated after its interval, though it was told in what is the future now"


async def test_two_notifiers_do_not_share_a_state(world: World) -> None:
    """Both would tell everything."""
    with world.notifier._file.held(), pytest.raises(ClientSetupError, match="another notifier uses"):
        await world.turns()


async def test_a_damaged_state_is_not_thrown_away(world: World) -> None:
    """Everything would be told again: a person decides."""
    world.settings.state_file.parent.mkdir()
    world.settings.state_file.write_text("{")
    with pytest.raises(LocalStorageError, match=r"state\.json is not what a notifier has written"):
        await world.turns()


def test_fingerprints_are_alertmanagers() -> None:
    """Values that Prometheus's own LabelSet.Fingerprint gives (prometheus/common, model/labelset_test)."""
    assert "cbf29ce484222325" == fingerprint({})


class TestMail:
    """E-mail over a real connection."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        certificates.authority(tmp_path / "tls")
        return tmp_path / "tls"

    def settings(self, folder: Path, port: int, **values: Any) -> MailSettings:
        defaults = {
            "name": "mail",
            "host": "localhost",
            "port": port,
            "from_address": "forge@forge.test",
            "to": ("one@forge.test", "two@forge.test"),
            "username": "forge",
            "password_file": str(folder / "password"),
            "ca_file": str(folder / "ca.pem"),
        }
        return MailSettings(**{**defaults, **values})

    async def test_mail_goes_out_after_tls_and_login(self, folder: Path, tmp_path: Path) -> None:
        """To all addresses, readable, and with the password of the file."""
        (folder / "password").write_text("s3cret\n")
        with mail_server(folder) as server:
            world = World(tmp_path, Mail(self.settings(folder, server.port)), runbook_base_url="https://docs.test/")
            assert [""] == [sent.error for sent in await world.turns(3)]
        login = base64.b64encode(b"\0forge\0s3cret").decode()
        assert [(True, login)] == server.secure
        assert ["<one@forge.test>", "<two@forge.test>"] == server.recipients
        mail = email.message_from_string(server.mails[0], policy=policy.default)
        assert "[FIRING:1] ForgeJobFailed (cognate)" == mail["Subject"]
        assert mail["Bcc"] is None
        assert "https://docs.test/docs/runbooks/ForgeJobFailed.md" in mail.get_content()

    async def test_a_mail_that_was_taken_goes_out_once_whatever_the_goodbye(self, folder: Path, tmp_path: Path) -> None:
        """A server that answers QUIT with an error, or closes, has taken it all the same."""
        (folder / "password").write_text("s3cret")
        with mail_server(folder) as server:
            server.goodbye = "421 too busy to part"
            world = World(tmp_path, Mail(self.settings(folder, server.port)))
            assert [""] == [sent.error for sent in await world.turns(3, each_s=600)]
        assert 1 == len(server.mails)

    async def test_a_server_without_tls_gets_neither_mail_nor_password(self, folder: Path, tmp_path: Path) -> None:
        """And the error holds no secret."""
        (folder / "password").write_text("s3cret")
        with mail_server(folder, offers_tls=False) as server:
            world = World(tmp_path, Mail(self.settings(folder, server.port)))
            [sent] = await world.turns()
        assert [] == server.mails
        assert "SMTPNotSupportedError" == sent.error

    async def test_a_certificate_of_a_stranger_is_refused(self, folder: Path, tmp_path: Path) -> None:
        """The mail server's name and authority are checked."""
        (folder / "password").write_text("s3cret")
        with mail_server(folder) as server:
            world = World(tmp_path, Mail(self.settings(folder, server.port, ca_file="")))
            [sent] = await world.turns()
        assert ([], True) == (server.mails, sent.error.startswith("SSLCertVerificationError"))


class TestSettings:
    """The settings file."""

    def write(self, folder: Path, text: str) -> Path:
        (folder / "notify.toml").write_text(text, encoding="utf-8")
        return folder / "notify.toml"

    def test_a_whole_file_is_read(self, tmp_path: Path) -> None:
        """Every kind of key."""
        file = self.write(
            tmp_path,
            """
            interval_s = 5
            state_file = "state.json"
            runbook_base_url = "https://docs.test/"
            [limits]
            queue_wait_s = 60
            [[webhooks]]
            name = "chat"
            url_env = "CHAT_URL"
            [[mails]]
            name = "people"
            host = "mail.test"
            from_address = "forge@forge.test"
            to = ["one@forge.test"]
            """,
        )
        settings = load(file)
        settings.check()
        assert (5.0, 60.0, "chat") == (settings.interval_s, settings.limits.queue_wait_s, settings.webhooks[0].name)
        assert (("one@forge.test",), 587, "starttls") == (
            settings.mails[0].to,
            settings.mails[0].port,
            settings.mails[0].security,
        )

    def test_the_documents_file_is_one(self, tmp_path: Path) -> None:
        """What docs/alerts.md shows can be used as it stands."""
        page = (Path(__file__).resolve().parents[2] / "docs/alerts.md").read_text(encoding="utf-8")
        [text] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
        settings = load(self.write(tmp_path, text))
        settings.check()
        assert (Limits(), "critical") == (settings.limits, settings.webhooks[0].min_severity)

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("interval = 5", "interval is no setting"),
            ("interval_s = '5'", "interval_s has a value of the wrong type"),
            ("[limits]\nqueue = 1", "limits.queue is no setting"),
            ("[webhooks]\nurl = 'http://127.0.0.1'", r"webhooks must be tables: \[\[webhooks\]\]"),
            ("[[webhooks]]\nurl = 'http://127.0.0.1'", "webhooks lacks name"),
            ("[[webhooks]]\nname = 'a'\npassword = 'b'", "webhooks.password is no setting"),
            ("[", "notify.toml"),
        ],
    )
    def test_a_wrong_key_is_named(self, tmp_path: Path, text: str, told: str) -> None:
        """Nothing is passed over: a misspelt receiver would never be told."""
        with pytest.raises(ClientSetupError, match=told):
            load(self.write(tmp_path, text))

    @pytest.mark.parametrize(
        ("settings", "told"),
        [
            (NotifySettings(), "nobody is to be told"),
            (NotifySettings(webhooks=(WebhookSettings(name="a"),)), "needs one of url, url_env and url_file"),
            (NotifySettings(webhooks=(WebhookSettings(name="a", url="file:///etc/passwd"),)), "must begin with http"),
            (
                NotifySettings(webhooks=(WebhookSettings(name="a", url="http://far.test", token_env="T"),)),  # noqa: S106 - a name
                "token in plaintext",
            ),
            (NotifySettings(webhooks=(WebhookSettings(name="a", url="http://a.test"),) * 2), "names of receivers"),
            (
                NotifySettings(
                    mails=(MailSettings(name="m", host="far.test", from_address="a@b", to=("c@d",), security="none"),)
                ),
                "in plaintext",
            ),
            (
                NotifySettings(mails=(MailSettings(name="m", host="h", from_address="a@b", to=("c\n@d",)),)),
                "needs addresses",
            ),
        ],
    )
    def test_what_cannot_work_is_refused_before_anything_is_told(self, settings: NotifySettings, told: str) -> None:
        """Also what would send a secret in plaintext."""
        with pytest.raises(ClientSetupError, match=told):
            settings.check()


async def test_secrets_are_never_printed(tmp_path: Path, hook: WebhookServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the token nor an address that is a secret, in results, errors or the state."""
    monkeypatch.setenv("CHAT_URL", hook.url + "?key=SECRET-ADDRESS")
    monkeypatch.setenv("CHAT_TOKEN", "SECRET-TOKEN")
    settings = WebhookSettings(name="chat", url_env="CHAT_URL", token_env="CHAT_TOKEN")  # noqa: S106 - a name
    world = World(tmp_path, Webhook(settings))
    sent = await world.turns()
    assert ["Bearer SECRET-TOKEN"] == hook.tokens
    hook.answer = 500
    world.wrong = [alert("ForgeTrainingDiverged")]
    sent += await world.turns(2)
    hook.close()
    sent += await world.turns(2, each_s=600)
    assert 3 <= len(sent)
    assert "SECRET" not in repr(sent) + world.settings.state_file.read_text()


def test_the_command_tells_of_services_that_are_down(tmp_path: Path, hook: WebhookServer) -> None:
    """A real process over the real client library: told, a line for each message, and an orderly end on SIGTERM."""
    settings = tmp_path / "notify.toml"
    settings.write_text('interval_s = 0.2\n[[webhooks]]\nname = "chat"\nurl_env = "CHAT_URL"\n')
    command = [sys.executable, "-m", "cognateforge.cli", "notify", "--settings", str(settings)]
    command += ["--state", str(tmp_path / "state.json"), "--timeout", "0.5"]
    command += ["--cognate", f"unix:{tmp_path}/c", "--agent-server", f"unix:{tmp_path}/a", "--json"]
    # Both have been away for an hour, as the state says: so a minute is not waited for.
    once = subprocess.run(
        [*command, "--once"], env={**os.environ, "CHAT_URL": hook.url}, capture_output=True, text=True, check=False
    )
    assert (0, "") == (once.returncode, once.stdout), once.stderr
    state = json.loads((tmp_path / "state.json").read_text())
    for record in state["records"]:
        record["seen"] = "2020-01-01T00:00:00+00:00"
    (tmp_path / "state.json").write_text(json.dumps(state))
    with subprocess.Popen(
        command, env={**os.environ, "CHAT_URL": hook.url}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=30)
    assert (0, "", "") == (process.returncode, rest, errors)
    assert {("ForgeServiceDown", "cognate", "firing"), ("ForgeServiceDown", "agent", "firing")} == {
        (line["alertname"], line["service"], line["status"]) for line in lines
    }
    assert 2 == len(hook.bodies)


def test_the_command_watches_one_service_where_there_is_no_other(tmp_path: Path, hook: WebhookServer) -> None:
    """Of the other one nothing is said."""
    state = tmp_path / "state.json"
    nowhere = ["--cognate", f"unix:{tmp_path}/c", "--agent-server", f"unix:{tmp_path}/a", "--timeout", "0.5"]
    watched = ["--webhook", hook.url, "--state", str(state), "--service", "cognate", "--once"]
    assert Exit.OK == CliRunner().invoke(app, ["notify", *nowhere, *watched]).exit_code
    assert ["cognate"] == [record["service"] for record in json.loads(state.read_text())["records"]]


@pytest.mark.parametrize(
    ("secret", "told"),
    [
        ('token_env = "NO_SUCH_TOKEN"', "variable NO_SUCH_TOKEN is not set"),
        ('token_file = "/nowhere"', "file /nowhere"),
    ],
)
def test_a_secret_that_is_not_there_is_told_at_the_start(tmp_path: Path, secret: str, told: str) -> None:
    """And not when somebody should have been told something."""
    settings = tmp_path / "notify.toml"
    settings.write_text(f'[[webhooks]]\nname = "chat"\nurl = "https://far.test"\n{secret}\n')
    result = CliRunner().invoke(app, ["notify", "--settings", str(settings)])
    assert (Exit.LOCAL, True) == (result.exit_code, told in result.stderr)


def test_a_command_that_has_nobody_to_tell_is_refused() -> None:
    """With the remedy."""
    result = CliRunner().invoke(app, ["notify"])
    assert Exit.LOCAL == result.exit_code
    assert "nobody is to be told: give --webhook" in result.stderr
