"""Mutual TLS from files, which are read again when they change."""

from __future__ import annotations

import logging
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from cognateforge.exceptions import ClientSetupError
from cognateforge.stamps import Stamp, stamp_of

logger = logging.getLogger(__name__)

# Files are looked at by the calls themselves, and not by each of them.
LOOK_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class TlsFiles:
    """The files of a client's TLS, in PEM form.

    ca: who signs servers; without it the machine's own list. cert, key: the client's certificate and its key.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):  # a path as text is what people write first
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else Path(given))

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Errors: ClientSetupError, naming the file that is missing or does not fit."""
        if (self.cert is None) != (self.key is None):
            raise ClientSetupError("a certificate and its key belong together: give both, or neither")
        try:
            ca, key, cert = (path.read_bytes() if path else None for path in (self.ca, self.key, self.cert))
        except OSError as error:
            raise ClientSetupError(f"{error.filename} cannot be read: {error.strerror}") from error
        self._check()
        return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)

    def stamp(self) -> Stamp:
        """Return what changes when a file is written or replaced. Errors: OSError."""
        return stamp_of(path for path in (self.ca, self.key, self.cert) if path)

    def _check(self) -> None:
        # gRPC takes any bytes, and fails later, in every call, without a word of the file.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ca is not None:
                context.load_verify_locations(self.ca)
        except (ssl.SSLError, OSError) as error:
            raise ClientSetupError(f"{self.ca} holds no certificate in PEM form") from error
        try:
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except (ssl.SSLError, OSError) as error:
            raise ClientSetupError(f"{self.key} is not the key of {self.cert}, or one is not in PEM form") from error


class Rotation:
    """Tells when the files have changed into others that can be used."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._look_at = 0.0
        # Taken before they are read for the first channel, so that no change can fall between.
        self._stamp = self._now()

    def due(self) -> bool:
        """Whether it is time to look."""
        return time.monotonic() >= self._look_at

    def changed(self) -> bool:
        """Look, and return whether a new channel would have other certificates. Unusable files are waited out."""
        self._look_at = time.monotonic() + LOOK_EVERY_S
        stamp = self._now()
        if stamp in (None, self._stamp):
            return False
        try:
            self._files.credentials()
        except ClientSetupError as error:
            logger.warning("TLS files stay as they were", extra={"error": error.message})
            return False
        self._stamp = stamp
        return True

    def _now(self) -> Stamp | None:
        try:
            return self._files.stamp()
        except OSError:  # one of them is just being replaced
            return None
