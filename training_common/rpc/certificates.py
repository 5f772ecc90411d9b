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
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from training_common.settings import SettingsError, TlsSettings

log = structlog.get_logger(__name__)

_WARN_BEFORE = datetime.timedelta(days=7)
Stamp = tuple[tuple[int, int, int], ...]


class ServerCertificates:
    """Server credentials that follow their files. Errors: SettingsError, when the first ones cannot be used."""

    def __init__(self, settings: TlsSettings) -> None:
        self._files = (settings.cert_file, settings.key_file, settings.client_ca_file)
        self._lock = threading.Lock()
        try:
            self._stamp = self._look()
            self._current = self._load()
        except (OSError, ValueError, TypeError) as error:
            raise SettingsError(f"security.tls: {_told(error)}") from error

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials for a port, which ask every client for a certificate."""
        return grpc.dynamic_ssl_server_credentials(self._current, self._fetch, require_client_authentication=True)

    def _fetch(self) -> grpc.ServerCertificateConfiguration:
        with self._lock:
            try:
                stamp = self._look()
                if stamp != self._stamp:
                    self._current = self._load()
                    self._stamp = stamp
                    log.info("certificates read again", cert_file=str(self._files[0]))
            except (OSError, ValueError, TypeError) as error:
                log.warning("certificates stay as they were", detail=_told(error))
            return self._current

    def _look(self) -> Stamp:
        found = [path.stat() for path in self._files]
        return tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in found)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        cert, key, ca = (path.read_bytes() for path in self._files)
        chain = _certificates(cert, self._files[0])
        _certificates(ca, self._files[2])
        if chain[0].public_key() != load_pem_private_key(key, password=None).public_key():
            raise ValueError(f"{self._files[1]} is not the key of {self._files[0]}")
        left = chain[0].not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        if left < datetime.timedelta():
            raise ValueError(f"{self._files[0]} expired at {chain[0].not_valid_after_utc.isoformat()}")
        if left < _WARN_BEFORE:
            log.warning(
                "certificate expires soon", cert_file=str(self._files[0]), hours=round(left.total_seconds() / 3600)
            )
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)


def _certificates(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(f"{path} holds no certificate in PEM form") from error


def _told(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
