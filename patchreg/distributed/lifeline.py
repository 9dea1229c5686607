"""News of a process that fails, brought to all others at once.

Collectives tell late, or never. NCCL waits for a process that is gone until the timeout, and then aborts without a word on
who it was; Gloo notices at once, but knows an address and no reason. So every process keeps a connection to the first. The
kernel ends it when either process ends, however it ends, and finds out by itself when a machine is gone; no heartbeat
stops because a process is busy.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass

log = logging.getLogger(__name__)

KEEP_ALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6))
"""A machine that says nothing for 40 s is gone."""

LONGEST = 4000
"""Characters of a reason."""

_open: weakref.WeakSet[Lifeline] = weakref.WeakSet()


@dataclass(frozen=True)
class News:
    """What happened to a process.

    Args:
        rank: its number.
        what: as a verb: "was lost", "raised ...".
    """

    rank: int
    what: str


class Lifeline:
    """One end of the connections; rank 0 has one to every other, and passes on what they say.

    Args:
        rank: of this process.
        connection: rank 0: the socket on which it waits for the others; the others: their connection to it.
        token: what the others must know to be believed.
        on_news: called, in a thread of its own, with the first bad news.
    """

    def __init__(self, rank: int, connection: socket.socket, token: str, on_news: Callable[[News], None]) -> None:
        self.rank, self._token, self._on_news = rank, token, on_news
        self._news: News | None = None
        self._came = threading.Event()
        self._lock = threading.Lock()
        self._ranks: dict[socket.socket, int | None] = {}
        self._unread: dict[socket.socket, bytes] = {}
        self._listener = connection if rank == 0 else None
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        if rank > 0:
            self._ranks[connection] = 0
        _open.add(self)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    @classmethod
    def host(cls, on_news: Callable[[News], None]) -> tuple[Lifeline, int, str]:
        """Rank 0's end, its port and the token with which others :meth:`join`."""
        both = socket.has_dualstack_ipv6()
        listener = socket.create_server(
            ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
        )
        token = secrets.token_hex(16)
        return cls(0, listener, token, on_news), listener.getsockname()[1], token

    @classmethod
    def join(
        cls, address: str, port: int, token: str, rank: int, on_news: Callable[[News], None], timeout: float = 30.0
    ) -> Lifeline | None:
        """Another rank's end. None, and a warning, where rank 0 cannot be reached: then only timeouts tell."""
        try:
            connection = socket.create_connection((address, port), timeout)
        except OSError as error:
            log.warning(
                "rank %d cannot reach rank 0 at %s, port %d (%s): a process that fails will be noticed by timeouts alone",
                rank, address, port, error,
            )  # fmt: skip
            return None
        connection.settimeout(None)
        _keep_alive(connection)
        _send(connection, {"token": token, "rank": rank})
        return cls(rank, connection, token, on_news)

    @property
    def news(self) -> News | None:
        """The first bad news there was."""
        return self._news

    def wait(self, seconds: float) -> News | None:
        """Bad news of another process, if it comes within so many seconds."""
        self._came.wait(seconds)
        return self._news

    def tell(self, what: str) -> None:
        """Tell all others what happened to this process; only the first news count."""
        self._pass_on(News(self.rank, what[:LONGEST]))

    def close(self) -> None:
        """This process is done, and will end or do something else: no bad news."""
        with self._lock:
            self._closed = True
            for connection in self._ranks:
                _send(connection, {"done": True})
            self._drop()
        _open.discard(self)

    def _drop(self) -> None:
        """Close this process's descriptors."""
        for connection in [*self._ranks, *([self._listener] if self._listener else [])]:
            connection.close()

    def _watch(self) -> None:
        with self._selector:
            while not self._closed:
                for key, _ in self._selector.select(timeout=0.5):
                    found = key.fileobj
                    assert isinstance(found, socket.socket)
                    with contextlib.suppress(OSError, ValueError, KeyError):  # closed meanwhile, by this process
                        if found is self._listener:
                            self._accept()
                        else:
                            self._read(found)

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        _keep_alive(connection)
        with self._lock:
            self._ranks[connection] = None
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        lines = (self._unread.pop(connection, b"") + data).split(b"\n")
        for line in lines[:-1]:
            if not self._take(connection, line):
                return
        self._unread[connection] = lines[-1]
        if not data or len(lines[-1]) > 65536:
            self._gone(connection, "was lost: its process ended, or its machine cannot be reached")

    def _take(self, connection: socket.socket, line: bytes) -> bool:
        """One message; False when there will be no others."""
        try:
            message = json.loads(line)
            if self.rank == 0 and self._ranks[connection] is None:
                if not secrets.compare_digest(str(message["token"]), self._token):
                    raise ValueError("another token")
                self._ranks[connection] = int(message["rank"])
                if self._news is not None:  # it came late
                    _send(connection, asdict(self._news))
            elif "done" in message:
                self._gone(connection, None)
                return False
            else:
                self._pass_on(News(int(message["rank"]), str(message["what"])[:LONGEST]))
        except (ValueError, KeyError, TypeError):
            self._gone(connection, None)  # a stranger
            return False
        return True

    def _gone(self, connection: socket.socket, what: str | None) -> None:
        with self._lock:
            rank = self._ranks.pop(connection, None)
        self._selector.unregister(connection)
        connection.close()
        if what is not None and rank is not None and not self._closed:
            self._pass_on(News(rank, what))

    def _pass_on(self, news: News) -> None:
        with self._lock:
            if self._closed or self._news is not None:
                return
            self._news = news
            for connection, rank in self._ranks.items():
                if rank is not None and rank != news.rank:
                    _send(connection, asdict(news))
        self._came.set()
        threading.Thread(target=self._on_news, args=(news,), name="bad-news", daemon=True).start()


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE:
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _after_fork() -> None:
    """A process that loads data must not hold the connection of the one that made it, or nobody would notice its end."""
    for lifeline in list(_open):
        lifeline._closed = True
        lifeline._drop()
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
