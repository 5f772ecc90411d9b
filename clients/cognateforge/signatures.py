"""Keys, and signatures of artifacts in the form of OpenSSF model signing.

A signature holds for a folder: for the path and the sha256 of every file in it but the signature itself. Here the
digests are known already, so no file is read. Needs the packages of the extra `signing`.

ClientSetupError        a key that cannot be used; a package is missing
SignatureDoesNotHoldError  the signature is not the key's, or is of other files
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cognateforge.exceptions import ClientSetupError
from cognateforge.layout import SIGNATURE_NAME

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from model_signing.manifest import Manifest

PRIVATE_NAME, PUBLIC_NAME = "signing.key", "signing.pub.pem"
# What the contract's messages hold. A signature of 64 files has about 40 KiB.
MAX_SIGNATURE_BYTES = 1 << 18
# The only curve: every verifier of model signatures knows it.
_CURVE = "secp256r1"
# Files that are named when many differ.
_NAMED = 3


class SignatureDoesNotHoldError(Exception):
    """The signature is not the key's, or it is of other files."""


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """A pair of keys that was made, and its fingerprint."""

    private: Path
    public: Path
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class PublicKey:
    """A public key in a file. fingerprint: "sha256:" and the hex digest of its PEM text, as signatures name it."""

    path: Path
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class Signed:
    """A signature: a Sigstore bundle in JSON, and the fingerprint of the key that made it."""

    bundle: bytes
    key: str


