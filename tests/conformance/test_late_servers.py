"""Which servers may carry out a write of a lost connection beside the next one, and which may not:
the table of docs/recovery.md, "What may land late"."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.latedisk import LateDisk
from tests.support.nbdpeers import nbdkit, qemu_nbd
from tests.support.nbdserve import MIB
from tests.support.rawnbd import RawNbd

KEPT = b"1" * 4096


@pytest.fixture
def disk(tmp_path: Path) -> LateDisk:
    return LateDisk(tmp_path, MIB)


def lands_on_top(disk: LateDisk, socket: str | None) -> bool:
    """Whether the next client, greeted by now, finds the old write landing after it has looked."""
    assert socket is not None
    disk.lose_a_connection(Path(socket), KEPT)
    with RawNbd(Path(socket)) as client:
        before = client.call(rawnbd.READ, 0, len(KEPT))
        disk.let_go(KEPT)
        return before != client.call(rawnbd.READ, 0, len(KEPT))


@pytest.mark.parametrize("filters", [[], ["--filter=limit"]], ids=["plain", "limit"])
def test_nbdkit_carries_out_late(disk: LateDisk, sock_dir: Path, filters: list[str]) -> None:
    limit = ["limit=2"] if filters else []
    with nbdkit(sock_dir, *filters, *disk.plugin(*limit)) as server:
        assert lands_on_top(disk, server.uri().socket_path)


def test_qemu_nbd_carries_out_late_whatever_the_number_of_clients(
    disk: LateDisk, sock_dir: Path
) -> None:
    (sock_dir / "inner").mkdir()
    with (
        nbdkit(sock_dir / "inner", *disk.plugin()) as inner,
        qemu_nbd(sock_dir, "--shared=1", inner.uri()) as server,
    ):
        assert lands_on_top(disk, server.uri().socket_path)


def test_nbdkit_that_serializes_connections_does_not(disk: LateDisk, sock_dir: Path) -> None:
    plugin = disk.plugin("serialize=connections")
    with nbdkit(sock_dir, "--filter=noparallel", *plugin) as server:
        socket = Path(server.uri().socket_path or "")
        disk.lose_a_connection(socket, KEPT)
        with pytest.raises(TimeoutError):
            RawNbd(socket, timeout_s=1.0)
        disk.let_go(KEPT)
        with RawNbd(socket) as client:
            assert client.call(rawnbd.READ, 0, len(KEPT)) == KEPT
