"""A server carries out, after its client is gone, what it had received (rule 2).

The secondary is equal, then old in one place: that place is in the record, and is copied again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.latedisk import LateDisk
from tests.support.nbdpeers import Peer, nbdkit
from tests.support.volumes import KIB, MIB, Volume

SIZE = 8 * MIB
OLD, NEW = b"1" * 64 * KIB, b"2" * 64 * KIB


@contextmanager
def mirrored(folder: Path, disk: LateDisk) -> Iterator[tuple[Volume, Peer]]:
    options = ["--initial-sync", "skip", "--era-interval", "100ms", "--late-writes", "16s"]
    with nbdkit(folder, *disk.plugin()) as server:
        volume = Volume(
            folder,
            SIZE,
            options=[*options, "--predictor", "lru"],
            secondary_target=str(server.uri()),
            media={"secondary": disk.image},
        )
        with volume:
            volume.create()
            volume.start()
            yield volume, server


@pytest.fixture
def disk(tmp_path: Path) -> LateDisk:
    return LateDisk(tmp_path, SIZE)


def put(volume: Volume, data: bytes) -> None:
    with volume.host() as host:
        host.call(rawnbd.WRITE, 2 * MIB, len(data), data)
        host.disconnect()


@pytest.mark.parametrize("paused", [False, True], ids=["", "paused meanwhile"])
def test_case_04_a_write_of_a_daemon_that_was_killed_lands_after_the_sides_were_equal(
    short_path: Path, disk: LateDisk, paused: bool
) -> None:
    with mirrored(short_path, disk) as (volume, _):
        disk.armed.touch()
        put(volume, OLD)
        disk.until_begun()
        put(volume, NEW)
        volume.kill()
        volume.start()
        volume.wait_in_sync()
        assert disk.content(2 * MIB, len(NEW)) == NEW
        if paused:
            volume.dmctl("pause", volume.name)
        disk.let_go(OLD, 2 * MIB)
        assert volume.ask("status")["suspect_bytes"] > 0
        assert volume.differing() == {2}
        assert volume.recorded() >= {2}
        if paused:
            volume.until(lambda status: status["suspect_bytes"] == 0)
            assert volume.recorded() >= {2}
            volume.dmctl("resume", volume.name)
        else:
            volume.until(lambda status: status["suspect_bytes"] == 0)
        volume.wait_in_sync()
        volume.stop()
        assert volume.recorded() == set()
        assert volume.differing() == set()