def make_keys(folder: Path) -> KeyPair:
    """Make a P-256 key pair: signing.key, which only its owner can read, and signing.pub.pem, which all may have.

    Errors: ClientSetupError, also where one of the files is there: what it signed could not be verified any more.
    """
    with _packages():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    made = KeyPair(
        private=folder / PRIVATE_NAME, public=folder / PUBLIC_NAME, fingerprint=_fingerprint(key.public_key())
    )
    for path in (made.private, made.public):
        if path.exists():
            raise ClientSetupError(f"{path} is there already: use it, or choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _create(made.private, private, 0o600)
        _create(made.public, _pem(key.public_key()), 0o644)
    except OSError as error:
        raise ClientSetupError(f"{error.filename}: {error.strerror}") from error
    return made


def _create(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def check_private_key(path: Path) -> str:
    """Return a private key's fingerprint.

    Errors: ClientSetupError, for a key that cannot be read, that others than its owner can read, that is encrypted, or
    that is not of P-256.
    """
    with _packages():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_bytes()
    except OSError as error:
        raise ClientSetupError(f"{path}: {error.strerror}; correct the path, or make a key: forge keys make") from error
    if mode & 0o077:
        raise ClientSetupError(f"{path} has mode {mode:04o}, so others than its owner can read or change it: chmod 600")
    try:
        key = serialization.load_pem_private_key(text, password=None)
    except (ValueError, TypeError) as error:
        raise ClientSetupError(
            f"{path} holds no private key as PEM without a password: make one with forge keys make"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVE:
        raise ClientSetupError(f"{path} holds a key that is not of P-256: make one with forge keys make")
    return _fingerprint(key.public_key())


def write_public_key(private_key: Path, path: Path) -> PublicKey:
    """Write the public key of a private one. Errors: ClientSetupError, as `check_private_key`."""
    fingerprint = check_private_key(private_key)
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = serialization.load_pem_private_key(private_key.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - it was checked
    path.write_bytes(_pem(key.public_key()))
    return PublicKey(path=path, fingerprint=fingerprint)


def read_public_key(path: Path) -> PublicKey:
    """Return a public key. Errors: ClientSetupError, for what is none of P-256 as PEM."""
    with _packages():
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise ClientSetupError(f"{path}: {error.strerror}; give the public key's file") from error
    except ValueError as error:
        raise ClientSetupError(f"{path} holds no public key as PEM: give signing.pub.pem of forge keys make") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE:
        raise ClientSetupError(f"{path} holds a key that is not of P-256")
    return PublicKey(path=path, fingerprint=_fingerprint(key))


def load_library() -> None:
    """Import what signs and verifies: half a second that nobody should wait for later. Errors: ClientSetupError."""
    with _packages():
        import model_signing  # noqa: F401


def sign(private_key: Path, name: str, digests: Mapping[str, str]) -> Signed:
    """Sign files that are known by path and digest. name: of the whole; a verifier does not compare it.

    Takes about a millisecond after `load_library`. Errors: ClientSetupError; OSError, where no temporary file can be.
    """
    check_private_key(private_key)
    with _packages():
        from model_signing import signing
    config: Any = signing.Config()  # type: ignore[no-untyped-call]
    config.use_elliptic_key_signer(private_key=private_key)
    config.set_hashing_config(_Known(_manifest(name, digests)))
    with tempfile.TemporaryDirectory(prefix="signing-") as folder:
        path = Path(folder) / SIGNATURE_NAME
        config.sign(name, path)
        bundle = path.read_bytes()
    # As the signature names it: the file may have been replaced since it was checked.
    return Signed(bundle=bundle, key=key_of(bundle))


def key_of(signature: bytes) -> str:
    """Return the fingerprint of the key that a signature says it was made with. Errors: SignatureDoesNotHoldError."""
    try:
        hint = json.loads(signature)["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SignatureDoesNotHoldError("it is no signature by a key, as OpenSSF model signing writes it") from error
    return f"sha256:{hint}"


def verify(signature: bytes, public_key: PublicKey, digests: Mapping[str, str]) -> None:
    """Make sure that a signature is the key's, and of exactly these files.

    digests: "sha256:" and hex digits, by path. Errors: SignatureDoesNotHoldError, naming a file that differs.
    """
    with _packages():
        from model_signing import verifying
    if len(signature) > MAX_SIGNATURE_BYTES:
        raise SignatureDoesNotHoldError(f"it has {len(signature)} bytes, more than any signature of an artifact")
    # Otherwise the library would take a signature that names no key.
    if key_of(signature) != public_key.fingerprint:
        raise SignatureDoesNotHoldError(f"it was made with another key than {public_key.fingerprint}")
    config: Any = verifying.Config()  # type: ignore[no-untyped-call]
    config.use_elliptic_key_verifier(public_key=public_key.path)
    config.set_hashing_config(_Known(_manifest("", digests)))
    with tempfile.TemporaryDirectory(prefix="signing-") as folder:
        path = Path(folder) / SIGNATURE_NAME
        path.write_bytes(signature)
        try:
            config.verify(Path(), path)
        except Exception as error:  # the library lets whatever a strange bundle causes through
            raise SignatureDoesNotHoldError(_words(error, signature, digests)) from error


def _words(error: Exception, signature: bytes, digests: Mapping[str, str]) -> str:
    """Return in what way a signature does not hold."""
    if not str(error).startswith("Signature mismatch"):
        return "its bytes are not what the key signed"
    # The signature itself holds, so what it says was signed.
    envelope = json.loads(signature)["dsseEnvelope"]
    signed = json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
    found = {item["name"]: f"sha256:{item['digest']}" for item in signed}
    paths = sorted(path for path in {*found, *digests} if found.get(path) != digests.get(path))
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return f"it was made over other bytes of {', '.join(paths[:_NAMED])}{more}"


class _Known:
    """Stands where the library would read a folder: what it would find is known."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest

    def hash(self, model_path: object, *, files_to_hash: object = None) -> Manifest:
        """Return the manifest."""
        return self._manifest

    def add_ignored_paths(self, *, model_path: object, paths: object) -> None:
        """Ignore nothing: what is asked for is every file but the signature."""


def _manifest(name: str, digests: Mapping[str, str]) -> Manifest:
    """Return the library's word for files: the one place that builds what it would have made of a folder."""
    from model_signing import manifest

    kind = manifest.SerializationType.from_args(
        {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE_NAME]}
    )
    items = [kind.new_item(path, _digest(manifest, digest)) for path, digest in digests.items()]
    return manifest.Manifest(name, items, kind)


def _digest(manifest: Any, digest: str) -> Any:
    return manifest.hashing.Digest("sha256", bytes.fromhex(digest.removeprefix("sha256:")))


def _fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    return f"sha256:{hashlib.sha256(_pem(key)).hexdigest()}"


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ClientSetupError(
            f"signatures need the package {error.name}: pip install 'cognateforge[signing]'"
        ) from error
