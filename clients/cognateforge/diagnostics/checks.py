"""What a check comes to. Checks look and change nothing; what fails brings its remedy."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any


class Level(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    # It works, and may not for long or not as well as it could.
    WARN = "warn"
    FAIL = "fail"
    # Nobody can tell, or it was not asked for: the detail says why.
    SKIP = "skip"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at.

    area: for instance "environment" or "cognate store". remedy: what to do; never empty for `warn` and `fail`.
    """

    area: str
    name: str
    level: Level
    detail: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level in (Level.WARN, Level.FAIL) and not self.remedy:
            raise ValueError(f"{self.area} {self.name}: a {self.level} needs a remedy")

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {**vars(self), "level": self.level.value}


@dataclass(frozen=True)
class Area:
    """Makes checks of one area."""

    name: str

    def ok(self, name: str, detail: str) -> Check:
        """Return a check that passed."""
        return Check(area=self.name, name=name, level=Level.OK, detail=detail)

    def warn(self, name: str, detail: str, remedy: str) -> Check:
        """Return a check that may become a failure."""
        return Check(area=self.name, name=name, level=Level.WARN, detail=detail, remedy=remedy)

    def fail(self, name: str, detail: str, remedy: str) -> Check:
        """Return a check that failed."""
        return Check(area=self.name, name=name, level=Level.FAIL, detail=detail, remedy=remedy)

    def skip(self, name: str, detail: str) -> Check:
        """Return a check that could not be made."""
        return Check(area=self.name, name=name, level=Level.SKIP, detail=detail)
