"""media/blockstat: what the kernel counts, and whether it counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bitmapd.media.blockstat import BlockStat
from dmctl.kernel.barrier import Counters, counters


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """Of device 253:0 below a folder that is like /sys/dev/block."""
    queue = tmp_path / "253:0" / "queue"
    queue.mkdir(parents=True)
    (queue / "iostats").write_text("1\n")
    stat = "".join(f"{number:8} " for number in range(17)) + "\n"
    (queue.parent / "stat").write_text(stat)
    return queue.parent


@pytest.fixture
def stat(entry: Path) -> BlockStat:
    return BlockStat("253:0", entry.parent)


def test_fields_are_those_of_the_stat_file(stat: BlockStat, entry: Path) -> None:
    assert stat.read() == list(range(17))
    assert counters(stat) == Counters(sectors_written=6, discards=11, lapses=0)
    (entry / "stat").write_text("9 " * 17)
    assert counters(stat, 4) == Counters(sectors_written=9, discards=9, lapses=4)


def test_every_reading_that_finds_it_off_is_a_lapse(stat: BlockStat, entry: Path) -> None:
    before = counters(stat)
    assert counters(stat) == before
    (entry / "queue" / "iostats").write_text("0\n")
    seen = [counters(stat), counters(stat)]
    assert seen[0] != before != seen[1] != seen[0]
    (entry / "queue" / "iostats").write_text("1\n")
    assert counters(stat) == seen[1]


def test_it_is_switched_on(stat: BlockStat, entry: Path) -> None:
    assert not stat.switch_on()
    (entry / "queue" / "iostats").write_text("0\n")
    assert stat.switch_on()
    assert (entry / "queue" / "iostats").read_text() == "1"
    assert not stat.switch_on()


def test_a_switch_that_stays_off_is_an_error(entry: Path) -> None:
    """The stat file is read through a descriptor; the name leads elsewhere by now."""
    switch = entry / "queue" / "iostats"
    switch.write_text("0\n")
    stat = BlockStat("253:0", entry.parent)
    switch.unlink()
    switch.symlink_to(os.devnull)
    with pytest.raises(OSError, match="iostats stays 0"):
        stat.switch_on()


def test_a_device_without_counters_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockStat("1:1", tmp_path)
    (tmp_path / "1:2").mkdir()
    (tmp_path / "1:2" / "stat").write_text("")
    with pytest.raises(FileNotFoundError):
        BlockStat("1:2", tmp_path)


def test_closed_descriptors_are_not_kept(stat: BlockStat) -> None:
    stat.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        stat.read()
