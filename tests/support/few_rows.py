"""A small set of labelled texts in a data folder: a whole Cognate takes tens of seconds for the generated ones."""

import json
from pathlib import Path

from cognateforge.agent.v1 import training_pb2

_ROWS = {"train": 4, "val": 2, "test": 3}
_TEXTS = {"greeting": "hello to you", "farewell": "see you later", "thanks": "thank you for that"}
FEW_ROWS = training_pb2.ClassificationTask(file=training_pb2.FileSource(path="few.jsonl"))


def write_few_rows(folder: Path) -> Path:
    """Write the rows that `FEW_ROWS` names into a data folder, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": f"{text}, {split} {number}", "intent": label, "split": split}
        for split, count in _ROWS.items()
        for label, text in _TEXTS.items()
        for number in range(count)
    ]
    (folder / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
