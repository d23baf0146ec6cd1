"""The kernel's NBD client, with servers that are foreign to it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.attach.kernel import negotiate
from dmctl.kernel.nbd_netlink import NbdNetlink, find_device, raise_request_size
from tests.vm.guest.disks import MIB, sh
from tests.vm.guest.erastack import direct, queue

SIZE = 8 * MIB
UUID = "0123456789abcdef" * 2
SOON_S = 30.0


class Server:
    """nbdkit over a file."""

    def __init__(self, folder: Path, *filters: str) -> None:
        self.image = folder / "image"
        if not self.image.exists():
            with self.image.open("wb") as stream:
                stream.truncate(SIZE)
        self._path = folder / f"s{len(list(folder.iterdir()))}"
        words = ["nbdkit", "--foreground", "--unix", str(self._path)]
        named = [f"--filter={name.partition(' ')[0]}" for name in filters]
        options = [name.partition(" ")[2] for name in filters]
        # Only once it has written its pid does it listen.
        pid = folder / f"{self._path.name}.pid"
        self._process = subprocess.Popen(
            [*words, f"--pidfile={pid}", *named, "file", str(self.image), *options]
        )
        until(pid.exists)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self._path))
        sock.setblocking(False)

        async def shake() -> tuple[int, int]:
            return await negotiate(asyncio.get_running_loop(), sock, "")

        self.size, self.flags = asyncio.run(shake())
        sock.setblocking(True)
        return sock

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(SOON_S)


def until(condition: object) -> None:
    end_s = time.monotonic() + SOON_S
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end_s, "it does not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(folder: Path, *filters: str) -> Iterator[Server]:
    server = Server(folder, *filters)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def client() -> Iterator[NbdNetlink]:
    sh("modprobe", "nbd", "max_part=0")
    with NbdNetlink() as made:
        before = {index for index, used in made.configured().items() if used}
        yield made
        for index, used in made.configured().items():
            if used and index not in before:
                made.disconnect(index)


def connect(client: NbdNetlink, server: Server, uuid: str = UUID, timeout_s: int = 10) -> int:
    with server.connect() as sock:
        return client.connect(
            sock.fileno(),
            uuid,
            size_bytes=SIZE,
            logical_block_bytes=512,
            timeout_s=timeout_s,
            dead_conn_timeout_s=1000,
            flags=server.flags,
        )


def reconnect(
    client: NbdNetlink, index: int, server: Server, deadline_s: float = SOON_S, uuid: str = UUID
) -> None:
    with server.connect() as sock:
        client.reconnect(
            index,
            sock.fileno(),
            uuid,
            timeout_s=2,
            dead_conn_timeout_s=1000,
            deadline_s=deadline_s,
        )


def put(index: int, offset: int, text: bytes) -> None:
    with direct(f"/dev/nbd{index}") as write:
        write(offset, text.ljust(4096))


def found(server: Server, offset: int) -> bytes:
    with server.image.open("rb") as stream:
        stream.seek(offset)
        return stream.read(4096).strip()


def test_connected_and_found_again(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert find_device(UUID) is None
        index = connect(client, server)
        device = f"/dev/nbd{index}"
        assert find_device(UUID) == index
        assert client.configured()[index]
        assert queue(device, "logical_block_size") == 512
        assert int(Path(f"/sys/block/nbd{index}/size").read_text()) * 512 == SIZE
        raise_request_size(index, 1280)
        assert queue(device, "max_sectors_kb") == 1280
        put(index, MIB, b"hello")
        assert found(server, MIB) == b"hello"
        client.disconnect(index)
        assert find_device(UUID) is None
        client.disconnect(index)


def test_the_kernel_chooses_devices_and_makes_more(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        uuids = [f"{number:032x}" for number in range(18)]
        indexes = [connect(client, server, uuid) for uuid in uuids]
        assert len(set(indexes)) == len(uuids)
        assert [find_device(uuid) for uuid in uuids] == indexes


def test_requests_wait_for_a_server_that_died(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        index = connect(client, server)
        put(index, 0, b"before")
        server.kill()
        late = threading.Thread(target=put, args=(index, 4096, b"after"))
        late.start()
        with serving(tmp_path) as second:
            reconnect(client, index, second)
            late.join(SOON_S)
            assert not late.is_alive()
            assert found(second, 0) == b"before"
            assert found(second, 4096) == b"after"
            client.disconnect(index)


def test_a_request_that_its_server_had_is_sent_again(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path, "delay wdelay=60") as slow:
        index = connect(client, slow, timeout_s=2)
        late = threading.Thread(target=put, args=(index, 8192, b"twice"))
        late.start()
        inflight = Path(f"/sys/block/nbd{index}/inflight")
        until(lambda: inflight.read_text().split()[1] != "0")
        slow.kill()
        with serving(tmp_path) as second:
            reconnect(client, index, second)
            late.join(SOON_S)
            assert not late.is_alive()
            assert found(second, 8192) == b"twice"
            client.disconnect(index)


def test_an_old_connection_that_lives_is_told(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server, serving(tmp_path) as second:
        index = connect(client, server)
        with pytest.raises(OSError, match="its old connection is alive") as refused:
            reconnect(client, index, second, deadline_s=0.3)
        assert refused.value.errno == errno.EBUSY
        put(index, 0, b"works")
        assert found(server, 0) == b"works"
        client.disconnect(index)


def test_the_death_of_the_old_connection_is_waited_for(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server, serving(tmp_path) as second:
        index = connect(client, server)
        killer = threading.Timer(0.7, server.kill)
        killer.start()
        try:
            reconnect(client, index, second)
        finally:
            killer.join()
        put(index, 0, b"works")
        assert found(second, 0) == b"works"
        client.disconnect(index)


def test_a_device_of_another_volume_is_refused(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server, serving(tmp_path) as second:
        index = connect(client, server)
        server.kill()
        with pytest.raises(OSError, match=f"cannot reconnect /dev/nbd{index}"):
            reconnect(client, index, second, uuid="f" * 32)
        reconnect(client, index, second)
        put(index, 0, b"works")
        client.disconnect(index)


def test_giving_up_fails_what_waits(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        index = connect(client, server)
        put(index, 0, b"works")  # and the kernel has looked for partitions
        server.kill()
        errors: list[OSError] = []

        def write() -> None:
            try:
                put(index, 0, b"lost")
            except OSError as error:
                errors.append(error)

        waiting = threading.Thread(target=write)
        waiting.start()
        waiting.join(0.5)  # a request that was not sent yet is in no counter
        assert waiting.is_alive()
        client.disconnect(index)
        waiting.join(SOON_S)
        assert not waiting.is_alive()
        assert [error.errno for error in errors] == [errno.EIO]


def test_a_larger_size_is_taken_up(client: NbdNetlink, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        index = connect(client, server)
        os.truncate(server.image, 2 * SIZE)
        client.resize(index, UUID, 2 * SIZE)
        assert int(Path(f"/sys/block/nbd{index}/size").read_text()) * 512 == 2 * SIZE
        client.disconnect(index)


def test_what_is_no_socket_is_refused_and_nothing_is_left(client: NbdNetlink) -> None:
    with (
        open("/dev/null", "rb") as stream,
        pytest.raises(OSError, match="cannot connect a device of the kernel's NBD client"),
    ):
        client.connect(
            stream.fileno(),
            UUID,
            size_bytes=SIZE,
            logical_block_bytes=512,
            timeout_s=10,
            dead_conn_timeout_s=10,
            flags=1,
        )
    assert find_device(UUID) is None
    assert not any(client.configured().values())


def test_without_the_module_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fault case 26."""
    sh("modprobe", "-r", "nbd")
    with monkeypatch.context() as patch:
        refusing = tmp_path / "modprobe"
        refusing.write_text("#!/bin/sh\nexit 1\n")
        refusing.chmod(0o755)
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(OSError, match="the kernel has no NBD client") as missing:
            NbdNetlink()
        assert missing.value.errno == errno.ENODEV
        patch.setenv("PATH", "")
        with pytest.raises(OSError, match="cannot load the kernel's NBD client"):
            NbdNetlink()
    with NbdNetlink():  # asks for the module
        assert Path("/sys/module/nbd").exists()
