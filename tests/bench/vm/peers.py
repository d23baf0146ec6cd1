"""The peers: what else mirrors or tracks in Debian's kernel, each set up as its own manual says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.vm.media import MIB, CommandFailed, Media, sh

SECTOR_BYTES = 512
_DRBD = "/lib/drbd/drbdsetup-84"
_PORTS = (7788, 7789)
_LOG_BYTES = 8 * MIB
ERA_BLOCK_BYTES = 256 << 10  # what a volume has
MIRROR_REGION_BYTES = 2 * MIB  # what lvm makes


@contextmanager
def mapped(name: str, size_bytes: int, target: str) -> Iterator[str]:
    """A device-mapper device of one target: its kind and parameters."""
    name = f"bvm-{name}"
    table = f"0 {size_bytes // SECTOR_BYTES} {target}"
    sh("dmsetup", "create", name, "--noudevsync", "--table", table)
    try:
        sh("dmsetup", "mknodes", name)
        yield f"/dev/mapper/{name}"
    finally:
        sh("dmsetup", "remove", "--noudevsync", "--retry", name)


@contextmanager
def linear(name: str, lower: str, size_bytes: int) -> Iterator[str]:
    with mapped(name, size_bytes, f"linear {lower} 0") as path:
        yield path


@contextmanager
def three_deep(lower: str, size_bytes: int) -> Iterator[str]:
    """As many layers as a hit passes in a volume, and nothing in them."""
    with ExitStack() as stack:
        for number in range(3):
            lower = stack.enter_context(linear(f"deep{number}", lower, size_bytes))
        yield lower


@contextmanager
def era(media: Media, lower: str, size_bytes: int) -> Iterator[str]:
    """dm-era by itself, its metadata on a disk of the same make."""
    sh("modprobe", "dm-era")
    metadata = media.make("era-meta", 4 * _LOG_BYTES)
    block = ERA_BLOCK_BYTES // SECTOR_BYTES
    with mapped("era", size_bytes, f"era {metadata} {lower} {block}") as path:
        yield path


@contextmanager
def layers(media: Media, lower: str, size_bytes: int, *, splits: bool) -> Iterator[str]:
    """Those of a volume without the volume, all of it recorded: a table over dm-era and, where it
    `splits`, a layer that has reads go past both."""
    sh("modprobe", "-a", "dm-era", "dm-delay")
    name = "split" if splits else "whole"
    metadata = media.make(f"{name}-meta", 4 * _LOG_BYTES)
    block = ERA_BLOCK_BYTES // SECTOR_BYTES
    with ExitStack() as stack:

        def over(layer: str, target: str) -> str:
            return stack.enter_context(mapped(f"{name}-{layer}", size_bytes, target))

        top = over("w", f"linear {over('era', f'era {metadata} {lower} {block}')} 0")
        if splits:
            top = over("top", f"delay {lower} 0 0 {top} 0 0 {lower} 0 0")
        yield top


@contextmanager
def md_raid1(media: Media, number: int, size_bytes: int, *, write_behind: bool) -> Iterator[str]:
    """Two legs, write-intent bitmap inside; with write-behind the second leg is write-mostly."""
    sh("modprobe", "-a", "md-mod", "raid1")
    legs = [media.make(f"md{number}-{leg}", size_bytes + 4 * MIB) for leg in "ab"]
    device = f"/dev/md{number}"
    second = ["--write-mostly", legs[1]] if write_behind else [legs[1]]
    behind = ["--write-behind=256"] if write_behind else []
    sh(
        *("mdadm", "--create", device, "--run", "--quiet", "--level=1", "--raid-devices=2"),
        *("--metadata=1.2", "--bitmap=internal", "--assume-clean", *behind, legs[0], *second),
    )
    try:
        yield device
    finally:
        sh("mdadm", "--stop", device)


@contextmanager
def dm_mirror(media: Media, size_bytes: int) -> Iterator[str]:
    """Two legs and a log on a disk of its own; both are equal already."""
    sh("modprobe", "dm-mirror")
    legs = [media.make(f"mirror-{leg}", size_bytes) for leg in "ab"]
    log = media.make("mirror-log", _LOG_BYTES)
    region = MIRROR_REGION_BYTES // SECTOR_BYTES
    table = f"mirror disk 3 {log} {region} nosync 2 {legs[0]} 0 {legs[1]} 0"
    with mapped("mirror", size_bytes, table) as path:
        yield path


@contextmanager
def drbd_connected(media: Media, size_bytes: int) -> Iterator[str]:
    """Both nodes of a resource in one kernel, as two resources that know each other's port."""
    with _resource(media, 0, size_bytes), _resource(media, 1, size_bytes):
        ends = [f"ipv4:127.0.0.1:{port}" for port in _PORTS]
        sh("ip", "link", "set", "lo", "up")
        sh(_DRBD, "connect", "bvm0", *ends, "--protocol=A")
        sh(_DRBD, "connect", "bvm1", *reversed(ends), "--protocol=A")
        sh(
            _DRBD,
            "wait-connect",
            "0",
            *(f"--{kind}wfc-timeout=30" for kind in ("", "degr-", "outdated-")),
        )
        _skip_first_sync(0)
        _await_up_to_date()
        sh(_DRBD, "primary", "0")
        yield "/dev/drbd0"
        sh(_DRBD, "secondary", "0")


@contextmanager
def drbd_alone(media: Media, size_bytes: int) -> Iterator[str]:
    """A node without the other: it keeps its activity log, and marks what it would have to send."""
    with _resource(media, 2, size_bytes):
        _skip_first_sync(2)
        sh(_DRBD, "primary", "2", "--force")
        yield "/dev/drbd2"
        sh(_DRBD, "secondary", "2")


@contextmanager
def _resource(media: Media, minor: int, size_bytes: int) -> Iterator[None]:
    if not Path("/sys/module/drbd").exists():
        sh("modprobe", "drbd", "usermode_helper=/bin/true")
    if not Path(_DRBD).exists():
        raise CommandFailed(f"{_DRBD} is not there: install drbd-utils")
    lower, name, number = (
        media.make(f"drbd{minor}", size_bytes + 4 * MIB),
        f"bvm{minor}",
        f"{minor}",
    )
    sh("drbdmeta", "--force", number, "v08", lower, "internal", "create-md")
    sh(_DRBD, "new-resource", name)
    try:
        sh(_DRBD, "new-minor", name, number, "0")
        sh(_DRBD, "attach", number, lower, lower, "internal")
        yield
    finally:
        sh(_DRBD, "down", name, check=False)


def _skip_first_sync(minor: int) -> None:
    sh(_DRBD, "new-current-uuid", str(minor), "--clear-bitmap")


def _await_up_to_date(timeout_s: float = 30) -> None:
    """The other node's news of the skipped sync have no command that waits for them."""
    end_s = time.monotonic() + timeout_s
    while Path("/proc/drbd").read_text().count("UpToDate/UpToDate") < 2:
        if time.monotonic() > end_s:
            raise TimeoutError(f"DRBD did not agree: {Path('/proc/drbd').read_text()}")
        time.sleep(0.1)
