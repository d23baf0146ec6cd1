"""The NBD client against the project's own server: one mirror's volume as another's secondary."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.media.base import ALLOC_HOLE, ALLOC_ZERO
from bitmapd.media.kdevice import KernelDevice
from bitmapd.net.tls import server_context
from bitmapd.net.uri import NbdUri
from tests.support.nbdcerts import make_certificates
from tests.support.nbdpeers import (
    KIB,
    MIB,
    allocation,
    completion,
    exercise,
    fail,
    image,
    opened,
    read,
    short_folder,
    succeed,
    write,
)
from tests.support.nbdserve import HeldDevice, ServerThread

SIZE = 4 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_everything(folder: Path, tmp_path: Path, tls: bool) -> None:
    file = image(folder / "disk", SIZE, seed=8)
    certificates = make_certificates(tmp_path) / "good" if tls else None
    context = server_context(certificates) if certificates is not None else None
    path = str(folder / "s")

    async def use() -> bytes:
        uri = NbdUri(tls, "vol0", socket_path=path)
        target = await opened(uri, connections=3, tls_certificates=certificates)
        try:
            return await exercise(target)
        finally:
            target.close()

    with ServerThread(lambda loop, engine: KernelDevice(file, engine), tls=context) as server:
        server.call(lambda: server.server.listen_unix(path, tls=tls))
        model = asyncio.run(use())
    assert file.read_bytes() == model


def test_semantics_and_errors_arrive(folder: Path) -> None:
    path = str(folder / "s")

    async def use(server: ServerThread) -> None:
        target = await opened(NbdUri(False, socket_path=path))
        assert (target.size_bytes, target.block_size_bytes) == (SIZE, 4096)
        server.device.pieces = [(64 * KIB, 0), (SIZE - 64 * KIB, ALLOC_HOLE | ALLOC_ZERO)]
        assert await allocation(target, 0, SIZE) == server.device.pieces
        server.device.fail_with = OSError(errno.ENOSPC, "the disk is full")
        buffer = memoryview(bytearray(4096))
        text = await fail(errno.ENOSPC, lambda done: target.write(0, buffer, done))
        assert "the server says" in text
        server.device.fail_with = None
        await write(target, 4096, b"x" * 4096, fua=True)
        assert await read(target, 4096, 4096) == b"x" * 4096
        target.close()

    with ServerThread(lambda loop, _: HeldDevice(loop, SIZE, 4096)) as server:
        server.call(lambda: server.server.listen_unix(path))
        asyncio.run(use(server))


def test_old_writes_are_over_before_a_client_is_let_in_again(folder: Path) -> None:
    """What a lost link had in flight cannot land on top of what the new one writes."""
    path = str(folder / "s")

    async def use(server: ServerThread) -> None:
        target = await opened(NbdUri(False, socket_path=path), timeout_s=1.0)
        server.call(lambda: setattr(server.device, "held", True))
        old = memoryview(bytearray(b"o" * 4096))
        await fail(errno.ETIMEDOUT, lambda done: target.write(0, old, done))
        again = asyncio.ensure_future(completion(target.open))
        await asyncio.sleep(0.2)
        assert not again.done()
        server.call(lambda: setattr(server.device, "held", False))
        server.call(server.device.release)
        assert await again is None
        await write(target, 0, b"n" * 4096)
        await succeed(target.flush)
        assert await read(target, 0, 4096) == b"n" * 4096
        target.close()

    with ServerThread(lambda loop, _: HeldDevice(loop, SIZE, 4096)) as server:
        server.call(lambda: server.server.listen_unix(path))
        asyncio.run(use(server))
