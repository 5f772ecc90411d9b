"""A TCP proxy that does to connections what networks do: it cuts, stalls, damages and refuses them."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

_READ_BYTES = 65_536
_STALL_POLL_S = 0.05

# What to do with the bytes that a server sent: pass on others, or the same.
Damage = Callable[[bytes], bytes]


class FaultyProxy:
    """Passes TCP connections on to 127.0.0.1:port, until it is told otherwise. Thread-safe.

    after_bytes: the first connections are reset, each after so many bytes from the server; later ones are not.
    damage: changes what the server sends.
    """

    def __init__(self, port: int, *, after_bytes: Iterable[int] = (), damage: Damage | None = None) -> None:
        self._port, self._after, self.damage = port, deque(after_bytes), damage
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._refusing = False
        self._closed = False
        self.connections = 0
        self.cut = 0
        self.bytes_from_server = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut_all(self) -> int:
        """Reset every open connection, and return how many clients had one."""
        with self._lock:
            sockets, self._open = self._open, set()
            self.cut += len(sockets) // 2
        for one in sockets:
            _reset(one)
        return len(sockets) // 2

    def partition(self) -> None:
        """Swallow what either side sends, and accept connections that lead nowhere: what a lost route looks like."""
        self._flowing.clear()

    def refuse(self) -> None:
        """Reset what is open and every new connection: what a dead process looks like."""
        self._refusing = True
        self.cut_all()

    def heal(self) -> None:
        """Pass everything on again. Bytes that a partition held back arrive late, as after a lost route."""
        self._refusing = False
        self._flowing.set()

    def close(self) -> None:
        """End every connection."""
        self._closed = True
        self._flowing.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                if self._refusing:
                    _reset(client)
                    continue
                limit = self._after.popleft() if self._after else None
                threading.Thread(target=self._serve, args=(client, limit), daemon=True).start()

    def _serve(self, client: socket.socket, limit: int | None) -> None:
        self._hold()
        try:
            server = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            _reset(client)
            return
        with self._lock:
            self._open |= {client, server}
        threading.Thread(target=self._pass_on, args=(client, server, None, False), daemon=True).start()
        self._pass_on(server, client, limit, True)

    def _hold(self) -> None:
        while not self._flowing.wait(_STALL_POLL_S):
            if self._closed:
                return

    def _pass_on(self, source: socket.socket, sink: socket.socket, limit: int | None, from_server: bool) -> None:
        with suppress(OSError):
            while data := source.recv(_READ_BYTES if limit is None else min(4096, limit)):
                self._hold()
                if from_server:
                    self.bytes_from_server += len(data)
                    data = self.damage(data) if self.damage else data
                sink.sendall(data)
                if limit is not None:
                    limit -= len(data)
                    if limit <= 0:
                        self.cut += 1
                        break
        with self._lock:
            self._open -= {source, sink}
        for one in (source, sink):
            _reset(one)


def flip_bits(seed: int, *, one_in_bytes: int) -> Damage:
    """Return a damage that flips a random bit of about every so many bytes."""
    pick = random.Random(seed)  # noqa: S311 - no secret

    def damage(data: bytes) -> bytes:
        changed = bytearray(data)
        whole, part = divmod(len(data), one_in_bytes)
        for _ in range(whole + (pick.random() < part / one_in_bytes)):
            changed[pick.randrange(len(changed))] ^= 1 << pick.randrange(8)
        return bytes(changed)

    return damage


def _reset(one: socket.socket) -> None:
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
