"""Provenance: manifest, statement and signature agree, or the version is refused with what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cognateforge.artifact.v1.artifact_pb2 import Provenance
from cognateforge.client.provenance import Problem, verify_folder, verify_provenance
from cognateforge.exceptions import ArtifactCorruptError, ClientSetupError, LocalStorageError, ProvenanceRefusedError
from cognateforge.layout import PREDICATE_TYPE, STATEMENT_TYPE
from cognateforge.signatures import KeyPair, make_keys, sign

NAME = "cognate-25m@7"
FILES = {"model.safetensors": b"weights" * 1000, "sub/config.json": b"{}"}
TOLD: dict[str, Any] = {"code": {"version": "1"}, "data": [{"name": "gsm8k"}]}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def statement(**changes: Any) -> dict[str, Any]:
    """Return the statement of the files, but for some of its parts."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": p, "digest": {"sha256": digest_of(d)[len("sha256:") :]}} for p, d in FILES.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"family": "cognate-25m", "code": TOLD["code"], "data": {"sources": TOLD["data"]}},
    } | changes


class Version:
    """A version as a registry tells of it, and each of its parts to tamper with."""

    def __init__(self, key: Path | None, *, name: str = NAME, told: bytes | None = None) -> None:
        self.statement = as_json(statement()) if told is None else told
        self.files = {**FILES, **({"provenance.json": self.statement} if self.statement else {})}
        entries = [{"path": p, "size_bytes": len(d), "digest": digest_of(d)} for p, d in self.files.items()]
        self.manifest = as_json({"name": name, "files": entries, **TOLD})
        self.digest = digest_of(self.manifest)
        self.signature = b""
        if key is not None:
            digests = {path: digest_of(data) for path, data in self.files.items()}
            self.signature = sign(key, name, {**digests, "manifest.json": self.digest}).bundle

    @property
    def message(self) -> Provenance:
        return Provenance(
            name=NAME,
            digest=self.digest,
            manifest=self.manifest,
            statement=self.statement,
            signature=self.signature,
        )

    def write(self, folder: Path) -> Path:
        """Lay it out as a fetch does."""
        for path, data in {**self.files, "manifest.json": self.manifest, "model.sig": self.signature}.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        return folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("other"))


def test_what_agrees_is_verified(keys: KeyPair, other: KeyPair) -> None:
    """Any of the trusted keys may have signed it; the answer says which one, and what the statement tells."""
    version = Version(keys.private)
    found = verify_provenance(
        version.message, name=NAME, digest=version.digest, public_keys=[other.public, keys.public]
    )
    assert (NAME, version.digest, keys.fingerprint) == (found.name, found.digest, found.key)
    assert (digest_of(version.statement), "cognate-25m") == (found.statement_digest, found.told["family"])


def test_without_a_key_the_signature_is_not_looked_at() -> None:
    """Manifest and statement still have to agree, and no key is named."""
    version = Version(None)
    assert "" == verify_provenance(version.message, name=NAME, digest=version.digest, public_keys=[]).key


def refuse(version: Version, *keys: Path) -> tuple[str, str]:
    """Return with which problem a version is refused, and the words for it."""
    with pytest.raises(ProvenanceRefusedError) as refused:
        verify_provenance(version.message, name=NAME, digest=version.digest, public_keys=keys)
    assert refused.value.message.startswith(f"{NAME} is refused: ")
    return refused.value.metadata["problem"], refused.value.message


def test_a_version_that_nobody_signed_is_refused(keys: KeyPair) -> None:
    """A missing signature is no signature."""
    problem, words = refuse(Version(None), keys.public)
    assert (Problem.NOT_SIGNED, True) == (problem, "it is not signed" in words)


def test_a_version_of_another_key_is_refused(keys: KeyPair, other: KeyPair) -> None:
    """The message names the key that signed it and those that are trusted."""
    problem, words = refuse(Version(other.private), keys.public)
    assert Problem.UNKNOWN_KEY == problem
    assert other.fingerprint in words
    assert keys.fingerprint in words


def test_a_manifest_that_was_changed_is_refused(keys: KeyPair) -> None:
    """Its digest is no longer the one that the registry names."""
    version = Version(keys.private)
    version.manifest = version.manifest.replace(b"gsm8k", b"mmlu5")
    assert Problem.MANIFEST == refuse(version, keys.public)[0]


def test_a_manifest_that_was_changed_with_its_digest_is_refused(keys: KeyPair) -> None:
    """Who can write the registry can change both; the signature is of the first one."""
    version = Version(keys.private)
    version.manifest = version.manifest.replace(b"gsm8k", b"mmlu5")
    version.digest = digest_of(version.manifest)
    problem, words = refuse(version, keys.public)
    assert (Problem.SIGNATURE, True) == (problem, "other bytes of manifest.json" in words)


def test_a_signature_that_was_changed_is_refused(keys: KeyPair) -> None:
    """One of its bytes, and it is none."""
    version = Version(keys.private)
    at = version.signature.index(b'"sig"') + 20
    version.signature = version.signature[:at] + bytes([version.signature[at] ^ 1]) + version.signature[at + 1 :]
    assert Problem.SIGNATURE == refuse(version, keys.public)[0]


