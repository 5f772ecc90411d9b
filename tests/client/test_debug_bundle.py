"""A debug bundle: it holds what explains a failure, and nobody's secrets, whichever way they came in."""

from __future__ import annotations

import base64
import json
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from typer.testing import CliRunner, Result

from cognateforge import exceptions
from cognateforge.cli.app import app
from cognateforge.diagnostics.bundle import Bundle, tail_of
from cognateforge.job.v1 import job_pb2
from cognateforge.masking import Redactor
from tests.client.fakes import JOB, Fake, progress_events

KEY_LINES = ["MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgPLANTEDplantedKEY"] * 3
# Where each is planted stands in `planted`.
SECRETS = {
    "environment": "s3cr3t-of-the-environment",
    "store": "p4ssw0rd-of-the-store",
    "option": "0ption-of-the-bucket",
    "consul": "c0nsul-acl-t0ken",
    "note": "hf_PLANTEDplantedPLANTEDplanted",
    "failure": "url-passw0rd-planted",
    "log": "l0g-line-passw0rd",
    "quoted": "two words with blanks",
    "header": "QmVhcmVyVG9rZW5QbGFudGVk",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJwbGFudGVkIn0.c2lnbmF0dXJlLXBsYW50ZWQ",
    "key": KEY_LINES[0],
    "file": "AKIAPLANTEDPLANTED00",
    "health": "ghp_plantedPLANTEDplanted00",
}


