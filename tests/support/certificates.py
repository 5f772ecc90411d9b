"""Certificates for tests: the ones that `forge certs` makes, and ones that nobody should accept."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import NameOID

from cognateforge.certificates import CA_CERT, Authority
from cognateforge.client import TlsFiles

TRUST = "forge.test"
HOSTS = ("localhost", "127.0.0.1")


def spiffe(name: str) -> str:
    """Return the id of a caller."""
    return f"spiffe://{TRUST}/{name}"


def uri(text: str) -> x509.UniformResourceIdentifier:
    """Return a URI for a subject alternative name."""
    return x509.UniformResourceIdentifier(text)


def files(folder: Path, name: str) -> TlsFiles:
    """Return a client's files."""
    return TlsFiles(ca=folder / CA_CERT, cert=folder / f"{name}.pem", key=folder / f"{name}.key")


def server_tls(folder: Path, name: str = "server") -> dict[str, Any]:
    """Return a server's settings for its files."""
    return {
        "cert_file": folder / f"{name}.pem",
        "key_file": folder / f"{name}.key",
        "client_ca_file": folder / CA_CERT,
    }


def authority(folder: Path, *names: str) -> Authority:
    """Make an authority, a server's certificate and one for each of the names."""
    made = Authority.create(folder, TRUST)
    made.issue("server", hosts=HOSTS)
    for name in names:
        made.issue(name)
    return made


def odd(
    folder: Path,
    name: str,
    *,
    names: Sequence[x509.GeneralName],
    subject: str = "odd",
    ends_in: datetime.timedelta = datetime.timedelta(days=1),
    key: CertificateIssuerPrivateKeyTypes | None = None,
) -> TlsFiles:
    """Have the authority of a folder sign what `forge certs` never would."""
    issuer = x509.load_pem_x509_certificate((folder / CA_CERT).read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key, now = key or ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=2))
        .not_valid_after(now + ends_in)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    cert = builder.sign(signer, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files(folder, name)
