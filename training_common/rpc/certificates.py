"""The server's certificate, its key and the authority of its clients: read again whenever their files change.

gRPC asks for them at every handshake, so a rotation needs no restart and touches no connection that is up. Files that
do not fit together, for instance because only one of a pair has been replaced yet, leave the last good ones in use.
"""

from __future__ import annotations

import datetime
import threading
from pathlib import Path

import grpc
import structlog
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from cognateforge.stamps import stamp_of
from training_common.settings import SettingsError, TlsSettings

log = structlog.get_logger(__name__)

_WARN_BEFORE = datetime.timedelta(days=7)


class ServerCertificates:
    """Server credentials that follow their files. Errors: SettingsError, when the first ones cannot be used."""

    def __init__(self, settings: TlsSettings) -> None:
        self._files = (settings.cert_file, settings.key_file, settings.client_ca_file)
        self._lock = threading.Lock()
        try:
            self._stamp = stamp_of(self._files)
            self._current = self._load()
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"security.tls: {_told(error)}") from error

    @property
    def expire_s(self) -> float:
        """When the certificate that is in use ends, in seconds since 1970."""
        return self._expire_s

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a port, which ask every client for a certificate."""
        return grpc.dynamic_ssl_server_credentials(self._current, self._fetch, require_client_authentication=True)

    def _fetch(self) -> grpc.ServerCertificateConfiguration:
        with self._lock:
            try:
                stamp = stamp_of(self._files)
                if stamp != self._stamp:
                    self._current = self._load()
                    self._stamp = stamp
                    log.info("certificates read again", cert_file=str(self._files[0]))
            except (OSError, ValueError, TypeError) as error:
                log.warning("certificates stay as they were", detail=_told(error))
            return self._current

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert_file, key_file, ca_file = self._files
        chain = _certificates(cert_file.read_bytes(), cert_file)
        authorities = _certificates(ca_file.read_bytes(), ca_file)
        key = load_pem_private_key(key_file.read_bytes(), password=None)
        if chain[0].public_key() != key.public_key():
            raise ValueError(f"{key_file} is not the key of {cert_file}")
        if not _may_serve(chain[0]):
            raise ValueError(f"{cert_file} is a client's certificate only: issue it with the hosts that it serves as")
        if not _is_served(key):
            raise ValueError(f"{key_file}: gRPC serves RSA keys of 2048 bits or more, and those of P-256 and P-384")
        left = chain[0].not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        if left < datetime.timedelta():
            raise ValueError(f"{cert_file} expired at {chain[0].not_valid_after_utc.isoformat()}")
        if left < _WARN_BEFORE:
            log.warning("certificate expires soon", cert_file=str(cert_file), hours=round(left.total_seconds() / 3600))
        self._expire_s = chain[0].not_valid_after_utc.timestamp()
        # Written anew from what was read: gRPC passes over what it dislikes in a file, and keeps its old authorities.
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return grpc.ssl_server_certificate_configuration([(key_pem, _pem(chain))], _pem(authorities))


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate in PEM form") from error


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(one.public_bytes(Encoding.PEM) for one in certificates)


def _may_serve(cert: x509.Certificate) -> bool:
    try:
        usages = cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return ExtendedKeyUsageOID.SERVER_AUTH in usages or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usages


def _is_served(key: object) -> bool:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.key_size >= 2048
    return isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
