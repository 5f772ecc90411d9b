"""Releases and servers of the tests of updates."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.previous import PreviousReleaseMissing, Release, previous_release, this_release
from tests.support.release_servers import ReleaseServer


@pytest.fixture(scope="session")
def new() -> Release:
    """Return this release."""
    return this_release()


@pytest.fixture(scope="session")
def old() -> Release:
    """Return the release before."""
    try:
        return previous_release()
    except PreviousReleaseMissing as missing:
        pytest.skip(str(missing))


class Servers:
    """Servers that end with the test, those that it has ended included."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def add(self, service: str, folder: Path, **settings: str) -> ReleaseServer:
        """Return a server that is not started yet."""
        server = ReleaseServer(service, folder, settings)
        self._stack.callback(server.kill)
        return server


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Yield a maker of servers."""
    with ExitStack() as stack:
        yield Servers(stack)
