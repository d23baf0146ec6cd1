"""receiver/summing: when sums of the image are said, and of what."""

from __future__ import annotations

import random

import pytest
import xxhash

from bitmapd.peer.frames import ErrorCode
from bitmapd.peer.payloads import Runs
from bitmapd.points.messages import Committed, Compare, Message, Pieces, Sums, Verify
from bitmapd.points.sums import piece_sums
from bitmapd.receiver.summing import MOST_ASKED
from tests.support.sim import drain
from tests.support.simreceiver import (
    BLOCK,
    GEOMETRY,
    Machine,
    Script,
    SimWire,
    exchange,
    fresh,
    point,
    small,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


@pytest.fixture
def machine() -> Machine:
    return fresh()


@pytest.fixture
def script(machine: Machine) -> Script:
    """With one point, which is applied."""
    script = Script(random.Random(1))
    script.write()
    point(script, machine)
    return script


def sums(script: Script, first: int, stop: int) -> Sums:
    blocks = [script.content[b * BLOCK : (b + 1) * BLOCK] for b in range(first, stop)]
    return Sums(first, tuple(xxhash.xxh3_64_intdigest(bytes(block)) for block in blocks))


def ask(script: Script, machine: Machine, *runs: tuple[int, int]) -> list[Message]:
    """The answers, when all disks are done."""
    assert script.wire is not None
    script.wire.say(Verify(runs))
    while script.wire.deliver():
        pass
    machine.settle()
    return answers(script)


def answers(script: Script) -> list[Message]:
    assert script.wire is not None
    found = []
    while (message := script.wire.answer()) is not None:
        found.append(message)
    return found


def test_sums_come_in_the_order_of_the_questions(script: Script, machine: Machine) -> None:
    last = GEOMETRY.blocks
    expected = [sums(script, 3, 5), sums(script, 0, 1), sums(script, last - 2, last)]
    assert ask(script, machine, (3, 5)) == expected[:1]
    assert script.wire is not None
    script.wire.say(Verify(((0, 1), (last - 2, last))))
    assert ask(script, machine) == expected[1:]


def test_sums_wait_until_what_was_committed_is_in_the_image(
    script: Script, machine: Machine
) -> None:
    script.write()
    while script.send(4):
        exchange(script, machine)
    assert script.end()
    assert script.wire is not None
    journal = machine.journal
    told: list[Message] = []
    while not any(isinstance(message, Committed) for message in told):
        script.wire.deliver()
        drain(machine.loop, journal)
        told += answers(script)
    script.wire.say(Verify(((0, GEOMETRY.blocks),)))
    script.wire.deliver()
    drain(machine.loop, journal)
    assert not any(isinstance(message, Sums) for message in answers(script))
    machine.settle()
    found = [message for message in answers(script) if isinstance(message, Sums)]
    assert found == [sums(script, 0, GEOMETRY.blocks)]


def test_the_last_block_is_as_long_as_in_the_point_that_the_image_has(
    script: Script, machine: Machine
) -> None:
    last = GEOMETRY.blocks
    wire = script.wire = SimWire(machine)  # the volume has grown, and no point of it is there yet
    machine.receiver.connected(wire)
    wire.say(script.hello(size_bytes=18 * BLOCK))
    wire.deliver()
    machine.settle()
    assert sums(script, last - 1, last) in ask(script, machine, (last - 1, last))


def test_before_a_point_the_size_of_who_asks_counts(machine: Machine) -> None:
    script = Script(random.Random(1))
    script.connect(machine)
    exchange(script, machine)
    empty = Sums(0, (xxhash.xxh3_64_intdigest(bytes(BLOCK)),))
    assert empty in ask(script, machine, (0, 1))


def test_what_cannot_be_read_has_no_sums(script: Script, machine: Machine) -> None:
    machine.image.fail_next["read"] = [5]
    assert ask(script, machine, (2, 3)) == [Sums(2, ())]
    assert ask(script, machine, (2, 3)) == [sums(script, 2, 3)]


def test_another_connection_does_not_hear_them(script: Script, machine: Machine) -> None:
    assert script.wire is not None
    script.wire.say(Verify(((0, 1), (2, 3))))
    script.wire.deliver()
    assert not machine.receiver.is_idle
    script.connect(machine)
    exchange(script, machine)  # which asserts that nothing comes but what it asked for
    assert machine.receiver.is_idle
    assert script.wire.is_open


@pytest.mark.parametrize(
    ("runs", "code"),
    [
        (tuple((n, n + 1) for n in range(0, 2 * MOST_ASKED, 2)), ErrorCode.BUSY),
        (((0, 5),), ErrorCode.SIZE),
    ],
)
def test_too_much_at_once_is_refused(
    runs: tuple[tuple[int, int], ...],
    code: ErrorCode,
    script: Script,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitmapd.receiver.summing.MOST_BYTES", 4 * BLOCK)
    monkeypatch.setattr("bitmapd.receiver.summing.MOST_ASKED", 4)
    wire = script.wire
    assert wire is not None
    runs = tuple(run for run in runs if run[1] <= GEOMETRY.blocks)
    wire.say(Verify(runs))
    while wire.deliver():
        pass
    assert wire.error is not None
    assert wire.error.code is code


def pieces(script: Script, salt: int, *runs: tuple[int, int]) -> Pieces:
    found: list[int] = []
    for first, stop in runs:
        start, length = GEOMETRY.block_bytes_range(first, stop)
        raw = memoryview(bytes(script.content[start : start + length]))
        found += piece_sums(GEOMETRY, salt, first, raw)
    return Pieces(runs[0][0], tuple(found))


def compare(script: Script, machine: Machine, *runs: tuple[int, int]) -> list[Message]:
    assert script.wire is not None
    script.wire.say(Compare(7, runs))
    while script.wire.deliver():
        pass
    machine.settle()
    return answers(script)


def test_sums_of_pieces_are_one_answer_after_a_flush(script: Script, machine: Machine) -> None:
    last = GEOMETRY.blocks
    runs = ((1, 2), (3, 5), (last - 1, last))
    flushes = machine.image.history.count(("flush", 0, 0))
    answer = compare(script, machine, *runs)
    assert answer == [pieces(script, 7, *runs)]
    assert machine.image.history.count(("flush", 0, 0)) == flushes + 1
    assert answer != [pieces(script, 8, *runs)]


@pytest.mark.parametrize("kind", ["flush", "read"])
def test_an_image_that_fails_has_no_sums_of_pieces(
    kind: str, script: Script, machine: Machine
) -> None:
    machine.image.fail_next[kind] = [5]
    assert compare(script, machine, (2, 4)) == [Pieces(2, ())]


@pytest.mark.parametrize(
    ("runs", "code"),
    [((), ErrorCode.RUNS), (((0, 3), (4, 6)), ErrorCode.SIZE)],
)
def test_a_comparison_of_nothing_or_too_much_is_refused(
    runs: Runs,
    code: ErrorCode,
    script: Script,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bitmapd.receiver.summing.MOST_BYTES", 4 * BLOCK)
    assert compare(script, machine, *runs) == []
    assert script.wire is not None
    assert script.wire.error is not None
    assert script.wire.error.code is code
