"""What a node has to say about its rights, until it says it (pure).

What gathers in one turn of the loop goes out together: extents in bitmaps and sets, so nothing here
grows with time.

Order on the wire: GOT, FREE and REMOVE go before whatever is sent behind them.  So none of them
ever speaks of an older ownership than the message in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bitmapd.media.base import Scheduler
from bitmapd.partner.claims import Home
from bitmapd.partner.messages import Add, Ask, Free, Got, Message, Remove
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import joined


class Outbox:
    """See the module docstring.  `flush` is called at the end of a turn that has something."""

    def __init__(self, scheduler: Scheduler, home: Home, flush: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._home = home
        self._flush = flush
        self._due = False
        self.messages = 0  # ADD, ASK and REMOVE that were sent
        self.forget()

    def forget(self) -> None:
        """Nothing is said on another connection."""
        self.connection = object()
        self._request = 0
        self._got: int | None = None
        self._free: set[int] = set()
        self._remove: set[int] = set()

    # -- what gathers ---------------------------------------------------------------------------
    def soon(self) -> None:
        if not self._due:
            self._due = True
            self._scheduler.call_soon(self._turn_ends)

    def _turn_ends(self) -> None:
        self._due = False
        self._flush()
        self._home.push()

    def got(self, sequence: int) -> None:
        """GRANTs up to this one have been processed."""
        self._got = sequence
        self.soon()

    def free(self, extents: Iterable[int]) -> None:
        """No copy of ours is under way there any more."""
        self._free.update(extents)
        self.soon()

    def remove(self, extent: int) -> None:
        """It has left our record."""
        self._remove.add(extent)
        self.soon()

    def unremove(self, extents: Iterable[int]) -> Runs:
        """Another message says it for these of them, or makes it untrue."""
        said = self._remove.intersection(extents)
        self._remove -= said
        return joined(said)

    # -- what is sent ---------------------------------------------------------------------------
    def send_free(self) -> None:
        if self._free:
            free, self._free = self._free, set()
            self._home.send(Free(joined(free)))

    def send_first(self) -> None:
        """What nothing may overtake."""
        self._send_got()
        self.send_free()
        if self._remove:
            self.messages += 1
            self._home.send(Remove(self._removed()))

    def _send_got(self) -> None:
        if self._got is not None:
            sequence, self._got = self._got, None
            self._home.send(Got(sequence))

    def _removed(self) -> Runs:
        removed, self._remove = self._remove, set()
        return joined(removed)

    def send(self, message: Message) -> int:
        """Behind all that may not be overtaken; returns its sequence."""
        self.send_first()
        return self._home.send(message)

    def add(self, needed: Runs, predicted: Runs) -> int:
        """ADD, which takes along what was removed; returns the number of the request."""
        self._send_got()
        self.send_free()
        request = self._next_request()
        self._home.send(Add(request, needed, predicted, self._removed()))
        return request

    def ask(self, blocks: Runs) -> int:
        """ASK; returns the number of the request."""
        self.send_first()
        request = self._next_request()
        self._home.send(Ask(request, blocks))
        return request

    def _next_request(self) -> int:
        self._request += 1
        self.messages += 1
        return self._request
