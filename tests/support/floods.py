"""Hostile neighbours of an export: `python -m tests.support.floods KIND --port P --rate N`.

`connect` opens connections and says nothing; `hello` asks for TLS and sends a ClientHello, for
which the server has to sign, and nothing after it.  Connections stay open until the server closes
them or until `--keep` younger ones are there.  Ends with its standard input or after `--seconds`.
"""

from __future__ import annotations

import argparse
import select
import socket
import ssl
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bitmapd.nbd.numbers import Opt
from bitmapd.nbd.wire import CLIENT_FLAGS, GREETING, OPTION_REPLY
from tests.support.nbdraw import option

ROOT = Path(__file__).resolve().parents[2]
GREETING_AND_ACK = GREETING.size + OPTION_REPLY.size


def client_hello(name: str = "localhost") -> bytes:
    """What a client of TLS 1.3 sends first; a server takes the same one any number of times."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    sent = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return sent.read()


def connect(source: str, port: int) -> socket.socket | None:
    sock = socket.socket()
    try:
        sock.bind((source, 0))
        sock.settimeout(1.0)
        sock.connect(("127.0.0.1", port))
    except OSError:
        sock.close()
        return None
    return sock


def greet(sock: socket.socket, hello: bytes) -> None:
    """As far as the server goes along."""
    with suppress(OSError):
        sock.sendall(CLIENT_FLAGS.pack(3) + option(Opt.STARTTLS))
        received = b""
        while len(received) < GREETING_AND_ACK:
            piece = sock.recv(GREETING_AND_ACK - len(received))
            if not piece:
                return
            received += piece
        sock.sendall(hello)


@contextmanager
def flood(kind: str, port: int, *, rate: float, source: str = "127.0.0.1") -> Iterator[None]:
    """Runs in a process of its own; it is under way when the body begins."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.support.floods", kind),
            *("--port", str(port), "--rate", str(rate), "--source", source),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the flood has no pipes")
    try:
        if process.stdout.readline() != "under way\n":
            raise RuntimeError("the flood did not start")
        yield
        if process.poll() is not None:
            raise RuntimeError("the flood ended early")
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["connect", "hello"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="connections in a second")
    parser.add_argument("--source", default="127.0.0.1")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--keep", type=int, default=300)
    # Seventy are more than there are places.
    parser.add_argument("--announce", type=int, default=70, help="connections before `under way`")
    arguments = parser.parse_args()
    hello = client_hello()
    open_ones: deque[socket.socket] = deque()
    begun_s, made = time.monotonic(), 0
    while True:
        pause_s = begun_s + made / arguments.rate - time.monotonic()
        if select.select([sys.stdin], [], [], max(0.0, pause_s))[0]:
            return
        if time.monotonic() - begun_s > arguments.seconds:
            return
        made += 1
        sock = connect(arguments.source, arguments.port)
        if sock is not None:
            open_ones.append(sock)
            if arguments.kind == "hello":
                greet(sock, hello)
        if len(open_ones) > arguments.keep:
            open_ones.popleft().close()
        if made == arguments.announce:
            print("under way", flush=True)


if __name__ == "__main__":
    main()
