"""What of the barrier needs no kernel that has dm-era; the rest is in tests/vm/guest."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from dmctl.kernel.barrier import Counters, MetadataFile, StatFile, alarm, widen
from dmctl.model.era import BATCH_BLOCKS, BLOCK_BYTES


@given(st.lists(st.booleans(), max_size=200))
def test_widened_runs_are_one_block_longer_at_their_end(bits: list[bool]) -> None:
    expected = [bit or (at > 0 and bits[at - 1]) for at, bit in enumerate(bits)]
    assert widen(bitarray(bits, endian="little")).tolist() == [int(bit) for bit in expected]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("barrier") / "metadata"
    path.write_bytes(b"".join(bytes([number]) * BLOCK_BYTES for number in range(64)))
    return path


@given(numbers=st.lists(st.integers(0, 63), min_size=1, max_size=BATCH_BLOCKS))
def test_metadata_blocks_come_in_the_order_asked_for(image: Path, numbers: list[int]) -> None:
    file = MetadataFile(str(image))
    try:
        assert [bytes(block[:1])[0] for block in file.read_blocks(numbers)] == numbers
        assert {len(block) for block in file.read_blocks(numbers)} == {BLOCK_BYTES}
        assert bytes(file.read_block(numbers[0])) == bytes([numbers[0]]) * BLOCK_BYTES
    finally:
        file.close()


def test_metadata_that_end_too_early_are_an_error(image: Path) -> None:
    file = MetadataFile(str(image))
    try:
        with pytest.raises(OSError, match="end before block 64"):
            file.read_blocks([62, 63, 64])
    finally:
        file.close()


def test_counters_are_those_of_the_stat_file(tmp_path: Path) -> None:
    folder = tmp_path / "253:0"
    folder.mkdir()
    stat = folder / "stat"
    stat.write_text("".join(f"{number:8} " for number in range(17)) + "\n")
    file = StatFile("253:0", tmp_path)
    try:
        assert file.counters() == Counters(sectors_written=6, discards=11)
        stat.write_text("9 " * 17)
        assert file.counters() == Counters(sectors_written=9, discards=9)
    finally:
        file.close()


def test_an_alarm_ends_what_waits_and_goes_again() -> None:
    def interrupted(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.getsignal(signal.SIGALRM)
    rest, write = os.pipe()
    try:
        with pytest.raises(TimeoutError), alarm(0.02, interrupted):
            os.read(rest, 1)
        started = []
        with alarm(0.01, lambda *_: started.append(time.monotonic())):
            while len(started) < 2:
                signal.pause()
    finally:
        os.close(rest)
        os.close(write)
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
