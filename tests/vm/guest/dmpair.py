"""Two nodes of a pair on one kernel, attached with device-mapper: the one that is promoted.

Each has a loop device of its own over one disk as its primary: the same medium, known to both by
the same identity, and claimed by each for itself, as on two machines.  Both have the same names
for their layers, so only one of them can have a stack.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.vm.guest.disks import MIB, Disk, disks, same, sh
from tests.vm.guest.dmvolume import DmVolume

NAME = "vol0"
LAYERS = (NAME, f"dmctl-{NAME}-w", f"dmctl-{NAME}-era")


class PairNode(DmVolume):
    """One of both; its volume's file, run directory and record are its own."""

    def __init__(self, number: int, folder: Path, primary: Disk, secondary: Disk, record: Disk):
        super().__init__(NAME, folder / str(number), [primary, secondary, record])
        self.number = number
        self.loop = sh("losetup", "-f", "--show", "--direct-io=on", primary.path).strip()
        self._socket = f"unix://{folder}/{number}.sock"
        self._other = f"unix://{folder}/{3 - number}.sock"

    def create(self, *options: str) -> None:
        self.dmctl(
            *("create", NAME, "--primary", self.loop, "--secondary", self.secondary.path),
            *("--record", self.record.path, "--node", str(self.number)),
            *("--partner", self._other, "--partner-listen", self._socket),
            *("--attach", "dm", "--serve", "on-promote", *options),
        )

    def grow_primary(self, size_bytes: int) -> None:
        """Its own device, once the disk under it has grown."""
        sh("losetup", "--set-capacity", self.loop)
        self.size_bytes = size_bytes

    def partner(self) -> dict[str, Any]:
        return dict(self.status()["partner"])

    @property
    def has_stack(self) -> bool:
        """Whether what hosts have is this node's."""
        uuid = sh("dmsetup", "info", "-c", "--noheadings", "-o", "uuid", NAME, check=False)
        return uuid.strip() == f"DMCTL-{self.status()['uuid'].replace('-', '')}-top"

    def close(self) -> None:
        self.dmctl("stop", NAME, "--now", status=None)
        with contextlib.suppress(OSError, ValueError, ProcessLookupError):
            self.kill()


def remove_stack() -> None:
    """Whoever's it is, as a fence would: nobody writes through it any more."""
    for name in LAYERS:
        sh("dmsetup", "resume", name, check=False)
        sh("dmsetup", "remove", "--noudevsync", "-f", name, check=False)
    for name in LAYERS:
        sh("dmsetup", "remove", "--noudevsync", name, check=False)


@contextlib.contextmanager
def dm_pair(size_bytes: int = 64 * MIB) -> Iterator[tuple[PairNode, PairNode]]:
    with (
        tempfile.TemporaryDirectory(prefix="dmp-") as name,
        disks(
            ("pair-p", size_bytes),
            ("pair-s", size_bytes),
            ("pair-r1", 4 * MIB),
            ("pair-r2", 4 * MIB),
        ) as (primary, secondary, *records),
    ):
        nodes = tuple(
            PairNode(number, Path(name), primary, secondary, record)
            for number, record in enumerate(records, 1)
        )
        try:
            for node in nodes:
                node.create()
            nodes[0].start()
            nodes[1].dmctl("start", NAME, status=None)
            for node in nodes:
                node.dmctl("wait", NAME, "--for", "paired", "--timeout", "100s")
            yield nodes
        finally:
            for node in nodes:
                node.close()
            remove_stack()
            for node in nodes:
                sh("losetup", "-d", node.loop, check=False)


def equal(node: PairNode) -> bool:
    os.sync()
    return same(node.primary, node.secondary, node.size_bytes)
