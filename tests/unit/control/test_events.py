"""The event log: shape, ring, holding back repeated events, lines for the journal."""

from __future__ import annotations

import json
import threading
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.control.catalogue import EVENTS
from bitmapd.control.events import (
    BURST,
    SINK_LINES,
    WINDOW_S,
    EventLog,
    LineSink,
    format_line,
    iso_time,
)

LIMITED = [event.name for event in EVENTS.values() if event.limited]


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def new_log(**options: Any) -> tuple[EventLog, Clock]:
    clock = Clock()
    return EventLog("vol0", wall_clock=lambda: 1_700_000_000.25, clock=clock, **options), clock


def test_an_event_has_time_volume_name_and_its_own_fields() -> None:
    log, _ = new_log()
    log.emit("link-down", reason="refused", attempts=3)
    assert log.recent() == [
        {
            "at": "2023-11-14T22:13:20.250+00:00",
            "volume": "vol0",
            "event": "link-down",
            "reason": "refused",
            "attempts": 3,
        }
    ]


@given(st.floats(0, 4e9))
def test_times_are_iso_8601(unix_time_s: float) -> None:
    parsed = datetime.fromisoformat(iso_time(unix_time_s))
    assert abs(parsed.timestamp() - unix_time_s) <= 0.001


def test_the_ring_keeps_the_newest() -> None:
    log, _ = new_log(capacity=3)
    for number in range(5):
        log.emit("in-sync", number=number)
    assert [entry["number"] for entry in log.recent()] == [2, 3, 4]


def test_what_happens_again_and_again_has_nothing_else_forgotten() -> None:
    """Not even what is let through because it comes slowly: invariant 3."""
    log, clock = new_log(capacity=100)
    log.emit("record-damaged", page=7)
    for number in range(500):
        log.emit("client-connected", peer=f"p{number}")
        log.emit("client-disconnected", peer=f"p{number}")
        clock.now_s += WINDOW_S
        if number == 250:
            log.emit("link-down", message="in between")
    kept = log.recent()
    assert len(kept) == 100
    assert (kept[0]["event"], kept[1]["event"]) == ("record-damaged", "link-down")
    assert [entry["peer"] for entry in kept[2:]] == [f"p{451 + n // 2}" for n in range(98)]


def test_where_all_are_equally_frequent_the_oldest_is_forgotten() -> None:
    log, _ = new_log(capacity=2)
    for name in ("started", "in-sync", "link-down", "link-up"):
        log.emit(name)
    assert [entry["event"] for entry in log.recent()] == ["link-down", "link-up"]


def test_subscribers_come_and_go_even_while_they_are_called() -> None:
    log, _ = new_log()
    got: list[str] = []
    log.subscribe(lambda entry: got.append("a" + entry["event"]))

    def once(entry: dict[str, Any]) -> None:
        got.append("b" + entry["event"])
        leave()

    leave = log.subscribe(once)
    log.emit("1")
    log.emit("2")
    assert got == ["a1", "b1", "a2"]


def test_repeated_data_path_events_are_held_back_and_counted() -> None:
    log, clock = new_log()
    for _ in range(BURST + 7):
        log.emit("copy-error")
        log.emit("started")
    names = [entry["event"] for entry in log.recent()]
    assert names.count("copy-error") == BURST
    assert names.count("started") == BURST + 7
    assert log.suppressed_total == 7
    clock.now_s = WINDOW_S
    log.emit("copy-error")
    log.emit("copy-error")
    last = log.recent()[-2:]
    assert [entry.get("suppressed") for entry in last] == [7, None]


@given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from(LIMITED)), max_size=120))
def test_every_event_is_either_told_or_counted(steps: list[tuple[float, str]]) -> None:
    log, clock = new_log(capacity=1000)
    for pause_s, name in steps:
        clock.now_s += pause_s
        log.emit(name)
    told = log.recent()
    assert len(told) + log.suppressed_total == len(steps)
    clock.now_s += WINDOW_S
    for name in LIMITED:
        log.emit(name)
    reported = sum(entry.get("suppressed", 0) for entry in log.recent())
    assert reported == log.suppressed_total


def test_lines() -> None:
    fields = {"at": "T", "volume": "v", "event": "e", "n": 3, "text": "a b", "word": "w", "x": None}
    assert format_line(3, fields, journal=True) == '<3>v: e n=3 text="a b" word=w x=null'
    assert format_line(3, fields, journal=False) == 'T v: e n=3 text="a b" word=w x=null'


@given(st.text(), st.lists(st.integers()))
def test_one_event_is_one_line(text: str, numbers: list[int]) -> None:
    fields = {"at": "T", "volume": "v", "event": "e", "text": text, "numbers": numbers, "b": True}
    line = format_line(5, fields, journal=False)
    assert line.splitlines() == [line]
    if text and not text.isprintable():
        assert json.dumps(text) in line


def test_the_sink_writes_in_order_with_the_level_of_the_event() -> None:
    lines: list[str] = []
    sink = LineSink(lines.append, journal=True)
    log, _ = new_log(sink=sink)
    log.emit("started")
    log.emit("record-damaged", pages=2)
    sink.close()
    assert lines == [
        "<5>vol0: started\n",
        f"<{EVENTS['record-damaged'].level}>vol0: record-damaged pages=2\n",
    ]


def test_a_sink_that_stalls_drops_and_does_not_block() -> None:
    release, taken = threading.Event(), []

    def stall(line: str) -> None:
        release.wait(10)
        taken.append(line)

    sink = LineSink(stall, journal=False)
    for _ in range(SINK_LINES + 50):
        sink(5, {"at": "T", "volume": "v", "event": "e"})
    assert sink.dropped_total >= 49
    sink.close(0.01)
    release.set()


def test_a_sink_that_fails_goes_on() -> None:
    calls: list[str] = []

    def fail_first(line: str) -> None:
        calls.append(line)
        if len(calls) == 1:
            raise BrokenPipeError

    sink = LineSink(fail_first, journal=False)
    for name in ("one", "two"):
        sink(5, {"at": "T", "volume": "v", "event": name})
    sink.close()
    assert [line.split()[-1] for line in calls] == ["one", "two"]
    assert sink.dropped_total == 1


def test_a_sink_that_was_never_used_closes() -> None:
    sink = LineSink(pytest.fail, journal=False)
    sink.close()
