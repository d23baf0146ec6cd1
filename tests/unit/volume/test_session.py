"""session: what a start checks before it changes anything, and what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bitmapd.errors import BitmapdError, BusyError, ForeignRecordError, NotFoundError
from bitmapd.media.identity import identify
from bitmapd.record import tool
from bitmapd.record.geometry import MIB, Geometry
from bitmapd.record.layout import PAGE_BYTES, RecordFlag, page_offset
from bitmapd.volume.session import RecordSession
from tests.support.local import LocalVolume
from tests.support.loops import loop_device, sparse_file


class Host:
    """Opens sessions, remembers the events, closes what is left open."""

    def __init__(self, local: LocalVolume) -> None:
        self.local = local
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.sessions: list[RecordSession] = []

    def open(self) -> RecordSession:
        session = RecordSession(
            self.local.config,
            self.local.paths,
            lambda event, **fields: self.events.append((event, fields)),
        )
        self.sessions.append(session)
        return session

    def serve(self) -> None:
        """One session from begin to end."""
        session = self.open()
        session.begin()
        session.finish()
        session.close()


@pytest.fixture
def host(tmp_path: Path, short_path: Path) -> Iterator[Host]:
    host = Host(LocalVolume(tmp_path, short_path))
    yield host
    for session in host.sessions:
        session.close()


# -- a session --------------------------------------------------------------------------------


def test_a_session_has_a_number_on_the_record_and_on_the_host(host: Host) -> None:
    state = host.local.paths.state_file(host.local.config.uuid)
    for number in (1, 2):
        session = host.open()
        assert not state.exists() or number == 2
        session.begin()
        assert session.superblock.session == number
        assert host.local.superblock == session.superblock
        sequence = session.superblock.sequence
        assert json.loads(state.read_text()) == {
            "name": "vol0",
            "session": number,
            "superblock": sequence,
        }
        session.close()
    assert host.events == []


def test_a_record_is_clean_between_an_orderly_end_and_the_next_beginning(host: Host) -> None:
    session = host.open()
    assert session.superblock.flags & RecordFlag.CLEAN
    session.begin()
    assert not host.local.superblock.flags & RecordFlag.CLEAN
    session.finish()
    assert host.local.superblock.flags & RecordFlag.CLEAN
    session.close()


def test_opening_changes_nothing(host: Host) -> None:
    before = host.local.record.read_bytes()
    host.open()
    assert host.local.record.read_bytes() == before


def test_every_update_is_numbered_and_durable(host: Host) -> None:
    session = host.open()
    session.begin()
    first = session.superblock
    session.update(flags=first.flags | RecordFlag.SYNC_SKIPPED)
    assert session.superblock.sequence == first.sequence + 1
    assert host.local.superblock == session.superblock


def test_a_copy_of_the_record_from_within_its_last_session_is_refused(host: Host) -> None:
    session = host.open()
    session.begin()
    copy = host.local.record.read_bytes()
    session.finish()
    session.close()
    newest = host.local.record.read_bytes()
    host.local.record.write_bytes(copy)
    with pytest.raises(ForeignRecordError, match="restored from an older copy") as caught:
        host.open()
    assert caught.value.hint is not None
    assert "put the newest record back" in caught.value.hint
    host.local.record.write_bytes(newest)
    host.open()


def test_a_state_file_that_cannot_be_written_keeps_no_update_from_being_made(host: Host) -> None:
    session = host.open()
    session.begin()
    state = host.local.paths.state_file(host.local.config.uuid)
    state.unlink()
    state.mkdir()
    session.finish()
    assert host.local.superblock.clean
    assert [name for name, _ in host.events] == ["state-unreadable"]


def test_a_second_session_finds_the_record_in_use(host: Host) -> None:
    first = host.open()
    with pytest.raises(BusyError) as caught:
        host.open()
    assert "'vol0'" in caught.value.message
    first.close()
    host.open()


def test_room_for_a_larger_volume_is_made_beyond_the_present_one(
    tmp_path: Path, short_path: Path
) -> None:
    host = Host(LocalVolume(tmp_path, short_path))
    session = host.open()
    session.begin()
    larger = Geometry(40000 * MIB)  # a second page
    session.prepare_growth(larger)
    assert host.local.recorded() == set(), "nothing is in force yet"
    session.update(geometry=larger, primary_size_bytes=larger.size_bytes)
    loaded = tool.load(host.local.record)
    assert not loaded.damaged
    assert loaded.bits.count() == larger.extents - 31488
    session.close()


# -- what is refused --------------------------------------------------------------------------


def refused(host: Host, kind: type[BitmapdError]) -> BitmapdError:
    """A start that fails, changes nothing and lets go of the record."""
    before = host.local.record.read_bytes()
    with pytest.raises(kind) as caught:
        host.open()
    assert type(caught.value) is kind
    assert host.local.record.read_bytes() == before
    with tool.RecordMedium.open(host.local.record) as medium:
        medium.lock()
    return caught.value


def test_a_record_of_another_volume(host: Host) -> None:
    was = host.local.config.uuid
    host.local.config = dataclasses.replace(host.local.config, uuid=uuid4())
    error = refused(host, ForeignRecordError)
    assert f"belongs to volume 'vol0' (uuid {was})" in error.message
    assert error.hint == "check 'record' in the configuration of 'vol0'"


def test_a_record_that_was_restored_from_a_copy(host: Host) -> None:
    host.serve()
    copy = host.local.record.read_bytes()
    host.serve()
    host.local.record.write_bytes(copy)
    error = refused(host, ForeignRecordError)
    assert "is of session 1, but this host has seen session 2" in error.message
    assert error.hint is not None
    assert "--force" in error.hint


def test_a_record_that_is_ahead_of_the_host_is_right(host: Host) -> None:
    """A crash between superblock and state file, or another host in between."""
    state = host.local.paths.state_file(host.local.config.uuid)
    host.serve()
    kept = state.read_text()
    host.serve()
    state.write_text(kept)
    host.serve()
    assert json.loads(state.read_text())["session"] == 3


@pytest.mark.parametrize(
    "content",
    ["", "nonsense", "{}", "[]", '{"session": null}', pytest.param("[" * 100_000, id="deep")],
)
def test_a_state_file_that_says_nothing_is_reported(host: Host, content: str) -> None:
    state = host.local.paths.state_file(host.local.config.uuid)
    host.serve()
    state.write_text(content)
    host.serve()
    (event, fields), (other, _) = host.events
    assert event == "state-unreadable"
    assert fields["file"] == str(state)
    assert other == "not-sealed", "what the primary looked like was in it"
    assert json.loads(state.read_text())["session"] == 2, "and mended"


def test_another_primary(host: Host) -> None:
    spare = host.local.primary.with_suffix(".copy")
    shutil.copy(host.local.primary, spare)
    os.replace(spare, host.local.primary)
    error = refused(host, ForeignRecordError)
    assert str(host.local.primary) in error.message
    assert "the record was made for" in error.message


def test_a_primary_that_has_shrunk(host: Host) -> None:
    os.truncate(host.local.primary, 7 * MIB)
    error = refused(host, BitmapdError)
    assert f"has {7 * MIB} bytes, the volume has {8 * MIB}: it has shrunk" in error.message
    os.truncate(host.local.primary, 9 * MIB)
    host.open()


def test_a_primary_that_is_gone(host: Host) -> None:
    host.local.primary.unlink()
    refused(host, NotFoundError)


def test_a_record_that_is_gone(host: Host) -> None:
    host.local.record.unlink()
    with pytest.raises(NotFoundError):
        host.open()


# -- the secondary ----------------------------------------------------------------------------


def test_the_right_secondary_is_accepted(host: Host) -> None:
    session = host.open()
    assert session.secondary_mismatch(8 * MIB) is None
    assert session.secondary_mismatch(9 * MIB) is None, "a larger one is as good"


def test_a_secondary_that_is_too_small(host: Host) -> None:
    found = host.open().secondary_mismatch(7 * MIB)
    assert found is not None
    assert f"has {7 * MIB} bytes, the volume has {8 * MIB}" in found


def test_another_secondary(host: Host) -> None:
    session = host.open()
    spare = host.local.secondary.with_suffix(".copy")
    shutil.copy(host.local.secondary, spare)
    os.replace(spare, host.local.secondary)
    found = session.secondary_mismatch(8 * MIB)
    assert found is not None
    assert identify(host.local.secondary).text in found


def test_a_medium_without_a_lasting_identity_may_be_any(tmp_path: Path, short_path: Path) -> None:
    """A loop device whose file was deleted is known by a name that proves nothing."""
    image = sparse_file(tmp_path / "image", 8 * MIB)
    with loop_device(image) as device:
        local = LocalVolume(tmp_path, short_path, secondary=device)
        host = Host(local)
        session = host.open()
        assert session.secondary_mismatch(8 * MIB) is None
        image.unlink()
        assert not identify(device).stable
        assert session.secondary_mismatch(8 * MIB) is None
        session.close()


# -- damage -----------------------------------------------------------------------------------


def test_a_damaged_page_is_told_of_and_healed_as_ones(host: Host) -> None:
    for slot in (0, 1):
        host.local.scribble(host.local.record, page_offset(0, slot) + 100, b"\xff" * 600)
    session = host.open()
    assert session.loaded.damaged
    session.begin()
    (name, fields), *_ = host.events
    assert name == "record-damaged"
    assert fields["device"] == str(host.local.record)
    assert not session.loaded.damaged
    assert host.local.recorded() == set(range(8))
    assert not tool.load(host.local.record).damaged


def test_one_superblock_of_two_is_enough_and_told_of(host: Host) -> None:
    host.local.scribble(host.local.record, 0, bytes(PAGE_BYTES))
    session = host.open()
    session.begin()
    assert [event for event, _ in host.events] == ["record-damaged"]
    assert tool.load(host.local.record).warnings == (), "written anew"
