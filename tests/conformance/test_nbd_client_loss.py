"""The NBD client when its server dies, hangs or comes back."""

from __future__ import annotations

import asyncio
import errno
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.nbd.client.target import NbdTarget
from tests.support.nbdpeers import (
    KIB,
    MIB,
    Peer,
    completion,
    descriptors,
    fail,
    image,
    nbdkit,
    opened,
    qemu_nbd,
    read,
    read_all,
    reopen,
    short_folder,
    succeed,
    write,
)

SIZE = 8 * MIB


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


class Load:
    """Keeps writes in flight; remembers for each block what is on the medium for sure."""

    def __init__(self, target: NbdTarget, seed: int) -> None:
        self.target = target
        self.rng = random.Random(seed)
        self.known: dict[int, set[bytes]] = {}  # by block of 64 KiB: what it may hold
        self.ended = 0
        self.errors: list[OSError] = []

    async def worker(self, blocks: list[int]) -> None:
        """Write until the link is lost; each worker has blocks of its own."""
        buffer = memoryview(bytearray(64 * KIB))
        while True:
            block = self.rng.choice(blocks)
            data = self.rng.randbytes(16) * (4 * KIB)
            buffer[:] = data
            before = self.known.setdefault(block, {bytes(64 * KIB)})
            before.add(data)
            offset = block * 64 * KIB
            error = await completion(lambda done: self.target.write(offset, buffer, done))
            self.ended += 1
            if error is not None:
                self.errors.append(error)
                return
            self.known[block] = {data}

    def holds(self, content: bytes) -> bool:
        """A write that failed may have left old, new, or a mixture of both by sectors."""
        for block, allowed in self.known.items():
            piece = content[block * 64 * KIB : (block + 1) * 64 * KIB]
            for at in range(0, 64 * KIB, 512):
                if all(piece[at : at + 512] != data[at : at + 512] for data in allowed):
                    return False
        return True


@pytest.mark.parametrize("server", [nbdkit, qemu_nbd])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_kill_9_with_requests_in_flight(folder: Path, server: object, tcp: bool) -> None:
    """Ten times: what was acknowledged is in the file, and `open` works again."""
    file = image(folder / "disk", SIZE)
    arguments = ["file", file] if server is nbdkit else [file]

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri(), timeout_s=10.0)
        load = Load(target, seed=7)
        files_open = descriptors()
        for round_number in range(10):
            async with asyncio.TaskGroup() as group:
                for worker in range(16):
                    group.create_task(load.worker(list(range(worker, 128, 16))))
                enough = load.ended + 20 + 30 * (round_number % 3)
                while load.ended < enough:
                    await asyncio.sleep(0)
                peer.kill()
            assert not target.connected
            assert len(load.errors) == 16
            assert {error.errno for error in load.errors} == {errno.ENOTCONN}
            load.errors.clear()
            assert load.holds(file.read_bytes())
            peer.start()
            await succeed(target.open)
            assert load.holds(await read_all(target))
        assert descriptors() == files_open
        target.close()

    with server(folder, *arguments, tcp=tcp) as peer:  # type: ignore[operator]
        asyncio.run(use(peer))


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_a_server_that_stops_answering(folder: Path, tcp: bool) -> None:
    """SIGSTOP: small requests, and one that does not fit the socket, run into the time-out.

    With qemu-nbd, since nbdkit 1.32 may abort when a client leaves while replies are pending
    (assertion in raw_send_socket).
    """
    file = image(folder / "disk", SIZE)

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri(), timeout_s=1.0)
        await write(target, 0, b"a" * 4096)
        peer.stop()
        large = memoryview(bytearray(SIZE))
        small = memoryview(bytearray(b"b" * 4096))
        texts = await asyncio.gather(
            fail(errno.ETIMEDOUT, lambda done: target.read(4096, small[:512], done)),
            fail(errno.ETIMEDOUT, lambda done: target.write(4096, small, done)),
            fail(errno.ETIMEDOUT, lambda done: target.write(0, large, done)),
            fail(errno.ETIMEDOUT, target.flush),
        )
        assert all("no reply to a request for" in text for text in texts)
        await fail(errno.ENOTCONN, target.flush)
        # The kernel still takes connections for a stopped process, but nobody shakes hands.
        assert "no answer within 1 s" in await fail(errno.ETIMEDOUT, target.open)
        peer.signal(signal.SIGCONT)
        await reopen(target)
        assert (await read(target, 0, 4096)) in (b"a" * 4096, bytes(4096))
        target.close()

    with qemu_nbd(folder, file, tcp=tcp) as peer:
        asyncio.run(use(peer))


def test_a_server_that_shuts_down(folder: Path) -> None:
    """The link is lost without a request, and is known to be."""
    file = image(folder / "disk", SIZE)

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri())
        await write(target, 0, b"a" * 4096)
        peer.signal(signal.SIGTERM)
        while target.connected:
            await asyncio.sleep(0.01)
        assert "closed the connection" in await fail(errno.ENOTCONN, target.flush)
        peer.kill()
        peer.start()
        await succeed(target.open)
        assert await read(target, 0, 4096) == b"a" * 4096
        target.close()

    with qemu_nbd(folder, file) as peer:
        asyncio.run(use(peer))


def test_another_disk_under_the_same_name(folder: Path) -> None:
    """Size and abilities are those of the newest `open`."""
    small, large = image(folder / "small", MIB), image(folder / "large", 2 * MIB)

    async def use(peer: Peer, other: Peer) -> None:
        target = await opened(peer.uri())
        assert (target.size_bytes, target.block_size_bytes) == (MIB, 512)
        peer.kill()
        while target.connected:
            await asyncio.sleep(0.01)
        other.start()
        await succeed(target.open)
        assert (target.size_bytes, target.block_size_bytes) == (2 * MIB, 4096)
        target.close()

    blocks = ["blocksize-minimum=4K", "blocksize-preferred=4K", "blocksize-maximum=1M"]
    with nbdkit(folder, "file", small) as peer:
        command = ["nbdkit", "-f", "--filter=blocksize-policy", "file", str(large), *blocks]
        other = Peer(folder, command, ["-U", "{path}"], tcp=False)
        try:
            asyncio.run(use(peer, other))
        finally:
            other.close()
