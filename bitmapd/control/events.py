"""What happened: the log of a volume's events.

An event is a flat JSON object with `at` (ISO 8601, UTC), `volume`, `event` (its name) and fields of
its own.  `EventLog` keeps the newest ones in a ring, hands each to its subscribers and writes it to
a sink; `LineSink` is the sink for standard error.

1. `emit` never blocks and never raises for want of room: the ring forgets, a subscriber and the
   sink drop what they cannot take and count it.  It may be called on the write path.
2. An event that the catalogue calls `limited` is let through `BURST` times in `WINDOW_S`; what is
   held back after that is counted, and the next one of that name says how many in `suppressed`.
   Everything else is never held back.
3. A full ring forgets the oldest of those events of which it has most.  So nothing that goes on and
   on (a host that connects again and again, a link that comes and goes) has the rest forgotten.
4. `LineSink` writes from a thread of its own, because a pipe or the journal may block.  The thread
   starts with the first line, so that a process that becomes a daemon must not emit before.
5. Under the journal (`JOURNAL_STREAM` is set) lines begin with a syslog level such as `<3>` and
   carry no time; elsewhere they begin with the time.

A crash loses the ring; what the sink had taken is in the journal or in the file behind it.
"""

from __future__ import annotations

import heapq
import json
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Protocol

from bitmapd.control.catalogue import lookup
from bitmapd.control.eventkinds import EventKind

Fields = dict[str, Any]

BURST = 5
WINDOW_S = 10.0
RING_EVENTS = 1000
SINK_LINES = 1000


def iso_time(unix_time_s: float) -> str:
    return datetime.fromtimestamp(unix_time_s, UTC).isoformat(timespec="milliseconds")


class Sink(Protocol):
    """Takes one event; neither blocks nor raises."""

    def __call__(self, level: int, fields: Mapping[str, Any]) -> None: ...


class EventLog:
    """See the module docstring.  `wall_clock` gives Unix time, `clock` never goes back."""

    def __init__(
        self,
        volume: str,
        *,
        wall_clock: Callable[[], float],
        clock: Callable[[], float],
        sink: Sink | None = None,
        capacity: int = RING_EVENTS,
    ) -> None:
        self._volume = volume
        self._wall_clock = wall_clock
        self._clock = clock
        self._sink = sink
        self._capacity = capacity
        self._emitted = 0
        self._ring: dict[str, deque[tuple[int, Fields]]] = {}  # name -> number and event, in order
        self._subscribers: list[Callable[[Fields], None]] = []
        self._windows: dict[str, tuple[float, int]] = {}  # name -> start, number since then
        self.suppressed_total = 0

    def emit(self, event: str, **fields: Any) -> None:
        kind = lookup(event)
        held_back = self._held_back(event, kind)
        if held_back is None:
            return
        at = iso_time(self._wall_clock())
        entry: Fields = {"at": at, "volume": self._volume, "event": event} | fields
        if held_back:
            entry["suppressed"] = held_back
        self._keep(event, entry)
        for subscriber in tuple(self._subscribers):
            subscriber(entry)
        if self._sink is not None:
            self._sink(kind.level, entry)

    def _held_back(self, event: str, kind: EventKind) -> int | None:
        """None to hold this one back too, else how many were before it."""
        if not kind.limited:
            return 0
        now_s = self._clock()
        start_s, count = self._windows.get(event, (now_s, 0))
        held_back = 0
        if now_s - start_s >= WINDOW_S:
            held_back = max(0, count - BURST)
            start_s, count = now_s, 0
        self._windows[event] = (start_s, count + 1)
        if count >= BURST:
            self.suppressed_total += 1
            return None
        return held_back

    def _keep(self, event: str, entry: Fields) -> None:
        ring = self._ring
        if sum(map(len, ring.values())) >= self._capacity:
            most = max(ring, key=lambda name: (len(ring[name]), -ring[name][0][0]))
            ring[most].popleft()
            if not ring[most]:
                del ring[most]
        self._emitted += 1
        ring.setdefault(event, deque()).append((self._emitted, entry))

    def recent(self) -> list[Fields]:
        numbered = heapq.merge(*self._ring.values(), key=lambda kept: kept[0])
        return [entry for _number, entry in numbered]

    def subscribe(self, subscriber: Callable[[Fields], None]) -> Callable[[], None]:
        """Hand every coming event to `subscriber`, which neither blocks nor raises, until the
        function that is returned is called."""
        self._subscribers.append(subscriber)
        return lambda: self._subscribers.remove(subscriber)


def format_line(level: int, fields: Mapping[str, Any], *, journal: bool) -> str:
    """One line, without its newline: what it is about first, the rest as key=value."""
    rest = "".join(
        f" {key}={value if _is_plain(value) else json.dumps(value, default=str)}"
        for key, value in fields.items()
        if key not in ("at", "volume", "event")
    )
    head = f"<{level}>" if journal else f"{fields['at']} "
    return f"{head}{fields['volume']}: {fields['event']}{rest}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return value.isprintable() and bool(value) and not set(value) & {" ", '"', "="}
    return isinstance(value, int | float) and not isinstance(value, bool)


class LineSink:
    """Writes events as lines through `write` (such as `sys.stderr.write`) from its own thread."""

    def __init__(self, write: Callable[[str], object], *, journal: bool) -> None:
        self._write = write
        self._journal = journal
        self._lines: queue.Queue[str | None] = queue.Queue(SINK_LINES)
        self._thread: threading.Thread | None = None
        self.dropped_total = 0

    def __call__(self, level: int, fields: Mapping[str, Any]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="log", daemon=True)
            self._thread.start()
        try:
            self._lines.put_nowait(format_line(level, fields, journal=self._journal))
        except queue.Full:
            self.dropped_total += 1

    def close(self, timeout_s: float = 2.0) -> None:
        """Wait for what has been taken; a reader that has stalled is waited for no longer."""
        if self._thread is not None:
            try:
                self._lines.put(None, timeout=timeout_s)
            except queue.Full:
                return
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                self._write(line + "\n")
            except OSError:
                # Nobody reads standard error any more; there is no other place to say so.
                self.dropped_total += 1
