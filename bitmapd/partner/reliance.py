"""What counts although it stands only in the partner's memory, and the flag that says so (pure).

With `record_on = partner` a host's write to a new place waits for the partner and not for this
node's own record.  So its record names less than may differ, and if both nodes lose power nobody
knows what does.  The flag VOLATILE in the superblocks says that this may be so; two nodes that find
it when both start anew compare everything.

Invariants (rule 14 of docs/partner-protocol.md):
1. The flag is durable in both superblocks before anything counts only in memory: each node sets it
   before it says READY, and relies on the other's memory only after the other's READY.  A node
   whose record cannot be written leaves it to the other: one of both flags is enough (`share`).
   Not so a keeper's host (`keeping`).
2. Nothing relies on the partner any more once its link is lost, from the event on that reports it:
   writes to places that are not stored here wait until they are.
3. The flag goes once all that this node knows of, its own, the other's and what is owed, is in its
   stored record, and if no exchange has begun meanwhile.  Of all, and not of its own alone: the
   other's memory may be gone, and what is known here is then the only copy.
4. A process that has met nobody yet lets the flag stand: what its record names is not all.

A crash leaves the flag until a later process of this node has met the partner, or compares
everything.
"""

from __future__ import annotations

from collections.abc import Callable

from bitmapd.partner.ledger import Ledger
from bitmapd.partner.states import Lasting, Surroundings


class Reliance:
    """See the module docstring."""

    def __init__(
        self, ledger: Ledger, around: Surroundings, stored: Callable[[Lasting], Lasting]
    ) -> None:
        """`stored` makes the superblock of a node whose stored record names all that it knows."""
        self._ledger = ledger
        self._around = around
        self._stored = stored
        self._token: object | None = None  # of what is under way to have the flag go
        self._may_end = False  # nothing relies on memory, and all that can be known is
        self._when_over: list[Callable[[], None]] = []

    def hold(self) -> None:
        """An exchange begins: the flag stays as it is, or is set."""
        self._may_end = False
        self._over()

    def begin(self, *, relies: bool) -> None:
        """The nodes come together, and the flag is set in both superblocks if it has to be.
        `relies`: this one, on what the other has of it."""
        self._around.rely(relies)

    def end(self) -> None:
        """The link is lost, or there is none: what is stored here has to be enough."""
        self._around.rely(False)
        self.settle()

    def settle(self) -> None:
        """Neither node relies on memory: the flag goes as soon as it may."""
        self._may_end = True
        token = self._token = object()
        was_volatile = self._ledger.lasting.volatile

        def over(error: OSError | None) -> None:
            if token is self._token:
                if was_volatile and not self._ledger.lasting.volatile:
                    self._around.emit("record-destaged")
                self._over()

        def stored(error: OSError | None) -> None:
            if token is self._token and error is None:
                self._ledger.change(self._stored, over)
            else:
                over(error)

        if not self._around.destage(stored):
            stored(None)

    def _over(self) -> None:
        self._token = None
        waiting, self._when_over = self._when_over, []
        for call in waiting:
            call()

    def when_over(self, call: Callable[[], None]) -> None:
        """Call back when nothing of this is under way: the flag has gone, or cannot go now."""
        if self._token is None:
            call()
        else:
            self._when_over.append(call)

    def tick(self) -> None:
        """Once a second: what could not be stored is tried again."""
        lasting = self._ledger.lasting
        if self._may_end and self._token is None and self._stored(lasting) != lasting:
            self.settle()
