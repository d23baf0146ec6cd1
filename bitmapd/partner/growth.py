"""How two nodes take up a larger size of their media (pure).

One node, the *first*, asks the other whether it can (RESIZE 1), has it make the size durable
(RESIZE 2), does so itself, and from then on shows it; the other does on RESIZE 3.  The new part is
the first one's, and dirty.

What lies beyond a node's size counts as the other's.  So the first may grow whether the other has
heard of it or not: who grows later takes note of the new part in the same event.  A node that is
smaller than the other's HELLO says grows before it goes on with it.

Invariants:
1. The first owns the extent in which the old end lies from before RESIZE 2 until it has grown, and
   neither gives nor drops it: its new part is dirty from then on.
2. A node is larger only after that is durable there, and shows it only after the first is.
3. The first does not go on with a partner that has not made that size durable: it ends the
   connection before it grows, and the other grows on the next HELLO.
4. A link that is lost ends the command, or not: it may be given again, and finds what is done.  So
   does whoever gives it up because the other does not answer (`give_up`).

A crash leaves each node with its old or its new size.  A new size that was never shown comes with a
record that names all of the new part, and the extent of the old end, also if the superblock's write
had failed and that extent has been given away and dropped since (`record/page_writer`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bitmapd.errors import BitmapdError, BusyError, UnreachableError, WrongStateError
from bitmapd.media.base import Done, Scheduler
from bitmapd.partner.messages import Message, Resize, Resized
from bitmapd.partner.rights import Rights, Stance
from bitmapd.peer.frames import ErrorCode, PeerError

CAN, DO, DONE = 1, 2, 3  # steps of RESIZE

Outcome = Callable[[BitmapdError | None], None]
Answer = Callable[[str | None], None]  # None, or why not


class Media(Protocol):
    """The appliance; each calls back later."""

    def look(self, size_bytes: int, answer: Answer) -> None:
        """Whether the media hold a volume of that size."""

    def record_end(self, done: Done) -> None:
        """Have the extent in which the old end lies recorded; it is not clean from now on."""

    def enlarge(self, size_bytes: int, answer: Answer) -> None:
        """Make that size durable; nothing of it shows yet."""

    def grow(self, size_bytes: int) -> None:
        """Take it up, at once: everything but the rights, and nothing becomes dirty by it."""


class Link(Protocol):
    """The node."""

    def say(self, message: Message) -> None: ...

    def end(self) -> None:
        """End the connection, if there is one."""


class Growth:
    """Both roles, one at a time; see the module docstring."""

    def __init__(self, rights: Rights, scheduler: Scheduler, link: Link) -> None:
        self._rights = rights
        self._scheduler = scheduler
        self._link = link
        self.media: Media | None = None  # None: this volume cannot grow
        self._outcome: Outcome = _nobody  # of the command that is under way
        self._then: Callable[[], None] | None = None  # what follows when the other has answered
        self._holds: object | None = None  # the old end is being recorded, by this command
        self._last: int | None = None  # extent that is held for its new part
        self._connection = object()
        self._prepared = 0  # size that the other has had made durable here, by this connection
        self._catching_up = False
        self._cannot: str | None = None

    # -- the first ------------------------------------------------------------------------------
    def begin(self, size_bytes: int, done: Outcome) -> None:
        """Grow.  WrongStateError, BusyError; `done` is called later."""
        media = self.media
        if media is None:
            raise WrongStateError("this volume cannot be resized while it is one of a pair")
        if self._is_first or self._catching_up or self._then is not None:
            raise BusyError("the volume is growing already")
        if self._rights.stance not in (Stance.UP, Stance.ALONE):
            raise UnreachableError(
                "both nodes have to grow, and the partner is not there",
                hint="let the nodes meet, then try again",
            )
        self._outcome = done
        paired = self._rights.stance is Stance.UP
        connection = self._connection if paired else None
        command = object()

        def hold() -> None:
            self._holds = command
            media.record_end(held)

        def held(error: OSError | None) -> None:
            if self._holds is not command:
                return  # it was given up
            if error is None and not self._hold():
                media.record_end(held)  # it was asked for, and given, meanwhile
                return
            self._holds = None
            if error is not None:
                self._end(BitmapdError(f"cannot write the record: {error.strerror or error}"))
            else:
                self._ask(size_bytes, DO, connection, enlarge)

        def enlarge() -> None:
            media.enlarge(size_bytes, enlarged)

        def enlarged(why_not: str | None) -> None:
            if why_not is not None:
                self._end(BitmapdError(why_not))
                return
            still = connection is self._connection
            if not still:
                self._link.end()
            else:
                self._then = self._has_grown
                self._link.say(Resize(size_bytes, DONE))
            self.take_up(media, size_bytes, mine=True)
            self._release()
            if not still:
                self._scheduler.call_soon(self._has_grown)

        self._ask(size_bytes, CAN, connection, hold)

    def _ask(
        self, size_bytes: int, step: int, connection: object | None, then: Callable[[], None]
    ) -> None:
        if connection is None:  # there is nobody to ask
            self._scheduler.call_soon(then)
        elif connection is self._connection:
            self._then = then
            self._link.say(Resize(size_bytes, step))
        else:
            self._end(UnreachableError("the link was lost while the nodes were growing"))

    def answered(self, message: Resized) -> None:
        then, self._then = self._then, None
        if then is None:
            raise PeerError(ErrorCode.ANSWER, "RESIZED without RESIZE")
        if message.code and then is not _given_up:
            self._end(WrongStateError(f"the partner cannot grow: {message.text}"))
        else:
            then()

    def give_up(self, error: BitmapdError) -> None:
        """End a command that waits for the other, whose answer means nothing any more.  One that is
        carried out here ends by itself."""
        if self._holds is not None:
            self._holds = None
            self._end(error)
        elif self._is_first and self._then is not None:
            then, self._then = self._then, _given_up
            self._end(None if then == self._has_grown else error)

    def _hold(self) -> bool:
        last = self._rights.short_extent
        if last is not None and not self._rights.reserve(last):
            return False
        self._last = last
        return True

    def _release(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            self._rights.release(last)

    def _end(self, error: BitmapdError | None) -> None:
        self._release()
        outcome, self._outcome = self._outcome, _nobody
        outcome(error)

    def _has_grown(self) -> None:
        self._end(None)

    @property
    def _is_first(self) -> bool:
        return self._outcome is not _nobody

    def take_up(self, media: Media, size_bytes: int, *, mine: bool) -> None:
        media.grow(size_bytes)
        self._rights.grow(size_bytes, mine=mine)

    # -- the other ------------------------------------------------------------------------------
    def asked(self, message: Resize) -> None:
        media, size_bytes, connection = self.media, message.size_bytes, self._connection

        def answer(why_not: str | None) -> None:
            if connection is self._connection:
                self._link.say(
                    Resized(0 if why_not is None else int(ErrorCode.SIZE), why_not or "")
                )

        def enlarged(why_not: str | None) -> None:
            if connection is self._connection and why_not is None:
                self._prepared = size_bytes
            answer(why_not)

        if message.step == DONE:
            if media is None or self._prepared != size_bytes:
                raise PeerError(ErrorCode.ANSWER, "RESIZE 3 without RESIZE 2")
            self._prepared = 0
            self.take_up(media, size_bytes, mine=False)
            answer(None)
        elif media is None:
            answer("this volume cannot be resized while it is one of a pair")
        elif self._is_first:
            answer("it is asked to grow itself: try again in a moment")
        elif message.step == CAN:
            media.look(size_bytes, answer)
        else:
            media.enlarge(size_bytes, enlarged)

    # -- neither --------------------------------------------------------------------------------
    def catch_up(self, size_bytes: int) -> PeerError:
        """The other is larger: grow, and meanwhile do not go on with it.  Returns what to say."""
        here = self._rights.size_bytes
        what = f"the volume has {size_bytes} bytes at one node and {here} at the other, which "
        media = self.media
        if media is None:
            return PeerError(ErrorCode.SIZE, what + "cannot be resized while it is one of a pair")
        cannot, self._cannot = self._cannot, None
        if not self._is_first and not self._catching_up:
            self._catching_up = True

            def looked(why_not: str | None) -> None:
                if why_not is None:
                    media.enlarge(size_bytes, enlarged)
                else:
                    enlarged(why_not)

            def enlarged(why_not: str | None) -> None:
                self._catching_up = False
                self._cannot = why_not
                if why_not is None:
                    self._link.end()
                    self.take_up(media, size_bytes, mine=False)

            media.look(size_bytes, looked)
        return PeerError(ErrorCode.SIZE, what + (f"cannot grow: {cannot}" if cannot else "grows"))

    def lost(self) -> None:
        """The link is gone."""
        self._connection = object()
        self._prepared = 0
        then, self._then = self._then, None
        if then == self._has_grown:  # the other does so on the next HELLO
            self._scheduler.call_soon(then)
        elif then is not None and then is not _given_up:
            error = UnreachableError("the link was lost while the nodes were growing")
            self._scheduler.call_soon(self._end, error)


def _nobody(error: BitmapdError | None) -> None:
    """No command is under way."""


def _given_up() -> None:
    """Follows when the other answers after all."""
