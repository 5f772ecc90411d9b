"""The statement of an artifact: of what, by what and how it was made, in the form of an in-toto statement.

It is one of the artifact's files, so manifest and signature cover it. docs/provenance.md has its fields. It is written
here and not by in-toto's classes: those keep numbers as doubles, and a seed of 64 bits would be another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from cognateforge.exceptions import IntegrityCheckFailedError
from cognateforge.layout import PREDICATE_TYPE, STATEMENT_NAME, STATEMENT_TYPE
from training_common.artifacts.blobs import StoredFile
from training_common.digests import canonical_json, sha256_bytes, sha256_file
from training_common.jobs.store import CheckpointRow

# The contract's bound on Provenance.statement.
MAX_STATEMENT_BYTES = 1 << 20
# What services call the file that tells of their data; files and rows are told there.
DATA_REPORT = "data.json"
# Newest first; a policy of retention keeps far fewer, unless somebody wants all.
_MAX_CHECKPOINTS = 100
# The manifest's parts that a statement repeats, in its own words where they differ.
_RESULTS = ("checks", "results", "evaluations", "readiness")
_COPIED = ("kind", "architecture", "task", "training", "grokfast")


@dataclass(frozen=True, kw_only=True)
class Ancestor:
    """A version that another one was made of. statement: the digest of its statement, empty where it has none.

    role: "foundation" or "agent" for versions, "model_folder" for a folder of files that nobody here published.
    """

    role: str
    name: str
    digest: str
    statement: str = ""


@dataclass(frozen=True, kw_only=True)
class Making:
    """What made a version. plan: the job's, and plan_bytes as it was stored. checkpoints: newest first."""

    job: str
    attempt: int
    plan: Message
    plan_bytes: bytes
    checkpoints: Sequence[CheckpointRow] = ()
    made_of: Sequence[Ancestor] = ()


def statement_of(files: Sequence[StoredFile], making: Making, *, family: str, body: Mapping[str, Any]) -> bytes:
    """Return the statement of files that a job made.

    files: all of the artifact's but the statement. body: the manifest's own part.
    Errors: IntegrityCheckFailedError, for a statement that is larger than the contract's messages hold.
    """
    report = next((file.digest for file in files if file.path == DATA_REPORT), "")
    told = {name: body[name] for name in _COPIED if name in body}
    predicate = {
        **told,
        "family": family,
        "job": {"name": making.job, "attempt": making.attempt},
        "create_us": body["create_us"],
        "code": body["code"],
        "plan": {
            "digest": sha256_bytes(making.plan_bytes),
            "fields": MessageToDict(making.plan, preserving_proto_field_name=True),
        },
        "data": {"report": {"path": DATA_REPORT, "digest": report} if report else None, "sources": body["data"]},
        "checkpoints": [
            {"step": row.step, "attempt": row.attempt, "digest": row.digest}
            for row in making.checkpoints[:_MAX_CHECKPOINTS]
        ],
        "recovery": body["recovery"],
        "results": {name: body[name] for name in _RESULTS if name in body},
        "made_of": [asdict(ancestor) for ancestor in making.made_of],
    }
    subjects = [{"name": file.path, "digest": {"sha256": file.digest.removeprefix("sha256:")}} for file in files]
    statement = canonical_json(
        {"_type": STATEMENT_TYPE, "subject": subjects, "predicateType": PREDICATE_TYPE, "predicate": predicate}
    )
    if len(statement) > MAX_STATEMENT_BYTES:
        raise IntegrityCheckFailedError(
            f"the statement of {family} has {len(statement)} bytes, at most {MAX_STATEMENT_BYTES} can be told: use a "
            "shorter plan"
        )
    return statement


def statement_in(folder: Path | None) -> tuple[str, Mapping[str, Any]]:
    """Return the digest of the statement in a version's folder, and its predicate; nothing where it has none.

    The folder's digests have been checked.
    """
    if folder is None or not (folder / STATEMENT_NAME).is_file():
        return "", {}
    path = folder / STATEMENT_NAME
    predicate: Mapping[str, Any] = json.loads(path.read_bytes()).get("predicate", {})
    return sha256_file(path), predicate
