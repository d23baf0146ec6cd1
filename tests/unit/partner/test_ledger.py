"""What the superblock says of the pair: `bitmapd/partner/ledger.py`, by its invariants."""

from __future__ import annotations

import errno
from dataclasses import replace

from bitmapd.media.base import Done
from bitmapd.partner.ledger import Edit, Ledger
from bitmapd.partner.states import Lasting

OLD = Lasting(True, 1, (bytes(16),) * 4, bytes(16))


class Book:
    """A ledger whose superblocks the test writes."""

    def __init__(self) -> None:
        self.writes: list[tuple[Lasting, Done]] = []
        self.done: list[tuple[str, OSError | None]] = []
        self.ledger = Ledger(OLD, lambda lasting, done: self.writes.append((lasting, done)))

    def change(self, name: str, edit: Edit) -> None:
        self.ledger.change(edit, lambda error: self.done.append((name, error)))

    def write(self, error: OSError | None = None) -> Lasting:
        lasting, done = self.writes.pop(0)
        done(error)
        return lasting


def test_one_update_at_a_time_each_made_from_what_the_last_has_left() -> None:
    it = Book()
    it.change("term", lambda now: replace(now, term=now.term + 1))
    it.change("again", lambda now: replace(now, term=now.term + 1))
    it.change("flag", lambda now: replace(now, volatile=True))
    assert (len(it.writes), it.ledger.lasting, it.done) == (1, OLD, [])
    assert it.write() == replace(OLD, term=2)
    assert it.write() == replace(OLD, term=3)
    assert it.write() == it.ledger.lasting == replace(OLD, term=3, volatile=True)
    assert it.done == [("term", None), ("again", None), ("flag", None)]


def test_after_a_failure_what_changes_nothing_is_written_too_unless_nobody_counts_on_it() -> None:
    """The one that failed may have landed all the same."""
    it, error = Book(), OSError(errno.EIO, "simulated")
    it.change("flag", lambda now: replace(now, volatile=True))
    it.write(error)
    it.ledger.change(lambda now: now, lambda error: it.done.append(("easy", error)), certain=False)
    assert it.done[1:] == [("easy", None)]
    it.change("same", lambda now: now)
    assert it.write() == OLD
    it.change("again", lambda now: now)
    assert it.done[2:] == [("same", None), ("again", None)]


def test_an_update_that_failed_counts_for_nothing() -> None:
    it, error = Book(), OSError(errno.EIO, "simulated")
    it.change("term", lambda now: replace(now, term=7))
    it.change("flag", lambda now: replace(now, volatile=True))
    it.write(error)
    assert it.ledger.lasting == OLD
    assert it.write() == replace(OLD, volatile=True)
    assert it.done == [("term", error), ("flag", None)]


def test_what_changes_nothing_waits_for_what_is_under_way_and_is_not_written() -> None:
    it = Book()
    it.change("same", lambda now: now)
    assert (it.done, it.writes) == ([("same", None)], [])
    it.change("term", lambda now: replace(now, term=2))
    it.change("is so", lambda now: replace(now, term=2))
    assert len(it.done) == 1
    it.write()
    assert it.done[1:] == [("term", None), ("is so", None)]
    assert it.writes == []


def test_whoever_is_called_may_ask_for_more() -> None:
    it = Book()
    more = lambda now: replace(now, term=now.term + 1)  # noqa: E731
    it.ledger.change(more, lambda error: it.change("more", more))
    it.write()
    it.write()
    assert it.ledger.lasting.term == 3
    assert it.done == [("more", None)]
