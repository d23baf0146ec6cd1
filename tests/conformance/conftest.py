"""A server whose device completes when the test says so."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.nbdheld import Served
from tests.support.nbdserve import MIB, HeldDevice, ServerThread


@pytest.fixture
def sock_dir() -> Iterator[Path]:
    """Short, since the path of a socket is limited."""
    with tempfile.TemporaryDirectory(prefix="nbd") as folder:
        yield Path(folder)


@pytest.fixture
def make(sock_dir: Path) -> Iterator[Any]:
    opened: list[Any] = []

    def start(size_bytes: int = 4 * MIB, block: int = 512, **options: Any) -> Served:
        thread = ServerThread(lambda loop, _: HeldDevice(loop, size_bytes, block), **options)
        thread.__enter__()
        path = str(sock_dir / f"s{len(opened)}")
        served = Served(thread, path)
        opened.append(served)
        thread.call(lambda: thread.server.listen_unix(path))
        return served

    yield start
    for served in opened:
        for client in served.clients:
            client.sock.close()
        served.thread.call(served.release_all)
        served.thread.__exit__()
        # Whatever happened, no buffer is lost.
        assert served.thread.pool.out_bytes == 0
