"""Bytes in a bucket of an S3 service, through obstore.

What is put is put with If-None-Match, so that the service itself keeps an object from being replaced. Requests are
repeated for some seconds; whoever can wait for longer does so outside of transactions.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

from training_common.artifacts.places import CHUNK_BYTES, Added, ChangedError, Entry, StoreAwayError
from training_common.digests import sha256_bytes, sha256_file

log = structlog.get_logger(__name__)

# One request: the weights of a Cognate-25M in float32 fit. What is larger is not held in memory, but sent in parts.
_WHOLE_BYTES = 128 << 20
# A service takes at most 10,000 parts: 156 GiB in all.
_PART_BYTES, _PARTS_AT_ONCE = 16 << 20, 4
# A request's latency vanishes beside it, and a reader holds two: one that is sent on while the next one arrives.
_RANGE_BYTES = 8 << 20
_RANGES_AT_ONCE = 16
_READ_BYTES = 1 << 20
# A manifest is never larger, and it is put while other writers of the database wait.
_SMALL_BYTES = 1 << 20
# The whole of a request. The longer one sends up to _WHOLE_BYTES: at 0.5 MB/s it is done.
_SHORT_S, _LONG_S = 30, 300
# Of somebody who looks whether the service answers, and tries twice.
_LOOK_S = 5
# A manifest is put while other writers of the database wait.
_RETRIES: dict[str, Any] = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=15),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
}
# Options of the connection; all others are the service's own. obstore takes each in its own place, and panics at one
# that is in the other.
_CONNECTION = frozenset(
    {
        *("allow_http", "allow_invalid_certificates", "connect_timeout", "default_content_type", "default_headers"),
        *("http1_only", "http2_keep_alive_interval", "http2_keep_alive_timeout", "http2_keep_alive_while_idle"),
        *("http2_only", "pool_idle_timeout", "pool_max_idle_per_host", "proxy_url", "proxy_ca_certificate"),
        *("proxy_excludes", "randomize_addresses", "read_timeout", "root_certificate", "timeout", "user_agent"),
    }
)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


class Bucket:
    """A place in a bucket.

    url: s3://BUCKET or s3://BUCKET/PREFIX. options: as obstore names them; what is absent comes from the environment.
    setting: which setting the URL is, for messages.
    Errors: ValueError, with what is wrong and the remedy.
    """

    far = True

    def __init__(self, url: str, options: Mapping[str, str], *, setting: str) -> None:
        self._url, self._setting = url, setting
        self._store, self._patient = (_open(url, options, timeout_s) for timeout_s in (_SHORT_S, _LONG_S))
        self._quick = _open(url, options, _LOOK_S, {**_RETRIES, "max_retries": 1})
        self._lock = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    def probe(self) -> None:
        key = f"probe-{uuid.uuid4().hex}"
        try:
            if not self.put(key, b"probe") or self.put(key, b"another"):
                raise ValueError(
                    f"the service of {self._url} replaces what is there although it is asked not to: use one that "
                    "knows the header If-None-Match"
                )
            if b"".join(self.read(key, 0, 5)) != b"probe":
                raise ValueError(f"the service of {self._url} does not give back what was put")
            self.delete(key)
        except (StoreAwayError, FileNotFoundError) as error:
            raise ValueError(f"{self._url} cannot be used: {_reason(error.__cause__ or error)}") from error

    def look(self) -> None:
        """List what is there, as far as the first page, and write nothing. Errors: ValueError, as `probe` has it."""
        try:
            self._asked(next, iter(obstore.list(self._quick, chunk_size=1)), None)
        except StoreAwayError as error:
            raise ValueError(f"{self._url} cannot be used: {_reason(error.__cause__ or error)}") from error

    def add(self, path: Path, key_of: Callable[[str], str]) -> Added:
        size_bytes = path.stat().st_size
        if size_bytes <= _WHOLE_BYTES:
            data = path.read_bytes()
            digest = sha256_bytes(data)
            return Added(digest, len(data), self.put(key_of(digest), data))
        digest = sha256_file(path)
        created = self.put_pieces(key_of(digest), _blocks(path), size_bytes=size_bytes, digest=digest)
        return Added(digest, size_bytes, created)

    def put(self, key: str, data: bytes) -> bool:
        try:
            # In parts there would be no condition: obstore sends it with whole objects alone.
            store = self._store if len(data) <= _SMALL_BYTES else self._patient
            self._asked(obstore.put, store, key, data, mode="create", use_multipart=False)
        except AlreadyExistsError:
            return False
        return True

    def put_pieces(self, key: str, pieces: Iterable[bytes], *, size_bytes: int, digest: str) -> bool:
        if size_bytes <= _WHOLE_BYTES:
            data = b"".join(pieces)
            if sha256_bytes(data) != digest:
                raise ChangedError(key)
            return self.put(key, data)
        if self.size(key) is not None:
            return False
        # Nothing keeps another one from completing the same key meanwhile, but its bytes have the same digest. The
        # object appears when the last part has been acknowledged, and not at all if the pieces end in an error.
        changed = ChangedError(key)
        try:
            self._asked(
                obstore.put,
                self._patient,
                key,
                _verified(pieces, digest, changed),
                use_multipart=True,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
        except ChangedError:
            raise changed from None
        return True

    def read(self, key: str, begin: int, end: int) -> Iterator[bytes]:
        if begin >= end:
            return
        starts = range(begin, end, _RANGE_BYTES)
        pool = self._pool()
        ahead = pool.submit(self._range, key, begin, min(begin + _RANGE_BYTES, end))
        for start in starts:
            data = memoryview(ahead.result())
            following = start + _RANGE_BYTES
            if following < end:
                ahead = pool.submit(self._range, key, following, min(following + _RANGE_BYTES, end))
            for position in range(0, len(data), CHUNK_BYTES):
                yield bytes(data[position : position + CHUNK_BYTES])
            if len(data) < min(_RANGE_BYTES, end - start):
                return

    def size(self, key: str) -> int | None:
        try:
            return int(self._asked(obstore.head, self._store, key)["size"])
        except FileNotFoundError:
            return None

    def list(self, prefix: str) -> Iterator[Entry]:
        pages = iter(obstore.list(self._store, prefix))
        while (page := self._asked(next, pages, None)) is not None:
            for found in page:
                modified_us = round(found["last_modified"].timestamp() * 1e6)
                yield Entry(found["path"], found["size"], modified_us)

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._asked(obstore.delete, self._store, key)

    def _range(self, key: str, begin: int, end: int) -> Any:
        try:
            return obstore.get_range(self._patient, key, start=begin, end=end)
        except (BaseError, FileNotFoundError) as error:
            if "416 Range Not Satisfiable" in str(error):  # nothing is there from `begin` on
                return b""
            raise self._told(error) from error

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(_RANGES_AT_ONCE, thread_name_prefix="bucket")
            return self._threads

    def _asked(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Make a call. Errors: AlreadyExistsError; FileNotFoundError, for an object; StoreAwayError."""
        try:
            return call(*args, **options)
        except AlreadyExistsError:
            raise
        except (BaseError, FileNotFoundError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> Exception:
        """Return the error to raise: the same one for an object that is not there, StoreAwayError for all others."""
        if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
            return FileNotFoundError(errno.ENOENT, "it is not in the bucket")
        # The service's own words name keys and addresses: they are for the log.
        log.warning("bucket cannot be used", url=self._url, detail=_first_line(error))
        return StoreAwayError(f"the store of artifacts ({self._setting}) cannot be used now: try again")


def _open(url: str, options: Mapping[str, str], timeout_s: int, retries: Mapping[str, Any] = _RETRIES) -> S3Store:
    given = {name.lower().removeprefix("aws_"): value for name, value in options.items()}
    own = {name: value for name, value in given.items() if name not in _CONNECTION}
    connection: dict[str, Any] = {"timeout": f"{timeout_s}s"}
    for name in given.keys() & _CONNECTION:
        connection[name] = _BOOLEANS.get(given[name].lower(), given[name])
    try:
        return S3Store.from_url(
            url, config=cast("Any", own), client_options=cast("Any", connection), retry_config=cast("Any", retries)
        )
    except (BaseError, ValueError, TypeError) as error:
        raise ValueError(f"{url} cannot be opened: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return what is wrong and the remedy, in words of the settings."""
    text = _first_line(error)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return (
            "its service refuses these credentials, or they may not put, read and delete here: check access_key_id and "
            "secret_access_key in artifacts.options or AWS_* in the environment, and what the bucket allows"
        )
    if "NoSuchBucket" in str(error):
        return "its service has no such bucket: create it, or correct the name"
    if "builder error" in text:
        return (
            "its endpoint is not https: give one that is, or set artifacts.options.allow_http to true where the way "
            "to it is safe"
        )
    if "169.254.169.254" in text or "169.254.170" in text:
        return (
            "there are no credentials: set access_key_id and secret_access_key in artifacts.options, or AWS_* in the "
            "environment"
        )
    return f"{text}; check artifacts.options (endpoint, region, allow_http), and that its service is up"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:500]


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            yield block


def _verified(pieces: Iterable[bytes], digest: str, changed: ChangedError) -> Iterator[bytes]:
    sha256 = hashlib.sha256()
    for piece in pieces:
        sha256.update(piece)
        yield piece
    if f"sha256:{sha256.hexdigest()}" != digest:
        raise changed
