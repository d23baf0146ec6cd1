"""The NBD client against nbdkit and qemu-nbd, with everything they can be told to lack or do."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.media.base import ALLOC_HOLE, ALLOC_ZERO
from bitmapd.media.buffers import aligned
from bitmapd.nbd.client.target import NbdTarget
from bitmapd.net.uri import NbdUri
from tests.support.nbdpeers import (
    KIB,
    MIB,
    Peer,
    allocation,
    completion,
    exercise,
    fail,
    image,
    nbdkit,
    opened,
    qemu_nbd,
    read,
    read_all,
    short_folder,
    succeed,
    write,
)

SIZE = 4 * MIB
BLOCKS_OF_4_TO_64_KIB = (
    "blocksize-minimum=4K",
    "blocksize-preferred=4K",
    "blocksize-maximum=64K",
    "blocksize-error-policy=error",
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


async def refused(uri: NbdUri, number: int) -> str:
    target = NbdTarget(asyncio.get_running_loop(), uri)
    text = await fail(number, target.open)
    assert not target.connected
    assert text.startswith(f"{uri}: ")
    target.close()
    return text


def exercise_file(peer: Peer, file: Path, export: str = "", **options: object) -> None:
    """Use the server hard, then compare its file with the model byte by byte."""

    async def use() -> bytes:
        target = await opened(peer.uri(export), **options)
        try:
            return await exercise(target)
        finally:
            target.close()

    model = asyncio.run(use())
    assert file.read_bytes() == model


# -- what servers have and lack -----------------------------------------------------------
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--no-sr"],
        ["--mask-handshake=0"],
        ["--mask-handshake=1"],
        ["--mask-handshake=2"],
        ["--filter=noextents"],
        ["--filter=nozero"],
        ["--filter=nozero", "zeromode=notrim"],
        ["--filter=fua"],
        ["--filter=fua", "fuamode=emulate"],
        ["--filter=fua", "--filter=nozero"],
        ["--filter=multi-conn", "multi-conn-mode=disable"],
        ["--filter=blocksize-policy", *BLOCKS_OF_4_TO_64_KIB],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_nbdkit(folder: Path, options: list[str], tcp: bool) -> None:
    file = image(folder / "disk", SIZE, seed=3)
    filters = [word for word in options if word.startswith("--")]
    parameters = [word for word in options if not word.startswith("--")]
    with nbdkit(folder, *filters, "file", file, *parameters, tcp=tcp) as peer:
        exercise_file(peer, file, connections=3)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--discard=unmap", "--detect-zeroes=unmap"],
        ["--shared=4", "--export-name=vol é/0"],
        ["--cache=writethrough"],
    ],
    ids=" ".join,
)
def test_qemu_nbd(folder: Path, options: list[str], tcp: bool) -> None:
    file = image(folder / "disk", SIZE, seed=4)
    with qemu_nbd(folder, *options, file, tcp=tcp) as peer:
        export = "vol é/0" if "--shared=4" in options else ""
        exercise_file(peer, file, export, connections=3 if "--shared=4" in options else 1)


def test_blocks_of_the_server_are_respected(folder: Path) -> None:
    """A server that answers a request of the wrong size with an error sees none."""
    file = image(folder / "disk", SIZE + 2048, seed=5)
    policy = ["blocksize-minimum=4K", "blocksize-preferred=64K", "blocksize-maximum=128K"]
    arguments = ["--filter=blocksize-policy", "file", file, *policy, "blocksize-error-policy=error"]

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri())
        assert target.block_size_bytes == 4096
        assert target.size_bytes == SIZE
        buffer = aligned(512)
        text = await fail(errno.EINVAL, lambda done: target.read(512, buffer, done))
        assert "whole blocks of 4096" in text
        data = random.Random(1).randbytes(2 * MIB)
        await write(target, 4096, data)
        assert await read(target, 4096, 2 * MIB) == data
        await succeed(lambda done: target.zero(0, 2 * MIB, done))
        assert await read(target, 0, 2 * MIB) == bytes(2 * MIB)
        target.close()

    with nbdkit(folder, *arguments) as peer:
        asyncio.run(use(peer))


def test_sparse_reads_and_allocation(folder: Path) -> None:
    """qemu-nbd answers a read of data and holes in several pieces."""
    file = image(folder / "disk", SIZE)
    with open(file, "r+b") as disk:
        for at in range(0, SIZE, 512 * KIB):
            disk.seek(at + 64 * KIB)
            disk.write(random.Random(at).randbytes(64 * KIB))
    expected = file.read_bytes()

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri())
        assert await read(target, 0, SIZE) == expected
        pieces = await allocation(target, 0, SIZE)
        assert sum(length for length, _ in pieces) == SIZE
        at, zero_bytes = 0, 0
        for length, flags in pieces:
            if flags & ALLOC_ZERO:
                assert expected[at : at + length] == bytes(length)
                zero_bytes += length
            at += length
        assert zero_bytes == SIZE - 8 * 64 * KIB
        assert any(flags == ALLOC_HOLE | ALLOC_ZERO for _, flags in pieces)
        target.close()

    with qemu_nbd(folder, file) as peer:
        asyncio.run(use(peer))


def test_named_exports(folder: Path) -> None:
    """The export that the URI names is used, and no other."""
    files = folder / "files"
    files.mkdir()
    for seed, name in enumerate(("one", "two")):
        image(files / name, 64 * KIB, seed)

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri("two"))
        assert await read_all(target) == (files / "two").read_bytes()
        await write(target, 0, b"x" * 4096)
        await succeed(target.flush)
        target.close()
        assert "no export 'three'" in await refused(peer.uri("three"), errno.ENOENT)

    before = (files / "one").read_bytes()
    with nbdkit(folder, "file", f"dir={files}") as peer:
        asyncio.run(use(peer))
    assert (files / "one").read_bytes() == before
    assert (files / "two").read_bytes()[:4096] == b"x" * 4096


def test_wrong_export_name_of_qemu_nbd(folder: Path) -> None:
    file = image(folder / "disk", 64 * KIB)
    with qemu_nbd(folder, "--export-name=right", file) as peer:
        assert "no export" in asyncio.run(refused(peer.uri("wrong"), errno.ENOENT))


def test_a_large_memory_disk_at_its_end(folder: Path) -> None:
    """Offsets above 32 bits, and an allocation of more than 32 bits that is cut."""

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri())
        assert target.size_bytes == 1 << 45
        end = (1 << 45) - MIB
        await write(target, end, b"e" * MIB)
        assert await read(target, end - MIB, 2 * MIB) == bytes(MIB) + b"e" * MIB
        pieces = await allocation(target, 0, target.size_bytes)
        assert 0 < sum(length for length, _ in pieces) <= target.size_bytes
        target.close()

    with nbdkit(folder, "memory", "32T") as peer:
        asyncio.run(use(peer))


# -- servers that cannot be a secondary ---------------------------------------------------
def test_read_only_is_refused(folder: Path) -> None:
    file = image(folder / "disk", 64 * KIB)
    with nbdkit(folder, "-r", "file", file) as peer:
        assert "read-only" in asyncio.run(refused(peer.uri(), errno.EROFS))


def test_read_only_qemu_nbd_is_refused(folder: Path) -> None:
    file = image(folder / "disk", 64 * KIB)
    with qemu_nbd(folder, "--read-only", file) as peer:
        assert "read-only" in asyncio.run(refused(peer.uri(), errno.EROFS))


def test_an_export_without_flush_is_refused(folder: Path) -> None:
    script = ["get_size=echo 65536", "pread=dd if=/dev/zero bs=1 count=$3", "pwrite=cat >/dev/null"]
    with nbdkit(folder, "eval", *script) as peer:
        assert "no flush" in asyncio.run(refused(peer.uri(), errno.EOPNOTSUPP))


def test_oldstyle_is_refused(folder: Path) -> None:
    with nbdkit(folder, "-o", "memory", "64K") as peer:
        assert "oldstyle" in asyncio.run(refused(peer.uri(), errno.EPROTO))


def test_nobody_listens(folder: Path) -> None:
    asyncio.run(refused(NbdUri(False, socket_path=str(folder / "nobody")), errno.ENOENT))
    asyncio.run(refused(NbdUri(False, host="127.0.0.1", port=1), errno.ECONNREFUSED))


# -- servers that fail and dawdle ---------------------------------------------------------
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [
        ("pread", "EIO", errno.EIO),
        ("pwrite", "ENOSPC", errno.ENOSPC),
        ("zero", "EPERM", errno.EPERM),
        ("trim", "EINVAL", errno.EINVAL),
    ],
)
def test_errors_of_the_server(
    folder: Path, kind: str, name: str, number: int, structured: bool
) -> None:
    """An error ends one operation, and the link goes on."""
    trigger = folder / "trigger"
    options = [] if structured else ["--no-sr"]
    error = [f"error-{kind}={name}", f"error-{kind}-rate=100%", f"error-{kind}-file={trigger}"]

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri())
        buffer = aligned(64 * KIB)
        operations = {
            "pread": lambda done: target.read(0, buffer, done),
            "pwrite": lambda done: target.write(0, buffer, done),
            "zero": lambda done: target.zero(0, 64 * KIB, done),
            "trim": lambda done: target.trim(0, 64 * KIB, done),
        }
        for failing in (True, False, True):
            trigger.touch() if failing else trigger.unlink()
            for what, submit in operations.items():
                if failing and what == kind:
                    assert "the server says" in await fail(number, submit)
                else:
                    await succeed(submit)
        assert target.connected
        target.close()

    with nbdkit(folder, *options, "--filter=error", "memory", "1M", *error) as peer:
        asyncio.run(use(peer))


def test_flush_that_fails(folder: Path) -> None:
    """The error filter knows no flush, so a script stands in."""
    trigger = folder / "trigger"
    script = [
        "get_size=echo 65536",
        "pread=dd if=/dev/zero bs=$3 count=1",
        "can_write=exit 0",
        "can_flush=exit 0",
        "pwrite=cat >/dev/null",
        f"flush=test ! -e {trigger} || {{ echo 'EIO the disk is gone' >&2; exit 1; }}",
    ]

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri())
        await succeed(target.flush)
        trigger.touch()
        await fail(errno.EIO, target.flush)
        # The server has no FUA of its own, so a write that must be durable needs the flush.
        buffer = aligned(4096)
        await fail(errno.EIO, lambda done: target.write(0, buffer, done, True))
        await succeed(lambda done: target.write(0, buffer, done))
        trigger.unlink()
        await succeed(lambda done: target.write(0, buffer, done, True))
        target.close()

    with nbdkit(folder, "eval", *script) as peer:
        asyncio.run(use(peer))


def test_random_errors_are_answered_one_by_one(folder: Path) -> None:
    """A third of the writes fails; which ones succeeded is exactly what the medium shows."""
    file = image(folder / "disk", SIZE)
    error = ["error=EIO", "error-pwrite-rate=33%"]

    async def use(peer: Peer) -> tuple[set[int], int]:
        target = await opened(peer.uri())
        buffers = []
        written: set[int] = set()

        async def one(index: int) -> None:
            buffer = aligned(4096)
            buffer[:] = index.to_bytes(2, "big") * 2048
            buffers.append(buffer)
            if await completion(lambda done: target.write(index * 4096, buffer, done)) is None:
                written.add(index)

        count = SIZE // 4096
        await asyncio.gather(*(one(index) for index in range(1, count)))
        await succeed(target.flush)
        target.close()
        return written, count

    with nbdkit(folder, "--filter=error", "file", file, *error) as peer:
        written, count = asyncio.run(use(peer))
    assert 0 < len(written) < count - 1
    content = file.read_bytes()
    for index in range(1, count):
        expected = index.to_bytes(2, "big") * 2048 if index in written else bytes(4096)
        assert content[index * 4096 : (index + 1) * 4096] == expected


def test_delays_overlap(folder: Path) -> None:
    """64 writes of half a second each: one after the other, the last would time out."""

    async def use(peer: Peer) -> None:
        target = await opened(peer.uri(), timeout_s=10.0)
        buffer = aligned(4096)
        await asyncio.gather(
            *(
                succeed(lambda done, at=at: target.write(at, buffer, done))
                for at in range(0, 64 * 4096, 4096)
            )
        )
        target.close()

    with nbdkit(folder, "-t", "64", "--filter=delay", "memory", "1M", "wdelay=500ms") as peer:
        asyncio.run(use(peer))


def test_a_throttled_server(folder: Path) -> None:
    file = image(folder / "disk", SIZE, seed=6)
    with nbdkit(folder, "--filter=rate", "file", file, "rate=400M") as peer:
        exercise_file(peer, file)
