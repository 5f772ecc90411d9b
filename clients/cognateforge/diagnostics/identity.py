"""Checks of certificates: dates, key, chain and SPIFFE id. They need the package cryptography (extra `certs`)."""

from __future__ import annotations

import datetime
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cognateforge.diagnostics.checks import Area, Check

if TYPE_CHECKING:
    from cryptography import x509

# As the servers do: one working week, and its end.
WARN_BEFORE = datetime.timedelta(days=7)
_RENEW = "issue it anew (forge certs issue, or your platform's manager)"


def check_identity(
    area: Area, *, cert: Path, key: Path, ca: Path | None, now: datetime.datetime | None = None
) -> Iterator[Check]:
    """Look at a certificate, its key and, where it is given, the authority that is to lead to it."""
    try:
        from cryptography import x509
    except ImportError:
        yield area.skip("certificate", "the package cryptography is not installed: pip install 'cognateforge[certs]'")
        return
    try:
        chain = x509.load_pem_x509_certificates(cert.read_bytes())
    except (OSError, ValueError) as error:
        yield area.fail("certificate", f"{cert}: {_said(error)}", "name a readable file of certificates in PEM form")
        return
    yield _dates(area, "certificate", chain[0], cert, now)
    yield _spiffe_id(area, chain[0], cert)
    yield from _key(area, chain[0], cert, key)
    if ca is not None:
        yield from check_authority(area, ca, now=now)
        yield _chain(area, chain, cert, ca)


def check_authority(area: Area, ca: Path, *, now: datetime.datetime | None = None) -> Iterator[Check]:
    """Look at the certificates of an authority."""
    try:
        from cryptography import x509

        authorities = x509.load_pem_x509_certificates(ca.read_bytes())
    except ImportError:
        return
    except (OSError, ValueError) as error:
        yield area.fail("authority", f"{ca}: {_said(error)}", "name a readable file of certificates in PEM form")
        return
    for one in authorities:
        yield _dates(area, "authority", one, ca, now)


def _dates(area: Area, name: str, cert: x509.Certificate, path: Path, now: datetime.datetime | None) -> Check:
    now = now or datetime.datetime.now(datetime.UTC)
    begins, ends = cert.not_valid_before_utc, cert.not_valid_after_utc
    if now < begins:
        return area.fail(name, f"{path} begins {_moment(begins)}", f"set the clock right, or {_RENEW}")
    if now >= ends:
        return area.fail(name, f"{path} ended {_moment(ends)}", _RENEW)
    if ends - now < WARN_BEFORE:
        return area.warn(name, f"{path} ends {_moment(ends)}, in {_days(ends - now)}", _RENEW)
    return area.ok(name, f"{path} ends {_moment(ends)}, in {_days(ends - now)}")


def _spiffe_id(area: Area, cert: x509.Certificate, path: Path) -> Check:
    from cryptography import x509

    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    found = [uri for uri in uris if uri.startswith("spiffe://")]
    if len(found) != 1:
        return area.fail("spiffe id", f"{path} has {len(found)} SPIFFE ids, and a caller is exactly one", _RENEW)
    return area.ok("spiffe id", found[0])


def _key(area: Area, cert: x509.Certificate, path: Path, key: Path) -> Iterator[Check]:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        mode = key.stat().st_mode
        loaded = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        yield area.fail(
            "key", f"{key}: {_said(error)}", "name a readable private key in PEM form, without a passphrase"
        )
        return
    if loaded.public_key() != cert.public_key():
        yield area.fail("key", f"{key} is not the key of {path}", "name the pair that was issued together")
        return
    yield area.ok("key", f"{key} is that of the certificate")
    if stat.S_IMODE(mode) & 0o077:
        yield area.warn("key file", f"{key} can be read by others ({stat.S_IMODE(mode):04o})", f"chmod 600 {key}")


def _chain(area: Area, chain: list[x509.Certificate], path: Path, ca: Path) -> Check:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        authorities = x509.load_pem_x509_certificates(ca.read_bytes())
    except (OSError, ValueError):
        return area.skip("chain", f"{ca} cannot be read")
    current = chain[0]
    # Every certificate of the file is one link at most.
    for _ in range(len(chain) + 1):
        for issuer in authorities:
            try:
                current.verify_directly_issued_by(issuer)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return area.ok("chain", f"{path} leads to {ca}")
        links = [one for one in chain[1:] if one.subject == current.issuer and one is not current]
        if not links:
            break
        current = links[0]
    return area.fail(
        "chain",
        f"{path} does not lead to an authority of {ca}",
        f"append the certificates between the two to {path}, or name the authority that issued it",
    )


def _moment(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M UTC")


def _days(left: datetime.timedelta) -> str:
    hours = int(left.total_seconds() // 3600)
    return f"{hours // 24} days" if hours >= 48 else f"{hours} hours"


def _said(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
