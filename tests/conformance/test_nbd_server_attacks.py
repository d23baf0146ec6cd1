"""faults.md, case 29: hostile clients get an error or are dropped, never more; others go on.

The server is a process of its own over a real file; while each attack runs, a well-behaved client
keeps reading and writing, and at the end the memory of the server is looked at.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.nbd.numbers import Cmd, CmdFlag, Errno, Opt, Rep
from tests.support.nbdraw import RawClient, context_data, info_data, option, request, string, write
from tests.support.nbdserve import MIB, ServerProcess, serve

SIZE = 128 * MIB
# The interpreter with its modules, the pool of 64 MiB that the tests use in full, and some room.
MEMORY_LIMIT = 140 * MIB


class Bystander(threading.Thread):
    """A client that minds its own business; `finish` raises what went wrong for it."""

    def __init__(self, path: str) -> None:
        super().__init__(name="bystander")
        self._client = RawClient(path).enter()
        self._ending = threading.Event()
        self._error: BaseException | None = None
        self.rounds = 0

    def run(self) -> None:
        chance = random.Random(4)
        try:
            while not self._ending.is_set() or not self.rounds:
                offset = chance.randrange(SIZE // 2, SIZE - 65536) // 512 * 512
                content = chance.randbytes(chance.randrange(1, 64) * 512)
                self._client.write(offset, content)
                assert self._client.read(offset, len(content)) == content
                self.rounds += 1
                self._ending.wait(0.002)
        except BaseException as error:  # noqa: BLE001  (told to the test by finish)
            self._error = error

    def finish(self) -> None:
        self._ending.set()
        self.join(60)
        self._client.sock.close()
        if self._error is not None:
            raise self._error


@pytest.fixture(scope="module")
def victim() -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory(prefix="nbd") as folder:
        image = Path(folder) / "image"
        with image.open("wb") as file:
            file.truncate(SIZE)
        with serve(image, "--timeout", "2", unix=Path(folder) / "s") as server:
            yield server


@pytest.fixture
def path(victim: ServerProcess) -> Iterator[str]:
    if victim.unix is None:
        raise RuntimeError("the victim has no socket")
    bystander = Bystander(victim.unix)
    bystander.start()
    try:
        yield victim.unix
    finally:
        bystander.finish()
    assert victim.process.poll() is None
    assert victim.resident_bytes() < MEMORY_LIMIT


def quietly_send(client: RawClient, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        client.send(data)


# -- handshake -----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [65537, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF])
@pytest.mark.parametrize("number", [Opt.GO, Opt.EXPORT_NAME, Opt.LIST, 0xFFFFFFFF])
def test_huge_option(path: str, number: int, length: int) -> None:
    with RawClient(path) as client:
        client.greet()
        quietly_send(client, struct.pack(">QII", 0x49484156454F5054, number, length))
        quietly_send(client, bytes(1 << 16))
        assert client.dropped()


def test_large_option_is_skipped(path: str) -> None:
    with RawClient(path) as client:
        client.greet()
        assert client.ask(Opt.GO, bytes(65536))[0][0] == Rep.ERR_TOO_BIG
        assert client.ask(Opt.LIST)[-1][0] == Rep.ACK


@pytest.mark.parametrize(
    "data",
    [
        option(Opt.GO, b"\xff\xff\xff\xff"),
        option(Opt.GO, string("") + b"\xff\xff"),
        option(Opt.INFO, struct.pack(">I", 0xFFFFFFFC) + bytes(100)),
        option(Opt.SET_META_CONTEXT, string("") + b"\xff\xff\xff\xff"),
        option(Opt.LIST_META_CONTEXT, context_data("n" * 3000, "q" * 3000)),
        option(Opt.GO, info_data("\x01\x02\x7f")),
        option(Opt.STARTTLS),
    ],
)
def test_lying_option_data(path: str, data: bytes) -> None:
    with RawClient(path) as client:
        client.greet()
        assert client.ask(Opt.STRUCTURED_REPLY)[-1][0] == Rep.ACK
        client.send(data)
        _, _, reply, length = struct.unpack(">QIII", client.receive(20))
        assert reply & 1 << 31
        assert len(client.receive(length)) < 200
        assert client.ask(Opt.LIST)[-1][0] == Rep.ACK


def test_endless_options(path: str) -> None:
    with RawClient(path) as client:
        client.greet()
        quietly_send(client, option(Opt.LIST) * 5000)
        with pytest.raises((EOFError, ConnectionResetError)):
            client.receive(5000 * 60)


def test_noise_from_the_start(path: str) -> None:
    chance = random.Random(1)
    for _ in range(100):
        with RawClient(path) as client:
            quietly_send(client, chance.randbytes(chance.randrange(1, 3000)))
            client.sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while client.sock.recv(4096):
                    pass


# -- requests ------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", [False, True])
def test_requests_that_are_refused(path: str, structured: bool) -> None:
    with RawClient(path) as client:
        client.enter(structured=structured, block_status=structured)
        for data, error in (
            (request(Cmd.READ, 1, 0, 0), Errno.EINVAL),
            (request(Cmd.READ, 1, 0, 0xFFFFFFFF), Errno.EINVAL),
            (request(Cmd.READ, 1, 0, 32 * MIB + 512), Errno.EINVAL),
            (request(Cmd.READ, 1, 1, 512), Errno.EINVAL),
            (request(Cmd.READ, 1, SIZE, 512), Errno.EINVAL),
            (request(Cmd.READ, 1, (1 << 64) - 512, 1024), Errno.EINVAL),
            (request(Cmd.READ, 1, 0, 512, 0xFFE0), Errno.EINVAL),
            (request(Cmd.WRITE, 1, 0, 0), Errno.EINVAL),
            (write(1, 3, bytes(512)), Errno.EINVAL),
            (write(1, SIZE, bytes(512)), Errno.ENOSPC),
            (write(1, 0, bytes(512), CmdFlag.DF), Errno.EINVAL),
            (write(1, (1 << 64) - 512, bytes(512)), Errno.ENOSPC),
            (request(Cmd.WRITE_ZEROES, 1, 0, 0xFFFFFE00), Errno.ENOSPC),
            (request(Cmd.TRIM, 1, 0, 0xFFFFFE00), Errno.EINVAL),
            (request(Cmd.FLUSH, 1, 512, 0), Errno.EINVAL),
            (request(Cmd.RESIZE, 1, 0, 512), Errno.EINVAL),
            (request(0xFFFF, 1, 0, 512), Errno.EINVAL),
            (request(Cmd.BLOCK_STATUS, 1, 0, 0), Errno.EINVAL),
            (request(Cmd.CACHE, 1, SIZE, 512), Errno.EINVAL),
        ):
            assert client.call(data).error == error, data[:28].hex()
        assert client.read(0, 512) == bytes(512)


def test_oversized_write_up_to_a_limit_is_skipped(path: str) -> None:
    with RawClient(path) as client:
        client.enter()
        client.send(request(Cmd.WRITE, 1, 0, 40 * MIB))
        for _ in range(40):
            client.send(bytes(MIB))
        assert client.answer().error == Errno.EINVAL
        assert client.read(0, 512) == bytes(512)


@pytest.mark.parametrize("length", [64 * MIB + 512, 0xFFFFFFFF])
def test_huge_write_drops(path: str, length: int) -> None:
    with RawClient(path) as client:
        client.enter()
        client.send(request(Cmd.WRITE, 1, 0, length))
        assert client.dropped()


@pytest.mark.parametrize("magic", [0, 0x25609514, 0x13956025])
def test_bad_magic_drops(path: str, magic: int) -> None:
    with RawClient(path) as client:
        client.enter()
        client.send(request(Cmd.READ, 1, 0, 512, magic=magic))
        assert client.dropped()


def test_bad_magic_behind_good_requests(path: str) -> None:
    with RawClient(path) as client:
        client.enter()
        client.send(write(1, 0, bytes(512)) * 20 + b"\0" * 28)
        with pytest.raises((EOFError, ConnectionResetError)):
            client.receive(16 * 21)


def test_a_byte_at_a_time(path: str) -> None:
    content = os.urandom(512)
    with RawClient(path) as client:
        client.enter(structured=True)
        for byte in write(1, 4096, content) + request(Cmd.READ, 2, 4096, 512):
            client.send(bytes([byte]))
        assert client.answer().error == 0
        assert client.answer().data == content
        client.write(4096, bytes(512))


def test_half_messages(path: str) -> None:
    whole = write(1, 8192, b"h" * 4096)
    for length in (1, 27, 28, 29, 540, len(whole) - 1):
        with RawClient(path) as client:
            client.enter()
            client.send(whole[:length])
    with RawClient(path) as client:
        assert client.enter().read(8192, 4096) == bytes(4096)


def test_a_flood_of_refused_requests(path: str) -> None:
    """The answers are larger than the requests; they are not piled up for who does not read."""
    with RawClient(path) as client:
        client.enter(structured=True)
        client.sock.settimeout(1.0)
        with contextlib.suppress(TimeoutError):
            for _ in range(2000):
                client.send(request(Cmd.READ, 1, 1, 512) * 1000)


def test_holding_memory_hostage(path: str) -> None:
    """Writes that never arrive in full: whoever holds buffers is dropped when others wait."""
    hogs = [RawClient(path).enter() for _ in range(8)]
    for hog in hogs:
        hog.send(request(Cmd.WRITE, 1, 0, 32 * MIB) + bytes(1000))
    with RawClient(path, timeout_s=100) as client:
        client.enter()
        client.write(0, bytes(512))
    for hog in hogs:
        hog.sock.close()


def test_random_requests(path: str) -> None:
    chance = random.Random(2)
    for _ in range(30):
        with RawClient(path) as client:
            client.enter(structured=True, block_status=True)
            for _ in range(100):
                quietly_send(
                    client,
                    request(
                        chance.randrange(0, 10),
                        chance.randrange(1 << 64),
                        chance.randrange(0, SIZE // 2, 512),
                        chance.randrange(0, 1 << 16, 512),
                        chance.choice([0, 0, 0, 1, 2, 4, 8, 16, 31, 32]),
                        b"",
                        chance.choice([0x25609513] * 50 + [1]),
                    ),
                )
            client.sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while client.sock.recv(1 << 20):
                    pass


# -- numbers -------------------------------------------------------------------------------


def test_thousands_of_connects(path: str, victim: ServerProcess) -> None:
    for number in range(5000):
        with contextlib.suppress(ConnectionError, EOFError), RawClient(path) as client:
            if number % 3:
                client.receive(18)
            if number % 3 == 2:
                client.send(b"\0\0\0\3" + option(Opt.LIST))
    descriptors = Path(f"/proc/{victim.process.pid}/fd")
    with RawClient(path) as client:
        client.enter()
        assert client.read(0, 512) == bytes(512)
        assert len(list(descriptors.iterdir())) < 64 + 20


def test_hundreds_of_idle_clients_at_once(path: str) -> None:
    idle = [RawClient(path) for _ in range(300)]
    with RawClient(path) as client:
        assert client.enter().read(0, 512) == bytes(512)
    for client in idle:
        client.sock.close()
