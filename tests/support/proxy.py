"""A proxy that breaks things on order, between an S3 client and a real S3 server.

A store's promises are about what happens when the network or the server fails, and a real server
fails too rarely to test them. So the server stays real and the way to it fails: each request is
read whole, forwarded as it is (with the Host header it was signed with) over a connection of its
own, and answered whole, unless a `Fault` was injected for it.

    with Proxy("http://127.0.0.1:9000") as proxy:
        client = boto3.client("s3", endpoint_url=proxy.endpoint, ...)
        proxy.inject("reset-after", method="PUT", path="/claims/")
"""

import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
from threading import Lock, Thread
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

# The last two take a header away that the client signed: a server that checks says 403.
Fault = Literal[
    "error-500",  # an S3 error, InternalError; not forwarded
    "slow-down-503",  # an S3 error, SlowDown; not forwarded
    "reset-before",  # the connection is reset; not forwarded
    "reset-after",  # forwarded, then reset: the server did it and the client does not know
    "reset-midway",  # the headers and half of the body (without one: half the headers), then reset
    "stall",  # silence until the client leaves or the proxy closes; not forwarded
    "stall-midway",  # as much as reset-midway, then silence
    "wrong-bytes",  # the middle byte of the response's body is changed
    "wrong-request-bytes",  # the middle byte of the request's body is changed
    "truncated",  # half of the body, with a Content-Length that agrees
    "ignore-range",  # forwarded without Range
    "ignore-conditions",  # forwarded without If-Match and its like
]
FAULTS: tuple[Fault, ...] = get_args(Fault)

_WITHHELD = {"ignore-range": "range", "ignore-conditions": "if-"}
_HOP_BY_HOP = {"connection", "keep-alive", "trailer", "transfer-encoding", "upgrade"}


@dataclass(frozen=True)
class Exchange:
    """One request and what became of it."""

    method: str
    path: str  # raw, with the query
    status: int | None  # the server's, or the proxy's in its place; None: nobody answered
    sent_bytes: int  # of the request's body
    received_bytes: int  # of the response's body, as passed on to the client
    fault: str | None
    range: str | None


@dataclass(frozen=True)
class _Reply:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


