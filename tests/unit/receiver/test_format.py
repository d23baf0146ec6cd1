"""A journal on a real file: made, looked at, and what is told of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import build_receiver
from bitmapd.errors import BusyError, NotFoundError, RecordDamagedError
from bitmapd.receiver.commit import CommitPage, Queued, first_page
from bitmapd.receiver.directory import NO_SLOT, Directory, Keep, KeptPoint
from bitmapd.receiver.format import examine_journal, format_journal, probe_journal
from bitmapd.receiver.places import MIN_JOURNAL_BYTES
from bitmapd.record.copies import SUPERBLOCK_OFFSETS
from bitmapd.record.medium import RecordMedium
from bitmapd.volume.receiver_status import described, points
from tests.data.make_journal_golden import dirty, superblock


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    with path.open("wb") as stream:
        stream.truncate(MIN_JOURNAL_BYTES)
    return path


def test_what_is_made_is_found(path: Path) -> None:
    assert probe_journal(path) is None
    with pytest.raises(NotFoundError):
        examine_journal(path)
    block = superblock(line=None, sequence=1)
    format_journal(path, block)
    assert probe_journal(path) == block
    assert examine_journal(path) == (block, first_page(block.journal.bytes))


def test_nothing_of_an_older_journal_is_left(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(dirty())
    assert examine_journal(path)[1].committed == 8
    format_journal(path, superblock(line=None, sequence=1))
    assert examine_journal(path)[1].committed == 0


def test_one_that_is_in_use_is_left_alone(path: Path) -> None:
    with RecordMedium.open(path) as medium:
        medium.lock()
        with pytest.raises(BusyError):
            format_journal(path, superblock())
    assert probe_journal(path) is None


def test_damage_names_the_medium(path: Path) -> None:
    format_journal(path, superblock(line=None))
    with path.open("r+b") as stream:
        for offset in SUPERBLOCK_OFFSETS:
            stream.seek(offset + 100)
            stream.write(b"x")
    with pytest.raises(RecordDamagedError, match=str(path)):
        probe_journal(path)


def page(**changes: object) -> CommitPage:
    import dataclasses

    return dataclasses.replace(first_page(bytes(16)), **changes)  # type: ignore[arg-type]


def test_the_points_that_can_be_produced() -> None:
    queued = Queued(8, bytes(16), 3, bytes(16), 1_767_225_600_000_000_000)
    at = "2026-01-01T00:00:00.000+00:00"
    none = Directory()
    consistent = page(
        applied=7, committed=8, queue=(queued,), inconsistent_until=0, committed_ns=queued.wall_ns
    )
    applied_7 = {"point": 7, "at": None, "bytes": None, "state": "applied"}
    plain: dict[str, Any] = {"label": "", "kept": False}
    assert points(consistent, none, {8: 4096}) == [
        applied_7 | plain,
        {"point": 8, "at": at, "bytes": 4096, "state": "committed"} | plain,
    ]
    applied = page(applied=8, committed=8, inconsistent_until=0, committed_ns=queued.wall_ns)
    applied_8 = {"point": 8, "at": at, "bytes": None, "state": "applied"} | plain
    assert points(applied, none, {}) == [applied_8]
    assert points(page(), none, {}) == []
    between = page(applied=7, committed=8, queue=(queued,), inconsistent_until=9)
    assert [point["point"] for point in points(between, none, {})] == [8]


def test_points_that_are_kept_are_shown_with_their_labels() -> None:
    queued = Queued(8, bytes(16), 3, bytes(16), 1_767_225_600_000_000_000)
    kept = KeptPoint(3, queued.wall_ns, bytes(16), 1 << 20, Keep.KEPT, 0, "before")
    here = replace(kept, point=7, slot=1, label="here")
    wanted = replace(kept, point=8, state=Keep.WANTED, slot=NO_SLOT, label="soon")
    going = replace(kept, point=2, state=Keep.GOING, slot=NO_SLOT, label="gone")
    directory = Directory(1, (going, kept, here, wanted))
    consistent = page(applied=7, committed=8, queue=(queued,), inconsistent_until=0)
    found = [
        (point["point"], point["state"], point["label"], point["kept"], point["bytes"])
        for point in points(consistent, directory, {})
    ]
    assert found == [
        (3, "kept", "before", True, 1 << 20),
        (7, "applied", "here", True, None),
        (8, "committed", "soon", False, None),
    ]
    between = page(applied=7, committed=8, queue=(queued,), inconsistent_until=9)
    states = [point["state"] for point in points(between, directory, {})]
    assert states == ["kept", "kept", "committed"]


def test_the_status_of_a_receiver_without_a_volume() -> None:
    table = {"role": "receiver", "image": "/i", "journal": "/j"}
    table["listen"] = "receiver+unix:///vol0?socket=/s"
    config, _ = build_receiver("vol0", table, "file")
    assert config is not None
    found = described(config, "stopped", superblock(line=None), None, None)
    assert (found["uuid"], found["size_bytes"], found["extent_size_bytes"]) == ("", None, 0)
    found = described(config, "receiving", superblock(), {"committed": 1}, None)
    assert (found["size_bytes"], found["block_size_bytes"]) == (10 << 20, 65536)
