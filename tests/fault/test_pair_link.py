"""The link of `tests.support.pairlink` goes on however often it is cut, or says that it cannot."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

from tests.support.pairlink import Link

CUTS = 1000  # closing sockets beside a select that waits for them ended the link after 150


def echo(listener: socket.socket) -> None:
    """One connection after another, until the listener is shut down."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(4096):
                    connection.sendall(data)


def speak(door: Path, over: threading.Event) -> None:
    """Connect anew after every cut."""
    while not over.is_set():
        with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
            client.settimeout(10)
            client.connect(str(door))
            client.sendall(b"word")
            while client.recv(4096) and not over.is_set():
                client.sendall(b"word")


def test_a_link_that_is_cut_under_load_goes_on(short_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(short_path / "inner"))
    listener.listen()
    over = threading.Event()
    link = Link(short_path / "outer", short_path / "inner")
    server = threading.Thread(target=echo, args=(listener,))
    server.start()
    speakers = [threading.Thread(target=speak, args=(short_path / "outer", over)) for _ in range(2)]
    for speaker in speakers:
        speaker.start()
    try:
        for _ in range(CUTS):
            link.cut()
            time.sleep(0.001)  # both sides connect again
        over.set()
        for speaker in speakers:
            speaker.join()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(short_path / "outer"))
            client.sendall(b"word")
            assert client.recv(4096) == b"word"
    finally:
        over.set()
        link.close()
        listener.shutdown(socket.SHUT_RDWR)
        server.join()
        listener.close()