class Proxy(ThreadingHTTPServer):
    """Stands at `endpoint` for the server at the endpoint it is given, which may come and go."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.upstream = urlsplit(endpoint).netloc
        # An exchange is here before its last byte, its reset or its silence reaches the client.
        self.exchanges: list[Exchange] = []
        # Called with method and path before a request is forwarded.
        self.on_request: Callable[[str, str], None] | None = None
        self._rules: list[tuple[str | None, str, Iterator[Fault | None]]] = []
        self._lock = Lock()
        self._sockets: set[socket.socket] = set()
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def inject(
        self,
        fault: Fault,
        times: int = 1,
        method: str | None = None,
        path: str = "",
        after: int = 0,
    ) -> None:
        """Fault the next requests of the method whose path contains `path`, after some that pass.

        A request gets one fault: of several that are due, the first injected.
        """
        if fault not in FAULTS:
            raise ValueError(f"no such fault: {fault}")
        with self._lock:
            self._rules.append((method, path, chain(repeat(None, after), repeat(fault, times))))

    def clear(self) -> None:
        """Forget the faults that are still to come."""
        with self._lock:
            self._rules.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that is due for a request."""
        with self._lock:
            for wanted, part, outcomes in self._rules:
                if wanted in (None, method) and part in path and (fault := next(outcomes, None)):
                    return fault
        return None

    @contextmanager
    def held(self, sock: socket.socket) -> Iterator[None]:
        """While held, a socket is shut down by `close`, which ends whatever waits on it."""
        self._sockets.add(sock)
        try:
            yield
        finally:
            self._sockets.discard(sock)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + 0.9
        while (held := self._sockets.copy()) and time.monotonic() < deadline:
            for sock in held:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news: nothing is printed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the last byte waits until the rest is acknowledged
    server: Proxy

    def handle(self) -> None:
        with self.server.held(self.connection):
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        if len(body) < size or "Transfer-Encoding" in self.headers:
            self.close_connection = True  # the client left, or speaks what is not spoken here
            return
        path = self.requestline.split()[1]  # self.path has lost a doubled first slash
        fault = self.server.take(self.command, path)
        reply = self._reply(path, body, fault)
        status, asked = reply.status if reply else None, self.headers.get("Range")
        exchange = Exchange(self.command, path, status, size, 0, fault, asked)
        if reply is None or fault == "reset-after":
            self.server.exchanges.append(exchange)
        else:
            self._answer(reply, exchange)
        ending = (fault or "").split("-")[0]
        self.close_connection |= reply is None or ending in ("reset", "stall")
        if ending == "reset":
            self._reset()
        elif ending == "stall":
            with suppress(OSError):
                while self.connection.recv(1 << 16):  # ends when the client leaves, or by close()
                    pass

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _reply(self, path: str, body: bytes, fault: Fault | None) -> _Reply | None:
        if fault == "error-500":
            return _error(500, "InternalError")
        if fault == "slow-down-503":
            return _error(503, "SlowDown")
        if fault in ("reset-before", "stall"):
            return None
        body = _changed(body) if fault == "wrong-request-bytes" else body
        try:
            reply = self._forward(path, body, ("expect", _WITHHELD.get(fault or "", "expect")))
        except (OSError, HTTPException):
            return None
        if fault == "wrong-bytes":
            return replace(reply, body=_changed(reply.body))
        return replace(reply, body=_half(reply.body)) if fault == "truncated" else reply

    def _forward(self, path: str, body: bytes, withheld: tuple[str, ...]) -> _Reply:
        if self.server.on_request:
            self.server.on_request(self.command, path)
        with closing(HTTPConnection(self.server.upstream)) as upstream:
            upstream.connect()
            with self.server.held(upstream.sock):
                upstream.putrequest(self.command, path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if not name.lower().startswith(withheld):
                        upstream.putheader(name, value)
                # A server may refuse a body that it has not read: its answer is there all the same.
                with suppress(BrokenPipeError, ConnectionResetError):
                    upstream.endheaders(body)
                reply = upstream.getresponse()
                return _Reply(reply.status, reply.reason, reply.getheaders(), reply.read())

    def _answer(self, reply: _Reply, exchange: Exchange) -> None:
        lines, body, dropped = [f"HTTP/1.1 {reply.status} {reply.reason}"], b"", _HOP_BY_HOP
        if self.command != "HEAD" and reply.status not in (204, 304):
            # The length is known here, also of what the server sent in chunks.
            body, dropped = reply.body, _HOP_BY_HOP | {"content-length"}
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{key}: {value}" for key, value in reply.headers if key.lower() not in dropped]
        head = "\r\n".join([*lines, "", ""]).encode("latin-1")
        if exchange.fault in ("reset-midway", "stall-midway"):
            data, last = (head + _half(body) if body else _half(head)), b""
        else:
            data, last = head + body[:-1] if body else head[:-1], (body or head)[-1:]
        passed = max(0, self._send(data) + len(last) - len(head))
        self.server.exchanges.append(replace(exchange, received_bytes=passed))
        self._send(last)

    def _send(self, data: bytes) -> int:
        """How much went: all of it, or what was taken before the client left."""
        sent = 0
        with suppress(OSError):
            while sent < len(data):
                sent += self.connection.send(memoryview(data)[sent:])
        return sent

    def _reset(self) -> None:
        for _ in range(200):
            # A reset discards what the kernel still holds: half a body has to arrive first.
            if not any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))):
                break
            time.sleep(0.01)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Not close(): it leaves the descriptor to rfile, and the server would send a FIN first.
        os.close(self.connection.detach())


def _error(status: int, code: str) -> _Reply:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>Injected</Message></Error>'
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    return _Reply(status, code, headers, body.encode())


def _changed(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes(byte ^ 1 for byte in data[half : half + 1]) + data[half + 1 :]


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]
