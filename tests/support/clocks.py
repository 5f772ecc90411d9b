"""The wall clock, moved by a test."""

import sys

import pytest

from training_common.store.database import now_us

_PACKAGES = ("training_common", "cognate_server", "agent_server")


class WallClock:
    """What every module of the services reads in place of the wall clock, from when it is made to the test's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_us = 0
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] in _PACKAGES and getattr(module, "now_us", None) is now_us:
                monkeypatch.setattr(module, "now_us", self.now_us)

    def now_us(self) -> int:
        return now_us() + self.ahead_us

    def advance(self, seconds: float) -> None:
        """Set it so many seconds ahead, or back."""
        self.ahead_us += round(seconds * 1e6)
