"""A point on demand of a file system that `fsfreeze` holds: whoever promotes it repairs nothing.

file system - loop device - FUSE file of nbdfuse - NBD - bitmapd, as tests/soak/failover has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fault.test_kept import wait_kept, xfs
from tests.support.filesystems import MAKE, check, mounted, need_filesystem
from tests.support.nbdfiles import NbdFile
from tests.support.needs import need
from tests.support.sites import Sites
from tests.support.volumes import MIB, run

pytestmark = pytest.mark.timeout(180)
SIZE = 32 * MIB


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    """On XFS, where the receiver can keep a point with a label."""
    need_filesystem("ext4")
    need("nbdfuse", "fsfreeze", "dumpe2fs")
    with xfs(short_path) as folder, Sites(folder, SIZE) as made:
        made.create()
        yield made


@contextmanager
def in_use(sites: Sites, uri: str, name: str) -> Iterator[Path]:
    shown = NbdFile(sites.folder / name, uri)
    try:
        with mounted(shown.path, sites.folder / "mnt", "ext4") as folder:
            yield folder
    finally:
        shown.end()


def features(image: Path) -> set[str]:
    lines = run(["dumpe2fs", "-h", str(image)]).splitlines()
    (line,) = [line for line in lines if line.startswith("Filesystem features:")]
    return set(line.split()[2:])


def test_a_point_of_a_frozen_file_system_needs_no_repair(sites: Sites) -> None:
    sites.start()
    blank = NbdFile(sites.folder / "blank", sites.near.uri)
    run([*MAKE["ext4"], str(blank.path)])
    blank.end()
    first, second = os.urandom(2 * MIB), os.urandom(2 * MIB)
    with in_use(sites, sites.near.uri, "near-disk") as folder:
        (folder / "first").write_bytes(first)  # in the page cache; it is fsfreeze that writes it
        run(["fsfreeze", "-f", str(folder)])
        try:
            words = ("--json", "point", "vol0", "--label", "before")
            number = int(json.loads(sites.near.dmctl(*words))["point"])
        finally:
            run(["fsfreeze", "-u", str(folder)])
        with (folder / "second").open("wb") as file:
            file.write(second)
            os.fsync(file.fileno())
        sites.near.dmctl("point", "vol0", "--wait")
        wait_kept(sites, number)
        sites.far.stop()  # it is all in the image: the newest point is that of a mounted one
        assert sites.far.status()["receiver"]["committed"] > number
        assert "needs_recovery" in features(sites.image)
        sites.far.start()
    sites.near.kill()
    assert (
        json.loads(sites.far.dmctl("--json", "promote", "vol0", "--label", "before"))["point"]
        == number
    )
    sites.far.stop("--now")
    assert "needs_recovery" not in features(sites.image)
    check("ext4", sites.image)
    with mounted(sites.image, sites.folder / "mnt", "ext4", "-o", "ro,noload") as folder:
        assert (folder / "first").read_bytes() == first
        assert not (folder / "second").exists()
