"""The key that signs what a service publishes, as the settings name it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from cognateforge.exceptions import ClientSetupError
from cognateforge.layout import MANIFEST_NAME
from cognateforge.signatures import (
    SignatureDoesNotHoldError,
    Signed,
    check_private_key,
    key_of,
    load_library,
    sign,
    verify,
    write_public_key,
)
from training_common.artifacts.blobs import StoredFile
from training_common.digests import sha256_bytes
from training_common.settings import ServiceSettings, SettingsError


class SigningKeyError(Exception):
    """The key cannot be used now. That is a matter of the machine, and no fault of a job."""


class ArtifactSigner:
    """Signs versions as they are published, with the key of a file."""

    def __init__(self, key_file: Path) -> None:
        self._key_file = key_file

    def require_key(self) -> None:
        """Make sure that the key can sign. Errors: SigningKeyError."""
        try:
            check_private_key(self._key_file)
        except ClientSetupError as error:
            raise SigningKeyError(f"artifacts.signing_key_file: {error.message}") from error

    def prepare(self) -> None:
        """Do what takes long, before a transaction: half a second for the library. Errors: SigningKeyError."""
        self.require_key()
        load_library()

    def sign(self, name: str, manifest: bytes, files: tuple[StoredFile, ...]) -> Signed:
        """Sign a version as its folder will lie at a reader's: its files, and the manifest beside them.

        From their digests, so it takes milliseconds whatever their size. Errors: SigningKeyError.
        """
        try:
            return sign(self._key_file, name, _digests(manifest, files))
        except ClientSetupError as error:
            raise SigningKeyError(f"artifacts.signing_key_file: {error.message}") from error

    def refuted(self, signature: bytes, manifest: bytes, files: tuple[StoredFile, ...]) -> str:
        """Return why a signature of this key does not hold for a version; "" where it does, or is of another key.

        Errors: SigningKeyError.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="signing-") as folder:
                public_key = write_public_key(self._key_file, Path(folder) / "key.pem")
                if key_of(signature) == public_key.fingerprint:
                    verify(signature, public_key, _digests(manifest, files))
        except SignatureDoesNotHoldError as error:
            return str(error)
        except ClientSetupError as error:
            raise SigningKeyError(f"artifacts.signing_key_file: {error.message}") from error
        return ""


def _digests(manifest: bytes, files: tuple[StoredFile, ...]) -> dict[str, str]:
    return {**{file.path: file.digest for file in files}, MANIFEST_NAME: sha256_bytes(manifest)}


def signer_of(settings: ServiceSettings) -> ArtifactSigner | None:
    """Return what signs a service's versions, or None where nothing does."""
    key_file = settings.artifacts.signing_key_file
    return None if key_file is None else ArtifactSigner(key_file)


def require_signing_key(settings: ServiceSettings) -> None:
    """Refuse a signing key that could not sign. Errors: SettingsError."""
    signer = signer_of(settings)
    if signer is not None:
        try:
            signer.require_key()
        except SigningKeyError as error:
            raise SettingsError(f"{error}; or leave the key out, then nothing is signed") from error
