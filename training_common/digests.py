"""Digests of files and of canonical JSON, and folders that are written whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# 1 MiB: large enough that Python's overhead per read vanishes beside sha256.
_BLOCK_BYTES = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Return "sha256:" and the hex digest of `data`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def sha256_file(path: Path) -> str:
    """Return "sha256:" and the hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no spaces, UTF-8. NaN and infinity are refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def files_under(folder: Path) -> list[Path]:
    """Return every file below `folder`, sorted by its path inside it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def sync_tree(folder: Path) -> None:
    """Flush every file and folder below `folder` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into an empty folder, flush it, and rename it to `target`: all of it is there, or nothing.

    Errors: whatever `fill` raises, OSError; the half-written folder is removed first.
    """
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        fill(scratch)
        sync_tree(scratch)
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def code_digest(*packages: str) -> str:
    """Return a digest over the Python files of installed packages: two runs share it when their code is the same."""
    digests = {}
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"package {package} is not installed")
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            digests[f"{package}/{path.relative_to(root).as_posix()}"] = sha256_file(path)
    return sha256_bytes(canonical_json(digests))
