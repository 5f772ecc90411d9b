"""A small authority for development: certificates with SPIFFE ids for both services and their callers.

For a fleet take the SPIFFE implementation or the certificate manager of your platform: the services only read files.
Needs the package `cryptography`, which the services bring (extra `certs` where there is no service).
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cognateforge.exceptions import ClientSetupError

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:  # pragma: no cover - the development environment has it
    raise ClientSetupError("certificates need the package cryptography: pip install 'cognateforge[certs]'") from error

CA_CERT, CA_KEY = "ca.pem", "ca.key"
_TRUST_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,253}[a-z0-9])?")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}(/[a-z0-9][a-z0-9._-]{0,62}){0,7}")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_LONGEST_DAYS = 36_500
# Clocks of the machines that meet may differ by this much.
_SKEW = datetime.timedelta(minutes=5)


@dataclass(frozen=True, kw_only=True)
class Issued:
    """A certificate that was made, and where its files are."""

    spiffe_id: str
    cert: Path
    key: Path
    expires: datetime.datetime


class Authority:
    """An authority in a folder: ca.pem, which everybody may have, and ca.key, which stays here."""

    def __init__(self, folder: Path, cert: x509.Certificate, key: ec.EllipticCurvePrivateKey, trust_domain: str):
        self.folder, self._cert, self._key, self.trust_domain = folder, cert, key, trust_domain

    @classmethod
    def create(cls, folder: Path, trust_domain: str, *, days: float = 3650) -> Authority:
        """Make an authority. Errors: ClientSetupError, also where the folder has one: its certificates would end."""
        if not _TRUST_DOMAIN.fullmatch(trust_domain):
            raise ClientSetupError(f"trust domain {trust_domain!r}: use small letters, digits, dots and dashes")
        _check_days(days)
        if (folder / CA_CERT).exists() or (folder / CA_KEY).exists():
            raise ClientSetupError(f"{folder} has an authority: use it, or choose another folder")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{trust_domain} authority"[:64])])
        builder = (
            _builder(name, name, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(_uri(f"spiffe://{trust_domain}"), critical=False)
        )
        cert = builder.sign(key, hashes.SHA256())
        _make_folder(folder)
        _write(folder / CA_KEY, _key_pem(key), private=True)
        _write(folder / CA_CERT, _pem(cert), private=False)
        return cls(folder, cert, key, trust_domain)

    @classmethod
    def open(cls, folder: Path) -> Authority:
        """Open the authority of a folder. Errors: ClientSetupError."""
        try:
            cert = x509.load_pem_x509_certificate((folder / CA_CERT).read_bytes())
            key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
            names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except OSError as error:
            half = (folder / CA_CERT).exists() or (folder / CA_KEY).exists()
            remedy = (
                "bring it back, or make an authority in another folder" if half else "make an authority first: init"
            )
            raise ClientSetupError(f"{error.filename}: {error.strerror}; {remedy}") from error
        except (ValueError, TypeError, x509.ExtensionNotFound) as error:
            raise ClientSetupError(f"{folder} holds no authority that was made here") from error
        if cert.public_key() != key.public_key():
            raise ClientSetupError(f"{folder / CA_KEY} is not the key of {folder / CA_CERT}")
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or len(uris) != 1:
            raise ClientSetupError(f"{folder} holds no authority that was made here")
        return cls(folder, cert, key, uris[0].removeprefix("spiffe://"))

    def hosts_of(self, name: str) -> tuple[str, ...]:
        """Return the hosts of the certificate of a name: none for a client's, or where there is no certificate."""
        try:
            cert = x509.load_pem_x509_certificate((self.folder / f"{name}.pem").read_bytes())
            names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (OSError, ValueError, x509.ExtensionNotFound):
            return ()
        addresses = map(str, names.get_values_for_type(x509.IPAddress))
        return (*names.get_values_for_type(x509.DNSName), *addresses)

    def issue(self, name: str, *, hosts: Sequence[str] = (), days: float = 30) -> Issued:
        """Make a certificate with the id spiffe://TRUST_DOMAIN/NAME. One of the same name is replaced.

        hosts: DNS names and addresses that it may serve as; without any it is a client's only.
        Errors: ClientSetupError.
        """
        if not _NAME.fullmatch(name) or name == "ca":
            raise ClientSetupError(f"name {name!r}: use small letters, digits, dots and dashes, and / between parts")
        _check_days(days)
        left = self._cert.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        if datetime.timedelta(days=days) > left:
            raise ClientSetupError(f"days {days:g}: the authority itself ends in {left.days} days")
        spiffe_id = f"spiffe://{self.trust_domain}/{name}"
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[-64:])])
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if hosts else [])]
        public = self._key.public_key()
        cert = (
            _builder(subject, self._cert.subject, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
            .add_extension(_uri(spiffe_id, hosts), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        issued = Issued(
            spiffe_id=spiffe_id,
            cert=self.folder / f"{name}.pem",
            key=self.folder / f"{name}.key",
            expires=cert.not_valid_after_utc,
        )
        _make_folder(issued.cert.parent)
        _write(issued.key, _key_pem(key), private=True)
        _write(issued.cert, _pem(cert), private=False)
        return issued


def _check_days(days: float) -> None:
    if not 0 < days <= _LONGEST_DAYS:
        raise ClientSetupError(f"days {days:g}: must be more than 0 and at most {_LONGEST_DAYS}")


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _uri(spiffe_id: str, hosts: Sequence[str] = ()) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id)]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _DNS_NAME.fullmatch(host):
                raise ClientSetupError(f"host {host!r} is neither a DNS name nor an address") from None
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ClientSetupError(f"{folder}: {error.strerror}") from error


def _write(path: Path, data: bytes, *, private: bool) -> None:
    """Put a file in its place at once: a service that reads it while it is replaced finds the old one or the new."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if private else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ClientSetupError(f"{path} cannot be written: {error.strerror}") from error