@pytest.fixture
def planted(fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plant secrets in the job, its events and logs, the environment, the settings and a file; return the settings."""
    s = SECRETS
    monkeypatch.setenv("PLANTED_API_KEY", s["environment"])
    job = fake.pretraining.job.job
    job.state, job.last_sequence = job_pb2.JOB_STATE_FAILED, 9
    job.failure.reason = "DATA_UNAVAILABLE"
    job.failure.message = f"cannot read postgresql://me:{s['failure']}@db/x and {s['environment']}"
    note = job_pb2.Note(kind="hub", message=f"login with {s['note']}", facts={"auth_token": "abcdef", "rows": "12"})
    fake.history.events = [*progress_events(9)[:-1], job_pb2.JobEvent(sequence=9, note=note)]
    fake.logs.written = [
        [
            f"connecting, password={s['log']} ok",
            f'{{"client_secret": "{s["quoted"]}", "tokens_per_s": 1234.5}}',
            f"Authorization: Bearer {s['header']}",
            f"cookie {s['jwt']}",
            "-----BEGIN PRIVATE KEY-----",
            *KEY_LINES,
            "-----END PRIVATE KEY-----",
            "loss 3.25 at step 7, tokenizer=bpe max_tokens=512",
        ]
    ]
    fake.pretraining.job.job.attempt = 1
    data = tmp_path / "data"
    logs = data / "jobs" / JOB.removeprefix("jobs/") / "logs"
    logs.mkdir(parents=True)
    (logs / "attempt-1.log").write_text(f"key id {s['file']}\nthe worker's last words\n")
    file = tmp_path / "cognate.toml"
    file.write_text(
        f'data_dir = "{data}"\nstore_url = "postgresql+psycopg://forge:{s["store"]}@127.0.0.1:1/forge"\n'
        f'[artifacts.options]\nsecret_access_key = "{s["option"]}"\nregion = "eu-west-1"\n'
        f'[consul]\ntoken = "{s["consul"]}"\n'
    )
    return file


def bundle(fake: Fake, *args: str, address: str = "") -> Result:
    env = {"FORGE_COGNATE": address or fake.address, "FORGE_AGENT": fake.address}
    return CliRunner().invoke(app, ["debug-bundle", JOB, *args], env=env, catch_exceptions=False)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        files = [entry for entry in archive.getmembers() if entry.isfile()]
        assert {("", "")} == {(entry.uname, entry.gname) for entry in files}
        contents = {entry.name.partition("/")[2]: archive.extractfile(entry) for entry in files}
        return {name: file.read() for name, file in contents.items() if file is not None}


def test_a_bundle_explains_a_failure_without_a_secret(fake: Fake, planted: Path, tmp_path: Path) -> None:
    """Every member is searched for every secret, and what is to be told is told."""
    path = tmp_path / "out.tar.gz"
    result = bundle(fake, "--output", str(path), "--cognate-settings", str(planted), "--timeout", "3")
    assert (0, f"{path}\n") == (result.exit_code, result.stdout)
    found = members(path)
    leaks = [(name, what) for name, data in found.items() for what, text in SECRETS.items() if text.encode() in data]
    assert [] == leaks
    assert not [what for what, text in SECRETS.items() if text in result.stderr + result.stdout]
    assert not [name for name, data in found.items() if b"abcdef" in data and name == "events.jsonl"]
    assert {
        "README.txt",
        "contents.json",
        "job.json",
        "client.json",
        "doctor.json",
        "cognate/server.json",
        "agent/server.json",
        "cognate/settings.json",
        "checkpoints.json",
        "metrics.jsonl",
        "events.jsonl",
        "logs/attempt-1.log",
        "cognate/logs/attempt-1.log",
    } == set(found)
    job = json.loads(found["job.json"])
    assert ("cognate", "DATA_UNAVAILABLE") == (job["service"], job["job"]["failure"]["reason"])
    events = [json.loads(line) for line in found["events.jsonl"].splitlines()]
    assert list(range(1, 10)) == [event["sequence"] for event in events]
    assert "12" == events[-1]["note"]["facts"]["rows"]
    log = found["logs/attempt-1.log"].decode()
    assert '"tokens_per_s": 1234.5' in log
    assert "loss 3.25 at step 7, tokenizer=bpe max_tokens=512" in log
    assert b"the worker's last words" in found["cognate/logs/attempt-1.log"]
    settings = json.loads(found["cognate/settings.json"])
    assert ("eu-west-1", "*") == (
        settings["artifacts"]["options"]["region"],
        settings["artifacts"]["options"]["secret_access_key"][0],
    )
    assert any(check["name"] == "python" for check in json.loads(found["doctor.json"]))


def test_a_bundle_is_its_owners_alone_and_replaces_nothing(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mode 0600 whatever the umask, nothing beside it, and a file that is there stays."""
    monkeypatch.chdir(tmp_path)
    assert 0 == bundle(fake).exit_code
    [path] = tmp_path.iterdir()
    assert (f"forge-debug-{JOB.removeprefix('jobs/')}.tar.gz", 0o600) == (
        path.name,
        stat.S_IMODE(path.stat().st_mode),
    )
    before = path.read_bytes()
    again = bundle(fake)
    assert (13, True) == (again.exit_code, "exists: name another file" in again.stderr)
    assert ([path], before) == (list(tmp_path.iterdir()), path.read_bytes())
    assert 13 == bundle(fake, "--output", str(tmp_path / "none" / "x.tar.gz")).exit_code


def test_the_person_sees_what_is_in_it(fake: Fake, tmp_path: Path) -> None:
    """The same list as in the archive, with digests that hold; what could not be had is told with the reason."""
    path = tmp_path / "out.tar.gz"
    result = bundle(fake, "--output", str(path), "--json")
    told = json.loads(result.stdout)
    found = members(path)
    assert {member["name"]: member["size_bytes"] for member in told["members"]} == {
        name: len(data) for name, data in found.items() if name not in ("README.txt", "contents.json")
    }
    listed = json.loads(found["contents.json"])
    assert (told["members"], told["missing"]) == (listed["members"], listed["missing"])


def test_a_part_that_cannot_be_had_does_not_stop_the_rest(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that retention removed, for instance."""
    fake.pretraining.job.job.attempt = 1

    def gone(*_: Any, **__: Any) -> Any:
        raise exceptions.LogGoneError("the files were removed")

    monkeypatch.setattr("cognateforge.cli.jobs.JobService.logs", gone)
    told = json.loads(bundle(fake, "--output", str(tmp_path / "out.tar.gz"), "--json").stdout)
    assert {"logs/attempt-1.log": "the files were removed"} == told["missing"]
    assert "events.jsonl" not in told["missing"]


def test_a_dead_services_machine_still_tells(fake: Fake, planted: Path, tmp_path: Path) -> None:
    """With its settings there are settings and logs, and without them an error."""
    nowhere = "unix:/nonexistent/forge.sock"
    path = tmp_path / "out.tar.gz"
    options = ("--service", "cognate", "--timeout", "2", "--output", str(path))
    assert 4 == bundle(fake, *options, address=nowhere).exit_code
    assert 0 == bundle(fake, *options, "--cognate-settings", str(planted), address=nowhere).exit_code
    found = members(path)
    assert {"cognate/settings.json", "cognate/logs/attempt-1.log", "doctor.json"} <= set(found)
    assert {"job.json", "cognate/server.json"} == set(json.loads(found["contents.json"])["missing"])


def test_settings_that_are_invalid_are_told_in_the_bundle(fake: Fake, tmp_path: Path) -> None:
    """They may be why somebody looks: all else is gathered."""
    file = tmp_path / "cognate.toml"
    file.write_text('colour = "green"\n')
    path = tmp_path / "out.tar.gz"
    result = bundle(fake, "--output", str(path), "--cognate-settings", str(file), "--json")
    assert 0 == result.exit_code
    told = json.loads(result.stdout)
    assert "colour" in told["missing"]["cognate/settings.json"]
    assert {"job.json", "doctor.json", "cognate/server.json"} <= set(members(path))


def test_a_bundle_is_bounded(fake: Fake, tmp_path: Path) -> None:
    """A long log keeps its end and says how much there was; many events keep the newest."""
    fake.pretraining.job.job.attempt = 1
    fake.pretraining.job.job.last_sequence = 4000
    fake.history.events = progress_events(4000)
    fake.logs.written = [["x" * 8000 + str(number) for number in range(200)]]
    path = tmp_path / "out.tar.gz"
    told = json.loads(bundle(fake, "--output", str(path), "--max-mib", "1", "--json").stdout)
    assert sum(member["size_bytes"] for member in told["members"]) <= 1 << 20
    notes = {member["name"]: member["note"] for member in told["members"]}
    assert notes["events.jsonl"].endswith(" of 4000")
    assert "bytes" in notes["logs/attempt-1.log"]
    found = members(path)
    assert found["logs/attempt-1.log"].endswith(b"199\n")
    assert 4000 == json.loads(found["events.jsonl"].splitlines()[-1])["sequence"]


def test_a_secret_is_hidden_where_a_text_is_cut(tmp_path: Path) -> None:
    """Half of a private key is a secret too, and so is one whose beginning was left out."""
    lines = ["-----BEGIN EC PRIVATE KEY-----\n", *(f"{line}\n" for line in KEY_LINES), "-----END EC PRIVATE KEY-----\n"]
    for part in (lines[2:], lines[:-1], lines):
        one = Bundle(Redactor(), 1 << 20)
        one.add_text("log", part, most_bytes=1 << 16)
        assert KEY_LINES[0].encode() not in one.members[0].data
    known = Bundle(Redactor(["s3cr3t-value-of-some-length"]), 1 << 20)
    for most in range(20, 60):
        known.add_text(f"{most}", ["first line\n", "s3cr3t-value-of-some-length\n", "the end\n"], most_bytes=most)
    assert not [member for member in known.members if b"some-length" in member.data]


def test_a_log_with_a_hole_is_read_past_it(tmp_path: Path) -> None:
    """A bounded log's middle is given back to the file system and reads as zeros."""
    log = tmp_path / "attempt-1.log"
    log.write_bytes(b"first\n" + b"\0" * 100_000 + b"last words\n")
    assert ["last words\n"] == list(tail_of(log, 1000)())
    link = tmp_path / "link.log"
    link.symlink_to(log)
    with pytest.raises(OSError, match="symbolic"):
        list(tail_of(link, 1000)())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://h/x?token=s3cr3t-0001&y=1", "https://h/x?token=***********&y=1"),
        ("postgresql://u@h/db?sslpassword=s3cr3t", "postgresql://u@h/db?sslpassword=******"),
        ("https://b.s3.x/k?X-Amz-Signature=s3cr3t&n=1", "https://b.s3.x/k?X-Amz-Signature=******&n=1"),
        ("https://hooks.slack.com/services/T0/s3cr3t", "https://hooks.slack.com/services/*********"),
        ("curl -u me:s3cr3t http://x", "curl -u me:****** http://x"),
        ("run --password s3cr3t-0001 -v", "run --password *********** -v"),
        ("['run', '--token', 's3cr3t-0001', '-v']", "['run', '--token', '***********', '-v']"),
        ("Cookie: session=s3cr3t; b=c", "Cookie: *******************"),
        ("passphrase: s3cr3t", "passphrase: ******"),
        ("(b'x-api-key', b's3cr3t')", "(b'x-api-key', b'******')"),
        ("(b'authorization', b'Basic s3cr3t-0001')", "(b'authorization', b'Basic ***********')"),
        ('{"password": {"value": "s3cr3t"}, "a": 1}', '{"password": {*****************}, "a": 1}'),
        ('password="s3\\"c r3t" and more', 'password="*********" and more'),
    ],
)
def test_secrets_are_hidden_where_programs_write_them(text: str, told: str) -> None:
    """In addresses, command lines, headers, printed pairs and objects; what stands around them is left."""
    assert told == Redactor().text(text)


