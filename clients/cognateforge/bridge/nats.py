"""Publishes what happens to foundation models to a NATS JetStream, each event once and in order.

The bridge is a client of the exchange and keeps no state: the stream's last message tells where it stands. A publish
names the message that it must follow, so a second bridge, or a publish that was thought lost, doubles nothing.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import nats
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import NoServersError, OutboundBufferLimitError
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError, ServerError, ServiceUnavailableError

from cognateforge.bridge import cloudevents
from cognateforge.bridge.cloudevents import ModelCloudEvent
from cognateforge.client import AsyncCognateClient, ModelNews, ModelSnapshot
from cognateforge.client.channel import is_local
from cognateforge.client.patience import GIVE_UP_AFTER_S, Patience
from cognateforge.exceptions import ClientSetupError, SequenceOutOfRangeError, UnavailableError

DEFAULT_SOURCE = "/cognateforge/exchange/v1/models"
DEFAULT_PORT = 4222

# One exchange with the server: a publish that is not acknowledged within it is repeated, which doubles nothing.
_ANSWER_S = 2.0
_RECONNECT_WAIT_S = 0.2
# A server that is down (TimeoutError is an OSError), starting, or between two leaders.
_PASSING = (OSError, NoStreamResponseError, ServiceUnavailableError, ServerError, OutboundBufferLimitError)
# JSStreamWrongLastSequenceErrF and its constant form: the stream has another last message than the one named.
_WRONG_LAST = {10071, 10164}

_STREAM = re.compile(r"[A-Za-z0-9_-]{1,255}")
_SUBJECT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Told:
    """An event that the stream holds now. duplicate: it did so before, by an attempt that was thought lost."""

    event: ModelCloudEvent
    stream_sequence: int
    duplicate: bool


@asynccontextmanager
async def connect(
    url: str, *, credentials: str | None = None, give_up_after_s: float = GIVE_UP_AFTER_S
) -> AsyncIterator[JetStreamContext]:
    """Yield JetStream of a NATS server. A lost connection is made again for as long as the context is open.

    url: nats://host:port for this machine, tls://host:port for any. credentials: path of a .creds file.
    Errors: ClientSetupError, for plaintext to another machine; UnavailableError, when no server answers.
    """
    _require_secret(url)
    if credentials is not None:
        _require_credentials(credentials)

    async def tell(error: Exception) -> None:
        """Say what keeps the connection from being made; every call tells its own failure besides."""
        logger.warning("NATS at %s: %s", url, error or type(error).__name__)

    connecting = nats.connect(
        url,
        name="cognateforge bridge",
        user_credentials=credentials,
        error_cb=tell,
        max_reconnect_attempts=-1,
        reconnect_time_wait=_RECONNECT_WAIT_S,
    )
    try:
        client: Client = await asyncio.wait_for(connecting, give_up_after_s)
    except (TimeoutError, OSError, NoServersError) as error:
        raise UnavailableError(f"no NATS server answers at {url}") from error
    try:
        yield client.jetstream(timeout=_ANSWER_S)
    finally:
        with suppress(OSError):  # a connection that is lost already cannot be flushed
            await client.close()


def _require_credentials(path: str) -> None:
    if not Path(path).is_file():
        raise ClientSetupError(f"{path} is no file with NATS credentials")
    if importlib.util.find_spec("nkeys") is None:
        raise ClientSetupError("NATS credentials need the package nkeys: pip install 'nats-py[nkeys]'")


def _require_name(what: str, name: str, pattern: re.Pattern[str]) -> None:
    if not pattern.fullmatch(name):
        raise ClientSetupError(f"{what} {name!r}: use letters, digits, dashes and underscores, without wildcards")


def _require_secret(url: str) -> None:
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    host = parts.hostname or ""
    address = f"[{host}]:{parts.port or DEFAULT_PORT}" if ":" in host else f"{host}:{parts.port or DEFAULT_PORT}"
    if parts.scheme not in {"tls", "wss"} and not is_local(address):
        raise ClientSetupError(f"plaintext to {host} is refused: use tls://{address}, or a server on this machine")


class NatsBridge:
    """Copies the outbox of foundation models into one stream, whose only subject is the given one.

    source: the CloudEvents attribute; give each Cognate its own.
    Errors: ClientSetupError, when the stream cannot be the bridge's memory; UnavailableError, when nothing can be
    published for `give_up_after_s`.
    """

    def __init__(
        self,
        jetstream: JetStreamContext,
        *,
        stream: str,
        subject: str,
        source: str = DEFAULT_SOURCE,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        _require_name("stream", stream, _STREAM)
        _require_name("subject", subject, _SUBJECT)
        self._jetstream = jetstream
        self._stream, self._subject, self._source = stream, subject, source
        self._give_up_after_s = give_up_after_s
        # The stream's last message: its number there, and the model and the outbox's sequence that it tells of.
        self._last_message, self._last_model, self._last_sequence = 0, "", 0

    async def run(self, client: AsyncCognateClient) -> AsyncGenerator[Told, None]:
        """Publish for ever, and yield what was published. A stream that is not there is made, in files."""
        await self._patiently(self._require_stream)
        while True:
            await self._patiently(self._look)
            try:
                async with aclosing(self._events(client)) as events:
                    async for event in events:
                        yield await self._publish(event)
            except _OvertakenError:
                continue  # another bridge is at work: go on behind what it has told

    async def _require_stream(self) -> None:
        try:
            config = (await self._jetstream.stream_info(self._stream)).config
        except NotFoundError:
            config = (await self._jetstream.add_stream(name=self._stream, subjects=[self._subject])).config
        if config.subjects != [self._subject]:
            raise ClientSetupError(
                f"stream {self._stream} has the subjects {config.subjects}: it must have {self._subject} and no other, "
                "because its last message tells where the bridge stands"
            )
        if config.retention != api.RetentionPolicy.LIMITS or config.max_age:
            raise ClientSetupError(
                f"stream {self._stream} forgets messages that were read, or by their age: its last message tells where "
                "the bridge stands, so bound it by max_msgs or max_bytes instead"
            )

    async def _look(self) -> None:
        """Read where the stream ends."""
        try:
            last = await self._jetstream.get_last_msg(self._stream, self._subject)
        except NotFoundError:
            if (await self._jetstream.stream_info(self._stream)).state.last_seq:
                raise ClientSetupError(
                    f"stream {self._stream} was emptied, so nobody knows what it has told: give a new one"
                ) from None
            self._last_message, self._last_model, self._last_sequence = 0, "", 0
            return
        self._last_message = last.seq or 0
        self._last_model, self._last_sequence = cloudevents.place_of(last.data or b"", self._source)

    async def _events(self, client: AsyncCognateClient) -> AsyncGenerator[ModelCloudEvent, None]:
        """Yield what the stream lacks. Where the events themselves are gone, a snapshot stands in for them."""
        after = self._last_sequence
        while True:
            try:
                async with aclosing(client.watch_models(after, give_up_after_s=self._give_up_after_s)) as watch:
                    async for news in watch:
                        for event in self._missing(news):
                            yield event
            except SequenceOutOfRangeError as error:
                if after == 0 or "oldest_sequence" not in error.metadata:
                    raise
                after = 0

    def _missing(self, news: ModelNews) -> Iterator[ModelCloudEvent]:
        if not isinstance(news, ModelSnapshot):
            yield cloudevents.from_event(news, self._source, self._last_model)
            return
        rest = news.models[self._told_of(news) :]
        for place, model in enumerate(rest, 1):
            sequence = news.last_sequence if place == len(rest) else 0
            yield cloudevents.from_snapshot(model, self._source, sequence=sequence)

    def _told_of(self, snapshot: ModelSnapshot) -> int:
        """Return how many models of a snapshot the stream tells of: a beginning, in the order of publication."""
        if not self._last_model:
            return 0
        names = [model.name for model in snapshot.models]
        if self._last_model in names:
            return names.index(self._last_model) + 1
        # It was collected since. The newest version of a family never is.
        family, _, version = self._last_model.partition("@")
        versions = [int(name.partition("@")[2]) if name.startswith(f"{family}@") else 0 for name in names]
        if not any(other > int(version) for other in versions):
            raise ClientSetupError(
                f"Cognate has no {self._last_model}, which {self._stream} tells of: is it another one?"
            )
        return next(place for place, other in enumerate(versions) if other > int(version))

    async def _publish(self, event: ModelCloudEvent) -> Told:
        headers = {
            api.Header.MSG_ID: f"{event.source}#{event.id}",
            api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE: str(self._last_message),
            "Content-Type": cloudevents.CONTENT_TYPE,
        }
        payload = event.to_json()

        async def publish() -> api.PubAck:
            return await self._jetstream.publish(
                self._subject, payload, timeout=_ANSWER_S, stream=self._stream, headers=dict(headers)
            )

        ack = await self._patiently(publish)
        self._last_message = max(self._last_message, ack.seq)
        if event.type == cloudevents.MODEL_PUBLISHED:
            self._last_model = event.subject
        return Told(event=event, stream_sequence=ack.seq, duplicate=bool(ack.duplicate))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work of which a repetition changes nothing, until the server answers or the patience is spent."""
        patience = Patience(self._give_up_after_s)
        while True:
            try:
                return await work()
            except _PASSING as error:
                broken = UnavailableError(f"NATS does not answer for stream {self._stream}: {error}")
                pause_s = patience.pause_s(broken)
            except APIError as error:
                if error.err_code in _WRONG_LAST:
                    raise _OvertakenError from error
                raise ClientSetupError(f"NATS refuses stream {self._stream}: {error.description}") from error
            except NatsError as error:
                raise UnavailableError(f"NATS ended the connection: {error}") from error
            await asyncio.sleep(pause_s)


class _OvertakenError(Exception):
    """The stream has another last message than the one that was told."""
