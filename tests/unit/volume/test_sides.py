"""sides: which media belong to a volume, and what is known of a copy (invariants by number)."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import Paths
from bitmapd.media.identity import Identity
from bitmapd.record.layout import InitialSync, RecordFlag
from bitmapd.volume import sides
from bitmapd.volume.sides import NoteKeeper, forget_copies, good_copies, is_other, read_note
from tests.support.local import LocalVolume


@pytest.fixture
def local(tmp_path: Path, short_path: Path) -> LocalVolume:
    return LocalVolume(tmp_path, short_path)


class Events:
    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.seen.append((event, fields))


def in_sync(local: LocalVolume, *, times: int = 1, emit: Any = None) -> None:
    """The volume tells so often that it is in sync, and ends."""

    async def tell() -> None:
        loop = asyncio.get_running_loop()
        keeper = NoteKeeper(
            local.config,
            local.paths,
            lambda: local.superblock,
            lambda: [3, 5],
            loop,
            emit or Events(),
        )
        for _ in range(times):
            keeper.in_sync()
        await keeper.end()

    asyncio.run(tell())


def note_file(local: LocalVolume) -> Path:
    return local.paths.sides_file(local.config.uuid)


def copies(local: LocalVolume, primary: str, secondary: str) -> list[str]:
    return good_copies(local.paths, None, primary, secondary)


# -- the note -----------------------------------------------------------------------------------


def test_a_note_names_both_sides_and_the_time(local: LocalVolume) -> None:
    in_sync(local)
    note = read_note(note_file(local))
    assert note is not None
    assert note.primary == local.superblock.primary
    assert note.secondary == local.superblock.secondary
    assert note.lately == (3, 5)
    assert note.sentence().startswith(f"{local.secondary} was, at 20")
    assert f"in sync with {local.primary}, volume 'vol0'" in note.sentence()


def test_it_is_written_once_in_a_while(local: LocalVolume) -> None:
    events = Events()
    note_file(local).mkdir(parents=True)  # which is told of at each attempt
    in_sync(local, times=3, emit=events)
    assert len(events.seen) == 1


def test_a_volume_that_never_was_in_sync_leaves_none(local: LocalVolume) -> None:
    in_sync(local, times=0)
    assert not note_file(local).exists()


def test_a_note_that_cannot_be_written_is_told_and_no_more(local: LocalVolume) -> None:
    note_file(local).mkdir(parents=True)
    events = Events()
    in_sync(local, emit=events)
    ((event, fields),) = events.seen
    assert event == "sides-not-noted"
    assert fields["file"] == str(note_file(local))


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"in_sync_s": "soon"}', "\udcff", pytest.param("[" * 100_000, id="deep")],
)
def test_a_file_that_says_nothing_is_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / "note"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert read_note(file) is None


# -- what a new volume would overwrite ----------------------------------------------------------


def test_a_copy_of_another_primary_is_one_to_be_asked_for(local: LocalVolume) -> None:
    in_sync(local)
    primary, secondary = local.superblock.primary, local.superblock.secondary
    assert len(copies(local, "wwid:new", secondary)) == 1
    assert len(copies(local, "wwid:new", primary)) == 1, "the other way round"
    assert copies(local, primary, secondary) == []
    assert copies(local, secondary, primary) == [], "each holds what the other is to hold"
    assert copies(local, "wwid:new", "wwid:other") == []
    assert copies(local, primary, "wwid:other") == []


def test_a_note_goes_with_its_copy_and_not_before(local: LocalVolume) -> None:
    in_sync(local)
    forget_copies(local.paths, "wwid:other")
    forget_copies(local.paths, local.superblock.primary)
    assert note_file(local).exists()
    forget_copies(local.paths, local.superblock.secondary)
    assert not note_file(local).exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"session": 3, "flags": RecordFlag.CLEAN}, "was, at 20"),
        ({"session": 3, "flags": RecordFlag(0)}, "is, but for what the record names, a copy"),
        ({"session": 0}, None),
        ({"session": 3, "initial_sync": InitialSync.FULL}, None),
    ],
)
def test_a_record_knows_its_sides(
    local: LocalVolume, changes: dict[str, Any], words: str | None
) -> None:
    record = dataclasses.replace(local.superblock, **changes)
    found = good_copies(local.paths, record, "wwid:new", record.secondary)
    assert [words in sentence for sentence in found if words] == ([True] if words else [])
    in_sync(local)
    assert len(good_copies(local.paths, record, "wwid:new", record.secondary)) == 1, "said once"


# -- what the secondary is worth ----------------------------------------------------------------


def holds(local: LocalVolume, **changes: Any) -> str:
    superblock = dataclasses.replace(local.superblock, **changes)
    return sides.secondary_holds(local.config, local.paths, superblock, 7)


def test_what_the_secondary_holds(local: LocalVolume) -> None:
    clean = {"session": 2, "flags": RecordFlag.CLEAN, "updated_s": 0}
    unclean = {"session": 2, "flags": RecordFlag(0)}
    assert holds(local, **clean).endswith("was in sync with it at 1970-01-01T00:00:00+00:00")
    assert "is a copy of it that may lack what 7 extents" in holds(local, **unclean)
    first = holds(local, **unclean, initial_sync=InitialSync.CHECKSUM)
    assert first == f"this host never saw secondary {local.secondary} in sync with it"
    in_sync(local)
    compared = holds(local, **unclean, initial_sync=InitialSync.CHECKSUM)
    assert "was in sync with it at 20" in compared
    assert "may lack what 7 extents" in compared


def test_a_medium_without_a_lasting_identity_may_be_any() -> None:
    medium = Identity("block", "name:sda", 1, 512, 512, False, stable=False)
    assert not is_other(medium, "name:sdb")
    assert is_other(dataclasses.replace(medium, stable=True), "name:sdb")


def test_a_missing_folder_knows_nothing(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "none", tmp_path)
    assert good_copies(paths, None, "wwid:a", "wwid:b") == []
