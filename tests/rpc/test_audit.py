"""The audit log as a file: whole lines, whatever happened to it."""

import json
import resource
import subprocess
import sys
from pathlib import Path

from training_common.rpc.audit import AuditLog
from training_common.settings import AuditSettings


def records(folder: Path) -> list[dict[str, object]]:
    text = (folder / "audit.jsonl").read_text(encoding="ascii")
    return [json.loads(line) for line in text.split("\n") if line]


def outcomes(folder: Path) -> list[object]:
    return [record["outcome"] for record in records(folder)]


def test_a_line_that_a_crash_has_torn_is_not_joined_to_the_next(tmp_path: Path) -> None:
    """The first record after a restart begins a line of its own."""
    (tmp_path / "audit.jsonl").write_bytes(b'{"time": "x", "outc')
    AuditLog(tmp_path, AuditSettings()).write(outcome="OK")
    assert b'"outc\n{"time"' in (tmp_path / "audit.jsonl").read_bytes()


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    """The next look notices, and no later record goes to the old file."""
    log = AuditLog(tmp_path, AuditSettings())
    log.write(outcome="first")
    (tmp_path / "audit.jsonl").rename(tmp_path / "moved")
    assert log.check()
    log.write(outcome="second")
    assert ["second"] == outcomes(tmp_path)
    log.close()


def test_callers_cannot_write_lines(tmp_path: Path) -> None:
    """Line ends of every kind, and what a terminal obeys, stay escaped."""
    log = AuditLog(tmp_path, AuditSettings())
    log.write(outcome="OK", wish='x\u2028{"outcome": "forged"}\x85\n\x9b31m\u202e\ud800')
    text = (tmp_path / "audit.jsonl").read_bytes()
    assert 1 == len(text.decode("ascii").splitlines())
    assert ["OK"] == outcomes(tmp_path)
    assert 0o600 == (tmp_path / "audit.jsonl").stat().st_mode & 0o777
    log.close()


def test_a_full_disk_loses_what_is_told_and_nothing_else(tmp_path: Path) -> None:
    """In a process with a limit on the size of files: the lost record is not in the file, and the count is right."""
    script = """
import resource, sys
from pathlib import Path
from training_common.rpc.audit import AuditLog
from training_common.settings import AuditSettings
log = AuditLog(Path(sys.argv[1]), AuditSettings())
log.write(outcome="before")
size = log.path.stat().st_size
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, resource.RLIM_INFINITY))
log.write(outcome="lost")
for _ in range(5):
    assert not log.check()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert log.check()
log.write(outcome="after")
"""
    if resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY:
        raise AssertionError("the limit cannot be taken back here")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert 0 == done.returncode, done.stderr
    assert "'outcome': 'lost'" in done.stdout + done.stderr
    whole = []
    for line in (tmp_path / "audit.jsonl").read_text().splitlines():
        try:
            whole.append(json.loads(line))
        except ValueError:
            assert len(line) <= 5, line
    assert ["before", "AUDIT_RESUMED", "after"] == [record["outcome"] for record in whole]
    assert 1 == whole[1]["lost"]
