"""The service that most tests of jobs use."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.toy_service import ToyService


@pytest.fixture
def service(tmp_path: Path, store_url: str) -> Iterator[ToyService]:
    """Yield a service over an empty store, of each kind in turn."""
    service = ToyService(tmp_path, store_url=store_url)
    yield service
    service.database.close()
