"""A receiver starts with its own journal and its own image only."""

from __future__ import annotations

import dataclasses
from uuid import UUID

import pytest

from bitmapd.config.receiver import build_receiver
from bitmapd.errors import ForeignRecordError
from bitmapd.media.identity import Identity
from bitmapd.receiver.superblock import JournalSuperblock
from bitmapd.record.geometry import MIB
from bitmapd.volume.receiving import check_owner

TABLE = {
    "role": "receiver",
    "image": "/dev/sdb",
    "journal": "/dev/sdc",
    "listen": "receiver+unix:///vol0?socket=/run/vol0",
}
DISK = Identity("block", "wwid:b", 8 * MIB, 512, 512, False, stable=True)
JOURNAL = JournalSuperblock(UUID(int=1), "vol0", 64 * MIB, "wwid:b", 8 * MIB, 1, 1)


def check(image: Identity, journal: JournalSuperblock = JOURNAL) -> None:
    config, problems = build_receiver("vol0", TABLE, "vol0.toml")
    assert config is not None, problems
    check_owner(config, image, journal)


def test_its_own_are_taken() -> None:
    check(DISK)


def test_those_of_another_are_refused() -> None:
    with pytest.raises(ForeignRecordError, match="belongs to the image wwid:b"):
        check(dataclasses.replace(DISK, text="wwid:c"))
    with pytest.raises(ForeignRecordError, match="belongs to receiver 'vol1'"):
        check(DISK, dataclasses.replace(JOURNAL, name="vol1"))


def test_a_disk_without_a_lasting_identity_may_have_another_name_after_a_boot() -> None:
    disk = dataclasses.replace(DISK, text="name:vdb", stable=False)
    check(disk, dataclasses.replace(JOURNAL, image="name:vdc"))
