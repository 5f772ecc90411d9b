"""Channels: where they may lead without TLS, and how one is swapped for another under the calls of a stub."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from cognateforge.client.interceptors import AioStreamGuard, AioUnaryGuard, CallGuard, SyncGuard
from cognateforge.client.patience import STREAM_LIFE_S
from cognateforge.client.retry import service_config
from cognateforge.client.tls import Rotation, TlsFiles
from cognateforge.exceptions import ClientSetupError

Addresses = tuple[str, ...]

# Calls that run when their address leaves the list may finish: longer than the default deadline of a unary call.
CLOSE_GRACE_S = 15.0
# A connection whose certificate was replaced is still good: its calls go on for as long as a stream may live.
ROTATION_GRACE_S = STREAM_LIFE_S + CLOSE_GRACE_S

# A server that restarts is found again within seconds; gRPC's own ceiling is two minutes. With gRPC's jitter, a fifth,
# it stays below a breaker's shortest pause: the first probe after a connection was possible again finds it made.
MAX_RECONNECT_BACKOFF_MS = 3000

ChannelT = TypeVar("ChannelT", grpc.Channel, grpc.aio.Channel)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of "host:port" or "[ipv6]:port"."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or not host:
        raise ClientSetupError(f"{address!r} is no address: use host:port, [ipv6]:port or unix:path")
    return host.strip("[]"), int(port)


def is_local(address: str) -> bool:
    """Return whether an address cannot leave this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def target_of(addresses: Addresses) -> str:
    """Return gRPC's target. Several addresses are resolved here, because gRPC's lists hold only numbers."""
    if not addresses:
        raise ClientSetupError("there is no address to dial")
    if len(addresses) == 1:
        return addresses[0]
    numeric = [_numeric(address) for address in addresses]
    families = {family for family, _ in numeric}
    if len(families) != 1:
        raise ClientSetupError(f"addresses of one service must be all IPv4 or all IPv6: {', '.join(addresses)}")
    return f"{families.pop()}:{','.join(text for _, text in numeric)}"


def _numeric(address: str) -> tuple[str, str]:
    host, port = split_address(address)
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ClientSetupError(f"{host} cannot be resolved: {error.strerror}") from error
    ip = sockaddr[0]
    return ("ipv6", f"[{ip}]:{port}") if family == socket.AF_INET6 else ("ipv4", f"{ip}:{port}")