def test_a_true_signature_of_another_version_is_refused(keys: KeyPair) -> None:
    """Otherwise an older version could stand in the place of a newer one."""
    problem, words = refuse(Version(keys.private, name="cognate-25m@6"), keys.public)
    assert (Problem.OTHER_VERSION, True) == (problem, "cognate-25m@6" in words)


def test_a_version_without_a_statement_is_refused(keys: KeyPair) -> None:
    """As one of a release of before is, also when it is signed."""
    assert Problem.NO_STATEMENT == refuse(Version(keys.private, told=b""), keys.public)[0]


def test_a_statement_that_is_not_there_is_refused(keys: KeyPair) -> None:
    """The manifest names it, and nobody can show it."""
    version = Version(keys.private)
    version.statement = b""
    assert Problem.NO_STATEMENT == refuse(version, keys.public)[0]


def test_a_statement_that_was_changed_is_refused(keys: KeyPair) -> None:
    """It is a file like others: the manifest has its digest."""
    version = Version(keys.private)
    version.statement = version.statement.replace(b"gsm8k", b"mmlu5")
    assert Problem.STATEMENT == refuse(version, keys.public)[0]


def fewer() -> dict[str, Any]:
    return statement(subject=statement()["subject"][:1])


def more() -> dict[str, Any]:
    return statement(subject=[*statement()["subject"], {"name": "evil.py", "digest": {"sha256": "0" * 64}}])


def swapped() -> dict[str, Any]:
    first, second = statement()["subject"]
    return statement(subject=[{**first, "digest": second["digest"]}, second])


def twice() -> dict[str, Any]:
    return statement(subject=[*statement()["subject"], statement()["subject"][0]])


def retold(**changes: Any) -> dict[str, Any]:
    return statement(predicate=statement()["predicate"] | changes)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (fewer, "about other files: sub/config.json"),
        (more, "about other files: evil.py"),
        (swapped, "about other files: model.safetensors"),
        (twice, "about other files"),
        (lambda: statement(predicateType="https://slsa.dev/provenance/v1"), "of a kind that is unknown"),
        (lambda: statement(_type="https://in-toto.io/Statement/v0.1"), "of a kind that is unknown"),
        (lambda: statement(subject=None), "cannot be read"),
        (lambda: statement(predicate=[]), "cannot be read"),
        (list, "cannot be read"),
        (lambda: retold(family="router"), "another family, code or data"),
        (lambda: retold(data={"sources": []}), "another family, code or data"),
        (lambda: retold(code={"version": "2"}), "another family, code or data"),
    ],
)
def test_a_statement_about_something_else_is_refused(keys: KeyPair, make: Callable[[], Any], words: str) -> None:
    """Also when somebody who is trusted has signed it: it proves nothing about these files."""
    problem, message = refuse(Version(keys.private, told=as_json(make())), keys.public)
    assert (Problem.STATEMENT, True) == (problem, words in message), message


def test_a_key_that_is_none_is_no_refusal_of_the_version(keys: KeyPair, tmp_path: Path) -> None:
    """Whose fault it is must be clear."""
    (tmp_path / "key.pem").write_text("no key")
    version = Version(keys.private)
    with pytest.raises(ClientSetupError, match="no public key"):
        verify_provenance(version.message, name=NAME, digest=version.digest, public_keys=[tmp_path / "key.pem"])


def test_a_folder_is_verified_with_every_byte(keys: KeyPair, tmp_path: Path) -> None:
    """Without the service: its files have all that is needed."""
    version = Version(keys.private)
    folder = version.write(tmp_path / "model")
    found = verify_folder(folder, public_keys=[keys.public])
    assert (NAME, version.digest, keys.fingerprint) == (found.name, found.digest, found.key)

    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ArtifactCorruptError, match=r"model\.safetensors has digest"):
        verify_folder(folder, public_keys=[keys.public])
    weights.unlink()
    with pytest.raises(ArtifactCorruptError, match=r"model\.safetensors is missing"):
        verify_folder(folder, public_keys=[keys.public])


def test_a_folder_with_a_stranger_is_refused(keys: KeyPair, tmp_path: Path) -> None:
    """What nobody vouches for may be what a program loads."""
    folder = Version(keys.private).write(tmp_path / "model")
    (folder / "modeling.py").write_text("evil")
    with pytest.raises(ProvenanceRefusedError, match=r"not published: modeling\.py") as refused:
        verify_folder(folder, public_keys=[keys.public])
    assert {"problem": Problem.FILES} == refused.value.metadata


def test_a_folder_without_its_signature_is_refused(keys: KeyPair, tmp_path: Path) -> None:
    """Whoever can change files can remove it."""
    folder = Version(keys.private).write(tmp_path / "model")
    (folder / "model.sig").unlink()
    with pytest.raises(ProvenanceRefusedError, match="not signed"):
        verify_folder(folder, public_keys=[keys.public])


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    """A wrong path is no damage."""
    with pytest.raises(LocalStorageError, match=r"no manifest\.json"):
        verify_folder(tmp_path, public_keys=[])
