"""The sender's words: greeting, what the receiver has, credit, the end of a point."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitmapd.peer.frames import ErrorCode
from bitmapd.peer.words import Bye, Error, Goodbye, Pong
from bitmapd.points import uplink
from bitmapd.points.messages import (
    NIL,
    Applied,
    Begin,
    Committed,
    Credit,
    Data,
    Encoding,
    End,
    Feature,
    Have,
    Hello2,
    Message,
    Ping,
    Received,
    Role,
    Taken,
)
from bitmapd.points.pieces import digest
from tests.support.mirror import BLOCK
from tests.unit.points.homes import GENERATION, IDENTITY, OURS, Home, begun, hello


def test_the_sender_says_who_it_is() -> None:
    home = Home(identity=replace(IDENTITY, committed=7, term=3))
    home.connect()
    (said,) = home.told()
    assert isinstance(said, Hello2)
    assert (said.role, said.incarnation, said.committed, said.term) == (Role.SENDER, OURS, 7, 3)
    assert (said.size_bytes, said.block_bytes) == (home.geometry.size_bytes, BLOCK)
    assert said.features is Feature.ZSTD


def test_without_compression_none_is_offered_or_used() -> None:
    home = begun(compress=False)
    home.put(1, fill=7)
    home.run(40.0)
    (entry,) = next(m for m in home.told() if isinstance(m, Data)).entries
    assert entry.encoding is Encoding.RAW
    home.connect()
    (said,) = home.told()
    assert isinstance(said, Hello2)
    assert said.features is Feature(0)


def test_a_receiver_that_cannot_unpack_is_sent_nothing_packed() -> None:
    home = Home()
    home.sender.start()
    home.greet(features=Feature(0))
    home.put(1, fill=7)
    home.run(40.0)
    (entry,) = next(m for m in home.told() if isinstance(m, Data)).entries
    assert entry.encoding is Encoding.RAW


def test_nothing_is_sent_before_the_last_have() -> None:
    home = Home()
    home.sender.start()
    home.put(1)
    home.connect()
    home.told()
    home.say(hello())
    home.say(Have(0, NIL, (), False))
    home.run(1.0)
    assert home.told() == []
    assert home.wire.geometry == home.geometry
    home.say(Have(0, NIL, (), True))
    home.run(1.0)
    assert home.blocks() == [1]


def test_a_point_begins_once_and_says_its_time_at_the_cut() -> None:
    home = begun()
    home.put(1, 2)
    home.sender.cut("eve")
    home.run(1.0)
    before, data, at_cut, end = home.told()
    assert before == Begin(1, OURS, 0, 0, 0, home.geometry.size_bytes, "")
    assert isinstance(data, Data)
    assert [(e.block, e.stamp, e.encoding) for e in data.entries] == [
        (1, 1, Encoding.ZSTD),
        (2, 2, Encoding.ZSTD),
    ]
    assert at_cut == replace(before, wall_ns=1_700_000_000_000_000_000, label="eve")
    lines = [(e.block, e.stamp, e.mask, e.sum64) for e in data.entries]
    assert end == End(1, OURS, 2, digest(lines))
    home.commit(1)
    home.put(1)
    home.run(31.0)
    begin = home.told()[0]
    assert isinstance(begin, Begin)
    assert (begin.point, begin.base, begin.label) == (2, 1, "")


def test_points_follow_those_that_the_receiver_has() -> None:
    home = Home()
    home.sender.start()
    home.greet(committed=41)
    home.put(1)
    home.run(1.0)
    assert isinstance(home.told()[0], Begin)
    assert home.sender.uplink.point == 42
    assert home.sender.uplink.known_committed == 41


def test_what_the_receiver_has_not_is_lost() -> None:
    home = begun(interval_s=1.0)
    home.put(1, 3)
    home.run(1.0)
    assert home.ended() is not None
    home.lose()
    home.greet(point=1, runs=((1, 1, 1), (2, 1, 9)))  # 2 of another sending, 3 not at all
    assert home.gate.current.any(2, 3)
    assert home.gate.current.any(3, 4)
    assert not home.gate.current.any(1, 2)
    assert home.sender.uplink.entries == 1
    home.run(5.0)
    end = home.ended()
    assert end is not None
    assert end.entries == 3


def test_have_may_come_in_several_parts() -> None:
    home = begun()
    home.put(1, 2)
    home.run(1.0)
    home.told()
    home.lose()
    home.connect()
    home.say(hello())
    home.say(Have(1, OURS, ((1, 1, 1),), False))
    home.say(Have(1, OURS, ((2, 1, 2),), True))
    assert not home.gate.current


def lost_in_slices(count: int, has: int) -> Home:
    """Connected again, and about to find which of so many blocks are lost: all but these."""
    home = begun()
    home.put(0, count)
    home.run(1.0)
    home.told()
    home.lose()
    home.sender.uplink.slice_blocks = 2
    home.connect()
    home.sender.received(home.wire, hello())
    home.sender.received(home.wire, Have(1, OURS, ((0, has, 1),), True))
    return home


def test_what_is_lost_is_found_a_slice_in_a_turn_and_what_comes_waits() -> None:
    home = lost_in_slices(7, has=2)
    uplink, turns = home.sender.uplink, 0
    home.sender.received(home.wire, Credit(5))
    home.sender.received(home.wire, Ping(77))
    assert [m for m in home.told() if isinstance(m, Pong)] == [Pong(77)]
    before = uplink.credit_bytes
    while not uplink.is_ready:
        assert not home.wire.reads
        assert (uplink.entries, uplink.credit_bytes) == (7, before)
        home.loop.run_soon_once()
        turns += 1
    assert turns == 3
    assert home.wire.reads
    assert (uplink.entries, uplink.credit_bytes) == (2, before + 5)
    home.run(1.0)
    assert home.blocks() == [2, 3, 4, 5, 6]


def test_one_have_is_taken_in_a_turn() -> None:
    home = begun()
    home.put(0, 3)
    home.run(1.0)
    home.lose()
    home.connect()
    home.sender.received(home.wire, hello())
    for block in range(3):
        home.sender.received(home.wire, Have(1, OURS, ((block, 1, 1 + block),), block == 2))
    turns = 0
    while not home.sender.uplink.is_ready:
        home.loop.run_soon_once()
        turns += 1
    assert turns == 2
    assert home.sender.uplink.entries == 3


def test_a_link_that_is_lost_meanwhile_leaves_what_was_sent_for_the_next() -> None:
    home = lost_in_slices(7, has=2)
    home.loop.run_soon_once()
    home.lose()
    home.turn()
    assert home.sender.uplink.entries == 7
    home.greet(point=1, runs=((0, 6, 1),))
    assert home.sender.uplink.entries == 6
    assert list(home.gate.current.runs()) == [(6, 7)]


def test_nothing_is_sent_while_it_is_found_what_an_end_lacks() -> None:
    home = begun()
    home.put(0, 7)
    home.run(1.0)
    home.told()
    uplink = home.sender.uplink
    uplink.slice_blocks = 2
    home.sender.received(home.wire, Have(1, OURS, ((0, 2, 1),), True))
    home.sender.spool.put(9, 1, b"x" * 4096)
    assert uplink.step(home.loop.time()) is None
    home.sender.spool.drop(9)
    home.run(1.0)
    assert home.blocks() == [2, 3, 4, 5, 6]


def test_a_have_that_refuses_an_end_though_nothing_is_lost_ends_the_connection() -> None:
    home = begun()
    home.put(1)
    home.run(1.0)
    assert home.ended() is not None
    home.say(Have(1, OURS, ((1, 1, 1),), True))
    assert home.wire.error is not None
    assert home.wire.error.code is ErrorCode.DIGEST


def test_a_have_after_an_end_says_what_is_to_be_sent_again() -> None:
    home = begun()
    home.put(1, 2)
    home.run(1.0)
    home.say(Have(1, OURS, ((1, 1, 1),), True))
    assert home.wire.is_open
    assert home.gate.current.any(2, 3)
    assert home.sender.figures()["void_total"]["link"] == 1


def test_no_more_is_sent_than_there_is_credit_for() -> None:
    home = Home(compress=False)
    home.sender.start()
    home.greet(credit_bytes=3 * 4096 - 1)  # two blocks, and a page that describes them
    home.put(1, 2)
    home.run(40.0)
    assert home.blocks() == []
    assert home.names() == ["link-up", "journal-full"]
    home.say(Credit(1))
    home.run(1.0)
    assert home.blocks() == [1, 2]
    assert home.sender.uplink.credit_bytes == 0


def test_nothing_is_sent_while_the_link_is_full() -> None:
    home = begun()
    home.wire.has_room = False
    home.put(1)
    home.run(40.0)
    assert home.blocks() == []
    home.wire.has_room = True
    home.sender.drained(home.wire)
    home.turn()
    assert home.blocks() == [1]


def test_the_rate_is_that_of_the_wire() -> None:
    home = begun(rate_bytes_per_s=1000.0)  # each frame counts a thousand here
    for block in range(0, 32, 8):
        home.put(block)
    home.sender.throttle.take(home.loop.time(), 4 * BLOCK)
    home.run(1.0)
    assert home.blocks() == []
    home.run(20.0)
    assert home.blocks() == [0, 8, 16, 24]


def test_zeros_and_bytes_are_counted() -> None:
    home = begun()
    home.put(1, fill=0)
    home.put(9, fill=5)
    home.run(1.0)
    link = home.sender.uplink
    assert (link.sent_bytes, link.zero_bytes) == (2 * BLOCK, BLOCK)
    assert link.wire_bytes == 5000  # BEGIN, DATA, DATA, BEGIN, END


def test_a_ping_is_answered_and_farewells_are_heard() -> None:
    home = begun()
    for message in (Pong(1), Bye(Goodbye.STOPPED), Error(8, "another volume"), Received(5)):
        home.say(message)
    assert home.told() == []
    home.say(Ping(7))
    assert home.told() == [Pong(7)]
    assert home.wire.is_open
    home.say(Applied(12))
    assert home.sender.uplink.applied == 12


def test_what_belongs_to_no_point_is_handed_on() -> None:
    home = begun()
    home.say(Taken(3))
    heard: list[Message] = []
    home.sender.on_other = heard.append
    home.say(Taken(4))
    assert heard == [Taken(4)]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (hello(), ErrorCode.KIND),
        (Committed(1, OURS), ErrorCode.ANSWER),
        (Have(1, NIL, ((1, 1, 1),), True), ErrorCode.ANSWER),
        (Have(2, OURS, ((1, 1, 1),), True), ErrorCode.ANSWER),
    ],
)
def test_what_no_receiver_says_ends_the_connection(message: Message, code: ErrorCode) -> None:
    home = begun()
    wire = home.wire
    if isinstance(message, Hello2):
        home.connect()  # which the receiver has not answered
        home.say(Credit(1))
    else:
        home.say(message)
    assert home.wire.error is not None
    assert home.wire.error.code is code
    assert wire.is_open is (wire is home.wire and wire.error is None)


def test_a_commit_of_another_point_ends_the_connection() -> None:
    home = begun()
    home.put(1)
    home.run(1.0)
    home.say(Committed(2, OURS))
    assert home.wire.error is not None


def test_a_receiver_whose_points_do_not_fit_is_not_followed() -> None:
    home = begun()
    home.put(1)
    home.run(1.0)
    home.commit(1)
    home.greet(committed=1)
    assert home.wire.is_open
    home.connect()
    home.say(hello(committed=2))
    assert home.wire.error is not None
    assert home.wire.error.code is ErrorCode.OTHER


def test_a_receiver_that_went_back_is_sent_nothing() -> None:
    home = Home(identity=replace(IDENTITY, committed=5))
    home.sender.start()
    home.put(1)
    home.connect()
    home.say(hello(committed=4))
    home.run(40.0)
    assert home.names() == ["receiver-went-back"]
    assert home.wire.error is not None
    assert [type(message) for message in home.told()] == [Hello2]


@pytest.mark.parametrize(
    "theirs",
    [
        {"role": Role.PROMOTED},
        {"generations": (bytes([9]) * 16, GENERATION, NIL, NIL)},
        {"generations": (bytes([9]) * 16, NIL, NIL, NIL)},
        {"term": 1},
    ],
)
def test_who_was_promoted_or_is_another_is_not_followed(theirs: dict[str, object]) -> None:
    home = Home()
    home.sender.start()
    home.connect()
    home.say(hello(**theirs))
    assert home.names() == ["receiver-refused"]
    assert home.wire.error is not None
    assert home.wire.error.code is ErrorCode.SPLIT_BRAIN
    assert not home.sender.uplink.is_ready


def test_a_new_receiver_is_followed() -> None:
    home = Home()
    home.sender.start()
    home.greet(generations=(NIL,) * 4, volume=NIL, size_bytes=0, block_bytes=0, extent_bytes=0)
    assert home.sender.uplink.is_ready


def test_a_new_connection_takes_the_place_of_the_old_one() -> None:
    home = begun()
    old = home.wire
    home.connect()
    assert not old.is_open
    home.sender.received(old, Applied(9))
    home.sender.lost(old, "late")
    assert home.sender.uplink.applied == 0
    home.say(hello())
    home.say(Have(0, NIL, (), True))
    assert home.sender.uplink.is_ready


def test_what_is_sent_is_cut_into_frames_that_take_little_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uplink, "FRAME_BYTES", 4 * BLOCK)
    home = begun(spool_blocks=400, interval_s=1.0)
    home.wire.has_room = False
    home.put(0, 10)
    home.run(2.0)
    home.wire.has_room = True
    home.run(1.0)
    frames = [len(m.entries) for m in home.told() if isinstance(m, Data)]
    assert frames == [4, 4, 2]


def test_an_end_without_a_connection_is_said_with_the_next() -> None:
    home = Home()
    home.sender.uplink.end(1, "")
    home.connect()
    assert [type(message) for message in home.told()] == [Hello2]