@dataclass(frozen=True, kw_only=True)
class Dialer:
    """Makes the channels of one client.

    Errors: ClientSetupError, when an address is no address, or would be reached in plaintext over a network.
    """

    services: Sequence[ServiceDescriptor]
    guard: CallGuard
    tls: grpc.ChannelCredentials | TlsFiles | None = None
    tls_server_name: str | None = None

    def dial(self, addresses: Addresses) -> grpc.Channel:
        """Return a guarded channel."""
        target, options = self._target(addresses), self._options(addresses)
        credentials = self._credentials()
        if credentials is None:
            channel = grpc.insecure_channel(target, options)
        else:
            channel = grpc.secure_channel(target, credentials, options)
        return grpc.intercept_channel(channel, SyncGuard(self.guard))

    def dial_aio(self, addresses: Addresses) -> grpc.aio.Channel:
        """Return a guarded asyncio channel. Call it where the event loop runs."""
        target, options = self._target(addresses), self._options(addresses)
        guards = [AioUnaryGuard(self.guard), AioStreamGuard(self.guard)]
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(target, options, interceptors=guards)
        return grpc.aio.secure_channel(target, credentials, options, interceptors=guards)

    def rotation(self) -> Rotation | None:
        """Return what tells of new certificates, or None where they cannot change."""
        return Rotation(self.tls) if isinstance(self.tls, TlsFiles) else None

    def _credentials(self) -> grpc.ChannelCredentials | None:
        return self.tls.credentials() if isinstance(self.tls, TlsFiles) else self.tls

    def _target(self, addresses: Addresses) -> str:
        far = [] if self.tls else [address for address in addresses if not is_local(address)]
        if far:
            raise ClientSetupError(
                f"plaintext to {', '.join(far)} is refused: give TLS credentials, or use a loopback or unix address"
            )
        return target_of(addresses)

    def _options(self, addresses: Addresses) -> list[tuple[str, Any]]:
        options: list[tuple[str, Any]] = [
            ("grpc.service_config", service_config(self.services, balanced=len(addresses) > 1)),
            # Two clients in one process fail and recover independently of each other.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        ]
        if self.tls is None:
            options.append(("grpc.enable_http_proxy", 0))  # plaintext goes to this machine only, never to a proxy
        if self.tls_server_name:
            options.append(("grpc.ssl_target_name_override", self.tls_server_name))
        return options


class _Late(Generic[ChannelT]):
    """A stub's method that is bound to the channel of the moment at every call."""

    def __init__(self, current: Callable[[], ChannelT], kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._current: Callable[[], ChannelT] = current
        # Generated stubs ask for methods to be registered. With interceptors gRPC does that anew at every call, and
        # crashes where its channel is closed at that moment. A method that is not registered gets an error then.
        kwargs = {key: value for key, value in kwargs.items() if key != "_registered_method"}
        self._kind, self._args, self._kwargs = kind, args, kwargs
        self._bound: tuple[ChannelT | None, Any] = (None, None)

    def _method(self) -> Any:
        channel = self._current()
        owner, method = self._bound
        if owner is not channel:
            method = getattr(channel, self._kind)(*self._args, **self._kwargs)
            self._bound = (channel, method)
        return method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method()(*args, **kwargs)

    def with_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._method().with_call(*args, **kwargs)

    def future(self, *args: Any, **kwargs: Any) -> Any:
        return self._method().future(*args, **kwargs)


def _closed_client() -> ClientSetupError:
    return ClientSetupError("the client is closed: make another one")


def _no_request_streams() -> NoReturn:
    raise NotImplementedError("the contract has no method that streams requests")


class SwappingChannel(grpc.Channel):
    """A channel that moves to other addresses under its stubs: new calls go to the new ones, running calls finish."""

    def __init__(
        self, dial: Callable[[Addresses], grpc.Channel], addresses: Addresses, rotation: Rotation | None = None
    ) -> None:
        self._dial = dial
        self._rotation = rotation
        self._lock = threading.Lock()
        self._addresses = addresses
        self._channel = dial(addresses)
        self._retired: list[tuple[threading.Timer, grpc.Channel]] = []
        self._closed = False

    @property
    def addresses(self) -> Addresses:
        """Where new calls go."""
        return self._addresses

    def swap(self, addresses: Addresses) -> None:
        """Send new calls to other addresses. Thread-safe."""
        with self._lock:
            if not self._closed and set(addresses) != set(self._addresses):
                self._replace(addresses, CLOSE_GRACE_S)

    def _replace(self, addresses: Addresses, grace_s: float) -> None:
        """Send new calls through a new channel, and close the old one when its calls had time to end."""
        old, self._channel, self._addresses = self._channel, self._dial(addresses), addresses
        timer = threading.Timer(grace_s, old.close)
        timer.daemon = True
        self._retired = [pair for pair in self._retired if pair[0].is_alive()] + [(timer, old)]
        timer.start()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for timer, channel in self._retired:
                timer.cancel()
                channel.close()
            self._channel.close()

    def _current(self) -> grpc.Channel:
        if self._rotation is not None and self._rotation.due():
            with self._lock:
                if not self._closed and self._rotation.changed():
                    self._replace(self._addresses, ROTATION_GRACE_S)
        if self._closed:
            raise _closed_client()
        return self._channel

    def unary_unary(self, *args: Any, **kwargs: Any) -> grpc.UnaryUnaryMultiCallable[Any, Any]:
        late = _Late(self._current, "unary_unary", args, kwargs)
        return cast("grpc.UnaryUnaryMultiCallable[Any, Any]", late)

    def unary_stream(self, *args: Any, **kwargs: Any) -> grpc.UnaryStreamMultiCallable[Any, Any]:
        late = _Late(self._current, "unary_stream", args, kwargs)
        return cast("grpc.UnaryStreamMultiCallable[Any, Any]", late)

    def stream_unary(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_request_streams()

    def stream_stream(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_request_streams()

    def subscribe(self, callback: Callable[[grpc.ChannelConnectivity], None], try_to_connect: bool = False) -> None:
        self._channel.subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Callable[[grpc.ChannelConnectivity], None]) -> None:
        self._channel.unsubscribe(callback)


class AioSwappingChannel(grpc.aio.Channel):
    """The same for asyncio. It dials when it is opened, because a grpc.aio channel belongs to the running loop."""

    def __init__(self, dial: Callable[[Addresses], grpc.aio.Channel], rotation: Rotation | None = None) -> None:
        self._dial = dial
        self._rotation = rotation
        self._addresses: Addresses = ()
        self._channel: grpc.aio.Channel | None = None
        self._closing: dict[asyncio.Task[None], grpc.aio.Channel] = {}
        self._closed = False

    @property
    def addresses(self) -> Addresses:
        """Where new calls go."""
        return self._addresses

    def swap(self, addresses: Addresses) -> None:
        """Send new calls to other addresses. Call it in the event loop."""
        if not self._closed and set(addresses) != set(self._addresses):
            self._replace(addresses, CLOSE_GRACE_S)

    def _replace(self, addresses: Addresses, grace_s: float) -> None:
        old, self._channel, self._addresses = self._channel, self._dial(addresses), addresses
        if old is not None:
            task = asyncio.get_running_loop().create_task(old.close(grace_s))
            self._closing[task] = old
            task.add_done_callback(self._closing.pop)

    async def close(self, grace: float | None = None) -> None:
        self._closed = True
        retired = dict(self._closing)
        for task in retired:
            task.cancel()
        await asyncio.gather(*retired, return_exceptions=True)
        for channel in retired.values():
            await channel.close()
        if self._channel is not None:
            await self._channel.close(grace)

    def _current(self) -> grpc.aio.Channel:
        if self._channel is None:
            raise ClientSetupError("the client is not open: use `async with`, or await its open()")
        if self._closed:
            raise _closed_client()
        if self._rotation is not None and self._rotation.due() and self._rotation.changed():
            self._replace(self._addresses, ROTATION_GRACE_S)
        return self._channel

    def unary_unary(self, *args: Any, **kwargs: Any) -> grpc.aio.UnaryUnaryMultiCallable[Any, Any]:
        late = _Late(self._current, "unary_unary", args, kwargs)
        return cast("grpc.aio.UnaryUnaryMultiCallable[Any, Any]", late)

    def unary_stream(self, *args: Any, **kwargs: Any) -> grpc.aio.UnaryStreamMultiCallable[Any, Any]:
        late = _Late(self._current, "unary_stream", args, kwargs)
        return cast("grpc.aio.UnaryStreamMultiCallable[Any, Any]", late)

    def stream_unary(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_request_streams()

    def stream_stream(self, *args: Any, **kwargs: Any) -> NoReturn:
        _no_request_streams()

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._current().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._current().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._current().channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()
