"""A browser, where there is one, and what it says about itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dashboard.browser import Browser, chromium
from tests.support.stage import Stage, stage


@pytest.fixture(scope="session")
def chromium_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Yield one headless Chromium for all tests, with a profile of its own."""
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("needs chromium and chromedriver, for instance Debian's packages of these names")
    browser = chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium_session: Browser) -> Iterator[Browser]:
    """Yield the browser; a test that leaves an error in its console fails."""
    chromium_session.reset()
    yield chromium_session
    chromium_session.open("about:blank")
    assert [] == chromium_session.errors()


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Stage]:
    """Yield both services and a dashboard that may act."""
    with stage(tmp_path, actions=True) as running:
        yield running
