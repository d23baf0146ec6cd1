"""The disk that loses unflushed writes loses only what it may (no guest needed)."""

from __future__ import annotations

import random
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.nbd.numbers import REQUEST_MAGIC, Cmd, CmdFlag, Info, Opt, Rep
from bitmapd.nbd.wire import (
    CLIENT_FLAGS,
    GREETING,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    REQUEST,
    SIMPLE_REPLY,
)
from tests.vm.lossy import TEAR_BYTES, LossyStore, Mode
from tests.vm.lossy_server import LossyServer

SECTORS = 48
SIZE = SECTORS * TEAR_BYTES

places = st.integers(0, SECTORS - 1).flatmap(
    lambda start: st.tuples(st.just(start), st.integers(start + 1, SECTORS))
)
steps = st.one_of(
    st.tuples(st.sampled_from(["write", "fua", "zero"]), places),
    st.tuples(st.sampled_from(["flush"]), st.none()),
    st.tuples(st.just("cut"), st.sampled_from(Mode)),
)


def filled(value: int, start: int, stop: int) -> bytes:
    return value.to_bytes(2, "big") * ((stop - start) * TEAR_BYTES // 2)


@contextmanager
def store(seed: int, cache_bytes: int = 1 << 20) -> Iterator[LossyStore]:
    with tempfile.TemporaryDirectory() as folder:
        made = LossyStore(Path(folder), SIZE, random.Random(seed), cache_bytes)
        try:
            yield made
        finally:
            made.close()


@given(st.lists(steps, max_size=25), st.integers(0, 2**32), st.sampled_from([2048, 1 << 20]))
def test_every_sector_is_one_of_its_versions_since_the_last_flush(
    script: list[tuple[str, tuple[int, int] | Mode | None]], seed: int, cache_bytes: int
) -> None:
    """`may[s]` holds what sector s may be after a cut; the last one is what a read gives."""
    may = [[0] for _ in range(SECTORS)]
    with store(seed, cache_bytes) as disk:
        for number, (action, argument) in enumerate(script, start=1):
            match action, argument:
                case ("flush", _):
                    disk.flush()
                    may = [versions[-1:] for versions in may]
                case ("cut", Mode() as mode):
                    disk.cut(mode)
                    medium = disk.medium_path.read_bytes()
                    for sector, versions in enumerate(may):
                        at = sector * TEAR_BYTES
                        now = int.from_bytes(medium[at : at + 2], "big")
                        assert medium[at : at + TEAR_BYTES] == filled(now, 0, 1)
                        assert now in versions
                        may[sector] = [now]
                case (_, (int(start), int(stop))):
                    value = 0 if action == "zero" else number
                    if action == "zero":
                        disk.zero(start * TEAR_BYTES, (stop - start) * TEAR_BYTES)
                    else:
                        data = filled(number, start, stop)
                        disk.write(start * TEAR_BYTES, data, fua=action == "fua")
                    for sector in range(start, stop):
                        may[sector] = [value] if action == "fua" else [*may[sector], value]
            shown = b"".join(filled(versions[-1], 0, 1) for versions in may)
            assert disk.read(0, SIZE) == shown
        disk.flush()
        disk.cut(Mode.NOTHING)
        assert disk.medium_path.read_bytes() == b"".join(filled(v[-1], 0, 1) for v in may)


@pytest.mark.parametrize(
    ("mode", "kept"), [(Mode.NOTHING, {b"a"}), (Mode.EVERYTHING, {b"b"}), (None, {b"a", b"b"})]
)
def test_modes_differ(mode: Mode | None, kept: set[bytes]) -> None:
    """Over many seeds the seeded choice gives what each fixed mode gives, and mixtures."""
    found = set()
    for seed in range(40):
        with store(seed) as disk:
            disk.write(0, b"a" * SIZE, fua=True)
            for at in range(0, SIZE, TEAR_BYTES):
                disk.write(at, b"b" * TEAR_BYTES)
            loss = disk.cut(mode)
            content = disk.medium_path.read_bytes()
            assert content.count(b"b") == loss.kept_bytes
            assert content.count(b"a") == loss.lost_bytes
            found.add(frozenset(content))
    single = {frozenset(letter) for letter in kept}
    assert single <= found
    assert (found == single) == (mode is not None)


def test_a_write_is_torn_within_itself() -> None:
    contents = set()
    for seed in range(40):
        with store(seed) as disk:
            disk.write(0, b"b" * SIZE)
            disk.cut(Mode.SECTORS)
            contents.add(disk.medium_path.read_bytes().count(0) // TEAR_BYTES)
    assert len(contents) > 5


def test_the_same_seed_loses_the_same() -> None:
    contents = set()
    for _ in range(2):
        with store(7) as disk:
            for at in range(0, SIZE, TEAR_BYTES):
                disk.write(at, b"b" * TEAR_BYTES)
            disk.cut()
            contents.add(disk.medium_path.read_bytes())
    assert len(contents) == 1


class Client:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(str(path))
        self.take(GREETING.size)
        self.socket.sendall(CLIENT_FLAGS.pack(3))
        self.size = 0
        self.socket.sendall(OPTION.pack(0x49484156454F5054, Opt.GO, 6) + bytes(6))
        kind = Rep.INFO
        while kind != Rep.ACK:
            _, _, kind, length = OPTION_REPLY.unpack(self.take(OPTION_REPLY.size))
            data = self.take(length)
            if data[:2] == bytes([0, Info.EXPORT]):
                self.size = INFO_EXPORT.unpack(data)[1]

    def take(self, length: int) -> bytes:
        got = b""
        while len(got) < length:
            part = self.socket.recv(length - len(got))
            assert part, "the server hung up"
            got += part
        return got

    def send(
        self, command: Cmd, at: int = 0, length: int = 0, data: bytes = b"", fua: bool = False
    ) -> None:
        flags = CmdFlag.FUA if fua else 0
        head = REQUEST.pack(REQUEST_MAGIC, flags, command, 1, at, length or len(data))
        self.socket.sendall(head + data)

    def ask(
        self, command: Cmd, at: int = 0, length: int = 0, data: bytes = b"", fua: bool = False
    ) -> tuple[int, bytes]:
        self.send(command, at, length, data, fua)
        _, error, _ = SIMPLE_REPLY.unpack(self.take(SIMPLE_REPLY.size))
        return error, self.take(length) if command == Cmd.READ and not error else b""


@contextmanager
def served(folder: Path) -> Iterator[tuple[LossyStore, LossyServer]]:
    disk = LossyStore(folder, SIZE, random.Random(1))
    server = LossyServer(disk, SIZE, 512, folder / "s")
    try:
        yield disk, server
    finally:
        server.close()
        disk.close()


def test_server_keeps_what_was_flushed_or_written_with_fua(short_path: Path) -> None:
    with served(short_path) as (disk, server):
        client = Client(server.path)
        assert client.size == SIZE
        assert client.ask(Cmd.WRITE, 0, data=b"f" * 512) == (0, b"")
        assert client.ask(Cmd.FLUSH) == (0, b"")
        assert client.ask(Cmd.WRITE, 512, data=b"u" * 512, fua=True) == (0, b"")
        assert client.ask(Cmd.WRITE, 1024, data=b"l" * 512) == (0, b"")
        assert client.ask(Cmd.WRITE_ZEROES, 0, length=512) == (0, b"")
        assert client.ask(Cmd.READ, 0, length=1536) == (0, bytes(512) + b"u" * 512 + b"l" * 512)
        assert client.ask(Cmd.WRITE, SIZE, data=bytes(512))[0] != 0
        client.socket.close()
        server.idle()
        disk.cut(Mode.NOTHING)
        assert disk.medium_path.read_bytes()[:1536] == b"f" * 512 + b"u" * 512 + bytes(512)
        assert Client(server.path).ask(Cmd.READ, 0, length=512) == (0, b"f" * 512)


def test_frozen_server_does_and_answers_nothing(short_path: Path) -> None:
    with served(short_path) as (disk, server):
        client = Client(server.path)
        client.ask(Cmd.WRITE, 0, data=b"1" * 512)
        server.freeze_after(2)
        client.ask(Cmd.WRITE, 512, data=b"2" * 512)
        client.ask(Cmd.FLUSH)
        client.send(Cmd.WRITE, 1024, data=b"3" * 512)
        client.send(Cmd.FLUSH)
        assert server.frozen.wait(20)
        client.socket.close()
        server.idle()
        disk.cut(Mode.EVERYTHING)
        assert disk.medium_path.read_bytes()[:1536] == b"1" * 512 + b"2" * 512 + bytes(512)
        server.thaw()
        assert Client(server.path).ask(Cmd.FLUSH) == (0, b"")
