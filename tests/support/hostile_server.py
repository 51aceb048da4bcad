"""A server at MLflow's address that is not MLflow, or misbehaves."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ESCAPE = b"\x1b[2J\x1b]0;owned\x07"


def _http(body: bytes, *, status: str = "200 OK", kind: str = "application/json", more: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{more}\r\n"
    )
    return head.encode() + body


ANSWERS = {
    "closed": b"",
    "not HTTP": b"\x00\xffSSH-2.0-OpenSSH\r\n" * 50,
    "a login page": _http(b"<!DOCTYPE html><html><body>Please log in</body></html>", kind="text/html"),
    "a list": _http(b"[]"),
    "null": _http(b"null"),
    "numbers for objects": _http(b'{"experiment": 7, "run": 7, "runs": 7}'),
    "objects for ids": _http(b'{"experiment": {"experiment_id": {"a": []}, "name": []}, "runs": [{"info": 3}]}'),
    "nested deeply": _http(b"[" * 100_000),
    "an empty object": _http(b"{}"),
    "half JSON": _http(b'{"experiment": {"experiment_id": "1"'),
    "not UTF-8": _http(b'{"experiment": "\xff\xfe\xfa"}'),
    "an unknown status": _http(b"{}", status="999 What"),
    "an error with escapes": _http(ESCAPE + b"\r\n" * 9 + b"x" * 100_000, status="500 Sorry", kind="text/plain"),
    "an error code that is none": _http(
        json.dumps({"error_code": [1], "message": {"a": 1}}).encode(), status="400 Bad Request"
    ),
    "elsewhere": _http(b"", status="302 Found", more="Location: http://127.0.0.1:9/\r\n"),
    "a file": _http(b"", status="302 Found", more="Location: file:///etc/passwd\r\n"),
    "a bomb": _http(gzip.compress(bytes(16 << 20)) * 64, more="Content-Encoding: gzip\r\n"),  # 1 GiB
    "without end": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000000000\r\n\r\n",
}


@contextmanager
def hostile_server(*names: str) -> Iterator[str]:
    """Serve these answers in turn, over and over (without names: all); yields ``host:port``."""
    chosen = list(names or ANSWERS)
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(client: socket.socket, name: str) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(5)
            client.recv(1 << 16)
            client.sendall(ANSWERS[name])
            while name == "without end":  # until the client stops reading
                client.sendall(b" " * (1 << 20))

    def serve() -> None:
        number = 0
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=answer, args=(client, chosen[number % len(chosen)]), daemon=True).start()
                number += 1

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
