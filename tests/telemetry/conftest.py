"""Servers that stop at once."""

import pytest


@pytest.fixture(autouse=True)
def quick_stop(no_drain_notice: None) -> None:
    """Every server of these tests stops at once."""
