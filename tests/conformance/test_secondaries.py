"""Foreign servers as secondaries of a whole volume: whatever they are, both sides become equal.

The copy is read back through the server by a foreign client, so what counts is what the server
would hand to somebody who takes over, also where it keeps the data in a cache or an overlay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bitmapd.net.uri import NbdUri, format_uri
from tests.support import rawnbd
from tests.support.nbdpeers import nbd_server, nbdkit, qemu_nbd, qemu_storage_daemon
from tests.support.needs import need
from tests.support.volumes import KIB, MIB, Volume, make_file, noise, run

SIZE = 16 * MIB

NBDKIT = {
    "plain": [],
    "delay": ["--filter=delay", "wdelay=20ms", "delay-zero=20ms"],
    "errors": ["--filter=error", "error-pwrite=EIO", "error-pwrite-rate=2%"],
    "zeroing always fails": ["--filter=error", "error-zero=EIO", "error-zero-rate=100%"],
    "zeroing is invalid": ["--filter=error", "error-zero=EINVAL", "error-zero-rate=100%"],
    "blocks of 4 to 64 KiB": [
        "--filter=blocksize-policy",
        *("blocksize-minimum=4K", "blocksize-preferred=4K", "blocksize-maximum=64K"),
        "blocksize-error-policy=error",
    ],
    "cache": ["--filter=cache", "cache=writeback"],
    "overlay": ["--filter=cow"],
    "rate": ["--filter=rate", "rate=400M"],
    "no zeroes": ["--filter=nozero"],
    "no trim, zeroes as data": ["--filter=nozero", "zeromode=plugin"],
    "every write durable": ["--filter=fua", "fuamode=force"],
    "one connection": ["--filter=multi-conn", "multi-conn-mode=disable"],
    "in the middle of a file": ["--filter=offset", "offset=1M", f"range={SIZE}"],
    "no structured replies": ["--no-sr"],
}
QEMU_NBD = {
    "plain": ["--shared=2"],
    "unmaps": ["--shared=2", "--discard=unmap", "--detect-zeroes=unmap"],
    "write-through": ["--shared=2", "--cache=writethrough"],
}
SERVERS = [
    *(f"nbdkit, {name}" for name in NBDKIT),
    *(f"qemu-nbd, {name}" for name in QEMU_NBD),
    "qemu-storage-daemon",
    "nbd-server",
]


@contextmanager
def served(server: str, folder: Path) -> Iterator[str]:
    """The URI of an export of SIZE bytes that holds something else than the primary."""
    program, _, name = server.partition(", ")
    far = folder / "far"
    far.write_bytes(noise(1, SIZE + 2 * MIB))
    if program == "nbdkit":
        if name != "in the middle of a file":
            make_file(far, SIZE).write_bytes(noise(1, SIZE))
        options = [word for word in NBDKIT[name] if word.startswith("-")]
        parameters = [word for word in NBDKIT[name] if not word.startswith("-")]
        with nbdkit(folder, *options, "file", far, *parameters) as peer:
            yield format_uri(peer.uri())
        return
    make_file(far, SIZE).write_bytes(noise(1, SIZE))
    if program == "qemu-nbd":
        with qemu_nbd(folder, *QEMU_NBD[name], far) as peer:
            yield format_uri(peer.uri())
    elif program == "nbd-server":
        with nbd_server(folder, far) as path:
            yield format_uri(NbdUri(False, "disk", socket_path=path))
    else:
        with qemu_storage_daemon(folder, far) as peer:
            yield format_uri(peer.uri("disk"))


def use(volume: Volume) -> None:
    """Writes small and large, zeroes and trims, in places old and new."""
    with volume.host() as host:
        for number in range(60):
            length = (4 + number * 12 % 252) * KIB
            offset = number * 13 % 15 * MIB + number % 5 * 132 * KIB
            host.submit(rawnbd.WRITE, offset, length, noise(number, length))
        while host.in_flight:
            assert host.reply().error == 0
        host.call(rawnbd.WRITE_ZEROES, 3 * MIB, 2 * MIB)
        host.call(rawnbd.TRIM, 9 * MIB, MIB)
        host.call(rawnbd.WRITE, SIZE - 4096, 4096, noise(99, 4096), rawnbd.FUA)
        host.call(rawnbd.FLUSH)
        host.disconnect()


@pytest.mark.parametrize("server", SERVERS)
def test_a_whole_volume(short_path: Path, server: str) -> None:
    need("qemu-img")
    with served(server, short_path) as uri:
        volume = Volume(short_path, SIZE, secondary_target=uri, options=["--era-interval", "100ms"])
        with volume:
            volume.create("--force")
            volume.primary.write_bytes(noise(2, 10 * MIB) + bytes(6 * MIB))
            volume.start()
            use(volume)
            volume.wait_in_sync()
            use(volume)
            volume.wait_in_sync()
            volume.stop()
            assert volume.recorded() == set()
        copy = short_path / "copy"
        run(["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, str(copy)])
        assert copy.read_bytes() == volume.primary.read_bytes()
