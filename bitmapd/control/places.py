"""Who has a place at the control socket, and who may run what (pure).

Many commands may wait at a time: for a volume to be in sync, for events, for the end of a verify.
They must not keep out the one that stops the volume or looks what is wrong.

1. A connection that asks for nothing keeps nobody out: when all places are taken, the one that has
   asked for nothing for longest gives its place to the newcomer.
2. `QUICK` verbs end at once and run without bound; at most `stops` connections wait for a stop, and
   at most `lasting` for anything else.  Together these are fewer than all places, so that there are
   some for quick verbs at any time.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

from bitmapd.errors import BusyError

QUICK = frozenset({"ping", "status", "group"})
STOP = "stop"

Key = TypeVar("Key", bound=Hashable)


class Places(Generic[Key]):
    """See the module docstring; a key stands for a connection."""

    def __init__(self, limit: int, lasting: int, stops: int) -> None:
        self._limit = limit
        self._lasting = lasting
        self._stops = stops
        self._idle: dict[Key, None] = {}  # in the order in which they began to ask for nothing
        self._running: dict[Key, str] = {}

    def enter(self, key: Key) -> Key | None:
        """A new connection, and which one has to go for it; BusyError if there is no place."""
        gone = None
        if len(self._idle) + len(self._running) >= self._limit:
            gone = next(iter(self._idle), None)
            if gone is None:
                raise BusyError(f"{self._limit} control connections are at work")
            del self._idle[gone]
        self._idle[key] = None
        return gone

    def begin(self, key: Key, verb: str) -> None:
        """The connection asks for `verb`; BusyError if too many wait for such verbs already."""
        if verb not in QUICK:
            alike = sum((verb == STOP) == (other == STOP) for other in self._lasting_verbs())
            limit = self._stops if verb == STOP else self._lasting
            if alike >= limit:
                kind = "for the stop" if verb == STOP else "at the control socket"
                raise BusyError(f"{limit} commands wait {kind} already", hint="end some of them")
        self._idle.pop(key, None)
        self._running[key] = verb

    def end(self, key: Key) -> None:
        """It has its answer."""
        if self._running.pop(key, None) is not None:
            self._idle[key] = None

    def leave(self, key: Key) -> None:
        """The connection is gone."""
        self._idle.pop(key, None)
        self._running.pop(key, None)

    def running(self, key: Key) -> bool:
        return key in self._running

    def _lasting_verbs(self) -> list[str]:
        return [verb for verb in self._running.values() if verb not in QUICK]
