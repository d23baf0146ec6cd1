"""points/differences: what is asked of an old primary before anything is sent to it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from bitmapd.gate.direct import Landed
from bitmapd.peer.frames import ErrorCode
from bitmapd.points import differences
from bitmapd.points.messages import NIL, Compare, Data, Feature, Have, Map, Pieces
from bitmapd.points.sums import piece_sums
from tests.support.mirror import BLOCK, EXTENT
from tests.unit.points.homes import GENERATION, IDENTITY, OURS, Home, IdleKernel, hello

OLD = b"o" * 16
PROMOTED = replace(IDENTITY, generations=(GENERATION, OLD, NIL, NIL), promoted=True)
PER = EXTENT // BLOCK


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "MOST_BYTES", 4 * BLOCK)
    monkeypatch.setattr(differences, "READ_BYTES", 2 * BLOCK)
    monkeypatch.setattr(differences, "DEPTH", 2)


def greet(home: Home, features: Feature = Feature.PIECES) -> None:
    home.connect()
    home.say(hello(generations=(OLD, NIL, NIL, NIL), features=features))
    home.wire.sent.clear()
    home.say(Have(0, OURS, (), True))


def named(*extents: tuple[int, int], **options: int) -> Home:
    """The old primary has said that these may differ, and nothing was read yet."""
    home = Home(identity=PROMOTED, **options)  # type: ignore[arg-type]
    home.sender.start()
    greet(home)
    home.say(Map(extents))
    home.run()
    return home


def asked(home: Home) -> list[Compare]:
    return [message for message in home.told() if isinstance(message, Compare)]


def answer(home: Home, question: Compare, *differing: int) -> None:
    """Zeros but for these blocks: what the primary has."""
    found: list[int] = []
    for first, stop in question.runs:
        for block in range(first, stop):
            raw = memoryview(bytes([block in differing]) * BLOCK)
            found += piece_sums(home.geometry, question.salt, block, raw)
    home.say(Pieces(question.runs[0][0], tuple(found)))
    home.run()


def test_sums_are_asked_for_when_the_record_names_all_that_may_differ() -> None:
    home = named((0, 1), (2, 3))
    assert home.recorded() == {0, 2}
    questions = asked(home)
    assert [question.runs for question in questions] == [((0, 4),), ((8, 12),)]
    assert len({question.salt for question in questions}) == 1
    assert home.sender.differences.is_under_way
    assert not home.sender.uplink.is_ready


def test_what_differs_is_sent_and_the_rest_settles_with_the_first_point() -> None:
    home = named((0, 1), (2, 3))
    for question in asked(home):
        answer(home, question, 2, 9)
    home.run(0.1)
    assert home.sender.uplink.is_ready
    assert home.recorded() == {0, 2}
    home.sender.cut()
    for _ in range(3):
        home.run(0.1)
    assert home.blocks() == [2, 9]
    home.commit(1)
    assert home.sender.differences.compared_bytes == 8 * BLOCK
    assert home.sender.differences.equal_bytes == 6 * BLOCK
    assert home.gate.in_sync


def test_no_more_is_asked_for_than_what_may_wait() -> None:
    home = named((0, 4))
    first, second = asked(home)
    answer(home, first)
    assert [question.runs for question in asked(home)] == [((8, 12),)]
    answer(home, second)
    assert [question.runs for question in asked(home)] == [((12, 16),)]


def test_a_write_after_the_question_is_sent_whatever_the_answer() -> None:
    home = named((0, 1))
    (question,) = asked(home)
    home.put(1)
    answer(home, question)
    home.sender.cut()
    for _ in range(3):
        home.run(0.1)
    assert home.blocks() == [1]


def test_the_next_connection_asks_for_what_has_no_answer() -> None:
    home = named((0, 2))
    first, _ = asked(home)
    answer(home, first)
    home.lose()
    assert not home.sender.differences.is_under_way
    greet(home)
    home.run()
    assert [question.runs for question in asked(home)] == [((4, 8),)]


def test_a_question_of_before_does_not_go_on_reading() -> None:
    home = Home(identity=PROMOTED)
    home.sender.start()
    greet(home)
    home.say(Map(((0, 1),)))
    while not home.primary.pending:
        home.record.finish()
        home.turn()
    home.lose()
    assert not home.sender.idle
    home.run()
    assert home.sender.idle
    assert [op for op in home.primary.history if op[0] == "read"] == [("read", 0, 2 * BLOCK)]


def test_a_connection_lost_while_the_era_ends_is_no_reason_to_end_another() -> None:
    home = Home(identity=PROMOTED)
    home.sender.start()
    home.put(7)
    home.write(20)  # in flight: the era does not end before
    home.turn()
    while home.record.pending:
        home.record.finish()
        home.turn()
    greet(home)
    home.say(Map(((0, 1),)))
    while home.record.pending:
        home.record.finish()
        home.turn()
    assert not home.sender.idle
    home.lose()
    greet(home)
    assert asked(home) == []
    home.run()
    assert [question.runs for question in asked(home)] == [((0, 4),)]


def test_a_barrier_for_the_sake_of_the_table_passes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(identity=PROMOTED, past_gate=True)
    home.sender.start()
    home.run()
    barriers: list[Callable[..., None]] = []
    with monkeypatch.context() as held:
        held.setattr(IdleKernel, "barrier", lambda *arguments: barriers.append(arguments[-1]))
        following = home.sender.following
        assert following is not None
        following._begin(home.loop.time())
        greet(home)
        home.say(Map(((0, 1),)))
        home.run()
        assert following.under_way
        assert not home.sender.differences.is_under_way
    barriers.pop()(None, Landed((), 1, 0.0))
    home.run()
    assert not following.under_way
    assert [question.runs for question in asked(home)] == [((0, 4),)]


@pytest.mark.parametrize("side", ["primary", "receiver"])
def test_what_cannot_be_read_is_sent_whole(side: str) -> None:
    home = Home(identity=PROMOTED)
    home.sender.start()
    if side == "primary":
        home.primary.fail_next["read"] = [errno.EIO]
    greet(home)
    home.say(Map(((0, 1),)))
    home.run()
    (question,) = asked(home)
    if side == "receiver":
        home.say(Pieces(0, ()))
        home.run()
    else:
        answer(home, question)
    home.sender.cut()
    for _ in range(3):
        home.run(0.1)
    assert home.blocks() == [0, 1, 2, 3]


@pytest.mark.parametrize("pieces", [Pieces(1, (1,) * 4), Pieces(0, (1,) * 3)])
def test_an_answer_to_another_question_ends_the_connection(pieces: Pieces) -> None:
    home = named((0, 1))
    home.say(pieces)
    assert home.wire.error is not None
    assert home.wire.error.code is ErrorCode.ANSWER


def test_an_answer_that_nobody_asked_for_ends_the_connection() -> None:
    home = named((0, 1))
    (question,) = asked(home)
    home.say(Map(((5, 6),)))  # once more: it counts no more
    answer(home, question)
    home.say(Pieces(0, (1,) * 4))
    assert home.wire.error is not None
    assert home.wire.error.code is ErrorCode.ANSWER


def test_a_receiver_that_knows_no_pieces_is_asked_nothing() -> None:
    home = Home(identity=PROMOTED)
    home.sender.start()
    greet(home, Feature.ZSTD)
    home.say(Map(((0, 1),)))
    home.run()
    assert asked(home) == []
    assert home.sender.uplink.is_ready


def test_after_something_was_sent_nothing_is_compared() -> None:
    home = named((0, 1))
    (question,) = asked(home)
    answer(home, question, 1)
    home.sender.cut()
    for _ in range(3):
        home.run(0.1)
    assert any(isinstance(message, Data) for message in home.told())
    home.gate.take_recorded()
    home.lose()
    greet(home)
    home.run()
    assert asked(home) == []
    assert home.sender.uplink.is_ready


def test_what_is_read_otherwise_is_not_compared() -> None:
    """A cut of before this receiver came is still being read."""
    home = Home(identity=PROMOTED)
    home.sender.start()
    home.greet()  # it differs everywhere
    while home.record.pending:
        home.record.finish()
        home.turn()
    home.sender.cut()
    for _ in range(10):
        home.turn()
    assert {op.kind for op in home.primary.pending} == {"read"}
    home.lose()
    greet(home)
    home.say(Map(((0, 1),)))
    while home.record.pending:
        home.record.finish()
        home.turn()
    home.turn()
    assert asked(home) == []
    assert home.sender.uplink.is_ready


def test_the_rate_bounds_what_is_asked_for() -> None:
    home = Home(identity=PROMOTED, rate_bytes_per_s=1000)
    home.sender.start()
    home.sender.throttle.take(home.loop.time(), 100_000)  # what was sent before
    greet(home)
    home.say(Map(((0, 1),)))
    home.run(1.0)
    assert asked(home) == []
    home.run(120.0)
    assert [question.runs for question in asked(home)] == [((0, 4),)]


def test_without_memory_it_waits_for_some() -> None:
    home = Home(identity=PROMOTED, pool_bytes=2 * BLOCK)
    held = home.pool.take(BLOCK)
    assert held is not None
    home.sender.start()
    greet(home)
    home.say(Map(((0, 1),)))
    home.run()
    assert not any(op[0] == "read" for op in home.primary.history)
    home.pool.give(held)
    home.run()
    assert any(op[0] == "read" for op in home.primary.history)


def test_the_status_says_that_it_compares() -> None:
    home = named((0, 1))
    assert home.sender.figures()["state"] == "comparing"
