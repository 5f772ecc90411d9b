"""Logs of attempts: bounded on disk, read by position, with no secret in what is read."""

import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cognate_server.settings import CognateSettings
from cognateforge.exceptions import OffsetOutOfRangeError
from tests.support.toy_service import ToyService, ended
from training_common.attempt_log import MAX_LINE_BYTES, AttemptLog, LogLine, kept_bounded, open_log
from training_common.engines.build import build_engine
from training_common.engines.local import LocalEngine
from training_common.jobs.folders import jobs_dir, log_name
from training_common.masking import Mask, secrets_of_environment
from training_common.settings import LogSettings

BOUND = LogSettings(keep_first_bytes=64 << 10, keep_last_bytes=256 << 10)
NOTHING = Mask()


def read_all(
    log: AttemptLog, position: int = 0, *, mask: Mask = NOTHING
) -> tuple[list[LogLine], list[tuple[int, int]]]:
    """Return every line from a position on, and the holes."""
    lines: list[LogLine] = []
    holes: list[tuple[int, int]] = []
    while (part := log.read(position, mask=mask, ended=True, partial=True)).next_position > position:
        if part.hole:
            holes.append((position, part.next_position))
        else:
            assert position == part.lines[0].position
        lines += part.lines
        position = part.next_position
    return lines, holes


def joined(lines: list[LogLine]) -> str:
    return "".join(line.text + ("" if line.continued else "\n") for line in lines)


