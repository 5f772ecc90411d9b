"""Where a version comes from, held against keys that the reader trusts.

What is published has a manifest, which names every file with its digest; a statement, one of those files, which tells
how they were made and names all the others; and a signature over manifest and files. All three must agree. Signatures
need the packages of the extra `signing`; they are imported when one is looked at.
"""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cognateforge.artifact.v1.artifact_pb2 import Provenance
from cognateforge.client.manifest import Manifest, digest_of, parse_manifest
from cognateforge.exceptions import ArtifactCorruptError, LocalStorageError, ProvenanceRefusedError
from cognateforge.layout import MANIFEST_NAME, PREDICATE_TYPE, SIGNATURE_NAME, STATEMENT_NAME, STATEMENT_TYPE

# Names in one message; the rest is counted.
_NAMED = 3


class Problem(enum.StrEnum):
    """Why a version is refused: `problem` in the error's metadata."""

    NOT_SIGNED = "not_signed"
    UNKNOWN_KEY = "unknown_key"
    SIGNATURE = "signature"
    OTHER_VERSION = "other_version"
    NOT_PUBLISHED = "not_published"
    MANIFEST = "manifest"
    NO_STATEMENT = "no_statement"
    STATEMENT = "statement"
    FILES = "files"


@dataclass(frozen=True, kw_only=True)
class VerifiedProvenance:
    """A version whose manifest, statement and signature agree.

    key: fingerprint of the trusted key that signed it; empty where no key was asked for. manifest: its document.
    told: the statement's predicate; docs/provenance.md has its fields.
    """

    name: str
    digest: str
    key: str
    statement_digest: str
    manifest: Mapping[str, Any]
    told: Mapping[str, Any]


def verify_provenance(
    provenance: Provenance, *, name: str, digest: str, public_keys: Sequence[Path]
) -> VerifiedProvenance:
    """Return what is told of a version once all of it agrees.

    name, digest: the version that was asked for, as the registry names it. public_keys: PEM files, any of which may
    have signed it; without one the signature is not looked at.
    Errors: ProvenanceRefusedError with `problem` in its metadata; ClientSetupError, for a key that cannot be used.
    """
    manifest = _manifest(provenance.manifest, name, digest)
    key = _signer(manifest, provenance.signature, name, digest, public_keys) if public_keys else ""
    # A true signature of another version would make an older one, or one with other flaws, pass for this one.
    if (named := manifest.document.get("name")) != name:
        raise refused(Problem.OTHER_VERSION, name, f"its manifest is that of {str(named)[:100]}")
    statement_digest, told = _statement(manifest, provenance.statement, name)
    return VerifiedProvenance(
        name=name,
        digest=digest,
        key=key,
        statement_digest=statement_digest,
        manifest=manifest.document,
        told=told,
    )


def verify_folder(folder: Path, *, public_keys: Sequence[Path]) -> VerifiedProvenance:
    """Return what is told of a fetched version once every byte in its folder agrees.

    Errors: as `verify_provenance`; ArtifactCorruptError, naming a file that is not as it was published;
    LocalStorageError, for a folder that cannot be read or holds no version.
    """
    try:
        raw = _read(folder / MANIFEST_NAME)
        if not raw:
            raise LocalStorageError(f"{folder} has no {MANIFEST_NAME}: give a folder that forge fetch made")
        digest = digest_of(raw)
        manifest = parse_manifest(raw, digest)
        for file in manifest.files:
            path = folder / file.path
            if path.is_symlink() or not path.is_file():
                raise ArtifactCorruptError(f"{path} is missing")
            if (found := _digest_of_file(path)) != file.digest:
                raise ArtifactCorruptError(f"{path} has digest {found}, the manifest says {file.digest}")
        name = str(manifest.document.get("name", ""))[:100]
        _refuse_strangers(folder, manifest, name)
        provenance = Provenance(
            name=name,
            digest=digest,
            manifest=raw,
            statement=_read(folder / STATEMENT_NAME),
            signature=_read(folder / SIGNATURE_NAME),
        )
    except OSError as error:
        raise LocalStorageError(f"{error.filename}: {error.strerror}") from error
    return verify_provenance(provenance, name=name, digest=digest, public_keys=public_keys)


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _refuse_strangers(folder: Path, manifest: Manifest, name: str) -> None:
    """Refuse files that nobody vouches for: what loads the folder might read them."""
    known = {MANIFEST_NAME, SIGNATURE_NAME, *(file.path for file in manifest.files)}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}
    if strangers := sorted(there - known):
        raise refused(Problem.FILES, name, f"its folder holds what was not published: {_some(strangers)}")


