"""Keys and signatures: what this library signs, the other one's tool verifies, and the other way round."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import model_signing.signing
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cognateforge.exceptions import ClientSetupError
from cognateforge.signatures import (
    KeyPair,
    SignatureDoesNotHoldError,
    check_private_key,
    key_of,
    make_keys,
    read_public_key,
    sign,
    verify,
)

FILES = {"manifest.json": b"{}", "model.safetensors": b"weights" * 1000, "sub/empty.txt": b""}


def digests(files: dict[str, bytes]) -> dict[str, str]:
    return {path: f"sha256:{hashlib.sha256(data).hexdigest()}" for path, data in files.items()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files, as a reader has it."""
    made = tmp_path / "model"
    for path, data in FILES.items():
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(data)
    return made


def run_tool(folder: Path, public_key: Path) -> subprocess.CompletedProcess[str]:
    """Verify a folder with the command-line tool of OpenSSF model signing."""
    signature = str(folder / "model.sig")
    command = [sys.executable, "-m", "model_signing", "verify", "key", "--signature", signature]
    command += ["--public_key", str(public_key), "--ignore-paths", signature, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_pair_of_keys_is_private_and_public(keys: KeyPair) -> None:
    """The private file is its owner's alone, and both name the same key."""
    assert 0o600 == stat.S_IMODE(keys.private.stat().st_mode)
    assert keys.fingerprint == check_private_key(keys.private) == read_public_key(keys.public).fingerprint


def test_keys_are_not_overwritten(keys: KeyPair) -> None:
    """What they signed could not be verified any more."""
    before = keys.private.read_bytes()
    with pytest.raises(ClientSetupError, match=r"signing\.key is there already"):
        make_keys(keys.private.parent)
    assert before == keys.private.read_bytes()


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Whoever could read it could have signed."""
    private = make_keys(tmp_path).private
    private.chmod(0o640)
    with pytest.raises(ClientSetupError, match=r"mode 0640.*chmod 600"):
        check_private_key(private)


@pytest.mark.parametrize("kind", ["p384", "rsa", "encrypted", "text", "missing"])
def test_a_key_that_cannot_sign_is_refused(tmp_path: Path, kind: str) -> None:
    """Each with its file, and what to do."""
    path = tmp_path / "key"
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    plain = serialization.NoEncryption()
    match kind:
        case "p384":
            data = ec.generate_private_key(ec.SECP384R1()).private_bytes(*form, plain)
        case "rsa":
            data = rsa.generate_private_key(65537, 2048).private_bytes(*form, plain)
        case "encrypted":
            locked = serialization.BestAvailableEncryption(b"secret")
            data = ec.generate_private_key(ec.SECP256R1()).private_bytes(*form, locked)
        case _:
            data = b"no key"
    if kind != "missing":
        path.touch(0o600)
        path.write_bytes(data)
    with pytest.raises(ClientSetupError, match=f"{path}.*forge keys make"):
        check_private_key(path)


def test_the_librarys_own_tool_accepts_a_signature_made_here(keys: KeyPair, folder: Path) -> None:
    """Made from digests alone, and the tool reads every file; another key, a flipped bit or a new file is refused."""
    signed = sign(keys.private, "cognate-25m@1", digests(FILES))
    (folder / "model.sig").write_bytes(signed.bundle)
    accepted = run_tool(folder, keys.public)
    assert (0, "Verification succeeded\n") == (accepted.returncode, accepted.stdout), accepted.stderr

    other = make_keys(folder.parent / "other")
    assert 0 != run_tool(folder, other.public).returncode

    weights = bytearray(FILES["model.safetensors"])
    weights[3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    refused = run_tool(folder, keys.public)
    assert 0 != refused.returncode
    assert "model.safetensors" in refused.stdout + refused.stderr


def test_a_signature_of_the_librarys_own_is_accepted_here(keys: KeyPair, folder: Path) -> None:
    """It has read the files; here their digests are enough."""
    signature = folder.parent / "model.sig"
    config = model_signing.signing.Config()  # type: ignore[no-untyped-call]
    config.use_elliptic_key_signer(private_key=keys.private).sign(folder, signature)
    verify(signature.read_bytes(), read_public_key(keys.public), digests(FILES))


def test_a_signature_holds_for_its_files_alone(keys: KeyPair) -> None:
    """A file that differs, is missing or is one more is named."""
    public, signed = read_public_key(keys.public), sign(keys.private, "x", digests(FILES)).bundle
    verify(signed, public, digests(FILES))
    for files in ({**FILES, "sub/empty.txt": b"no"}, {**FILES, "more": b""}, {"manifest.json": b"{}"}):
        with pytest.raises(SignatureDoesNotHoldError, match=r"over other bytes of (sub/empty|more|model\.)"):
            verify(signed, public, digests(files))


def test_a_signature_of_another_key_does_not_hold(keys: KeyPair, tmp_path: Path) -> None:
    """Not even when it says that it was made with the trusted one."""
    public, other = read_public_key(keys.public), make_keys(tmp_path)
    signed = sign(other.private, "x", digests(FILES))
    assert other.fingerprint == signed.key == key_of(signed.bundle)
    with pytest.raises(SignatureDoesNotHoldError, match="another key"):
        verify(signed.bundle, public, digests(FILES))
    bundle = json.loads(signed.bundle)
    bundle["verificationMaterial"]["publicKey"]["hint"] = public.fingerprint.removeprefix("sha256:")
    with pytest.raises(SignatureDoesNotHoldError, match="not what the key signed"):
        verify(json.dumps(bundle).encode(), public, digests(FILES))


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"verificationMaterial": {"publicKey": {}}}',
        b" " * (1 << 18) + b"{}",
    ],
    ids=["nothing", "empty", "list", "bytes", "deep", "keyless", "long"],
)
def test_what_is_no_signature_does_not_hold(keys: KeyPair, bundle: bytes) -> None:
    """Whatever a server sends, the answer is a refusal and no other error."""
    with pytest.raises(SignatureDoesNotHoldError):
        verify(bundle, read_public_key(keys.public), digests(FILES))


def test_every_part_of_a_bundle_counts(keys: KeyPair) -> None:
    """A bundle whose parts are of other types, or missing, is refused as one that does not hold."""
    public = read_public_key(keys.public)
    whole = json.loads(sign(keys.private, "x", digests(FILES)).bundle)
    for part in ("mediaType", "dsseEnvelope"):
        values: tuple[object, ...] = (None, 7, [], {}, "text")
        for value in values:
            with pytest.raises(SignatureDoesNotHoldError):
                verify(json.dumps({**whole, part: value}).encode(), public, digests(FILES))


def test_the_library_is_the_one_that_this_was_written_for() -> None:
    """Its words for files are called unstable by their authors: with another release, look at signatures._manifest."""
    assert version("model-signing").startswith("1.1.")
