"""A clock that jumps ahead makes nothing old: retention waits until somebody could have looked at it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import cognate_server.migrations
from tests.support.outbox import job_with_events
from training_common.jobs.age_clock import HOLD_S, MOST_AWAY_US, TOLERANCE_US, AgeClock
from training_common.jobs.sweeper import Removed, Sweeper
from training_common.settings import RetentionSettings
from training_common.store.database import Database, now_us

DAY_S, DAY_US = 86_400, 86_400 * 10**6


class Machine:
    """A store, and the clocks of the machine that a service runs on."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.wall_us, self.steady_s = now_us(), 5.0
        self.start()

    def start(self) -> None:
        """Start the service anew: it knows only its store."""
        self.clock = AgeClock(self.database, clock=lambda: self.wall_us, steady=lambda: self.steady_s)

    def passes(self, seconds: float) -> int | None:
        """Let time pass, and return the time of the service."""
        self.wall_us += round(seconds * 1e6)
        self.steady_s += seconds
        return self.clock()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    database = Database(f"sqlite:///{tmp_path / 'store.db'}")
    database.upgrade(Path(cognate_server.migrations.__file__).parent)
    yield Machine(database)
    database.close()


def test_time_that_passes_is_believed(machine: Machine) -> None:
    """Between two looks and over years; also a clock that is set a little, or back."""
    for seconds in (0, 600, 3 * 365 * DAY_S):
        assert machine.passes(seconds) == machine.wall_us
    machine.wall_us += TOLERANCE_US
    assert machine.passes(600) == machine.wall_us
    machine.wall_us -= 365 * DAY_US
    assert machine.passes(600) == machine.wall_us


def test_a_jump_ahead_is_in_doubt_until_the_clock_is_set_back(machine: Machine) -> None:
    """However often it is looked at meanwhile; it is told when it begins and when it ends, and once each."""
    machine.passes(0)
    machine.wall_us += 365 * DAY_US
    with structlog.testing.capture_logs() as logged:
        assert [None] * 3 == [machine.passes(DAY_S) for _ in range(3)]
        machine.wall_us -= 365 * DAY_US
        assert machine.passes(600) == machine.passes(0) == machine.wall_us
    assert [
        "the clock has jumped ahead: retention removes nothing",
        "the clock is believed again: retention goes on",
    ] == [one["event"] for one in logged]
    assert pytest.approx(365 * DAY_S - TOLERANCE_US / 1e6, abs=1) == logged[0]["ahead_s"]


def test_a_clock_that_stays_is_believed_in_the_end(machine: Machine) -> None:
    """It may have been behind before. Another jump after that is in doubt again."""
    machine.passes(0)
    machine.wall_us += 365 * DAY_US
    assert [None, None] == [machine.passes(600), machine.passes(HOLD_S - 1)]
    assert machine.passes(1) == machine.wall_us
    machine.wall_us += 365 * DAY_US
    assert machine.passes(HOLD_S - 1) is None


def test_at_the_start_the_clock_is_held_against_the_last_event(machine: Machine) -> None:
    """A service may have been away for weeks. Nobody waits where nothing has ever been done."""
    machine.wall_us += 1000 * DAY_US
    machine.start()
    assert machine.passes(0) == machine.wall_us
    job_with_events(machine.database, 1)
    machine.start()
    assert machine.passes(600) is None
    machine.wall_us = now_us() + MOST_AWAY_US - 60 * 10**6
    machine.start()
    assert machine.passes(0) == machine.wall_us


def test_nothing_is_removed_by_a_clock_in_doubt(machine: Machine, tmp_path: Path) -> None:
    """A year ahead; it goes in its own time."""
    job_with_events(machine.database, 5)
    with machine.database.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET end_us = create_us")
    settings = RetentionSettings(job_files_days=90, job_events_days=90)
    sweeper = Sweeper(machine.database, tmp_path, settings, clock=machine.clock)
    sweeper.sweep()
    machine.wall_us += 365 * DAY_US
    sweeper.sweep()
    assert Removed() == sweeper.removed
    machine.wall_us -= 365 * DAY_US
    machine.passes(91 * DAY_S)
    sweeper.sweep()
    assert (1, 5) == (sweeper.removed.job_folders, sweeper.removed.events)