@pytest.mark.parametrize("before", ["", "x", "xx"])
@pytest.mark.parametrize(
    "encode",
    [
        lambda data: base64.b64encode(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: data.hex(),
        lambda data: data.hex().upper(),
        lambda data: quote(data, safe=""),
    ],
)
def test_a_known_secret_is_hidden_in_other_forms(before: str, encode: Callable[[bytes], str]) -> None:
    """Whatever stands before and after it: of Base64 at most what is shared with a neighbour is left."""
    secret = "s3cr3t+value/of?an~environment"  # noqa: S105 - made up
    text = encode(f"{before}{secret}-and-more".encode())
    hidden = Redactor([secret]).text(text)
    assert len(text) == len(hidden)
    assert hidden.count("*") >= len(encode(secret.encode()).rstrip("=")) - 4


def test_what_is_below_a_secrets_name_is_hidden() -> None:
    """As in a configuration that says where a password comes from; counts of tokens are none."""
    plain = {"password": {"value": "s3cr3t", "from": ["s3cr3t"]}, "tokens": {"unit": "words"}}
    hidden = {"password": {"value": "******", "from": ["******"]}, "tokens": {"unit": "words"}}
    assert hidden == Redactor().plain(plain)


@pytest.mark.parametrize(
    "text",
    [
        "tokens_per_s=1234.5 max_new_tokens: 512 tokens=123456789012",
        '{"tokenizer_digest": "sha256:abc", "secret_count": 3, "token": null}',
        "basic training of 25 million parameters",
        "https://example.org/a:b@c",
        "https://example.org/a?page=2&state=RUNNING",
        "--token is required, --max-tokens 12345678 --tokenizer bert-base-uncased",
        '{"tokens": {"seen": 5, "unit": "words"}}',
    ],
)
def test_what_is_no_secret_is_left(text: str) -> None:
    """Counts of tokens, names of tokenizers and ordinary words explain failures."""
    assert text == Redactor().text(text)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "piece",
    [
        "x",
        "eyJ-",
        "a.",
        "password",
        "&a=",
        "?",
        "--a",
        "--password ",
        "'a', ",
        "a:{",
        "-u a:",
        "cookie:",
        '="\\"',
        "-----BEGIN PRIVATE KEY-----",
        "-----END PRIVATE KEY-----",
        "\\",
        '"',
        "= ",
        "hf-",
    ],
)
def test_no_text_takes_long(piece: str) -> None:
    """A program that trains writes what it likes: a mebibyte of anything is looked through in seconds."""
    text = piece * ((1 << 20) // len(piece))
    assert len(text) == len(Redactor(["s3cr3t-value"]).text(text))