def test_what_was_written_is_read_whatever_its_lines_are(tmp_path: Path) -> None:
    """Long, empty, unfinished, of many bytes a character: parts add up to the text, and none is longer than allowed."""
    pick = random.Random(3)  # noqa: S311
    lengths = [0, 0, 1, 100, MAX_LINE_BYTES - 1, MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 3 * MAX_LINE_BYTES, 200_000]
    written = (
        "".join("".join(pick.choices("aä€😀", k=pick.choice(lengths) // 2)) + "\n" for _ in range(40)) + "unfinished\n"
    )
    path = tmp_path / "log"
    path.write_text(written)
    lines, _ = read_all(AttemptLog(path))
    assert written == joined(lines)
    assert all(len(line.text.encode()) <= MAX_LINE_BYTES for line in lines)
    assert all(written.encode()[line.position :].startswith(line.text.encode()) for line in lines)
    for line in pick.sample(lines, 20):
        again, _ = read_all(AttemptLog(path), line.position)
        assert lines[lines.index(line) :] == again
    with pytest.raises(OffsetOutOfRangeError, match="beyond the log's end"):
        AttemptLog(path).read(len(written.encode()) + 1, mask=NOTHING, ended=True, partial=False)


def test_an_unfinished_line_waits_for_its_end(tmp_path: Path) -> None:
    """A follower gets it whole; who asks for what there is gets the beginning; at the attempt's end it is the last."""
    path = tmp_path / "log"
    path.write_text("one\ntw")
    log = AttemptLog(path)
    assert 4 == log.read(0, mask=NOTHING, ended=False, partial=False).next_position
    unfinished = LogLine(position=4, text="tw", continued=True)
    assert (unfinished,) == log.read(4, mask=NOTHING, ended=False, partial=True).lines
    assert (LogLine(position=4, text="tw", continued=False),) == log.read(
        4, mask=NOTHING, ended=True, partial=False
    ).lines
    with path.open("ab") as file:
        file.write(b"o\xff\n")
    assert ("two\ufffd",) == tuple(line.text for line in log.read(4, mask=NOTHING, ended=False, partial=False).lines)


def test_a_long_log_keeps_its_beginning_and_its_end(tmp_path: Path) -> None:
    """The disk holds no more than the bound and what came since; positions and whole lines stay what they were."""
    path = tmp_path / "log"
    log = AttemptLog(path)
    descriptor = open_log(path)
    for number in range(0, 60_000, 1000):
        os.write(descriptor, b"".join(b"line %07d %s\n" % (n, b"x" * 80) for n in range(number, number + 1000)))
        assert log.bound(BOUND)
    os.close(descriptor)
    size = path.stat().st_size
    assert size == 60_000 * 94
    bound = BOUND.keep_first_bytes + BOUND.keep_last_bytes
    assert path.stat().st_blocks * 512 <= bound + (1 << 20) + (128 << 10)
    lines, holes = read_all(log)
    assert 1 == len(holes)
    begin, end = holes[0]
    assert begin == BOUND.keep_first_bytes
    assert size - end >= BOUND.keep_last_bytes - 94
    first, last = begin // 94, end // 94
    assert [f"line {n:07d} {'x' * 80}" for n in range(first)] == [line.text for line in lines[:first]]
    assert lines[first].continued, "the hole begins in the middle of it"
    assert [f"line {n:07d} {'x' * 80}" for n in range(last, 60_000)] == [line.text for line in lines[first + 1 :]]
    # A reader that comes from within the hole goes on where the others do.
    assert (end, True) == (
        (part := log.read(end - 5000, mask=NOTHING, ended=True, partial=True)).next_position,
        part.hole,
    )


def test_a_reader_beside_a_writer_and_a_bound_takes_no_hole_for_text(tmp_path: Path) -> None:
    """Whatever the moment: every line is one that was written, and positions grow."""
    path = tmp_path / "log"
    log, done = AttemptLog(path), threading.Event()
    descriptor = open_log(path)

    def write() -> None:
        for number in range(0, 200_000, 500):
            os.write(descriptor, b"".join(b"line %07d %s\n" % (n, b"x" * 80) for n in range(number, number + 500)))
            log.bound(BOUND)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    position = last = 0
    while not done.is_set():
        part = log.read(position, mask=NOTHING, ended=False, partial=False)
        for line in part.lines:
            if not line.continued:
                assert line.text == f"line {line.position // 94:07d} {'x' * 80}"
                last = line.position
        position = part.next_position
    thread.join()
    os.close(descriptor)
    assert last > 0


def test_where_no_part_of_a_file_can_be_freed_a_full_log_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a file system keeps the beginning; the process goes on, and the log says why it ends."""
    path = tmp_path / "log"
    code = (
        "import os, sys, threading\n"
        "from pathlib import Path\n"
        "from training_common import attempt_log\n"
        "attempt_log._free = lambda *_: False\n"
        "path = Path(sys.argv[1])\n"
        "with attempt_log.kept_bounded(path, attempt_log.LogSettings(keep_last_bytes=65536), interval_s=0.01):\n"
        "    ended = [t for t in threading.enumerate() if t.name == 'log-bound'][0]\n"
        "    os.write(1, b'x' * (4 << 20) + b'\\n')\n"
        "    ended.join(30)\n"
        "    os.write(2, b'nobody reads this')\n"
    )
    descriptor = open_log(path)
    subprocess.run([sys.executable, "-c", code, str(path)], stdout=descriptor, stderr=descriptor, check=True)
    os.close(descriptor)
    assert path.read_bytes().endswith(
        b"x\nthe log is full: what follows is not kept, for this file system frees no part of a file\n"
    )


def test_secrets_are_hidden_and_keep_their_length(tmp_path: Path) -> None:
    """Known values and passwords in URLs, also where a part of the log ends in the midst of one."""
    assert ["abc12345"] == secrets_of_environment({"HUB_TOKEN": "abc12345", "PATH": "/usr/bin"})
    mask = Mask(["hunter2-hunter2", "short"])
    assert "postgresql://forge:******@db/x shortly" == mask.text("postgresql://forge:pa$$wd@db/x shortly")
    path = tmp_path / "log"
    for begin in range(MAX_LINE_BYTES - 20, MAX_LINE_BYTES + 5):
        path.write_text("." * begin + "hunter2-hunter2" + "." * 100 + "\n")
        lines, _ = read_all(AttemptLog(path), mask=mask)
        assert "." * begin + "*" * 15 + "." * 100 + "\n" == joined(lines)
    path.write_text("." * 65_500 + "hunter2-hunter2" * 9 + "\n")
    lines, _ = read_all(AttemptLog(path), mask=mask)
    assert "hunter" not in joined(lines)


async def test_each_attempt_has_a_log_of_its_own(tmp_path: Path) -> None:
    """In the job's folder, readable to the service alone; a worker's structured lines name job and attempt."""
    service = ToyService(tmp_path)
    job = await service.until(service.submit(steps=30, checkpoint_every=10, disk_full_at=20), ended)
    assert 2 == job.attempt
    for attempt, word in ((1, "attempt ended by the platform"), (2, "attempt ended")):
        path = jobs_dir(service.settings) / log_name(job.name, attempt)
        assert 0o600 == path.stat().st_mode & 0o777
        events = [json.loads(line) for line in path.read_text().splitlines()]
        assert (word, job.name, attempt) == (events[-1]["event"], events[-1]["job"], events[-1]["attempt"])
    service.database.close()


def test_a_worker_bounds_its_own_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it runs, from the settings."""
    path = tmp_path / "log"
    descriptor, looks = open_log(path), threading.Semaphore(0)
    bound = AttemptLog.bound

    def counted(log: AttemptLog, settings: LogSettings) -> bool:
        kept = bound(log, settings)
        looks.release()
        return kept

    monkeypatch.setattr(AttemptLog, "bound", counted)
    # Written in one piece before anybody looks, and by the end of the first look it is cut.
    os.write(descriptor, b"x" * (4 << 20))
    with kept_bounded(path, BOUND, interval_s=0.01):
        assert looks.acquire(timeout=60)
        assert looks.acquire(timeout=60), "and it goes on looking"
    os.close(descriptor)
    assert [64 << 10, (4 << 20) - (256 << 10)] == json.loads(path.with_suffix(".cut").read_text())


def test_what_is_no_file_is_refused_as_a_log(tmp_path: Path) -> None:
    """A pipe in its place would keep the server waiting for a reader."""
    os.mkfifo(tmp_path / "log")
    with pytest.raises(OSError, match="No such device"):
        open_log(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="no regular file"):
        open_log(tmp_path / "log")
    os.close(reader)


def test_services_write_logs_where_watches_look_for_them(tmp_path: Path) -> None:
    settings = CognateSettings.model_validate({"data_dir": tmp_path / "own", "shared_dir": tmp_path / "shared"})
    engine = build_engine(settings, module="nothing")
    assert isinstance(engine, LocalEngine)
    assert jobs_dir(settings) == engine._log_dir
