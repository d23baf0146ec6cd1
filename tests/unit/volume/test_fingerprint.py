"""A primary that is written while its volume is stopped is noticed, and there is a way on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import BusyError, ForeignRecordError
from bitmapd.media import fingerprint as module
from bitmapd.media.fingerprint import END_BYTES, SAMPLE_BYTES, SAMPLES, fingerprint, places
from bitmapd.record import tool
from bitmapd.record.layout import InitialSync, RecordFlag
from bitmapd.volume.session import RecordSession, distrust
from tests.support.cli import MIB, Cli, new_cli
from tests.support.local import LocalVolume
from tests.support.loops import loop_device

SEED = b"0123456789abcdef"


# -- what is read -----------------------------------------------------------------------------


@given(st.integers(0, 1 << 46), st.binary(max_size=16))
def test_both_ends_and_samples_in_between(size_bytes: int, seed: bytes) -> None:
    found = places(size_bytes, seed)
    assert found == places(size_bytes, seed)
    at = 0
    for offset, length in found:
        assert offset >= at
        assert offset % SAMPLE_BYTES == 0
        assert 0 < length <= END_BYTES + SAMPLE_BYTES
        at = offset + length
    assert at == size_bytes
    covered = sum(length for _, length in found)
    assert covered <= 2 * END_BYTES + (SAMPLES + 1) * SAMPLE_BYTES
    if size_bytes <= 2 * END_BYTES:
        assert covered == size_bytes
    elif size_bytes > 1 << 30:
        assert len(found) > SAMPLES // 2


def test_samples_differ_from_volume_to_volume() -> None:
    assert places(1 << 40, b"one") != places(1 << 40, b"two")


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_every_byte_of_both_ends_counts(tmp_path: Path, sector_bytes: int) -> None:
    size = 4 * MIB + sector_bytes
    path = tmp_path / "disk"
    path.write_bytes(bytes(size))
    first = fingerprint(str(path), size, SEED)
    for offset in (0, 1080, MIB - 1, 3 * MIB + 4096, size - 1):
        with path.open("r+b") as stream:
            stream.seek(offset)
            stream.write(b"x")
        assert fingerprint(str(path), size, SEED) != first
        path.write_bytes(bytes(size))
    with loop_device(path, sector_bytes) as name:
        assert fingerprint(name, size, SEED) == first


def test_what_is_behind_the_volume_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4 * MIB))
    first = fingerprint(str(path), 3 * MIB, SEED)
    with path.open("r+b") as stream:
        stream.seek(3 * MIB)
        stream.write(b"x" * MIB)
    assert fingerprint(str(path), 3 * MIB, SEED) == first
    with pytest.raises(OSError, match="ends before byte"):
        fingerprint(str(path), 5 * MIB, SEED)


def test_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fingerprint(str(tmp_path / "none"), MIB, SEED)


def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * MIB)
    wanted = fingerprint(str(path), MIB, SEED)
    real = os.open

    def refuses(name: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *rest)

    monkeypatch.setattr(module.os, "open", refuses)
    assert fingerprint(str(path), MIB, SEED) == wanted


# -- sessions ---------------------------------------------------------------------------------


class Host:
    def __init__(self, local: LocalVolume) -> None:
        self.local = local
        self.events: list[str] = []

    def serve(self, *, orderly: bool = True) -> None:
        session = self.session()
        session.begin()
        if orderly:
            session.finish()
            session.seal()
        session.close()

    def session(self) -> RecordSession:
        return RecordSession(
            self.local.config, self.local.paths, lambda event, **_: self.events.append(event)
        )

    def scribble(self, offset: int = 1080) -> None:
        with self.local.primary.open("r+b") as stream:
            stream.seek(offset)
            old = stream.read(1)
            stream.seek(offset)
            stream.write(bytes([old[0] ^ 0xFF]))

    @property
    def state(self) -> dict[str, Any]:
        path = self.local.paths.state_file(self.local.config.uuid)
        return dict(json.loads(path.read_text()))


@pytest.fixture
def host(tmp_path: Path, short_path: Path) -> Host:
    return Host(LocalVolume(tmp_path, short_path))


def test_a_primary_that_was_written_meanwhile_is_refused(host: Host) -> None:
    host.serve()
    host.serve()
    assert set(host.state) == {
        "name",
        "session",
        "superblock",
        "fingerprint",
        "secondary_fingerprint",
    }
    before = host.local.record.read_bytes(), host.state
    host.scribble()
    with pytest.raises(
        ForeignRecordError, match="was written while volume 'vol0' was stopped"
    ) as e:
        host.session()
    assert e.value.hint is not None
    assert "dmctl start vol0 --resync-all" in e.value.hint
    assert (host.local.record.read_bytes(), host.state) == before
    host.scribble()  # back as it was
    host.serve()


def test_after_a_crash_there_is_nothing_to_compare(host: Host) -> None:
    host.serve()
    host.serve(orderly=False)
    assert "fingerprint" not in host.state
    host.scribble()
    host.serve()


def test_a_fingerprint_of_an_older_session_does_not_count(host: Host) -> None:
    """The host died after the superblock and before the state file was written."""
    host.serve()
    old = host.local.paths.state_file(host.local.config.uuid).read_bytes()
    host.serve(orderly=False)
    host.local.paths.state_file(host.local.config.uuid).write_bytes(old)
    host.scribble()
    host.serve()
    assert host.events == [], "after a crash the record says what to copy"


def test_a_clean_volume_whose_state_was_lost_is_told_of(host: Host) -> None:
    host.serve()
    assert host.events == [], "the first session has nothing to compare"
    host.local.paths.state_file(host.local.config.uuid).unlink()
    host.serve()
    assert host.events == ["not-sealed"]
    host.serve()
    assert host.events == ["not-sealed"], "the stop has remembered it again"


def test_a_session_that_has_not_begun_seals_nothing(host: Host) -> None:
    host.serve()
    before = host.state
    session = host.session()
    host.scribble()
    session.seal()
    session.close()
    assert host.state == before


def test_a_primary_that_cannot_be_read_is_told_and_not_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.serve()

    def broken(*_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("bitmapd.volume.session.fingerprint", broken)
    host.serve()
    assert host.events == ["not-sealed", "not-sealed"]
    assert "fingerprint" not in host.state


def test_distrust_records_everything_to_be_compared(host: Host) -> None:
    host.serve()
    host.scribble()
    distrust(host.local.config, host.local.paths)
    superblock = host.local.superblock
    assert superblock.initial_sync is InitialSync.CHECKSUM
    assert not superblock.flags & RecordFlag.CLEAN
    assert tool.load(host.local.record).bits.all()
    assert tool.check(host.local.record).exit_status == 0
    session = host.session()
    with pytest.raises(BusyError):
        distrust(host.local.config, host.local.paths)
    session.close()
    host.serve()


def test_distrust_does_not_make_a_first_full_copy_less(tmp_path: Path, short_path: Path) -> None:
    local = LocalVolume(tmp_path, short_path, initial=InitialSync.FULL)
    distrust(local.config, local.paths)
    assert local.superblock.initial_sync is InitialSync.FULL
    assert not local.paths.state_file(local.config.uuid).exists()


def test_distrust_keeps_off_a_foreign_record(tmp_path: Path, short_path: Path) -> None:
    local = LocalVolume(tmp_path, short_path)
    other = LocalVolume(tmp_path, short_path, "other")
    local.record.write_bytes(other.record.read_bytes())
    with pytest.raises(ForeignRecordError, match="belongs to volume 'other'"):
        distrust(local.config, local.paths)
    assert local.record.read_bytes() == other.record.read_bytes()


# -- the whole volume -------------------------------------------------------------------------


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    with new_cli(tmp_path) as made:
        yield made


@pytest.mark.parametrize("stop", [(), ("--now",)])
def test_the_way_on_copies_what_was_written_past_the_volume(
    cli: Cli, stop: tuple[str, ...]
) -> None:
    cli.create()
    cli.ok("start", "vol0")
    cli.ok("wait", "vol0", "--for", "in-sync", "--timeout", "60s")
    cli.ok("stop", "vol0", *stop)
    primary, secondary = cli.folder / "vol0.primary", cli.folder / "vol0.secondary"
    assert primary.read_bytes() == secondary.read_bytes()
    with primary.open("r+b") as stream:
        stream.write(b"past the volume")
    refused = cli.call("start", "vol0")
    assert refused.status == 22
    assert "--resync-all" in refused.err
    assert "was written while" in cli.call("assemble", "vol0").err
    said = cli.ok("start", "vol0", "--resync-all").err
    assert "everything is compared" in said
    cli.ok("wait", "vol0", "--for", "in-sync", "--timeout", "60s")
    assert primary.read_bytes() == secondary.read_bytes()
    recovery = cli.status()["last_recovery"]
    assert (recovery["reason"], recovery["extents"]) == ("initial", 8)
    running = cli.call("start", "vol0", "--resync-all")
    assert running.status == 14
    assert "verify vol0 --repair" in running.err


def test_a_start_that_fails_later_keeps_the_fingerprint(cli: Cli) -> None:
    cli.create()
    cli.ok("start", "vol0")
    cli.ok("stop", "vol0")
    blocker = cli.paths.nbd_socket("vol0")
    blocker.mkdir()
    assert cli.call("start", "vol0").status != 0
    blocker.rmdir()
    with (cli.folder / "vol0.primary").open("r+b") as stream:
        stream.write(b"past the volume")
    assert cli.call("start", "vol0").status == 22
