"""What a scan finds: the golden images are the format."""

from __future__ import annotations

import gzip
import json

import pytest

from bitmapd.errors import RecordDamagedError
from bitmapd.receiver.places import Places
from tests.data.make_journal_golden import (
    AT,
    BATCHES,
    FOLDER,
    PLACES,
    described,
    dirty,
    disk,
    images,
    scanned,
)
from tests.support.sim import SimDisk

NAMES = sorted(path.name.removesuffix(".img.gz") for path in FOLDER.glob("*.img.gz"))


def test_there_is_an_image_for_each_way_in_which_a_journal_is_found() -> None:
    assert sorted(images()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_golden_images_are_read_as_ever(name: str) -> None:
    image = gzip.decompress((FOLDER / f"{name}.img.gz").read_bytes())
    assert described(image) == json.loads((FOLDER / f"{name}.json").read_text())


def test_golden_images_are_made_by_this_code() -> None:
    for name, image in images().items():
        assert gzip.decompress((FOLDER / f"{name}.img.gz").read_bytes()) == image, name


def test_what_cannot_be_read_is_as_if_it_were_not_there() -> None:
    journal = disk(bytes(dirty()))
    journal.unreadable = {AT[2] + 4096 + 100}  # a payload of the open point
    assert list(scanned(journal).open) == []
    journal.unreadable = {AT[1]}
    found = scanned(journal)
    assert found.points[8].count == len(BATCHES[0].entries)
    journal.unreadable = {PLACES.segment_offset(1), 0}
    found = scanned(journal)
    assert found.points[8].count == 0
    assert found.notes == ("superblock copy A: the superblock cannot be read",)


@pytest.mark.parametrize(("less", "blocks"), [(4096, 0), (0, 2)])
def test_a_segment_ends_with_the_last_batch_that_is_all_in_it(
    less: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = PLACES.segment_offset(1)
    monkeypatch.setattr(Places, "segment_bytes", property(lambda _: AT[1] - start - less))
    monkeypatch.setattr(Places, "segment_offset", lambda _, index: start)
    monkeypatch.setattr(Places, "segments", property(lambda _: 8))
    assert scanned(disk(bytes(dirty()))).points[8].count == blocks


def test_a_journal_that_was_cut_short_is_refused() -> None:
    image = bytes(dirty())
    with pytest.raises(RecordDamagedError, match="67108864"):
        scanned(SimDisk("journal", len(image), image))
