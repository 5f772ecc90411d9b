"""The manifest of a stored artifact: which files it has, in payload order, with size and digest."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from cognateforge.exceptions import ArtifactCorruptError
from cognateforge.layout import MANIFEST_NAME as MANIFEST_NAME
from cognateforge.layout import SIGNATURE_NAME

# The contract's rule for File.path: no absolute path, no empty, hidden, "." or ".." part.
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_PATH_CHARS = 255
MAX_FILES = 64


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """One file, and where its bytes start in the payload."""

    path: str
    size_bytes: int
    digest: str
    offset_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest whose digest holds and whose every path stays inside the artifact's folder."""

    raw: bytes
    document: dict[str, Any]
    files: tuple[ManifestFile, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the payload."""
        return sum(file.size_bytes for file in self.files)


def digest_of(data: bytes) -> str:
    """Return "sha256:" and 64 hex digits."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def check_digest(digest: str) -> None:
    """Refuse what is no digest: it names a folder later on."""
    if not _DIGEST.fullmatch(digest):
        raise ArtifactCorruptError(f"the registry's digest {digest[:100]!r} is not sha256 and 64 hex digits")


def parse_manifest(raw: bytes, digest: str) -> Manifest:
    """Return a checked manifest.

    Errors: ArtifactCorruptError, when the bytes do not have the digest, or say what no manifest may say.
    """
    check_digest(digest)
    found = digest_of(raw)
    if found != digest:
        raise ArtifactCorruptError(f"the manifest has digest {found}, the registry says {digest}")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorruptError(f"the manifest is not JSON: {error}") from error
    entries = document.get("files") if isinstance(document, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_FILES:
        raise ArtifactCorruptError(f"the manifest has no list of at most {MAX_FILES} files")
    files: list[ManifestFile] = []
    offset_bytes = 0
    for entry in entries:
        files.append(_file(entry, offset_bytes))
        offset_bytes += files[-1].size_bytes
    _refuse_collisions([file.path for file in files])
    return Manifest(raw=raw, document=document, files=tuple(files))


def _file(entry: object, offset_bytes: int) -> ManifestFile:
    match entry:
        case {"path": str(path), "size_bytes": int(size_bytes), "digest": str(digest)}:
            pass
        case _:
            raise ArtifactCorruptError(f"the manifest's file needs path, size_bytes and digest: {str(entry)[:200]}")
    if len(path) > MAX_PATH_CHARS or not _PATH.fullmatch(path):
        raise ArtifactCorruptError(f"the manifest names {path[:300]!r}, which is no path inside the artifact")
    if isinstance(size_bytes, bool) or size_bytes < 0 or not _DIGEST.fullmatch(digest):
        raise ArtifactCorruptError(f"the manifest's size or digest of {path} is not one")
    return ManifestFile(path=path, size_bytes=size_bytes, digest=digest, offset_bytes=offset_bytes)


def _refuse_collisions(paths: list[str]) -> None:
    # Compared without case, because the destination may be on a file system that does not tell "A" from "a".
    folded = [path.lower() for path in [*paths, MANIFEST_NAME, SIGNATURE_NAME]]
    for path in folded:
        if folded.count(path) > 1 or any(other.startswith(f"{path}/") for other in folded):
            raise ArtifactCorruptError(f"the manifest names {path} twice, or as file and folder")
