"""Devices of a host: one worker for each, whichever service it works for, and free again when it ends by any means."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.support.toy_service import ToyService
from training_common import devices
from training_common.attempt import AttemptWaits
from training_common.devices import DeviceLocks, take_devices
from training_common.jobs.states import FINAL, JobState
from training_common.jobs.waits import Standing, WaitReason, waits
from training_common.settings import SettingsError, WorkerSettings

HOLD = """
import sys, time
from pathlib import Path
from training_common.devices import DeviceLocks
taken = DeviceLocks(Path(sys.argv[1])).take(["0", "1"], int(sys.argv[2]), holder="the other service")
print(",".join(taken), flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def another_process(folder: Path, count: int) -> Iterator[subprocess.Popen[str]]:
    """Hold devices in another process."""
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(count)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child:
        assert child.stdout.readline().strip()
        yield child
        child.kill()


def test_two_processes_never_have_the_same_device(tmp_path: Path) -> None:
    """The second one takes what is left, and is told who has the rest; kill -9 of the first makes it free at once."""
    locks = DeviceLocks(tmp_path / "locks")
    with another_process(tmp_path / "locks", 1) as other:
        assert ["1"] == locks.take(["0", "1"], 1, holder="me")
        locks.release()
        with pytest.raises(AttemptWaits, match="1 of 2 devices are free: 0 is in use by the other service"):
            locks.take(["0", "1"], 2, holder="me")
        # All or none: what was free is free again.
        assert ["1"] == DeviceLocks(tmp_path / "locks").take(["1"], 1, holder="me")
        other.send_signal(signal.SIGKILL)
        other.wait()
        assert ["0"] == locks.take(["0"], 1, holder="me")


def test_a_device_has_one_lock_by_either_name(tmp_path: Path) -> None:
    """Its UUID and its index, in the order of the bus, are the same where the driver tells them."""
    for bus, uuid in (("0000:5e:00.0", "GPU-bbb"), ("0000:3b:00.0", "GPU-aaa")):
        (tmp_path / "proc" / bus).mkdir(parents=True)
        (tmp_path / "proc" / bus / "information").write_text(f"Model: X\nGPU UUID: \t {uuid}\nDevice Minor: 0\n")
    first, second = (DeviceLocks(tmp_path / "locks", proc=tmp_path / "proc") for _ in range(2))
    assert ["GPU-bbb"] == first.take(["GPU-bbb"], 1, holder="one")
    with pytest.raises(AttemptWaits, match="1 is in use by one"):
        second.take(["1"], 1, holder="two")
    assert ["0", "MIG-7"] == second.take(["0", "MIG-7"], 2, holder="two")


def test_workers_share_a_device_up_to_its_places(tmp_path: Path) -> None:
    """Spread over the devices, one part of each for a worker, and the next worker is told who has them."""
    one, two, three, four = (DeviceLocks(tmp_path / "locks") for _ in range(4))
    assert ["0"] == one.take(["0", "1"], 1, holder="one", shares=2)
    assert ["1"] == two.take(["0", "1"], 1, holder="two", shares=2)
    assert ["0", "1"] == three.take(["0", "1"], 2, holder="three", shares=2)
    with pytest.raises(AttemptWaits, match="0 of 1 devices have 1/2 free: 0 is in use by one, 1 is in use by two"):
        four.take(["0", "1"], 1, holder="four", shares=2)
    one.release()
    assert ["0"] == four.take(["0", "1"], 1, holder="four", shares=2)


def test_who_wants_a_device_alone_never_meets_a_sharer(tmp_path: Path) -> None:
    """Neither beside a part of another process, nor the other way round; each is told of the other."""
    whole, part = (DeviceLocks(tmp_path / "locks") for _ in range(2))
    whole.take(["0"], 1, holder="one alone")
    with pytest.raises(AttemptWaits, match="0 of 1 devices have 1/2 free: 0 is in use by one alone"):
        part.take(["0"], 1, holder="a sharer", shares=2)
    whole.release()
    for shares in (2, 3, 64):
        # The last part, so that the first is free.
        with part_of(tmp_path / "locks", shares - 1, shares) as held:
            with pytest.raises(AttemptWaits, match="0 of 1 devices are free: 0 is in use by a sharer"):
                whole.take(["0"], 1, holder="one alone")
            held.release()
            assert ["0"] == whole.take(["0"], 1, holder="one alone")
            whole.release()


@contextlib.contextmanager
def part_of(folder: Path, part: int, shares: int) -> Iterator[DeviceLocks]:
    """Hold a certain part of device 0, after those before it were taken and given back."""
    before, held = DeviceLocks(folder), DeviceLocks(folder)
    for _ in range(part):
        before.take(["0"], 1, holder="another", shares=shares)
    held.take(["0"], 1, holder="a sharer", shares=shares)
    before.release()
    yield held
    held.release()


@pytest.mark.parametrize(
    ("taken", "shares", "expected"),
    [((2,), 4, 2), ((2,), 3, 1), ((3, 3), 3, 1), ((2, 4), 4, 1), ((6, 3), 6, 3), ((64,), 1, 0), ((1,), 64, 0)],
)
def test_services_may_divide_a_device_differently(
    tmp_path: Path, taken: Sequence[int], shares: int, expected: int
) -> None:
    """What all have never adds up to more than the device: so many parts are left beside parts of other sizes."""
    for number in taken:
        DeviceLocks(tmp_path / "locks").take(["0"], 1, holder=f"one of {number}", shares=number)
    left = 0
    with contextlib.suppress(AttemptWaits):
        while True:
            DeviceLocks(tmp_path / "locks").take(["0"], 1, holder="me", shares=shares)
            left += 1
    assert expected == left
    assert left / shares + sum(1 / number for number in taken) <= 1


def test_torch_keeps_to_its_part_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each device that the worker sees; one that has its devices alone is not bounded."""
    bounds: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *bound: bounds.append(bound))
    for shares, expected in ((1, []), (4, [(0.25, 0), (0.25, 1)])):
        monkeypatch.setattr(devices, "_locks", None)
        settings = WorkerSettings(
            devices=("2", "0"), devices_per_worker=2, workers_per_device=shares, device_folder=tmp_path
        )
        seen: dict[str, str] = {}
        take_devices(settings, job="jobs/1", environment=seen)
        assert ("2,0", expected) == (seen["CUDA_VISIBLE_DEVICES"], bounds)
        held = devices._locks
        assert held is not None
        held.release()


def test_a_lock_file_that_was_removed_keeps_nobody_out(tmp_path: Path) -> None:
    """A cleaner of temporary files may take it: who comes next makes a new one, and one more is kept out by that."""
    first, second, third = (DeviceLocks(tmp_path / "locks") for _ in range(3))
    first.take(["0"], 1, holder="one")
    (tmp_path / "locks" / "0.lock").unlink()
    second.take(["0"], 1, holder="two")
    with pytest.raises(AttemptWaits, match="0 is in use by two"):
        third.take(["0"], 1, holder="three")


def test_the_folder_is_safe_to_share(tmp_path: Path) -> None:
    """Anybody may lock, only owners may remove; links are not followed, and open folders are refused."""
    umask = os.umask(0o077)
    try:
        DeviceLocks(tmp_path / "locks").take(["0"], 1, holder="me")
    finally:
        os.umask(umask)
    assert 0o1777 == (tmp_path / "locks").stat().st_mode & 0o7777
    assert 0o666 == (tmp_path / "locks" / "0.lock").stat().st_mode & 0o7777
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "locks" / "1.lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        DeviceLocks(tmp_path / "locks").take(["1"], 1, holder="me")
    assert "precious" == victim.read_text()
    (tmp_path / "link").symlink_to(tmp_path / "locks")
    with pytest.raises(SettingsError, match="link is no folder"):
        DeviceLocks(tmp_path / "link")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(SettingsError, match="chmod 1777"):
        DeviceLocks(tmp_path / "open")


def test_a_worker_sees_its_devices_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA's variables; where no devices are set, nothing is."""
    monkeypatch.setattr(devices, "_locks", None)
    seen: dict[str, str] = {}
    take_devices(WorkerSettings(), job="jobs/1", environment=seen)
    assert {} == seen
    settings = WorkerSettings(devices=("2", "0"), devices_per_worker=2, device_folder=tmp_path)
    take_devices(settings, job="jobs/1", environment=seen)
    assert {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2,0"} == seen
    assert f"process {os.getpid()} for jobs/1" == (tmp_path / "2.lock").read_text().rstrip("\0")
    held = devices._locks
    assert held is not None
    held.release()


async def test_a_job_waits_for_a_device_and_then_has_it(tmp_path: Path) -> None:
    """A real worker: another process has the only device, its job says so, and ends when the device is free."""
    folder = tmp_path / "locks"
    service = ToyService(tmp_path, devices=["0"], device_folder=str(folder))
    with another_process(folder, 1):
        job = service.submit(steps=3)
        row = await service.until(job, lambda row: row.waits > 0)
        with service.database.read() as connection:
            wait = waits(connection, [row], Standing(slots=1))[row.id]
    assert (WaitReason.DEVICE, "the devices of its worker's host are in use: tried 1 times") == (
        wait.reason,
        wait.message,
    )
    row = await service.until(job, lambda row: row.state in FINAL)
    assert (JobState.SUCCEEDED, 0) == (row.state, row.retries_without_progress)
    told = [event.payload for event in service.events(job) if event.payload.get("kind") == "waiting_for_device"]
    assert "0 of 1 devices are free: 0 is in use by the other service" in told[0]["message"]
    service.database.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"devices": ["0", "0"]}, "a device is named twice"),
        ({"devices": ["../x"]}, "'../x' is neither an index nor a UUID"),
        ({"devices": ["0"], "devices_per_worker": 2}, "a worker takes 2 of 1 devices"),
        ({"workers_per_device": 2}, "workers_per_device: 2 workers cannot share devices that are not named"),
        ({"devices": ["0"], "workers_per_device": 0}, "workers_per_device"),
        ({"devices": ["0"], "workers_per_device": 65}, "workers_per_device"),
    ],
)
def test_devices_that_cannot_be_had_are_refused(values: dict[str, object], words: str) -> None:
    """When the settings are read, by name."""
    with pytest.raises(ValidationError, match=words):
        WorkerSettings.model_validate(values)
