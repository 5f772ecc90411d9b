"""What is exported: a folder that a fetch left, looked through once more."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cognateforge.client.manifest import Manifest, digest_of, parse_manifest
from cognateforge.exceptions import ArtifactCorruptError, LocalStorageError
from cognateforge.layout import MANIFEST_NAME, SIGNATURE_NAME

# The contract's rule for the name of a version, and what there are versions of.
_VERSION = re.compile(r"[a-z][a-z0-9-]{0,47}@[1-9][0-9]{0,8}")
_KINDS = ("foundation", "agent")


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model or an agent in a folder, each file as its manifest says. digest: of the manifest."""

    folder: Path
    manifest: Manifest
    digest: str

    @property
    def document(self) -> dict[str, Any]:
        """The manifest."""
        return self.manifest.document

    @property
    def name(self) -> str:
        """Family and version."""
        return str(self.document["name"])

    @property
    def kind(self) -> str:
        """What it is: "foundation" or "agent"."""
        return str(self.document.get("kind") or ("agent" if "task" in self.document else "foundation"))

    @cached_property
    def files(self) -> dict[str, Path]:
        """Its files by their paths inside it, in the manifest's order."""
        return {file.path: self.folder / file.path for file in self.manifest.files}

    @property
    def proofs(self) -> dict[str, Path]:
        """The manifest and, where there is one, the signature: what stands beside the files."""
        found = {name: self.folder / name for name in (MANIFEST_NAME, SIGNATURE_NAME)}
        return {name: path for name, path in found.items() if path.is_file() and not path.is_symlink()}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written. digest: of an OCI image's manifest; of a folder's artifact."""

    path: Path
    format: str
    name: str
    digest: str
    size_bytes: int


def open_artifact(folder: Path) -> Artifact:
    """Return the artifact of a fetched folder.

    Errors: LocalStorageError, when there is none or the disk refuses; ArtifactCorruptError, naming the file that is not
    what the manifest says.
    """
    try:
        raw = (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise LocalStorageError(
            f"{folder} has no {MANIFEST_NAME} that can be read: name a folder that forge fetch has written"
        ) from error
    digest = digest_of(raw)
    manifest = parse_manifest(raw, digest)
    _require_version(manifest.document, folder / MANIFEST_NAME)
    for file in manifest.files:
        path = folder / file.path
        if path.is_symlink() or not path.is_file():
            raise ArtifactCorruptError(f"{file.path} of {folder} is missing, or is no file")
        try:
            with path.open("rb") as handle:
                found = f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"
        except OSError as error:
            raise LocalStorageError(f"{path} cannot be read: {error.strerror}") from error
        if found != file.digest:
            raise ArtifactCorruptError(f"{file.path} of {folder} has digest {found}, not {file.digest}: fetch it again")
    return Artifact(folder=folder, manifest=manifest, digest=digest)


def _require_version(document: dict[str, Any], path: Path) -> None:
    """Refuse what is no version's: its parts go into names and annotations of other tools."""
    if not _VERSION.fullmatch(str(document.get("name"))):
        raise ArtifactCorruptError(f"{path} names no version")
    if document.get("kind", _KINDS[0]) not in _KINDS:
        raise ArtifactCorruptError(f"{path} is of neither a model nor an agent")
    wanted: dict[str, tuple[type, ...]] = {
        "create_us": (int,),
        "parent": (dict,),
        "architecture": (dict, str),
        "task": (str,),
        "state": (str,),
    }
    for part, form in wanted.items():
        if part in document and not isinstance(document[part], form):
            raise ArtifactCorruptError(f"{path}: {part} has a form that no version's has")


def require_free(out: Path) -> None:
    """Refuse a place where something is. Errors: LocalStorageError."""
    if out.exists() or out.is_symlink():
        raise LocalStorageError(f"{out} is there already: name another place, or remove it")


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """Yield a path beside `out` to write to, which becomes `out` when all went well and is removed otherwise.

    Errors: LocalStorageError, when something is at `out` already, or the disk refuses.
    """
    require_free(out)
    scratch = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.rename(scratch, out)
    except OSError as error:
        raise LocalStorageError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)
