"""Whoever else writes this primary, as the gate sees it (pure).

The gate is told of a write before it happens.  Others may write besides, and say so later: hosts
through the kernel's table (`gate/direct`).  What they have in common is here, and the gate knows no
more of any of them.

1. An extent that is *open* may have been written without the gate's knowledge since the latest
   barrier.  It is not clean, and so never leaves the record.
2. A barrier ends the era there, too.  It calls back once no write of that era is in flight, with
   the blocks that were written in it; after an error they come with the next one.  One at a time.
3. What the record is to lose is *cooled* first: nobody writes it elsewhere after the barrier that
   comes next, and after the one behind that it is *closed*.
4. Who writes elsewhere writes only what is durably recorded (`recorded` of the barrier).
5. What is to be given to another node is *left* first: nobody writes it elsewhere any more.  What
   was written last may be known only with the blocks of the next barrier, for it is open until
   then; whoever gives it counts all of it as written.  To wait for that barrier would hold up hosts
   who wait for what is given.

Where another node writes, a read may have to wait until what is in flight there has landed: that is
`Asks`.  What it says holds for this read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from bitmapd.media.base import Done

Run = tuple[int, int]
# The blocks that were written, or None if that will be known at the next barrier.
Collected = Callable[[Sequence[Run] | None], None]


class Elsewhere(Protocol):
    """See the module docstring.  Runs are [first, stop)."""

    # -- extents
    def is_open(self, extent: int) -> bool: ...

    def cool(self, extents: Iterable[int]) -> None: ...

    def warm(self, extents: Iterable[int]) -> None:
        """They are wanted after all."""

    def closed(self) -> list[int]:
        """Cooling extents that the gate alone has written since their last blocks were known."""

    def missed(self) -> list[int]:
        """Cooling extents that hosts have written through the gate since the latest barrier."""

    def gone(self, extents: Iterable[int]) -> None:
        """These have left the record."""

    def leave(self, extents: Iterable[int], call: Callable[[], None]) -> None:
        """Have nobody write these elsewhere any more, as long as they are not covered; `call` when
        that is so, from inside if it is."""

    def gated_hit(self, first: int, stop: int) -> None:
        """A write to recorded extents came through the gate."""

    # -- what hosts may write there
    @property
    def can_grow(self) -> bool:
        """Whether hosts write much through the gate that they could write there."""

    def grow(self, recorded: Iterable[Run], done: Callable[[], None]) -> None:
        """Have them write there what is durably recorded.  No era ends, and none may before `done`
        was called, maybe from inside."""

    @property
    def held_s(self) -> tuple[float, float]:
        """For how long barriers and growth have held hosts' writes: in all, and the latest."""

    # -- eras
    def barrier(self, recorded: Iterable[Run], done: Collected) -> None: ...

    @property
    def marks_s(self) -> float:
        """For how long hosts have waited for the marks that the latest barrier has brought."""

    @property
    def wants_barrier(self) -> bool: ...

    @property
    def is_urgent(self) -> bool:
        """Whether a barrier should not wait for the end of the era."""

    def when_urgent(self, call: Callable[[], None]) -> None:
        """Have `call` called when `is_urgent` may have become true by writes of hosts."""

    @property
    def written(self) -> bool:
        """Whether something may have been written that no barrier has brought."""

    @property
    def being_written(self) -> bool:
        """Whether hosts write now, or `written`: good enough to put off a judgement."""

    @property
    def host_load(self) -> tuple[int, int]:
        """Requests of hosts, and bytes written, since the start; those that the gate saw, too."""


class Asks(Protocol):
    """Who has to be asked before extents [first, stop) are read."""

    def may_read(self, first: int, stop: int) -> bool:
        """Whether a read may be submitted in this event without asking.  Every read calls it."""

    def ask(self, first: int, stop: int, go: Done) -> None:
        """Calls `go` once, never from inside: without error the read may be submitted in that
        event; with one it may not be."""
