"""The record of one of two appliances: what is stored here, and what the other has granted.

To the gate it is a record like any other (`record/holder`).  An extent is covered if this node has
the right to write it and its own stored record names it, so a hit asks two bits and sends nothing.
A miss asks the partner and writes its own page in the same event; the slower of the two counts.

While this node *relies* on the partner (`reliance`) the second bit does not count: what is ours is
in the partner's record, and a miss waits for that alone.  Our own pages follow lazily.  When the
link is lost the rule changes back for all extents at once, and all pages are written at once.

The stored record holds more than what is ours: also what is the other's and what is owed to it.
So after a failure of both each node's record names what either may have written since.

Invariants:
1. `covers` is never true for what this node may not write.
2. An extent that leaves this node's record leaves `own` in the same event (`Rights.drop`), and the
   stored one unless it is the other's from then on.
3. `add` calls back once every extent has been granted and is stored, or one could not be stored
   and the partner cannot stand in for that (`standin`).  What was granted stays ours in any case.
4. A write that was granted and waits only for its own page holds the extent here until it has been
   submitted (`reserved` of `Rights`).  One that still waits for another extent holds nothing, so no
   circle of waiting arises.
5. What is not relied on any more is not covered before it is stored, whenever it was granted.

What a crash leaves is in `record/store` and `partner/node`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from bitmapd.media.base import Done
from bitmapd.partner.messages import Message
from bitmapd.partner.rights import Home, Rights
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import ones, runs_of
from bitmapd.record.holder import Ranges, Record
from bitmapd.record.store import RecordStore


class Mirror(Protocol):
    """The part of the gate that gives and takes; see there."""

    @property
    def embargoed_extents(self) -> int: ...

    def when_landed(self, call: Callable[[], None]) -> None: ...

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None: ...

    def give(self, extents: Sequence[int]) -> list[tuple[int, int]]: ...

    def take_over(self, dirt: Iterable[tuple[int, int]], embargoed: Iterable[int]) -> None: ...

    def free(self, extents: Iterable[int]) -> None: ...

    def free_all(self) -> None: ...

    def guessed(self, runs: Runs) -> None: ...

    def refused(self, runs: Runs) -> None: ...

    def is_clean(self, extent: int) -> bool: ...

    def drop_clean(self, extents: Iterable[int]) -> None: ...


class Copies(Protocol):
    """The part of the copier that is asked when extents change hands."""

    def given(self, extents: Sequence[int], free: Callable[[list[int]], None]) -> set[int]: ...


class _Batch:
    """One `add` that waits for rights and for the stored record."""

    __slots__ = ("done", "error", "first", "reserved", "rights", "stored")

    def __init__(self, done: Done, first: int) -> None:
        self.done = done
        self.first = first  # one of its extents
        self.error: OSError | None = None
        self.rights = 0  # that have not come
        self.stored = True
        self.reserved: list[int] = []

    def fail(self, error: OSError) -> None:
        """The first one counts."""
        self.error = error
        self.done(error)


class PairRecord(Record):
    """See the module docstring.  `store` names what is ours, the other's and owed."""

    def __init__(self, store: RecordStore, rights: Rights) -> None:
        self._store = store
        self.rights = rights
        self._held = rights.held
        self._stored = store.covered  # the second bit that a hit asks; `held` again while we rely
        self._relies = False
        self.on_unwritten: Callable[[], bool] = lambda: False  # whether the partner may stand in

    # -- questions ------------------------------------------------------------------------
    def covers(self, first: int, stop: int) -> bool:
        # As short as for one node: a call more here is 0.5 % of a write.
        if stop - first == 1:
            return bool(self._held[first] and self._stored[first])
        held, stored = self._held, self._stored
        return held.find(False, first, stop) < 0 and stored.find(False, first, stop) < 0

    @property
    def recorded_extents(self) -> int:
        return self.rights.own_extents + self.rights.pending_extents

    def missing(self, first: int, stop: int) -> int:
        own = self.rights.own
        pending = sum(1 for e in range(first, stop) if not own[e] and self.rights.is_pending(e))
        return stop - first - own.count(True, first, stop) - pending

    def recorded_runs(self, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
        own = self.rights.own
        return ones(own, start, len(own) if end is None else end)

    def covered_runs(self) -> Iterator[tuple[int, int]]:
        yield from runs_of(self._held & self._stored)

    @property
    def settled(self) -> bool:
        return self._store.settled

    # -- changes --------------------------------------------------------------------------
    def add(self, needed: Ranges, extra: Ranges, done: Done) -> bool:
        rights, batch = self.rights, _Batch(done, needed[0][0])
        for first, stop in needed:
            for extent in rights.obtain(first, stop):
                batch.rights += 1
                rights.want(extent, partial(self._granted, batch, extent))
        guessed = rights.guess(extra) if batch.rights or not extra else self._ours(extra)
        if self._relies:
            self._store.note(needed)
            self._store.note(guessed)
        elif self._store.add(needed, guessed, partial(self._has_stored, batch)):
            batch.stored = False
        return bool(batch.rights) or not batch.stored

    def _ours(self, extra: Ranges) -> list[tuple[int, int]]:
        """Predictions ride along with a message that is sent anyway; without one, only ours."""
        return [run for first, stop in extra for run in self.recorded_runs(first, stop)]

    def _granted(self, batch: _Batch, extent: int, error: OSError | None) -> bool:
        batch.rights -= 1
        if batch.error is not None:
            return True
        if error is not None:
            batch.fail(error)
        elif batch.rights:
            return True
        elif batch.stored:
            batch.done(None)
        else:
            batch.reserved.append(extent)
            return False
        return True

    def _has_stored(self, batch: _Batch, error: OSError | None) -> None:
        batch.stored = True
        if batch.error is None:
            if error is not None and not self._relies:
                self._was_not_stored(batch, error)
            elif not batch.rights:
                batch.done(None)
        for extent in batch.reserved:
            self.rights.release(extent)

    def _was_not_stored(self, batch: _Batch, error: OSError) -> None:
        if not self.on_unwritten():
            batch.fail(error)
        elif not batch.rights:  # else it waits already, and once only
            batch.rights += 1
            self.rights.want_anew(batch.first, partial(self._granted, batch, batch.first))

    def drop(self, extents: Iterable[int]) -> None:
        gone = self.rights.drop(extents)
        self._store.drop(extent for extent in gone if not self.rights.other[extent])

    # -- for the other node, and with it ---------------------------------------------------
    def keep(self, runs: Runs) -> None:
        """They belong into the stored record; nobody waits for it."""
        if self._relies:
            self._store.note(runs)
        # What a miss has put there is on its way already, and no page is written twice for it.
        elif missing := [run for run in runs if self._store.missing(*run)]:
            self._store.add(missing, (), _no_matter)

    def rely(self, on: bool) -> None:
        """Whether what the other node holds of this record counts, stored here or not.  Whoever has
        waited for rights alone finds out by asking `covers` again, as all who are called back do.
        """
        self._relies = on
        self._stored = self._held if on else self._store.covered

    def destage(self, done: Done) -> bool:
        """Have the stored record name all that is recorded, in one batch (`RecordStore`)."""
        return self._store.destage(done)

    # -- what is cleared --------------------------------------------------------------------
    def destage_clears(self, done: Done) -> None:
        self._store.destage_clears(done)

    def flush_clears(self) -> None:
        self._store.flush_clears()

    def commit(self) -> None:
        self._store.commit()


class Hands(Home):
    """What `Rights` asks of the appliance: gate, copier and stored record."""

    def __init__(
        self, store: RecordStore, send: Callable[[Message], int], push: Callable[[], None]
    ) -> None:
        self._store = store
        self._send = send
        self._push = push
        self.on_unstored: Callable[[], object] = _nothing

    @property
    def embargoed_extents(self) -> int:
        return self._gate.embargoed_extents

    def attach(self, gate: Mirror, copies: Copies, record: PairRecord) -> None:
        """They need one another, so this comes last."""
        self._gate, self._copies, self._record = gate, copies, record

    def send(self, message: Message) -> int:
        return self._send(message)

    def push(self) -> None:
        self._push()

    def when_landed(self, call: Callable[[], None]) -> None:
        self._gate.when_landed(call)

    def when_left(self, extents: Sequence[int], call: Callable[[], None]) -> None:
        self._gate.when_left(extents, call)

    def keep(self, runs: Runs) -> None:
        self._record.keep(runs)

    def store(self, runs: Runs, done: Done) -> bool:
        return self._store.add(runs, (), done)

    def unstored(self) -> None:
        self.on_unstored()

    def forget(self, runs: Runs) -> None:
        self._store.drop(extent for first, stop in runs for extent in range(first, stop))

    def give(self, extents: Sequence[int]) -> tuple[Runs, set[int]]:
        dirt = self._gate.give(extents)
        return tuple(dirt), self._copies.given(extents, self._record.rights.freed)

    def take_over(self, dirt: Runs, embargoed: Iterable[int]) -> None:
        self._gate.take_over(dirt, embargoed)

    def free(self, extents: Iterable[int]) -> None:
        self._gate.free(extents)

    def free_all(self) -> None:
        self._gate.free_all()

    def guessed(self, runs: Runs) -> None:
        self._gate.guessed(runs)

    def refused(self, runs: Runs) -> None:
        self._gate.refused(runs)

    def drop_clean(self, extents: Iterable[int]) -> None:
        self._gate.drop_clean(extents)


def _nothing() -> None:
    """Nobody is to hear of it."""


def _no_matter(error: OSError | None) -> None:
    """The store has reported it; the other's extents count here in memory as well."""
