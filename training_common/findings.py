"""What happened to every row of a data set: kept, refused with a remedy, or left out on purpose.

Both data pipelines report with these classes. A refused row never stops a run, and none is lost without a trace: a
report is balanced when every row that was read is kept, refused or left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from training_common.attempt import Json

# Enough to see what is wrong with a file; the counts by reason are complete.
MAX_FINDINGS = 50
# A hostile row's text is quoted in part only.
MAX_QUOTED_CHARS = 120


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row that was refused.

    file: name of the file or source, without its folder. line: 1-based; in a JSON array, the element's number; 0 for
    the file as a whole. field: the field that is wrong, empty for the whole row. reason: a stable word, for counting.
    """

    file: str
    line: int
    field: str
    reason: str
    detail: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" + (f" {self.field}" if self.field else "")
        return f"{where}: {self.detail}; {self.remedy}"


class RowRefusedError(ValueError):
    """A row cannot be used. Raised by whoever looks at the row, turned into a `Finding` by whoever knows its place."""

    def __init__(self, reason: str, *, field: str = "", detail: str, remedy: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.field = field
        self.detail = detail
        self.remedy = remedy

    def at(self, file: str, line: int) -> Finding:
        """Return the finding for a row at this place."""
        return Finding(
            file=file, line=line, field=self.field, reason=self.reason, detail=self.detail, remedy=self.remedy
        )


class ProcessingReport:
    """Counts of rows read, kept, refused and left out, with the first findings in full."""

    def __init__(self, *, max_findings: int = MAX_FINDINGS) -> None:
        self._max_findings = max_findings
        self.rows_read = 0
        self.rows_kept = 0
        self.refused: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.findings: list[Finding] = []

    def read(self) -> None:
        """Count a row that was found, whatever becomes of it."""
        self.rows_read += 1

    def keep(self, rows: int = 1) -> None:
        """Count rows that are used."""
        self.rows_kept += rows

    def refuse(self, finding: Finding) -> None:
        """Count a row that cannot be used, and keep the finding while there is room."""
        self.refused[finding.reason] += 1
        if len(self.findings) < self._max_findings:
            self.findings.append(finding)

    def leave_out(self, reason: str, rows: int = 1) -> None:
        """Count sound rows that the settings exclude, for instance duplicates."""
        self.left_out[reason] += rows

    @property
    def rows_refused(self) -> int:
        """How many rows could not be used."""
        return self.refused.total()

    @property
    def rows_left_out(self) -> int:
        """How many sound rows were excluded on purpose."""
        return self.left_out.total()

    @property
    def balanced(self) -> bool:
        """Whether every row that was read is accounted for."""
        return self.rows_read == self.rows_kept + self.rows_refused + self.rows_left_out

    def to_json(self) -> dict[str, Json]:
        """Return the report for a manifest or an event."""
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.rows_kept,
            "rows_refused": self.rows_refused,
            "rows_left_out": self.rows_left_out,
            "refused": dict(sorted(self.refused.items())),
            "left_out": dict(sorted(self.left_out.items())),
            "findings": [asdict(finding) for finding in self.findings],
        }


def quote(value: object) -> str:
    """Return a value as it may appear in a message: printable and bounded."""
    text = ascii(value[: MAX_QUOTED_CHARS + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_QUOTED_CHARS else text[:MAX_QUOTED_CHARS] + "..."
