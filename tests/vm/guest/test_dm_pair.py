"""Device-mapper on the node of a pair that serves: moved, killed, fenced, in a real kernel."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.vm.guest.disks import MIB, sh, size_of
from tests.vm.guest.dmpair import NAME, PairNode, dm_pair, equal
from tests.vm.guest.dmvolume import wiring_of
from tests.vm.guest.test_volume import VERIFY

# Under load the emulated machine takes minutes for what takes seconds elsewhere.
pytestmark = pytest.mark.timeout(1800)

DEVICE = f"/dev/mapper/{NAME}"
PLACES = range(0, 8 * MIB, MIB)  # one in each of eight extents


@pytest.fixture
def pair() -> Iterator[tuple[PairNode, PairNode]]:
    with dm_pair() as made:
        yield made


def put(fd: int, offset: int, text: bytes) -> None:
    """A write of 4 KiB that no cache of this kernel delays."""
    page = mmap.mmap(-1, 4096)
    page.write(text.ljust(4096, b"."))
    os.pwrite(fd, page, offset)


def get(offset: int) -> bytes:
    fd = os.open(DEVICE, os.O_RDONLY | os.O_DIRECT)
    try:
        page = mmap.mmap(-1, 4096)
        os.preadv(fd, [page], offset)
        return page[:].rstrip(b".")
    finally:
        os.close(fd)


def opened() -> int:
    return os.open(DEVICE, os.O_RDWR | os.O_DIRECT)


def have_direct(node: PairNode, fd: int) -> None:
    """The places are in the record of the node that serves, and in its kernel's table."""

    def direct(status: dict[str, Any]) -> bool:
        if status["direct_extents"] >= len(PLACES):
            return True
        for place in PLACES:  # written again it is worth a change of the table
            put(fd, place, b"first")
        return False

    node.until(direct)
    before = node.status()["gate_writes_total"]
    for place in PLACES:
        put(fd, place, b"direct")
    assert node.status()["gate_writes_total"] == before


def come_back(node: PairNode) -> None:
    node.dmctl("start", NAME, status=None)  # 15 where the partner is slow to answer
    node.dmctl("wait", NAME, "--for", "paired", "--timeout", "100s")


def end(one: PairNode, two: PairNode) -> None:
    for node in (one, two):
        assert node.partner()["compared_extents_total"] == 0
        node.stop()
    assert equal(one)


def test_from_node_to_node(pair: tuple[PairNode, PairNode], tmp_path: Path) -> None:
    one, two = pair
    assert not os.path.exists(DEVICE)  # nobody is promoted
    one.dmctl("takeover", NAME)
    assert one.has_stack
    sh("mkfs.ext4", "-q", DEVICE)
    mount = tmp_path / "mnt"
    mount.mkdir()
    sh("mount", DEVICE, str(mount))
    (mount / "letter").write_bytes(b"from one" * 100_000)
    assert "in use" in two.dmctl("takeover", NAME, status=12)
    assert "in use" in one.dmctl("demote", NAME, status=12)
    assert one.has_stack
    sh("umount", str(mount))

    two.dmctl("takeover", NAME)
    assert two.has_stack
    assert "one node serves" in one.dmctl("takeover", NAME, "--beside", status=14)
    assert one.partner()["own_extents"] == 0
    sh("e2fsck", "-f", "-n", DEVICE)
    sh("mount", DEVICE, str(mount))
    assert (mount / "letter").read_bytes() == b"from one" * 100_000
    (mount / "answer").write_bytes(b"from two" * 100_000)
    sh("umount", str(mount))
    two.dmctl("demote", NAME)
    assert not os.path.exists(DEVICE)
    two.wait_in_sync()
    end(one, two)
    sh("e2fsck", "-f", "-n", two.secondary.path)


