"""A bad connection: stands between a client and a server, and spoils what passes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

#: What makes bytes of bytes on their way; ``None`` ends the connection.
Spoil = Callable[[bytes], bytes | None]

CHUNK = 16 * 1024


class Proxy:
    """Passes bytes between its port and the server's, through what a test does to them.

    Each connection gets functions of its own.

    :param request: makes what spoils the bytes to the server.
    :param answer: makes what spoils those from it.
    """

    def __init__(
        self,
        port: int,
        *,
        request: Callable[[], Spoil] = lambda: _same,
        answer: Callable[[], Spoil] = lambda: _same,
    ) -> None:
        self._target = port
        #: Seconds before each answer of the server, which then comes by itself.
        self.pause = 0.0
        #: True if each byte of an answer comes by itself.
        self.dribbles = False
        self.request = request
        self.answer = answer
        #: How many connections were made.
        self.connections = 0
        self._sockets: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._start(self._accept)

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        """The port of the proxy."""
        port: int = self._listening.getsockname()[1]
        return port

    def cut(self) -> None:
        """End all connections, and go on with new ones."""
        for each in self._sockets:
            _close(each)

    def close(self) -> None:
        """End everything."""
        _close(self._listening)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return

            self.connections += 1
            self._sockets += [client, server]
            self._start(self._pass, client, server, self.request())
            self._start(self._pass, server, client, self.answer())

    def _pass(self, source: socket.socket, target: socket.socket, spoil: Spoil) -> None:
        try:
            is_answer = source.getpeername()[1] == self._target

            while (data := source.recv(CHUNK)) and (spoilt := spoil(data)) is not None:
                if is_answer and self.pause:
                    self._pass_slowly(spoilt, target)
                else:
                    target.sendall(spoilt)
        except OSError:
            pass  # one of them is gone, and so is the other
        finally:
            _close(source)
            _close(target)

    def _pass_slowly(self, data: bytes, target: socket.socket) -> None:
        # An array is one answer; other answers to a batch come one by one.
        parts = [data] if data.startswith(b"*") else data.splitlines(keepends=True)

        for part in [data[at : at + 1] for at in range(len(data))] if self.dribbles else parts:
            time.sleep(self.pause)
            target.sendall(part)

    def _start(self, run: Callable[..., None], *args: object) -> None:
        threading.Thread(target=run, args=args, daemon=True).start()


def _same(data: bytes) -> bytes:
    return data


def _close(socket_: socket.socket) -> None:
    try:
        socket_.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already
    finally:
        socket_.close()


class Impostor:
    """Takes Redis's place on a port and answers whatever comes with the same bytes."""

    def __init__(self, answer: bytes, *, port: int = 0) -> None:
        self._answer = answer
        self._listening = socket.create_server(("127.0.0.1", port))
        self._sockets: list[socket.socket] = []
        #: How many connections were made.
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """The port of the proxy."""
        port: int = self._listening.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """The URL for clients."""
        return f"redis://127.0.0.1:{self.port}/0"

    def close(self) -> None:
        """Go away."""
        for each in (self._listening, *self._sockets):
            _close(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return

            self.connections += 1
            self._sockets.append(client)
            threading.Thread(target=self._reply, args=(client,), daemon=True).start()

    def _reply(self, client: socket.socket) -> None:
        try:
            while client.recv(CHUNK):
                client.sendall(self._answer)
        except OSError:
            pass  # the client is gone
