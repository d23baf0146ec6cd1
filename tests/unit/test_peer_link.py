"""One connection between two nodes, without a socket; and when it is dialled again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.peer.backoff import Backoff
from bitmapd.peer.frames import (
    HEADER_BYTES,
    MAX_GREETING_BYTES,
    MAX_PAYLOAD_BYTES,
    ErrorCode,
    Kind,
    Part,
    PeerError,
    encode,
)
from bitmapd.peer.link import MAX_OUTPUT_BYTES, Link, Verdict

HELLO = Part(Kind.HELLO, 0, 0, bytes(200))
PING = Part(Kind.PING, 0, 0, bytes(37))
LARGE = Part(Kind.RECORD, 1, 0, bytes(MAX_PAYLOAD_BYTES))


def greeted(now_s: float = 0.0) -> Link:
    link = Link(now_s)
    link.greeted()
    return link


def everything(link: Link, now_s: float = 0.0) -> bytes:
    return b"".join(iter(lambda: link.take(1 << 16, now_s), b""))


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 2000), st.integers(1, 500))
def test_what_one_sends_the_other_receives(
    payloads: list[bytes], most_bytes: int, piece_bytes: int
) -> None:
    one, other, got = greeted(), greeted(), []
    for number, payload in enumerate(payloads, 1):
        assert one.send([Part(Kind.ADD, 0, number, payload)]) == number
    while data := one.take(most_bytes, 0.0):
        assert len(data) <= max(most_bytes, HEADER_BYTES + 300)
        for start in range(0, len(data), piece_bytes):
            got += other.receive(data[start : start + piece_bytes], 0.0)
    assert [frame.payload for frame in got] == payloads
    assert other.frames_received == one.frames_sent == len(payloads)
    assert one.queued_bytes == 0


def test_small_frames_leave_together() -> None:
    link = greeted()
    assert link.send([PING, PING, PING]) == 3
    assert len(link.take(1 << 16, 0.0)) == 3 * (HEADER_BYTES + len(PING.payload))
    assert link.send([]) == 3


def test_before_the_greeting_frames_are_small_and_come_singly() -> None:
    link = Link(0.0)
    data = encode(HELLO, 1) + encode(LARGE, 2) + encode(PING, 3)
    assert [frame.kind for frame in link.receive(data, 0.0)] == [Kind.HELLO]
    link.greeted()
    assert [frame.kind for frame in link.receive(b"", 0.0)] == [Kind.RECORD, Kind.PING]
    assert link.receive(b"", 0.0) == []

    link = Link(0.0)
    assert len(link.receive(encode(HELLO, 1) + encode(PING, 2), 0.0)) == 1
    assert [frame.kind for frame in link.receive(b"", 0.0)] == [Kind.PING]

    link = Link(0.0)
    assert len(link.receive(data, 0.0)) == 1
    with pytest.raises(PeerError, match=str(MAX_GREETING_BYTES)) as caught:
        link.receive(b"", 0.0)
    assert caught.value.code is ErrorCode.TOO_LONG


def test_what_is_right_comes_before_what_is_wrong() -> None:
    link = greeted()
    data = encode(PING, 1) + encode(PING, 2) + encode(PING, 4)
    assert [frame.sequence for frame in link.receive(data, 0.0)] == [1, 2]
    for _ in range(2):
        with pytest.raises(PeerError, match="frame 4 came after frame 2"):
            link.receive(b"", 0.0)


def test_output_is_bounded_but_a_message_is_whole() -> None:
    link = greeted()
    link.send([LARGE])
    assert link.has_room
    link.send([LARGE] * 8)
    assert not link.has_room
    assert link.queued_bytes == 9 * (MAX_PAYLOAD_BYTES + HEADER_BYTES)
    while not link.has_room:
        assert link.take(1, 0.0)
    assert link.queued_bytes > MAX_OUTPUT_BYTES - MAX_PAYLOAD_BYTES - HEADER_BYTES
    assert link.queued_bytes <= MAX_OUTPUT_BYTES


def run_until(link: Link, now_s: float, end_s: float) -> tuple[float, Verdict]:
    """Checks whenever it is due, and answers each PING; returns the first loss or the end."""
    while now_s < end_s:
        now_s = max(now_s, link.due_s())
        verdict = link.check(now_s)
        if verdict is Verdict.PING:
            link.send([PING])
            everything(link, now_s)
        elif verdict is not Verdict.FINE:
            return now_s, verdict
    return now_s, Verdict.FINE


def test_silence_is_a_loss_after_the_time_out() -> None:
    link = greeted(10.0)
    assert link.receive(encode(PING, 1), 11.0)
    assert run_until(link, 11.0, 99.0) == (13.0, Verdict.SILENT)


def test_the_larger_time_out_counts() -> None:
    link = Link(0.0, 2.0)
    link.greeted(6.0)
    assert run_until(link, 0.0, 99.0) == (6.0, Verdict.SILENT)
    link = Link(0.0, 2.0)
    link.greeted(1.0)
    assert run_until(link, 0.0, 99.0) == (2.0, Verdict.SILENT)


def test_half_a_frame_is_a_sign_of_life() -> None:
    link = greeted()
    assert link.receive(encode(PING, 1)[:5], 1.5) == []
    assert run_until(link, 1.5, 99.0) == (3.5, Verdict.SILENT)


def test_no_bytes_are_no_sign_of_life() -> None:
    link = greeted()
    assert link.receive(b"", 1.5) == []
    assert run_until(link, 1.5, 99.0)[0] == 2.0


def test_a_ping_is_due_when_nothing_was_sent_for_a_quarter() -> None:
    link = greeted()
    assert link.due_s() == 0.5
    assert link.check(0.499) is Verdict.FINE
    assert link.check(0.5) is Verdict.PING
    assert link.check(0.5) is Verdict.FINE
    link.send([PING])
    everything(link, 0.8)
    assert link.check(1.29) is Verdict.FINE
    assert link.check(1.3) is Verdict.PING


def test_nothing_is_sent_before_the_greeting() -> None:
    link = Link(0.0)
    assert [link.check(now_s) for now_s in (0.5, 1.0, 1.9)] == [Verdict.FINE] * 3
    assert link.check(2.0) is Verdict.SILENT
    link = Link(0.0)
    assert run_until(link, 0.0, 99.0) == (2.0, Verdict.SILENT)
    assert link.frames_sent == 0


def test_a_loop_that_stood_still_reads_before_it_judges() -> None:
    link = greeted()
    assert link.check(0.4) is Verdict.FINE
    assert link.check(600.0) is Verdict.PING
    assert link.due_s() <= 600.0  # the next turn
    assert link.receive(encode(PING, 1), 600.01)
    assert link.check(600.02) is Verdict.FINE
    assert link.check(1200.0) is Verdict.PING
    assert link.check(1200.01) is Verdict.SILENT


def test_output_that_does_not_leave_is_a_loss() -> None:
    link = greeted()
    link.send([LARGE] * 4)
    for number in range(1, 8):  # slow, and not lost
        now_s = number / 2
        link.receive(encode(PING, number), now_s)
        assert link.check(now_s) is not Verdict.STUCK
        if number == 3:
            link.take(1, now_s)
    link.receive(encode(PING, 8), 3.6)
    assert link.check(3.9) is not Verdict.STUCK
    assert link.due_s() == 4.0
    assert link.check(4.0) is Verdict.STUCK
    everything(link, 4.1)
    assert link.check(4.2) is Verdict.FINE


def test_attempts_become_rare_and_are_not_in_step() -> None:
    backoff = Backoff(lambda: 0.0)
    assert [backoff.next_s(0.0) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    backoff.succeeded()
    assert backoff.next_s(0.0) == 0.1
    assert Backoff(lambda: 0.8).next_s(0.0) == pytest.approx(0.06)


def test_five_errors_in_a_minute_slow_the_dialling_down() -> None:
    backoff = Backoff(lambda: 0.0)
    for now_s in (0.0, 10.0, 20.0, 30.0):
        backoff.erred(now_s)
        assert not backoff.slow(now_s)
    backoff.erred(40.0)
    assert backoff.slow(59.0)
    assert backoff.next_s(59.0) == 30.0
    assert not backoff.slow(60.0)
    assert backoff.next_s(60.0) == 0.2


def test_what_is_not_read_on_purpose_is_no_silence() -> None:
    link = greeted()
    for step in range(1, 9):
        link.unread(step * 0.5)
        assert link.check(step * 0.5) is not Verdict.SILENT
    assert run_until(link, 4.0, 99.0) == (6.0, Verdict.SILENT)