def test_a_kernel_outlives_bitmapd_and_is_fenced(
    pair: tuple[PairNode, PairNode], tmp_path: Path
) -> None:
    """Hosts go on, what they write meanwhile is copied, and no node compares anything."""
    one, two = pair
    fence = tmp_path / "fence"
    fence.write_text(
        "#!/bin/sh\ncat > /dev/null\n"
        "for round in 1 2; do for name in vol0 dmctl-vol0-w dmctl-vol0-era; do"
        " dmsetup remove --noudevsync -f $name; done; done\n! dmsetup info vol0\n"
    )
    fence.chmod(0o755)
    one.dmctl("takeover", NAME)
    fd = opened()
    try:
        have_direct(one, fd)
        one.kill()
        two.until(lambda status: status["partner"]["state"] == "cut")
        for place in PLACES:
            put(fd, place, b"unseen")  # nobody but the kernel knows
        assert "its kernel goes on" in two.dmctl("takeover", NAME, status=15)
        come_back(one)
        assert one.has_stack
        assert one.partner()["serving"]
        assert one.partner()["own_extents"] >= len(PLACES)
        assert two.partner()["peer"]["attach"] == "dm"
        put(fd, 40 * MIB, b"through the gate")
        assert "in use" in one.stop(status=12)
        one.wait_in_sync()
        have_direct(one, fd)
        one.kill()
        for place in PLACES:
            put(fd, place, b"last words")
    finally:
        os.close(fd)

    two.dmctl("set", NAME, f"fence-command={fence}")
    two.dmctl("takeover", NAME)
    assert two.has_stack
    assert two.partner()["proof"] == "fence"
    assert [get(place) for place in PLACES] == [b"last words"] * len(PLACES)
    come_back(one)
    assert two.has_stack
    assert not one.partner()["serving"]
    two.dmctl("demote", NAME)
    two.wait_in_sync()
    end(one, two)


LARGER = 96 * MIB


def grow_media(pair: tuple[PairNode, PairNode], *, secondary: bool = True) -> None:
    pair[0].primary.grow(LARGER)
    for node in pair:
        node.grow_primary(LARGER)
    if secondary:
        pair[0].secondary.grow(LARGER)


@pytest.mark.parametrize("asked", [0, 1], ids=["where hosts are", "at the other"])
def test_an_ext4_that_grows_in_use(
    pair: tuple[PairNode, PairNode], tmp_path: Path, asked: int
) -> None:
    one, _ = pair
    one.dmctl("takeover", NAME)
    sh("mkfs.ext4", "-q", DEVICE)
    mount = tmp_path / "mnt"
    mount.mkdir()
    sh("mount", DEVICE, str(mount))
    try:
        words = ["fio", "--name=job", f"--filename={mount}/job", "--ioengine=libaio"]
        words += ["--rw=randwrite", "--bs=4k", "--iodepth=4", "--size=16m", "--direct=1"]
        words += ["--loops=8", *VERIFY]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as job:
            one.until(lambda status: status["direct_extents"] > 4)
            grow_media(pair, secondary=False)
            assert "secondary" in pair[asked].dmctl("resize", NAME, status=13)
            one.secondary.grow(LARGER)
            pair[asked].dmctl("resize", NAME)
            for node in pair:
                assert node.status()["size_bytes"] == LARGER
            one.until(lambda status: size_of(DEVICE) == LARGER)
            pair[asked].dmctl("resize", NAME)  # nothing left to do
            sh("resize2fs", DEVICE)
            output, _ = job.communicate(timeout=600)
            assert job.returncode == 0, output
        (mount / "more").write_bytes(os.urandom(24 * MIB))
        one.until(lambda status: status["direct_extents"] > 4)
    finally:
        sh("umount", str(mount))
    one.dmctl("demote", NAME)
    one.wait_in_sync()
    end(*pair)
    sh("e2fsck", "-f", "-n", one.secondary.path)


def test_one_that_dies_before_its_hosts_see_the_new_size(pair: tuple[PairNode, PairNode]) -> None:
    """They go on with the old size, past a process that is not there, and get the new one from the
    next."""
    one, _ = pair
    one.dmctl("takeover", NAME)
    fd = opened()
    try:
        have_direct(one, fd)
        grow_media(pair)
        wiring = wiring_of(one)
        os.kill(wiring, signal.SIGSTOP)
        with subprocess.Popen(one.words("resize", NAME), env=one.environment) as command:
            one.until(lambda status: status["size_bytes"] == LARGER)
            one.kill()
            os.kill(wiring, signal.SIGKILL)
            assert command.wait(60) != 0
        assert size_of(DEVICE) == 64 * MIB
        with ThreadPoolExecutor(1) as host:  # what passes the gate waits for the next process
            written = [host.submit(put, fd, place, b"unseen") for place in PLACES]
            come_back(one)
            for each in written:
                each.result(60)
        one.until(lambda status: size_of(DEVICE) == LARGER)
        put(fd, LARGER - 4096, b"beyond the old end")
        assert get(LARGER - 4096) == b"beyond the old end"
        assert [get(place) for place in PLACES] == [b"unseen"] * len(PLACES)
    finally:
        os.close(fd)
    one.dmctl("demote", NAME)
    one.wait_in_sync()
    end(*pair)
