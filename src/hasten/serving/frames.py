"""Messages on a stream socket: four bytes of length, then that many bytes of msgpack."""

from __future__ import annotations

import contextlib
import select
import socket
import struct

HEADER = struct.Struct("<I")

MAX_FRAME = 64 << 20
"""Bytes of the largest message. Some 50,000 prompt log-probabilities with 100 alternatives each,
or a prompt of 10 million tokens; whatever is larger is refused by the sender."""

MAX_UNSENT = 4 << 20
"""Bytes that wait for a slow peer before `Link.send` waits with them."""

READ = 1 << 18


class PeerGone(Exception):
    """The other process has closed its end, or is no more."""


def framed(payload: bytes) -> bytes:
    """A message as it goes over the socket. Raises ``ValueError`` if it is too large."""
    if len(payload) > MAX_FRAME:
        raise ValueError(f"a message of {len(payload)} bytes, at most {MAX_FRAME} can be sent")
    return HEADER.pack(len(payload)) + payload


def length(header: bytes) -> int:
    """What a header announces. Raises ``ValueError`` if that is more than a message may have."""
    (count,) = HEADER.unpack(header)
    if count > MAX_FRAME:
        raise ValueError(f"a message of {count} bytes is announced, at most {MAX_FRAME} are read")
    return int(count)


class Link:
    """One end of the socket, for a loop that has other work to do.

    Nothing blocks except ``wait``, and ``send`` once ``MAX_UNSENT`` bytes are queued: a peer that
    reads slowly slows this process down, and one that is gone ends the wait. Other threads may call
    ``wake``, and nothing else.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._received = bytearray()
        self._unsent = bytearray()
        self._poll = select.poll()
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)

    def next(self) -> bytes | None:
        """The next message that has arrived whole, or None. Raises ``PeerGone`` at the end.

        The socket is read only when no whole message is left, so that what a busy receiver does
        not come to stays with the sender.
        """
        while True:
            if end := self._end_of_first():
                message = bytes(self._received[HEADER.size : end])
                del self._received[:end]
                return message
            try:
                data = self._socket.recv(READ)
            except BlockingIOError:
                return None
            except OSError as error:
                raise PeerGone from error
            if not data:
                raise PeerGone
            self._received += data

    def send(self, payload: bytes) -> None:
        """Queue a message and send what the socket takes."""
        self._unsent += framed(payload)
        self.flush()
        while len(self._unsent) > MAX_UNSENT:
            self._wait_for(select.POLLOUT)
            self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        while self._unsent:
            try:
                # a bytearray with an exported view cannot shrink, so the view ends first
                with memoryview(self._unsent) as view:
                    sent = self._socket.send(view[:READ])
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerGone from error
            del self._unsent[:sent]

    def wake(self) -> None:
        """End the ``wait`` of the thread that owns the link, or its next one."""
        with contextlib.suppress(BlockingIOError):  # so many are under way that one will do
            self._waker.send(b"w")

    def wait(self) -> None:
        """Sleep until a message may have arrived, or ``wake`` was called; what is queued goes out
        meanwhile."""
        if self._end_of_first():
            return
        self._poll.register(self._woken, select.POLLIN)
        if self._unsent:
            self._wait_for(select.POLLIN | select.POLLOUT)
            self.flush()
        else:
            self._wait_for(select.POLLIN)
        self._poll.unregister(self._woken)
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(READ)

    def _end_of_first(self) -> int:
        """Where the first message in the buffer ends; 0 if it has not arrived whole."""
        got = self._received
        if len(got) < HEADER.size:
            return 0
        end = HEADER.size + length(bytes(got[: HEADER.size]))
        return end if len(got) >= end else 0

    def _wait_for(self, events: int) -> None:
        self._poll.register(self._socket, events)
        self._poll.poll()
