"""The barrier on a simulated kernel, one call at a time; tests/vm/guest has it on a real one.

Numbers of rules are those of `dmctl/kernel/barrier.py`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.gate.direct import Landed
from bitmapd.gate.routes import DIRECT, GATE, Segment
from bitmapd.record.geometry import Geometry
from dmctl.kernel.barrier import MetadataFile, alarm, widen
from dmctl.model.era import BATCH_BLOCKS, BLOCK_BYTES
from tests.support.sim import SimDisk
from tests.support.simhelper import METADATA_BLOCKS
from tests.support.simkernel import SimKernel


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


# -- on the simulated kernel ------------------------------------------------------------------
BLOCK = 4096
GEOMETRY = Geometry(8 * BLOCK, 2 * BLOCK, BLOCK)
ALL_DIRECT: list[Segment] = [(0, 8 * BLOCK, DIRECT)]
HALF: list[Segment] = [(0, 4 * BLOCK, DIRECT), (4 * BLOCK, 8 * BLOCK, GATE)]
CALLS = 10  # more than a barrier makes


class Bench:
    """A volume whose hosts write directly, and who asks for barriers as the direct path does."""

    def __init__(self) -> None:
        self.disk = SimDisk("primary", GEOMETRY.size_bytes)
        self.kernel = SimKernel(GEOMETRY, self.disk)
        self.kernel.table = ALL_DIRECT
        self.since_era = 1
        self.answers: list[OSError | Landed] = []

    def write(self, block: int, *, lands: bool = True) -> None:
        self.kernel.write("write", block * BLOCK, b"x" * BLOCK, lambda error: None, False)
        if lands:
            self.land()

    def discard(self, block: int) -> None:
        """The second half of a block and the first of the next."""
        start = block * BLOCK + BLOCK // 2
        self.kernel.write("trim", start, bytes(BLOCK), lambda error: None, False)
        self.land()

    def land(self) -> None:
        while self.disk.pending:
            self.disk.finish(0)

    def begin(self, table: list[Segment] | None = None, calls: int = 0) -> None:
        self.kernel.barrier(table, self.since_era, self._answered)
        for _ in range(calls):
            if self.kernel.can_step:
                self.kernel.step()

    def _answered(self, error: OSError | None, landed: Landed | None) -> None:
        if landed is not None:
            self.since_era = landed.era + 1
            self.answers.append(landed)
        elif error is not None:
            self.answers.append(error)

    def end(self) -> None:
        while self.kernel.can_step:
            self.kernel.step()

    def landed(self, table: list[Segment] | None = None) -> Landed:
        """Of a barrier that nothing disturbs."""
        self.begin(table)
        self.end()
        landed = self.answers.pop()
        assert isinstance(landed, Landed), landed
        return landed

    def blocks(self, table: list[Segment] | None = None) -> set[int]:
        return blocks_of(self.landed(table))


def blocks_of(landed: OSError | Landed) -> set[int]:
    if isinstance(landed, OSError):
        return set()
    return {block for first, stop in landed.runs for block in range(first, stop)}


@pytest.fixture
def bench() -> Bench:
    """Settled: the helper has got two readings."""
    made = Bench()
    made.landed()
    made.landed()
    return made


def test_it_brings_what_was_written_and_nothing_else(bench: Bench) -> None:
    bench.write(3)
    bench.write(5)
    assert bench.blocks() == {3, 5}
    bench.write(6)
    assert bench.blocks() == {6}


def test_rule_5_it_is_skipped_when_three_readings_are_equal(bench: Bench) -> None:
    bench.write(3)
    skipped = [bench.landed().skipped for _ in range(5)]
    assert skipped == [False, False, True, True, True]
    assert not bench.landed(HALF).skipped


@pytest.mark.parametrize("table", [None, HALF])
def test_rule_1_what_it_brings_has_landed(bench: Bench, table: list[Segment] | None) -> None:
    bench.write(0)  # one in flight is no reason for a barrier
    bench.write(3, lands=False)
    bench.begin(table, calls=CALLS)
    assert not bench.answers, "a write is in flight, and the barrier has passed"
    bench.land()
    bench.end()
    assert [blocks_of(answer) for answer in bench.answers] == [{0, 3}]


@pytest.mark.parametrize("at", range(CALLS))
@pytest.mark.parametrize("table", [None, HALF])
def test_rule_1_a_write_at_any_moment_is_brought_after_it_landed(
    bench: Bench, table: list[Segment] | None, at: int
) -> None:
    bench.write(0)
    bench.begin(table, calls=at)
    bench.write(3, lands=False)
    held = not bench.disk.pending
    bench.end()
    if bench.answers and not held:
        assert 3 not in blocks_of(bench.answers[0]), "it has not landed"
    bench.land()
    bench.end()
    bench.land()
    brought = set().union(*map(blocks_of, bench.answers))
    for _ in range(2):
        brought |= bench.blocks()
    assert brought == {0, 3}


@pytest.mark.parametrize("at", range(CALLS))
@pytest.mark.parametrize("counts_at_start", [False, True])
def test_rule_4_a_discard_at_any_moment_brings_both_of_its_blocks(
    bench: Bench, counts_at_start: bool, at: int
) -> None:
    bench.kernel.era.counts_at_start = counts_at_start
    bench.write(0)
    bench.begin(calls=at)
    bench.discard(3)
    bench.end()
    bench.land()
    brought = set().union(*map(blocks_of, bench.answers))
    for _ in range(2):
        brought |= bench.blocks()
    assert brought >= {3, 4}


def test_rule_4_later_writes_are_not_widened(bench: Bench) -> None:
    bench.discard(3)
    for _ in range(3):
        bench.landed()
    bench.write(5)
    assert bench.blocks() == {5}


@pytest.mark.parametrize("at", range(CALLS))
@pytest.mark.parametrize(("change", "blocks"), [(Bench.write, {3}), (Bench.discard, {3, 4})])
def test_rule_5_a_request_that_is_marked_long_after_it_was_counted(
    bench: Bench, at: int, change: Callable[[Bench, int], None], blocks: set[int]
) -> None:
    era = bench.kernel.era
    era.counts_at_start = True
    bench.write(0)
    bench.begin(calls=at)
    era.defers = lambda: True
    change(bench, 3)
    bench.end()
    if not bench.answers:  # it waits for it
        era.work()
        bench.land()
        bench.end()
    brought = set().union(*map(blocks_of, bench.answers))
    bench.answers.clear()
    bench.begin()
    while bench.kernel.snapshot is None:
        bench.kernel.step()
    era.work()  # the next era has begun
    bench.land()
    bench.end()
    brought |= set().union(*map(blocks_of, bench.answers))
    for _ in range(2):
        brought |= bench.blocks()
    assert brought >= blocks


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_rule_5_answers_that_got_lost_are_brought_again(bench: Bench, lost: int) -> None:
    bench.discard(3)
    for _ in range(lost):
        bench.begin()
        while bench.kernel.busy is not None and not bench.kernel.busy.process.ended:
            bench.kernel.step()
        bench.kernel.give_up()
    assert all(isinstance(answer, OSError) for answer in bench.answers)
    assert bench.blocks() >= {3, 4}


def fails(kernel: SimKernel) -> None:
    kernel.give_up()


def dies_with_the_old_table(kernel: SimKernel) -> None:
    kernel.lose_helper(swap=False)


def dies_with_the_new_table(kernel: SimKernel) -> None:
    kernel.lose_helper(swap=True)


@pytest.mark.parametrize("at", range(CALLS))
@pytest.mark.parametrize("table", [None, HALF])
@pytest.mark.parametrize("lands", [False, True])
@pytest.mark.parametrize("ends", [fails, dies_with_the_old_table, dies_with_the_new_table])
def test_rule_2_what_ends_it_stops_no_write_and_loses_no_block(
    bench: Bench,
    table: list[Segment] | None,
    at: int,
    lands: bool,
    ends: Callable[[SimKernel], None],
) -> None:
    kernel = bench.kernel
    bench.write(0)
    bench.write(3, lands=lands)
    bench.begin(table, calls=at)
    ends(kernel)
    assert not kernel.suspended
    assert kernel.table in (ALL_DIRECT, table)
    assert kernel.inactive is None
    assert kernel.coming is None
    bench.land()
    brought = set().union(*map(blocks_of, bench.answers))
    bench.write(1)
    assert brought | bench.blocks() | bench.blocks() >= {0, 1, 3}
    assert kernel.snapshot is None


def test_rule_2_a_deadline_that_passes_leaves_the_old_table(bench: Bench) -> None:
    bench.write(3, lands=False)
    bench.begin(HALF, calls=CALLS)
    bench.kernel.give_up()
    (error,) = bench.answers
    assert isinstance(error, TimeoutError)
    assert bench.kernel.table == ALL_DIRECT


def test_rule_5_who_asks_from_an_older_era_on_gets_it(bench: Bench) -> None:
    bench.write(3)
    while not bench.landed().skipped:
        pass
    bench.since_era = 1
    assert bench.blocks() == {3}


def test_a_table_that_another_program_cleared_is_not_taken_for_a_barrier(bench: Bench) -> None:
    bench.write(3, lands=False)
    bench.begin(HALF)
    while bench.kernel.inactive is None:
        bench.kernel.step()
    bench.kernel.inactive = None
    bench.end()
    (error,) = bench.answers
    assert isinstance(error, OSError)
    assert error.errno == errno.EAGAIN
    assert bench.kernel.table == ALL_DIRECT


def test_rule_6_what_was_not_counted_is_brought(bench: Bench) -> None:
    for _ in range(3):
        bench.landed()
    bench.kernel.era.counting = False
    bench.discard(3)
    assert bench.blocks() == {3, 4}
    assert bench.kernel.era.counting


@pytest.mark.parametrize("at", range(CALLS))
def test_rule_6_counting_may_end_at_any_moment(bench: Bench, at: int) -> None:
    for _ in range(3):
        bench.landed()
    bench.begin(HALF, calls=at)
    bench.kernel.era.counting = False
    bench.discard(1)
    bench.end()
    bench.land()
    brought = set().union(*map(blocks_of, bench.answers))
    for _ in range(2):
        brought |= bench.blocks()
    assert brought >= {1, 2}


def test_rule_6_what_another_one_saw_counts_too(bench: Bench) -> None:
    for _ in range(3):
        bench.landed()
    bench.kernel.era.counting = False
    bench.discard(3)
    assert bench.kernel.counters().lapses
    bench.kernel.era.counting = True  # whoever it was
    assert bench.blocks() == {3, 4}


def test_rule_8_no_era_ends_while_half_of_the_metadata_are_in_use(bench: Bench) -> None:
    bench.write(3)
    bench.kernel.metadata_used = METADATA_BLOCKS // 2
    before = bench.kernel.era.current
    bench.begin(HALF)
    bench.end()
    (error,) = bench.answers
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOBUFS
    assert bench.kernel.era.current == before
    assert bench.kernel.inactive is None
    bench.kernel.metadata_used -= 1
    assert bench.blocks() == {3}


def test_marks_that_cannot_be_read_are_damage(bench: Bench) -> None:
    bench.write(3)
    bench.begin()
    while bench.kernel.snapshot is None:
        bench.kernel.step()
    snapshot = bench.kernel.snapshot
    snapshot.image.blocks[snapshot.root] = bytes(BLOCK_BYTES)
    bench.end()
    (landed,) = bench.answers
    assert isinstance(landed, Landed)
    assert "checksum" in landed.damage
    assert landed.era == bench.kernel.era.current - 1
    assert bench.kernel.snapshot is None


def test_a_swap_puts_a_table_in_force_and_ends_no_era(bench: Bench) -> None:
    bench.kernel.table = HALF
    era = bench.kernel.era.current
    bench.write(0, lands=False)
    answers: list[OSError | None] = []
    bench.kernel.swap(ALL_DIRECT, lambda error, window_s: answers.append(error))
    bench.end()
    assert (answers, bench.kernel.table) == ([], HALF), "a write is in flight"
    bench.land()
    bench.end()
    assert (answers, bench.kernel.table) == ([None], ALL_DIRECT)
    assert bench.kernel.era.current == era
    bench.write(6)
    assert bench.landed().runs == [(0, 1), (6, 7)]


def test_a_swap_that_is_given_up_leaves_nothing_behind(bench: Bench) -> None:
    bench.kernel.table = HALF
    bench.write(0, lands=False)
    answers: list[OSError | None] = []
    bench.kernel.swap(ALL_DIRECT, lambda error, window_s: answers.append(error))
    bench.end()
    bench.kernel.give_up()
    assert isinstance(answers[0], TimeoutError)
    assert (bench.kernel.table, bench.kernel.inactive) == (HALF, None)
    assert not bench.kernel.suspended
