"""Numbers beside a text: read with the row, checked one by one, and equally many in a set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent_server.objectives.classification import ClassificationObjective, EncodedText
from cognateforge.exceptions import DataUnavailableError
from tests.agent.data_support import prepare_rows, reasons


def _rows(*features: object) -> list[dict[str, Any]]:
    """Return a sound set of two labels, then a training row for each of the given values."""
    sound = [
        {"text": f"{label} {split}", "label": label, "split": split, "features": [1, 2.5]}
        for label in ("a", "b")
        for split in ("train", "test")
    ]
    return [*sound, *({"text": f"row {i}", "label": "a", "features": value} for i, value in enumerate(features))]


def test_features_come_with_their_rows(tmp_path: Path) -> None:
    """Whole numbers are numbers, and the same words beside other numbers are another row."""
    rows = _rows([3, -1.0], [0, 0])
    rows[-1]["text"] = rows[-2]["text"]
    data = prepare_rows(tmp_path, "classification", [*rows, rows[-1]])
    assert {row.features for row in (*data.train, *data.validation)} >= {(1.0, 2.5), (3.0, -1.0), (0.0, 0.0)}
    assert data.report.rows_kept == len(rows)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "wrong_type"),
        ("1 2", "wrong_type"),
        ([1, "2"], "wrong_type"),
        ([1, True], "wrong_type"),
        ([1, None], "wrong_type"),
        ([1, 1e39], "not_finite"),
        ([1, 10**400], "not_finite"),
    ],
)
def test_what_is_no_list_of_numbers_is_refused(tmp_path: Path, value: object, reason: str) -> None:
    """The finding names the field and the remedy."""
    data = prepare_rows(tmp_path, "classification", _rows(value), max_refused_share=1)
    assert reasons(data) == {5: reason}
    (finding,) = data.report.findings
    assert (finding.field, bool(finding.remedy)) == ("features", True)


def test_rows_need_equally_many(tmp_path: Path) -> None:
    """A set of uneven rows does not make batches; the objective says so too, of rows from elsewhere."""
    with pytest.raises(DataUnavailableError, match="rows of 1 and rows of 2 features"):
        prepare_rows(tmp_path, "classification", _rows([1]))
    rows = [EncodedText((1,), 0, (1.0,)), EncodedText((1,), 0)]
    with pytest.raises(DataUnavailableError, match="rows have 0 and 1 features"):
        ClassificationObjective().batch(rows)