def _manifest(raw: bytes, name: str, digest: str) -> Manifest:
    try:
        return parse_manifest(raw, digest)
    except ArtifactCorruptError as error:
        raise refused(Problem.MANIFEST, name, error.message) from error


def _signer(manifest: Manifest, signature: bytes, name: str, digest: str, public_keys: Sequence[Path]) -> str:
    """Return the fingerprint of the trusted key that signed a manifest and the files it names."""
    from cognateforge.signatures import SignatureDoesNotHoldError, key_of, read_public_key, verify

    if not signature:
        raise refused(Problem.NOT_SIGNED, name, "it is not signed")
    try:
        key = key_of(signature)
        trusted = {found.fingerprint: found for found in map(read_public_key, public_keys)}
        if key not in trusted:
            known = ", ".join(sorted(trusted))
            raise refused(Problem.UNKNOWN_KEY, name, f"it is signed with {key[:100]}, and trusted is {known}")
        verify(signature, trusted[key], {**{f.path: f.digest for f in manifest.files}, MANIFEST_NAME: digest})
    except SignatureDoesNotHoldError as error:
        raise refused(Problem.SIGNATURE, name, f"its signature does not hold: {error}") from error
    return key


def _statement(manifest: Manifest, raw: bytes, name: str) -> tuple[str, Mapping[str, Any]]:
    """Return the digest and the predicate of a statement that is about exactly the manifest's other files."""
    listed = next((file for file in manifest.files if file.path == STATEMENT_NAME), None)
    if listed is None:
        raise refused(Problem.NO_STATEMENT, name, f"its manifest names no {STATEMENT_NAME}")
    if not raw:
        raise refused(Problem.NO_STATEMENT, name, f"its {STATEMENT_NAME} is missing")
    if (found := digest_of(raw)) != listed.digest:
        raise refused(Problem.STATEMENT, name, f"its statement has digest {found}, the manifest says {listed.digest}")
    try:
        document = json.loads(raw)
        subjects = {item["name"]: f"sha256:{item['digest']['sha256']}" for item in document["subject"]}
        kinds, told = (document["_type"], document["predicateType"]), document["predicate"]
        told_of = (told["family"], told["code"], told["data"]["sources"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refused(Problem.STATEMENT, name, "its statement cannot be read") from error
    if kinds != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise refused(Problem.STATEMENT, name, f"its statement is of a kind that is unknown here: {str(kinds)[:200]}")
    published = {file.path: file.digest for file in manifest.files if file.path != STATEMENT_NAME}
    other = sorted(path for path in {*subjects, *published} if subjects.get(path) != published.get(path))
    if other or len(document["subject"]) != len(published):
        raise refused(Problem.STATEMENT, name, f"its statement is about other files: {_some(other)}")
    of_manifest = (name.partition("@")[0], manifest.document.get("code"), manifest.document.get("data"))
    if told_of != of_manifest:
        raise refused(Problem.STATEMENT, name, "its statement tells of another family, code or data than its manifest")
    return found, told


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def refused(problem: Problem, name: str, why: str) -> ProvenanceRefusedError:
    """Return the error that refuses a version."""
    return ProvenanceRefusedError(f"{name} is refused: {why}", metadata={"problem": problem.value})
