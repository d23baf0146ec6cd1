"""What a receiver answers, and what it does not let happen; schedules written by hand."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest

from bitmapd.errors import WrongStateError
from bitmapd.peer.frames import ErrorCode
from bitmapd.peer.payloads import Runs
from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from bitmapd.points.codec import cost_bytes
from bitmapd.points.messages import (
    NIL,
    Applied,
    ApplyUpTo,
    Committed,
    Credit,
    Data,
    Encoding,
    End,
    Entry,
    Have,
    Hello2,
    Map,
    Message,
    Need,
    Ping,
    Received,
    Role,
)
from bitmapd.points.pieces import whole_mask
from bitmapd.receiver import places
from bitmapd.receiver import receiver as module
from bitmapd.receiver.commit import MOST_QUEUED, NEVER, PageFlag, encode_page, slot_offset
from bitmapd.receiver.receiver import State
from bitmapd.receiver.superblock import Line
from tests.support.sim import SimDisk
from tests.support.simreceiver import (
    GENERATION,
    GEOMETRY,
    IMAGE_BYTES,
    JOURNAL_BYTES,
    SEGMENT,
    VOLUME,
    Machine,
    Script,
    SimWire,
    exchange,
    formatted,
    fresh,
    point,
    small,
    superblock,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


@pytest.fixture
def machine() -> Machine:
    return fresh()


@pytest.fixture
def script() -> Script:
    return Script(random.Random(1))


def content(machine: Machine) -> bytes:
    return bytes(machine.image.visible[: GEOMETRY.size_bytes])


def media(machine: Machine) -> tuple[bytes, bytes]:
    machine.settle()
    return bytes(machine.image.visible), bytes(machine.journal.visible)


def answers(wire: SimWire) -> list[Message]:
    found = []
    while (message := wire.answer()) is not None:
        found.append(message)
    return found


def killed(machine: Machine) -> Machine:
    """Another process on the same disks, as they are."""
    for disk in machine.disks:
        disk.abandon()
    image, journal = (SimDisk(d.name, d.size_bytes, bytes(d.visible)) for d in machine.disks)
    return Machine(image, journal)


def sent_not_written(machine: Machine, script: Script, blocks: int = 3) -> None:
    """Some blocks of the open point are at the receiver, in flight to its disks."""
    for _ in range(blocks):
        script.write()
    script.send(blocks)
    while script.wire is not None and script.wire.deliver():
        pass


def fill(script: Script) -> None:
    """All of the volume changes, to what cannot be packed."""
    for block in range(GEOMETRY.blocks):
        start, length = GEOMETRY.block_bytes_range(block, block + 1)
        script.content[start : start + length] = script.rng.randbytes(length)
        script.changed[block] = whole_mask(GEOMETRY, block)
        script.dirty.add(block)


def second_point(machine: Machine, script: Script) -> None:
    """Point 1 is in the image; of point 2 two blocks were sent, and are in the journal."""
    point(script, machine)
    while len(script.dirty) < 2:
        script.write()
    script.send(2)
    exchange(script, machine)


# -- points -----------------------------------------------------------------------------------


def test_points_come_through_one_after_the_other(machine: Machine, script: Script) -> None:
    assert machine.receiver.figures()["consistent"] == "never"
    for number in range(1, 5):
        point(script, machine)
        page = machine.receiver.journal.page
        assert (page.committed, page.applied, page.inconsistent_until) == (number, number, 0)
        assert content(machine) == bytes(script.content)
        for _ in range(4):
            script.write()
    assert machine.receiver.figures() == {
        "connected": True,
        "role": "receiver",
        "committed": 4,
        "committed_timestamp_seconds": 1767225600.0,
        "applied": 4,
        "queued_bytes": 0,
        "journal_bytes": 0,
        "journal_limit_bytes": 9 * SEGMENT,
        "catch_up": "keep",
        "in_place_until": None,
        "consistent": "yes",
        "kept": [],
        "view": None,
    }
    assert machine.receiver.is_idle
    assert [event for event, _ in machine.events] == ["sender-connected"] + 4 * ["point-committed"]


def test_the_first_point_goes_to_the_image_and_not_through_the_journal(
    machine: Machine, script: Script
) -> None:
    point(script, machine)
    assert not any(machine.journal.visible[1 << 20 :])
    assert sum(length for kind, _, length in machine.image.history) == GEOMETRY.size_bytes


def test_a_point_without_blocks_is_a_point(machine: Machine, script: Script) -> None:
    point(script, machine)
    point(script, machine)
    assert machine.receiver.journal.page.applied == 2


def test_zeros_are_not_written_as_data(machine: Machine, script: Script) -> None:
    zeroed: list[tuple[int, int]] = []
    plain = machine.image.zero

    def zero(offset: int, length: int, *args: Any, **kwargs: Any) -> None:
        zeroed.append((offset, length))
        plain(offset, length, *args, **kwargs)

    machine.image.zero = zero  # type: ignore[method-assign]
    point(script, machine)  # of nothing but zeros
    assert sum(length for _, length in zeroed) == GEOMETRY.size_bytes


def test_committed_is_said_when_the_page_is_durable(machine: Machine, script: Script) -> None:
    """And a HELLO2 waits for it: it would say less than what is becoming durable."""
    second_point(machine, script)
    assert script.end()
    assert script.wire is not None
    while script.wire.deliver():
        pass
    journal = machine.journal
    assert [op.kind for op in journal.pending] == ["flush"]
    journal.finish()
    assert [(op.kind, op.offset_bytes, op.fua) for op in journal.pending] == [
        ("write", slot_offset(machine.receiver.journal.page.sequence + 1), True)
    ]
    assert not answers(script.wire)
    script.connect(machine)
    script.wire.deliver()
    assert not answers(script.wire)
    assert machine.receiver.state is State.GREETING
    assert not machine.receiver.is_idle
    assert machine.receiver.journal.page.committed == 1
    journal.finish()
    hello = script.wire.answer()
    assert isinstance(hello, Hello2)
    assert hello.committed == 2


def test_what_a_process_that_was_killed_has_written_is_durable_before_it_is_said(
    machine: Machine, script: Script
) -> None:
    second_point(machine, script)
    assert script.end()
    assert script.wire is not None
    while script.wire.deliver():
        pass
    machine.journal.finish()
    (page,) = machine.journal.pending
    machine.journal.pending = []
    machine.journal.carry_out(page.offset_bytes, page.data, fua=False)
    after = Machine(*machine.disks)
    assert after.receiver.journal.page.committed == 2
    image, journal = (SimDisk(d.name, d.size_bytes, bytes(d.durable)) for d in after.disks)
    assert Machine(image, journal).receiver.journal.page.committed == 2


def seven_are_here(machine: Machine, script: Script) -> SimWire:
    """Point 2 is there; of point 3, which is open, seven blocks are here,
    and its sender has come again.  Nothing has been read of what it is told."""
    second_point(machine, script)
    assert script.end()
    exchange(script, machine)
    script.dirty = set(range(7))
    for block in script.dirty:
        script.changed[block] = whole_mask(GEOMETRY, block)
    while script.dirty:
        script.send(1)
        exchange(script, machine)
    script.wire.cut()  # type: ignore[union-attr]
    machine.receiver.have_blocks = 2
    script.connect(machine)
    wire = script.wire
    assert wire is not None
    while machine.receiver.state is not State.SAYING:
        wire.deliver()
        machine.loop.run_soon_once()
    return wire


def test_what_is_here_is_said_a_have_in_each_turn(machine: Machine, script: Script) -> None:
    wire = seven_are_here(machine, script)
    said = len(wire.to_sender)
    turns = 0
    while machine.receiver.state is State.SAYING:
        machine.receiver.drained(wire)  # which the link may say at any time
        machine.loop.run_soon_once()
        turns += 1
        assert len(wire.to_sender) == said + turns
    hello, *haves = answers(wire)
    assert isinstance(hello, Hello2)
    assert [(sum(n for _, n, _ in h.runs), h.last) for h in haves if isinstance(h, Have)] == [
        (2, False),
        (2, False),
        (2, False),
        (1, True),
    ]
    assert len(haves) == 4


def test_what_is_here_is_said_as_far_as_the_link_takes_it(machine: Machine, script: Script) -> None:
    machine.most_answers = 2
    wire = seven_are_here(machine, script)
    for _ in range(9):
        machine.loop.run_soon()
    assert len(wire.to_sender) == 2
    receiver = machine.receiver
    receiver.drained(wire)  # somebody is too early
    machine.loop.run_soon()
    said: list[Message] = []
    while receiver.state is State.SAYING:
        message = wire.answer()
        assert message is not None
        said.append(message)
        machine.loop.run_soon()
        assert len(wire.to_sender) <= 2
    assert len(said + answers(wire)) == 5


def test_nothing_comes_between_what_is_here(machine: Machine, script: Script) -> None:
    machine.most_answers = 2
    wire = seven_are_here(machine, script)
    receiver = machine.receiver
    receiver._told_applied = 1  # and it was applied since
    receiver.applied(2)
    receiver.damaged(((0, 1),))
    receiver._credit_bytes -= 2 << 20
    receiver._written(0)
    said: list[Message] = []
    while (message := wire.answer()) is not None:
        said.append(message)
        machine.loop.run_soon()
    kinds = [type(message) for message in said]
    assert kinds == [Hello2, Have, Have, Have, Have, Applied, Credit]


@pytest.mark.parametrize("what", ["begin", "data", "end"])
def test_who_sends_before_all_is_said_is_refused(
    machine: Machine, script: Script, what: str
) -> None:
    machine.most_answers = 2
    wire = seven_are_here(machine, script)
    entry = next(iter(script.sent.values()))
    message = {"begin": script.begin(), "data": Data((entry,)), "end": script.end_message()}[what]
    wire.say(message)
    wire.deliver()
    assert not wire.is_open
    assert wire.error is not None
    assert "came while saying what is here" in wire.error.text
    machine.loop.run_soon()
    assert receiver_says_nothing(wire)


@pytest.mark.parametrize("differs", [(), ((0, 1),)])
@pytest.mark.parametrize("is_new", [False, True])
def test_an_old_primary_says_where_it_differs_also_if_that_is_nowhere(
    script: Script, differs: Runs, is_new: bool
) -> None:
    """The sender of a newer generation waits for it; to one of the same it means nothing."""

    class OldPrimary(Machine):
        pass

    OldPrimary.differs = differs
    line = Line(VOLUME, GEOMETRY, (GENERATION,), 0)
    journal = bytes(formatted(superblock(line=line)))
    machine = OldPrimary(SimDisk("image", IMAGE_BYTES), SimDisk("journal", JOURNAL_BYTES, journal))
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    new = (bytes([7] * 16), GENERATION.bytes, NIL, NIL)
    wire.say(script.hello(generations=new if is_new else (GENERATION.bytes, NIL, NIL, NIL)))
    wire.deliver()
    machine.settle()
    said = [type(message) for message in answers(wire)]
    assert said == [Hello2, Have, *([Map] if is_new else [])]


def receiver_says_nothing(wire: SimWire) -> bool:
    """After what it had said."""
    before = len(wire.to_sender)
    wire.machine.receiver.drained(wire)
    wire.machine.loop.run_soon()
    return len(wire.to_sender) == before


def test_an_end_that_does_not_fit_is_answered_with_what_is_here(
    machine: Machine, script: Script
) -> None:
    second_point(machine, script)
    wire = script.wire
    assert wire is not None
    block, entry = next(iter(script.sent.items()))
    script.sent[block] = dataclasses.replace(entry, stamp=entry.stamp + 1)
    wire.say(script.end_message())
    wire.deliver()
    (have,) = answers(wire)
    assert isinstance(have, Have)
    assert have.point == 2
    assert have.last
    assert machine.receiver.state is State.RECEIVING
    script.sent[block] = entry
    wire.say(script.end_message())
    wire.deliver()
    machine.settle()
    assert Committed(2, script.incarnation) in answers(wire)


# -- what is taken up, and what is dropped --------------------------------------------------------


def test_what_is_here_is_not_sent_again(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    sent = script.sent_entries
    assert script.wire is not None
    script.wire.cut()
    for _ in range(2):
        script.connect(machine)
        exchange(script, machine)
    machine = killed(machine)
    script.connect(machine)
    point(script, machine)
    assert script.sent_entries == sent
    assert content(machine) == bytes(script.content)


def test_what_another_process_sent_is_dropped_before_anything_is_taken(
    machine: Machine, script: Script
) -> None:
    second_point(machine, script)
    assert machine.receiver.journal.open.count == 2
    script.restart()
    script.connect(machine)
    assert script.wire is not None
    script.wire.deliver()
    assert not answers(script.wire)  # the page that drops it is not durable
    assert len(machine.journal.pending) == 1
    machine.journal.finish()
    _, have = answers(script.wire)
    assert have == Have(0, script.incarnation, (), True)
    assert machine.receiver.journal.used_bytes == SEGMENT  # the one in use
    fresh_one = killed(machine)
    assert fresh_one.receiver.journal.open.count == 0
    assert fresh_one.receiver.journal.used_bytes == 0


def test_a_drop_waits_for_what_is_in_flight(machine: Machine, script: Script) -> None:
    point(script, machine)
    sent_not_written(machine, script)
    assert [op.kind for op in machine.journal.pending] == ["write"]
    script.restart()
    script.connect(machine)
    assert script.wire is not None
    script.wire.deliver()
    assert len(machine.journal.pending) == 1
    machine.journal.finish()
    assert [op.fua for op in machine.journal.pending] == [True]


def test_a_batch_that_was_torn_is_not_said_to_be_here(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    assert any(len(entry.payload) for entry in script.sent.values())
    first = machine.receiver.journal.open
    place = max(kept.place_bytes + kept.length_bytes for kept in first)
    machine.journal.visible[place - 1] ^= 0xFF
    machine = killed(machine)
    script.connect(machine)
    point(script, machine)
    assert content(machine) == bytes(script.content)


def test_the_first_point_begins_anew_after_a_crash(machine: Machine, script: Script) -> None:
    script.connect(machine)
    exchange(script, machine)
    script.send(4)
    exchange(script, machine)
    machine = killed(machine)
    script.connect(machine)
    point(script, machine)
    assert content(machine) == bytes(script.content)
    assert script.sent_entries == GEOMETRY.blocks + 4


def test_two_writes_of_a_block_before_point_1_do_not_pass_one_another(
    machine: Machine, script: Script
) -> None:
    script.connect(machine)
    exchange(script, machine)
    for fill in (1, 2):
        script.content[:4096] = bytes([fill]) * 4096
        script.dirty = {0}
        assert script.send(1)
        while script.wire is not None and script.wire.deliver():
            pass
    while machine.image.pending:
        machine.image.finish(len(machine.image.pending) - 1)
    assert machine.image.visible[:4096] == bytes([2]) * 4096


# -- rot --------------------------------------------------------------------------------------


def rot(machine: Machine, block: int = 0) -> None:
    """A bit of what a queued point has of a block changes."""
    (entries,) = machine.receiver.journal.points.values()
    (place,) = [kept.place_bytes for kept in entries if kept.block == block]
    machine.journal.visible[place + 9] ^= 4
    machine.journal.durable[:] = machine.journal.visible


def stopped_before_applying(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    script.content[0:4096] = random.Random(7).randbytes(4096)
    script.changed[0] = script.changed.get(0, 0) | 1
    script.dirty.add(0)
    script.send(1)
    exchange(script, machine)
    assert script.end()
    assert script.wire is not None
    while script.wire.deliver():
        pass
    machine.journal.finish()
    machine.journal.finish()
    assert machine.receiver.journal.page.committed == 2
    assert machine.receiver.journal.page.applied == 1


def test_what_rots_is_asked_for_and_comes_with_the_next_point(
    machine: Machine, script: Script
) -> None:
    stopped_before_applying(machine, script)
    rot(machine)
    machine.settle()
    page = machine.receiver.journal.page
    assert (page.committed, page.applied, page.inconsistent_until) == (2, 1, 0)
    assert content(machine) == script.points[script.incarnation, 1]
    assert script.wire is not None
    script.is_committed()
    assert Need(((0, 1),)) in answers(script.wire)
    script.changed[0] = 15
    script.dirty.add(0)
    script.write()
    point(script, machine)
    assert machine.receiver.journal.page.applied == 3
    assert content(machine) == bytes(script.content)
    assert "point-damaged" in [event for event, _ in machine.events]


def test_rot_of_what_may_be_in_the_image_makes_it_inconsistent(
    machine: Machine, script: Script
) -> None:
    stopped_before_applying(machine, script)
    rot(machine)
    machine = killed(machine)
    machine.settle()
    assert machine.receiver.figures()["consistent"] == "no"
    assert machine.receiver.journal.page.inconsistent_until == 3
    again = killed(machine)
    again.settle()
    assert again.receiver.journal.page.inconsistent_until == 3
    script.connect(again)
    exchange(script, again)
    assert 0 in script.dirty  # NEED came with the greeting
    point(script, again)
    assert again.receiver.figures()["consistent"] == "yes"
    assert content(again) == bytes(script.content)


def test_rot_while_a_point_is_written_is_seen(machine: Machine, script: Script) -> None:
    stopped_before_applying(machine, script)
    reads = len([op for op in machine.journal.pending if op.kind == "read"])
    for _ in range(reads):
        machine.journal.finish()  # verified
    rot(machine)
    machine.settle()
    assert machine.receiver.journal.page.inconsistent_until == 3
    point(script, machine)
    assert content(machine) == bytes(script.content)


def test_a_point_whose_entries_are_lost_is_asked_for_as_a_whole(
    machine: Machine, script: Script
) -> None:
    stopped_before_applying(machine, script)
    (entries,) = machine.receiver.journal.points.values()
    place = min(kept.place_bytes for kept in entries) // 4096 * 4096
    while machine.journal.visible[place : place + 8] != b"BMPbat01":
        place -= 4096
    machine.journal.visible[place + 70] ^= 1
    machine = killed(machine)
    machine.settle()
    assert machine.receiver.journal.page.applied == 1
    script.connect(machine)
    exchange(script, machine)
    assert script.dirty == set(range(GEOMETRY.blocks))
    point(script, machine)
    assert content(machine) == bytes(script.content)


def test_some_pieces_of_a_block_do_not_make_good_what_is_wrong(
    machine: Machine, script: Script
) -> None:
    stopped_before_applying(machine, script)
    script.changed[0] = 15
    rot(machine)
    machine.settle()
    script.is_committed()
    assert script.wire is not None
    answers(script.wire)  # and NEED is not heeded
    script.content[8192:12288] = bytes([3]) * 4096
    script.changed, script.dirty = {0: 4}, {0}
    script.send(1)
    assert script.end()
    exchange(script, machine)
    page = machine.receiver.journal.page
    assert (page.committed, page.applied) == (3, 1)
    assert content(machine) == script.points[script.incarnation, 1]


def test_applied_is_written_when_the_image_is_durable(machine: Machine, script: Script) -> None:
    stopped_before_applying(machine, script)
    while machine.journal.pending or len(machine.image.pending) > 1 or not machine.image.pending:
        for disk in machine.disks:
            while disk.pending and disk.pending[0].kind != "flush":
                disk.finish()
    assert [op.kind for op in machine.image.pending] == ["flush"]
    assert not machine.journal.pending
    machine.image.finish()
    assert [op.offset_bytes for op in machine.journal.pending] == [
        slot_offset(machine.receiver.journal.page.sequence + 1)
    ]
    assert bytes(machine.image.durable[: GEOMETRY.size_bytes]) == bytes(script.content)


def test_a_point_that_comes_while_rot_is_looked_for_counts(
    machine: Machine, script: Script
) -> None:
    """The whole queue makes good what is wrong, also what was committed meanwhile."""
    stopped_before_applying(machine, script)
    rot(machine)
    reads = list(machine.journal.pending)
    wire = script.wire
    assert wire is not None
    script.take()
    wire.deliver()
    fill(script)
    while script.dirty:
        assert script.send(4)
        while wire.deliver():
            pass
    assert script.end()
    while wire.deliver():
        pass
    while machine.receiver.journal.page.committed == 2:
        machine.journal.finish(
            next(n for n, op in enumerate(machine.journal.pending) if op not in reads)
        )
    machine.settle()
    assert machine.receiver.journal.page.applied == 3
    assert content(machine) == bytes(script.content)
    assert "point-damaged" not in [event for event, _ in machine.events]


def test_nothing_is_asked_for_before_there_is_a_volume(machine: Machine) -> None:
    machine.receiver.state = State.RECEIVING
    with pytest.raises(WrongStateError):
        machine.receiver.damaged(((0, 1),))


def test_a_process_that_stops_says_so(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    wire = script.wire
    assert wire is not None
    machine.receiver.leave()
    assert answers(wire) == [Bye(Goodbye.STOPPED)]
    assert not wire.is_open
    assert machine.receiver.is_idle
    machine.receiver.leave()


def test_with_nobody_there_nothing_is_said(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    wire = script.wire
    assert wire is not None
    wire.cut()
    machine.receiver.state = State.RECEIVING
    machine.receiver.applied(1)
    machine.receiver.fail()
    assert not answers(wire)


def test_an_unreadable_payload_is_as_a_wrong_one(machine: Machine, script: Script) -> None:
    stopped_before_applying(machine, script)
    (entries,) = machine.receiver.journal.points.values()
    (place,) = [kept.place_bytes for kept in entries if kept.block == 0]
    machine.journal.unreadable = {place}
    machine.settle()
    assert machine.receiver.journal.page.applied == 1
    machine.journal.unreadable = set()
    point(script, machine)
    assert content(machine) == bytes(script.content)


# -- errors of media ------------------------------------------------------------------------------


def test_an_error_of_the_image_is_tried_again(machine: Machine, script: Script) -> None:
    point(script, machine)
    script.write()
    machine.image.fail_next["write"] = [5]
    point_two = lambda: machine.receiver.journal.page.committed == 2  # noqa: E731
    exchange(script, machine)
    script.send(4)
    exchange(script, machine)
    script.end()
    exchange(script, machine, until=point_two)
    machine.settle()
    assert machine.receiver.journal.page.applied == 1
    assert ("image-error", {"message": "simulated EIO"}) in machine.events
    machine.loop.advance(11)
    machine.settle()
    assert machine.receiver.journal.page.applied == 2
    assert content(machine) == bytes(script.content)


@pytest.mark.parametrize("kind", ["write", "flush"])
def test_an_error_of_the_image_before_point_1_begins_it_anew(
    kind: str, machine: Machine, script: Script
) -> None:
    fill(script)
    script.connect(machine)
    exchange(script, machine)
    script.send(4)
    exchange(script, machine)
    machine.image.fail_next[kind] = [5]
    while script.send(4):
        exchange(script, machine)
    script.end()
    exchange(script, machine)
    assert machine.receiver.journal.page.committed == 0
    assert script.wire is None
    script.connect(machine)
    point(script, machine)
    assert content(machine) == bytes(script.content)
    assert script.sent_entries > GEOMETRY.blocks


@pytest.mark.parametrize("kind", ["batch", "flush", "page", "drop", "applied"])
def test_nothing_is_answered_after_an_error_of_the_journal(
    kind: str, machine: Machine, script: Script
) -> None:
    second_point(machine, script)
    wire = script.wire
    assert wire is not None
    if kind == "drop":
        script.restart()
        script.connect(machine)
        wire = script.wire
        assert wire is not None
        wire.deliver()
        machine.journal.fail_next["write"] = [5]
    elif kind == "batch":
        script.write()
        script.send(3)
        wire.deliver()
        script.end()
        wire.deliver()
        assert machine.receiver.state is State.COMMITTING
        machine.journal.fail_next["write"] = [5]
    else:
        assert script.end()
        while wire.deliver():
            pass
        if kind == "flush":
            machine.journal.fail_next["flush"] = [5]
        else:
            machine.journal.finish()
            if kind == "applied":
                machine.journal.finish()
            machine.journal.fail_next["write"] = [5]
    machine.settle()
    assert [error.errno for error in machine.failures] == [5]
    assert machine.receiver.state is State.FAILED
    assert not wire.is_open
    assert not any(isinstance(m, Committed) for m in answers(wire)) or kind == "applied"
    script.connect(machine)
    assert script.wire is not None
    assert not script.wire.is_open
    machine.receiver.lost(script.wire)
    assert machine.receiver.state is State.FAILED
    after = killed(machine)
    after.settle()
    script.connect(after)
    exchange(script, after)
    script.write()
    point(script, after)
    assert content(after) == bytes(script.content)


def test_changes_that_wait_for_a_page_that_fails_fail_with_it(
    machine: Machine, script: Script
) -> None:
    stopped_before_applying(machine, script)
    journal = machine.receiver.journal
    ends: list[OSError | None] = []
    for until in (3, 0):
        module.run(journal.inconsistent(until), lambda error, _: ends.append(error))
    machine.journal.fail_next["write"] = [5]
    while machine.journal.pending:
        machine.journal.finish()
    assert [error and error.errno for error in ends] == [5, 5]
    module.run(journal.inconsistent(3), lambda error, _: ends.append(error))
    assert ends[2] is machine.failures[0]


# -- bounds -----------------------------------------------------------------------------------


def test_no_more_is_taken_than_was_granted(machine: Machine, script: Script) -> None:
    point(script, machine)
    fill(script)
    while script.send(1):
        exchange(script, machine)
        script.dirty = set(script.changed)  # written again and again
    script.credit += 1 << 20
    before = media(machine)
    wire = script.wire
    assert wire is not None
    assert script.send(1)
    wire.deliver()
    assert wire.error is not None
    assert wire.error.code is ErrorCode.BUSY
    assert media(machine) == before


def test_a_journal_has_room_for_what_was_granted(machine: Machine, script: Script) -> None:
    """Whatever the sizes of DATA are, and however often a block comes."""
    point(script, machine)
    for _ in range(40):
        while script.credit > 0:
            script.write()
            script.changed = dict.fromkeys(script.dirty, 1)
            if not script.send(script.rng.choice((1, 1, 3))):
                break
            exchange(script, machine)
        if script.dirty:
            break
    assert script.wire is not None
    assert script.wire.error is None
    assert machine.receiver.journal.used_bytes <= 9 * SEGMENT


def test_credit_comes_back_when_space_is_free(
    machine: Machine, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CREDIT_BYTES", 4096)
    point(script, machine)
    for _ in range(12):
        for _ in range(6):
            script.write()
        point(script, machine)
    assert script.credit >= machine.receiver.journal.room_bytes - SEGMENT


def test_what_cannot_be_written_is_not_received(
    machine: Machine, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_UNWRITTEN_BYTES", 8192)
    point(script, machine)
    assert script.wire is not None
    sent_not_written(machine, script)
    assert not script.wire.reads
    machine.settle()
    assert script.wire.reads


def test_received_is_said_now_and_then(
    machine: Machine, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RECEIVED_BYTES", 8192)
    point(script, machine)
    sent_not_written(machine, script)
    assert script.wire is not None
    assert Received(script.stamp) in answers(script.wire)


def test_no_more_than_16_points_are_queued(machine: Machine, script: Script) -> None:
    point(script, machine)
    journal = machine.receiver.journal
    stopped = [disk for disk in machine.disks if disk is machine.image]

    def journal_only() -> None:
        machine.loop.run_soon()
        while machine.journal.pending:
            machine.journal.finish()
            machine.loop.run_soon()

    for _ in range(17):
        wire = script.wire
        assert wire is not None
        while wire.deliver() or script.take():
            journal_only()
        script.content[0] ^= 1
        script.changed[0] = 1
        script.dirty = {0}
        script.send(1)
        assert script.end()
        while wire.deliver() or script.take():
            journal_only()
    assert stopped[0].pending
    assert journal.page.committed == 17
    assert machine.receiver.state is State.COMMITTING
    exchange(script, machine)
    assert journal.page.applied == 18
    assert content(machine) == bytes(script.content)


# -- what is wrong ------------------------------------------------------------------------------


def entry(**changes: Any) -> Entry:
    return dataclasses.replace(Entry(0, 1000, 1, Encoding.RAW, 0, bytes(4096)), **changes)


VIOLATIONS: dict[str, Callable[[Script], Message]] = {
    "hello again": lambda script: script.hello(),
    "a message of a receiver": lambda script: Committed(2, script.incarnation),
    "wrong sum": lambda script: Data((entry(),)),
    "end of another point": lambda script: End(3, script.incarnation, 0, bytes(16)),
    "end of another process": lambda script: End(2, bytes([1] * 16), 0, bytes(16)),
    "begin of a point too far": lambda script: dataclasses.replace(script.begin(), point=3),
    "begin on another base": lambda script: dataclasses.replace(script.begin(), base=0),
    "begin of another process": lambda script: dataclasses.replace(
        script.begin(), incarnation=bytes([1] * 16)
    ),
    "begin of a larger size": lambda script: dataclasses.replace(
        script.begin(), size_bytes=IMAGE_BYTES
    ),
    "begin of no size": lambda script: dataclasses.replace(script.begin(), size_bytes=4000),
}


@pytest.mark.parametrize("name", VIOLATIONS)
@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_wrong_ends_the_connection_and_changes_nothing(
    name: str, in_place: bool, machine: Machine, script: Script
) -> None:
    if in_place:
        script.connect(machine)
        exchange(script, machine)
    else:
        second_point(machine, script)
    before = media(machine)
    page = machine.receiver.journal.page
    wire = script.wire
    assert wire is not None
    wire.say(VIOLATIONS[name](script))
    wire.deliver()
    if name == "begin on another base" and in_place:
        return  # that is its base
    assert not wire.is_open
    assert wire.error is not None
    assert machine.receiver.state is State.WAITING
    assert media(machine) == before
    assert machine.receiver.journal.page == page
    script.connect(machine)
    point(script, machine)
    assert content(machine) == bytes(script.content)


@pytest.mark.parametrize("message", [Data((entry(),)), End(2, bytes([1] * 16), 0, bytes(16))])
def test_nothing_comes_before_begin(message: Message, machine: Machine, script: Script) -> None:
    point(script, machine)
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello())
    wire.deliver()
    machine.settle()
    answers(wire)
    wire.say(message)
    wire.deliver()
    assert wire.error is not None
    assert wire.error.code is ErrorCode.KIND


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"role": Role.RECEIVER}, ErrorCode.OTHER),
        ({"generations": (NIL,) * 4}, ErrorCode.OTHER),
        ({"name": "vol1"}, ErrorCode.OTHER),
        ({"size_bytes": 0}, ErrorCode.OTHER),
        ({"size_bytes": IMAGE_BYTES + 512}, ErrorCode.SIZE),
        ({"size_bytes": IMAGE_BYTES - 100}, ErrorCode.SIZE),
        ({"extent_bytes": 1 << 26, "block_bytes": 4096}, None),
    ],
)
def test_a_volume_that_does_not_fit_is_refused(
    changes: dict[str, Any], code: ErrorCode | None, machine: Machine, script: Script
) -> None:
    before = media(machine)
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello(**changes))
    wire.deliver()
    machine.settle()
    if code is None:
        assert wire.is_open
        return
    assert wire.error is not None
    assert wire.error.code is code
    assert media(machine) == before


def test_a_volume_that_the_journal_is_too_small_for_is_refused(
    machine: Machine, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "MIN_JOURNAL_BYTES", 1 << 30)
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello())
    wire.deliver()
    assert wire.error is not None
    assert "too small" in wire.error.text
    assert "it needs 1073741824 bytes at least" in wire.error.text


@pytest.mark.parametrize(
    "changes",
    [{"volume": bytes([1] * 16)}, {"extent_bytes": 2 * GEOMETRY.extent_bytes}],
)
def test_another_volume_is_refused(
    changes: dict[str, Any], machine: Machine, script: Script
) -> None:
    point(script, machine)
    before = media(machine)
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello(**changes))
    wire.deliver()
    assert wire.error is not None
    assert wire.error.code is ErrorCode.OTHER
    assert media(machine) == before


def test_a_sender_that_is_not_followed_hears_why_and_changes_nothing(
    machine: Machine, script: Script
) -> None:
    point(script, machine)
    before = media(machine)
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello(generations=(bytes([7] * 16), NIL, NIL, NIL)))
    wire.deliver()
    (hello,) = answers(wire)
    assert isinstance(hello, Hello2)
    assert hello.committed == 1
    assert machine.receiver.state is State.REFUSED
    wire.say(script.begin())
    wire.deliver()
    assert wire.error is not None
    assert media(machine) == before
    assert machine.events[-1][0] == "sender-refused"


def test_a_promoted_receiver_takes_nothing(machine: Machine, script: Script) -> None:
    point(script, machine)
    page = dataclasses.replace(
        machine.receiver.journal.page,
        flags=PageFlag.PROMOTED,
        sequence=machine.receiver.journal.page.sequence + 1,
    )
    at = slot_offset(page.sequence)
    machine.journal.visible[at : at + 4096] = encode_page(page)
    machine = killed(machine)
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello())
    wire.deliver()
    (hello,) = answers(wire)
    assert isinstance(hello, Hello2)
    assert hello.role is Role.PROMOTED
    assert machine.receiver.state is State.REFUSED
    assert machine.receiver.figures()["role"] == "promoted"


# -- connections --------------------------------------------------------------------------------


def test_a_second_connection_takes_the_place_of_the_first(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    first = script.wire
    assert first is not None
    script.connect(machine)
    assert not first.is_open
    machine.receiver.received(first, script.begin())
    machine.receiver.lost(first)
    point(script, machine)
    assert content(machine) == bytes(script.content)


def test_a_hello_that_comes_while_another_is_answered_is_answered_next(
    machine: Machine, script: Script
) -> None:
    second_point(machine, script)
    script.restart()
    script.connect(machine)
    assert script.wire is not None
    script.wire.deliver()
    script.wire.cut()
    script.connect(machine)
    script.wire.deliver()
    assert not answers(script.wire)
    point(script, machine)
    assert content(machine) == bytes(script.content)


def test_pings_are_answered_and_farewells_change_nothing(machine: Machine, script: Script) -> None:
    script.connect(machine)
    wire = script.wire
    assert wire is not None
    exchange(script, machine)
    for message in (Ping(77), Pong(1), Bye(Goodbye.STOPPED), Error(99, "wrong")):
        wire.say(message)
        wire.deliver()
    assert answers(wire) == [Pong(77)]
    assert machine.receiver.state is State.RECEIVING


def test_applied_is_said(machine: Machine, script: Script) -> None:
    second_point(machine, script)
    assert script.end()
    wire = script.wire
    assert wire is not None
    while wire.deliver():
        pass
    machine.settle()
    assert [m for m in answers(wire) if not isinstance(m, Credit)] == [
        Committed(2, script.incarnation),
        Applied(2),
    ]


def test_credit_and_cost_are_in_one_unit() -> None:
    assert cost_bytes(Data((entry(),))) == 8192


def test_a_journal_without_a_volume_has_no_room(machine: Machine) -> None:
    journal = machine.receiver.journal
    assert (journal.room_bytes, journal.used_bytes, journal.limit_bytes) == (0, 0, 0)
    assert journal.page.inconsistent_until == NEVER


def test_points_that_others_lack_do_not_wait_for_ever(
    machine: Machine, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as a page can name wait; then each new one has the oldest applied."""
    begin = script.begin
    monkeypatch.setattr(
        script, "begin", lambda: dataclasses.replace(begin(), group=100 + script.point)
    )
    point(script, machine)  # in place
    for _ in range(MOST_QUEUED):
        script.write()
        point(script, machine)
    page = machine.receiver.journal.page
    assert (page.committed, page.applied) == (1 + MOST_QUEUED, 1)
    assert "group-apart" not in dict(machine.events)
    script.write()
    point(script, machine)
    page = machine.receiver.journal.page
    assert (page.committed, page.applied) == (2 + MOST_QUEUED, 2)
    assert machine.events.count(("group-apart", {"point": 2})) == 1
    assert script.wire is not None
    script.wire.say(ApplyUpTo(100 + page.committed))
    exchange(script, machine)
    assert machine.receiver.journal.page.applied == page.committed
    assert content(machine) == bytes(script.content)
