"""One of two nodes: what it is to the other, and how the two come together (pure).

A node serves hosts while it knows what the other may write.  It knows after it has exchanged
records with it, and goes on knowing while the link is lost, as long as its process lives: no right
changes by a cut.  It serves without the other only after proof that the other can write no more; a
time-out is none.

| state | means |
| --- | --- |
| waiting | this process has met nobody: it owns nothing and serves nobody |
| paired | the records are exchanged and the link is there |
| cut | it was paired; hosts go on where this node has the right to |
| alone | the other can write no more, or there has never been another |
| outdated | the other was given the proof that we are dead: nothing is written any more |
| split-brain | both went on alone: nothing is written any more, on either, until one begins anew |

Coming together: HELLO both ways (`greeting`), then an `exchange` of what both know.

Invariants:
1. The superblock is durable before anything relies on a step to alone.
2. A node that is not fresh and meets a fresh one has the proof that the other's old process is
   dead: it takes over what that owned, all of it dirty, before it sends RECORD.  Where the other's
   kernel writes for hosts (`HelloFlag.DIRECT`) that proves nothing of the places that it writes:
   they are `own` in the other's RECORD, which comes first, and stay the other's.
3. A message that is not allowed in the phase of the connection ends the connection.
4. In a split brain nothing is written or copied until the other comes as a fresh process.  Then
   everything is compared: copies of both may have landed on one another, which no record knows.
5. A keeper (`keeping`) is waiting, paired or cut.  It serves nobody and is never alone.

A crash leaves the superblock of before or after a step.  The process that comes next is fresh,
except for a node 1 that was never paired.  It owns nothing but what its kernel has gone on writing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from bitarray import bitarray

from bitmapd.errors import BusyError, UnreachableError, WrongStateError
from bitmapd.media.base import Scheduler, Timer
from bitmapd.partner import messages
from bitmapd.partner.exchange import Exchange
from bitmapd.partner.greeting import (
    NIL,
    SplitBrain,
    Standing,
    check,
    has,
    has_new_record,
    in_memory,
    is_over,
    relies,
    standing,
    stores_first,
)
from bitmapd.partner.growth import Growth
from bitmapd.partner.handover import Handover, Hosts, Outcome
from bitmapd.partner.keeping import is_keeper
from bitmapd.partner.lead import Lead
from bitmapd.partner.ledger import Ledger
from bitmapd.partner.messages import Hello, HelloFlag, Message
from bitmapd.partner.reliance import Reliance
from bitmapd.partner.rights import Rights
from bitmapd.partner.share import Shares, SplitRights
from bitmapd.partner.split import Conflicts, conflicts
from bitmapd.partner.standin import StandIn
from bitmapd.partner.states import Lasting, Phase, Proof, State, Surroundings, Wire
from bitmapd.peer import words
from bitmapd.peer.frames import ErrorCode, PeerError
from bitmapd.peer.payloads import Runs
from bitmapd.record.extents import bits_of, runs_of

__all__ = ["Lasting", "Node", "Phase", "Proof", "State", "Surroundings", "Wire"]

HELLO_TIMEOUT_S = 2.0
EXCHANGE_TIMEOUT_S = 30.0


class Node:
    """See the module docstring."""

    def __init__(
        self,
        number: int,
        lasting: Lasting,
        rights: Rights,
        scheduler: Scheduler,
        around: Surroundings,
        *,
        keeps: bool = False,
    ) -> None:
        """It `keeps` the record of the other and is nothing else."""
        self.number = number
        self.keeps = keeps
        self.ledger = Ledger(lasting, around.store)
        self.rights = rights
        self._scheduler = scheduler
        self._around = around
        self.state = State.WAITING
        self.phase = Phase.CLOSED
        self.proof: Proof | None = None
        self.peer: Hello | None = None  # of this connection or the last one
        self.exchanges = 0
        self.absorbed_extents = 0
        self.comparisons = 0  # how often nobody has known what differs
        self.conflicts: Conflicts | None = None  # of a split brain, once the other has said its
        self._was_alone = False  # before the split brain
        self._known = False  # what the other may own: it has exchanged, or is alone
        self._wire: Wire | None = None
        self._timer: Timer | None = None
        self._mine: Hello  # of this connection
        self._theirs: Hello  # likewise, once it has come
        self._exchange: Exchange  # of this connection, once our RECORD is sent
        self._says_later = False  # what is ours: once the other has said what its kernel writes
        self._writes_on = False  # our kernel, since before this process began
        self._last_paired = 0
        self._going_alone = False
        self._held_off = False  # the other is being fenced
        self._over = False  # nothing is said any more
        self._left: Callable[[bool], None] | None = None
        self._handover = Handover(rights, scheduler, self.say)
        self._reliance = Reliance(self.ledger, around, self._all_stored)
        self._other_goes_on = False  # it may take places in a cut that we do not know of
        rights.on_stuck = self._look_whether_to_go_on
        self.stand_in = StandIn(rights, scheduler, self, around.emit)
        self.growth = Growth(rights, scheduler, self)
        self.lead = Lead(number)

    @property
    def lasting(self) -> Lasting:
        """What the superblock says for certain."""
        return self.ledger.lasting

    # -- how it begins ------------------------------------------------------------------------
    def start(self, direct: Runs = ()) -> None:
        """A node 1 that was never paired needs nobody; any other has to meet its partner.
        `direct`: extents that our kernel has gone on writing; they are ours, as they were."""
        self._writes_on = bool(direct)
        joins = self.lasting.volume == NIL
        if self.number == 1 and self.lasting.never_paired and not (joins or self.keeps):
            self._known = True
            self.proof = Proof.NEVER
            self.rights.adopt(runs_of(self._around.stored()))
            self.rights.alone()
            self._become(State.ALONE)
        elif direct:
            self.rights.adopt(direct)

    @property
    def serves(self) -> bool:
        """Whether requests of hosts may be taken."""
        return not self.keeps and self.state in (State.PAIRED, State.CUT, State.ALONE)

    @property
    def going_alone(self) -> bool:
        """Whether that it is alone is being written."""
        return self._going_alone

    def _become(self, state: State) -> None:
        self.state = state
        self._around.changed()

    # -- the connection -----------------------------------------------------------------------
    def connected(self, wire: Wire) -> None:
        """The other node is there, and is who it says it is."""
        if self._wire is not None:
            self._hang_up(None)
        # That we are alone is on its way to the disk, or this process ends.
        if self._held_off or self._going_alone or self._over:
            wire.close(None)
            return
        self._wire = wire
        if self.state is State.OUTDATED:
            self.refuse(PeerError(ErrorCode.OLD_TERM, "this node is outdated"))
            return
        self._mine = self._fill(self._around.hello())
        self._phase(Phase.HELLO, HELLO_TIMEOUT_S)
        wire.send(self._mine)

    def _fill(self, hello: Hello) -> Hello:
        flags = HelloFlag(0)
        if not self._known:
            flags |= HelloFlag.FRESH
        if self.state is State.ALONE or (self.state is State.SPLIT_BRAIN and self._was_alone):
            flags |= HelloFlag.ALONE
        if self.lead.is_claimed:
            flags |= HelloFlag.LEAD
        if self.serves:
            flags |= HelloFlag.SERVES
        if self.lasting.volatile:
            flags |= HelloFlag.VOLATILE
        if self._other_goes_on if self.keeps and self._known else self.lasting.gone_on:
            flags |= HelloFlag.GONE_ON
        return replace(
            hello,
            volume=self.lasting.volume,
            node=self.number,
            flags=hello.flags | flags,
            term=self.lasting.term,
            generations=self.lasting.generations,
            last_paired=self._last_paired,
        )

    def _phase(self, phase: Phase, timeout_s: float | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.phase = phase
        if timeout_s is not None:
            self._timer = self._scheduler.call_later(timeout_s, self._too_late)
        self._around.changed()

    def _too_late(self) -> None:
        self.refuse(PeerError(ErrorCode.INTERNAL, f"no answer in the phase '{self.phase.value}'"))

    def lost(self) -> None:
        """The connection is gone."""
        self._wire = None
        self._lose()

    def _lose(self) -> None:
        had_said_ready = self.phase is Phase.READY and self._exchange.has_said_ready
        if had_said_ready and has(self._theirs, HelloFlag.GO_ON):
            self._other_goes_on = True  # it may have come up, though this node has not
        if self._known:
            self._reliance.end()
        self._handover.lost()
        self.stand_in.lost()
        self.growth.lost()
        self._phase(Phase.CLOSED)
        if self._left is not None:
            left, self._left = self._left, None
            self._scheduler.call_soon(left, False)
        if self.state is State.PAIRED or (self.state is State.ALONE and had_said_ready):
            self.rights.cut()
            self._become(State.CUT)
        elif self.state is State.CUT:
            self.rights.cut()
        elif self.state is State.ALONE:
            self.rights.alone()
        elif self.state is State.WAITING:
            self.rights.forget_all()

    def refuse(self, error: PeerError) -> None:
        """End the connection: what came is wrong, or too late."""
        if self._wire is not None:
            self._around.emit("partner-protocol-error", code=int(error.code), message=error.text)
            self._hang_up(error)

    def _hang_up(self, error: PeerError | None) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close(error)
        self._lose()

    # -- messages -----------------------------------------------------------------------------
    def received(self, message: Message, sequence: int) -> None:
        """One message; a wrong one ends the connection and changes nothing."""
        if self._wire is None:
            return
        try:
            self._take(message, sequence)
        except SplitRights as error:
            self._split(PeerError(ErrorCode.BOTH_OWN, str(error)))
        except PeerError as error:
            if error.code is ErrorCode.SPLIT_BRAIN:
                self._split(error)
            else:
                self.refuse(error)

    def _take(self, message: Message, sequence: int) -> None:
        handler = _HANDLERS.get((self.phase, type(message)))
        if handler is None:
            raise PeerError(
                ErrorCode.KIND,
                f"{type(message).__name__} is not allowed in the phase '{self.phase.value}'",
            )
        handler(self, message, sequence)

    def _greeted(self, theirs: Hello, _: int) -> None:
        mine = self._mine
        check(mine, theirs)
        self.peer = self._theirs = theirs
        fresh, other_fresh = mine.flags & HelloFlag.FRESH, theirs.flags & HelloFlag.FRESH
        found = standing(mine, theirs)
        if found is Standing.BEHIND and not fresh:
            self.shut_out("the partner has taken over while this node lived")
            return
        if fresh and self._writes_on and is_over(mine, theirs):
            self.shut_out("the partner has taken over while this node's kernel went on writing")
            return
        if self.state is State.SPLIT_BRAIN and not other_fresh:
            raise SplitBrain
        if found is Standing.AHEAD and not other_fresh:
            raise PeerError(ErrorCode.OLD_TERM, f"term {theirs.term} is over: it is {mine.term}")
        if theirs.size_bytes > mine.size_bytes:
            raise self.growth.catch_up(theirs.size_bytes)
        if theirs.size_bytes < mine.size_bytes:
            return  # it ends this connection, and comes back when it has grown
        self._reliance.hold()
        self.rights.most_requests = theirs.most_requests
        self._phase(Phase.RECORDS, EXCHANGE_TIMEOUT_S)
        self._says_later = self._inherits and has(theirs, HelloFlag.DIRECT)
        if not self._says_later:
            self._begin_exchange(())

    @property
    def _inherits(self) -> bool:
        """Whether the other's process is a new one, and what the old one had is ours."""
        knows = (self._known and self.state is not State.ALONE) or self.state is State.SPLIT_BRAIN
        return knows and not self.keeps and has(self._theirs, HelloFlag.FRESH)

    def _begin_exchange(self, direct: Runs) -> None:
        """Say what is ours.  `direct`: what the other's kernel writes on."""
        if self._inherits:
            if self.state is State.SPLIT_BRAIN:
                self._outlive(direct)
            else:
                self._absorb(direct)
        wire = self._wire
        self._exchange = Exchange(
            self._mine, self._theirs, self, self._around, lambda: wire is self._wire
        )

    def _absorb(self, direct: Runs) -> None:
        """Its process is a new one, so the old one is dead: what that had is ours (invariant 2)."""
        if self._other_goes_on and has_new_record(self._mine, self._theirs):
            # What it has gone on with stood in its record, and it comes with a new one.
            self._nobody_knows()
        taken = (self.rights.other | self.rights.owed) & ~bits_of(direct, len(self.rights.own))
        self.rights.absorb(direct)
        self._inherited(taken)

    def _inherited(self, taken: bitarray) -> None:
        """These were the other's, or may have been, and are ours."""
        self.absorbed_extents += taken.count()
        self._around.other_died(runs_of(taken))

    def end(self) -> None:
        """End the connection, if there is one; another may come."""
        if self._wire is not None:
            self._hang_up(None)

    def say(self, message: Message) -> None:
        if self._wire is not None:
            self._wire.send(message)

    def _heard(self, message: messages.Record, _: int) -> None:
        if self._says_later:
            self._begin_exchange(message.own)
        self._phase(Phase.READY, EXCHANGE_TIMEOUT_S)
        try:
            self._exchange.heard(message)
        except SplitRights:
            self.conflicts = conflicts(self.rights.owned_alone, message.own)
            raise

    def come_together(
        self, shares: Shares, copying: Runs, incarnation: int, *, inherits: bool
    ) -> None:
        """Both know what both know: rights change (called by the exchange)."""
        self.comparisons += shares.everything and shares.own.any()
        self._known = True
        self.proof = None
        self._last_paired = incarnation
        self.exchanges += 1
        mine, theirs = self._mine, self._theirs
        claimed, claimed_there = (has(one, HelloFlag.LEAD) for one in (mine, theirs))
        self.lead.met(claimed=claimed, claimed_there=claimed_there)
        if inherits:
            self.absorbed_extents += shares.dirty.count()
        self.stand_in.met(mine, theirs)
        self._reliance.begin(relies=relies(mine, theirs))
        self.rights.store_first(stores_first(mine, theirs))
        self.rights.thaw(shares, copying)
        self._other_goes_on = has(theirs, HelloFlag.GO_ON)  # and has gone on with nothing so far
        if stores_first(mine, theirs) if self.keeps else not self._lacks:
            self._reliance.settle()
        if self.lasting.gone_on and not self.keeps:
            # The other knows now; if this fails, it stays a warning.
            self.ledger.change(partial(_gone_on, False), lambda error: None)
        self._phase(Phase.UP)
        self._become(State.PAIRED)
        self._around.emit(
            "records-exchanged",
            own_extents=shares.own.count(),
            partner_extents=shares.other.count(),
            dirty_extents=shares.dirty.count(),
        )

    @property
    def _lacks(self) -> bool:
        """Whether this node's stored record need not name all that counts while they are paired."""
        mine, theirs = self._mine, self._theirs
        return in_memory(mine, theirs) or (is_keeper(theirs) and relies(mine, theirs))

    # -- going on in a cut --------------------------------------------------------------------
    def _look_whether_to_go_on(self) -> None:
        """With `on_cut = go-on` hosts need not wait for what is nobody's, once that is durable.
        Each place is stored here before it is written, as in every cut."""
        if self._may_go_on and self.rights.pending_extents:
            self.ledger.change(partial(_gone_on, True), self._goes_on)

    @property
    def _may_go_on(self) -> bool:
        if self.state is not State.CUT or self.phase is not Phase.CLOSED or self._going_alone:
            return False
        return has(self._mine, HelloFlag.GO_ON)

    def _goes_on(self, error: OSError | None) -> None:
        if error is None and self._may_go_on:
            if not self.rights.goes_on:
                self._around.emit("gone-on")
            self.rights.go_on()

    # -- alone --------------------------------------------------------------------------------
    def hold_off(self) -> None:
        """The other is being fenced: until `let_in` nothing is agreed with it.  WrongStateError or
        BusyError if this node could not go alone afterwards."""
        if self.state not in (State.WAITING, State.CUT) or self._going_alone:
            raise WrongStateError(f"nothing has to be proven in the state '{self.state.value}'")
        self._check_alone()
        self._held_off = True

    def let_in(self) -> None:
        self._held_off = False

    def _check_alone(self) -> None:
        if self.lasting.never_paired:
            raise WrongStateError(
                "this node has never met its partner: it knows nothing of the volume",
                hint="start node 1 first, and let the two meet",
            )
        if self.phase is Phase.HELLO:  # whoever has said nothing yet may never do so
            self._hang_up(None)
        if self.phase is not Phase.CLOSED:
            raise BusyError("the nodes are exchanging their records: try again in a moment")

    def fenced(self, proof: Proof) -> None:
        """The other can write no more: serve alone, once that is durable."""
        if self.keeps or self.state not in (State.WAITING, State.CUT) or self._going_alone:
            return
        self._check_alone()
        self._going_alone = True
        generation = self._around.new_generation()

        def edit(now: Lasting) -> Lasting:
            generations = (generation, *now.generations)[:4]
            return replace(now, never_paired=False, term=now.term + 1, generations=generations)

        def stored(error: OSError | None) -> None:
            if error is not None:
                self._around.emit("takeover-failed", message=f"cannot write the record: {error}")
                over()
            elif self._is_unknown(proof) and not self.lasting.volatile:
                self._around.partner_record(read)
            else:
                read(None)

        def read(found: bitarray | None) -> None:
            if self.state in (State.WAITING, State.CUT):
                self._be_alone(proof, found)
            over()

        def over() -> None:
            self._going_alone = False
            self._around.changed()

        self.ledger.change(edit, stored)

    def _is_unknown(self, proof: Proof) -> bool:
        """Whether the other may have written what is not known here."""
        if not self._known:
            return not self.lasting.kept or self.lasting.volatile
        return self._other_goes_on and proof is not Proof.BYE

    def _be_alone(self, proof: Proof, theirs: bitarray | None) -> None:
        """`theirs`: what the other's stored record names, if that is needed and counts."""
        self.lead.take()
        self.proof = proof
        compared = self.comparisons
        unknown = self._is_unknown(proof)
        if unknown and theirs is None:
            # What the other has done is known to nobody: all of it may differ.
            self._nobody_knows()
        elif not self._known:
            # All that this node wrote is in its own record.
            self.rights.learn(runs_of(self._around.stored()))
        if unknown and theirs is not None:
            self.rights.learn(runs_of(theirs))
        self._known = True
        # Not what hosts have waited for besides: nobody has written there.
        taken = self.rights.other | self.rights.owed
        self.rights.alone()
        self._reliance.end()
        self._inherited(taken)
        self._become(State.ALONE)
        self._around.emit(
            "takeover",
            proof=proof.value,
            extents=taken.count(),
            compares_everything=self.comparisons > compared,
        )

    def _nobody_knows(self) -> None:
        """All of it may be the other's, and has to be compared."""
        self.rights.learn(((0, len(self.rights.own)),))
        self.comparisons += 1

    # -- together -----------------------------------------------------------------------------
    def serve(self, hosts: Hosts) -> None:
        """These take the requests of hosts at this node."""
        self._handover.hosts = hosts

    def take_lead(self) -> None:
        """What belongs to nobody is ours from now on.  UnreachableError if the partner cannot hear
        of it."""
        if self.state is State.ALONE:
            return
        if self.state is not State.PAIRED:
            raise UnreachableError(
                f"the partner cannot hear of it in the state '{self.state.value}'",
                hint="let the nodes meet; a takeover moves the lead, too",
            )
        self._claim_lead()

    def _claim_lead(self) -> None:
        self.lead.take()
        self.say(messages.Lead(self.lead.claim))

    def take(self, force: bool, done: Outcome) -> None:
        """A planned takeover: the other stops its hosts and gives everything.  Calls back, without
        error, when that is done; at once if there is nobody to take from.  `force`: even if hosts
        are connected there."""
        if self.state is State.ALONE:
            self._scheduler.call_soon(done, None)
            return
        if self.state is not State.PAIRED:
            raise WrongStateError(
                f"the partner cannot be asked in the state '{self.state.value}'",
                hint="prove that it is dead: fence it",
            )
        if self._left is not None:
            raise BusyError("this node is stopping")
        if self.lasting.kept:
            self._scheduler.call_soon(done, None)
            return

        def over(error: Exception | None) -> None:
            if error is None:
                self._claim_lead()
            done(error)

        self._handover.take(force, over)

    def give(self, done: Callable[[bool], None]) -> None:
        """No host is served here, until the next `take`: give everything to the other.  Calls back
        with whether it has all of it; without a link what is ours stays ours."""
        if self._left is not None:
            raise BusyError("this node is stopping")
        if self.state is State.PAIRED and not self.lasting.kept:
            self._handover.give(done)
        else:
            self._scheduler.call_soon(done, False)

    def leave(self, done: Callable[[bool], None]) -> None:
        """End: no host is served any more.  Give everything to the other, and say so last; `done`
        with whether it has all of it.  Without a link what is ours stays in the record."""
        if self.keeps:
            self._leave_off(partial(done, False))
            return
        if self.state is not State.PAIRED or self._handover.is_taking:
            self._reliance.when_over(partial(done, False))
            return
        self._handover.give_up("the partner is stopping")
        self._left = done
        self.rights.give_all(partial(self._say_bye, done))

    def _say_bye(self, done: Callable[[bool], None]) -> None:
        self._left = None
        self.rights.flush()
        self.say(words.Bye(words.Goodbye.STOPPED))
        self._reliance.end()
        self._over, self._known = True, False
        self.state = State.WAITING
        self._hang_up(None)
        self._reliance.when_over(partial(done, True))

    def _leave_off(self, done: Callable[[], None]) -> None:
        """Of a keeper: keep nothing more.  The other goes on alone from BYE on, so that comes after
        the superblock says that the record here lacks what is written then."""

        def may_go(error: OSError | None) -> None:
            if error is None and self.phase is Phase.UP:
                self.say(words.Bye(words.Goodbye.STOPPED))
            self.finish(done)

        if self.phase is Phase.UP:
            self._other_goes_on = True
            self.ledger.change(partial(_gone_on, True), may_go)
        else:
            self.finish(done)

    def part(self, done: Callable[[], None]) -> None:
        """End, where the other is a keeper: what is ours stays in both records.  No host is served
        any more, and nothing is copied."""
        if self.phase is Phase.UP:
            self.rights.flush()
            self.say(words.Bye(words.Goodbye.STOPPED))
        self.finish(done)

    def finish(self, done: Callable[[], None]) -> None:
        """Nothing is said or heard any more.  Call back when the stored record stands for itself,
        or cannot."""
        self._over = True
        self._hang_up(None)
        self._reliance.when_over(done)

    def tick(self) -> None:
        """Once a second."""
        self._reliance.tick()
        self._look_whether_to_go_on()

    def begin_anew(self) -> None:
        """End the connection, for what was said on it is not so; another one comes."""
        if self.phase is Phase.UP:
            self.say(words.Bye(words.Goodbye.RECONNECTING))
            self._hang_up(None)

    def _bye(self, message: words.Bye, _: int) -> None:
        """The other has given everything, and nothing of its is in flight anywhere."""
        self._hang_up(None)
        if message.reason == words.Goodbye.STOPPED:
            self.fenced(Proof.BYE)

    def _all_stored(self, now: Lasting) -> Lasting:
        """The superblock once the stored record names all that this node knows."""
        gone_on = self._other_goes_on if self.keeps else now.gone_on
        return replace(now, volatile=False, gone_on=gone_on)

    # -- neither ------------------------------------------------------------------------------
    def shut_out(self, why: str) -> None:
        """Nothing that this node writes counts any more: the other has taken over, or will."""
        if self.state is State.OUTDATED:
            return
        self._hang_up(PeerError(ErrorCode.OLD_TERM, why))
        self.rights.stop(why)
        self._become(State.OUTDATED)
        self._around.emit("outdated", message=why)

    def _split(self, error: PeerError) -> None:
        """Both may have written.  If this is found at HELLO each says where, and they stay
        connected: each hears at once when the other ends."""
        asks = self.phase is Phase.HELLO
        if not asks:
            self._hang_up(error)
        self._stop_writing(error.text)
        if asks:
            self.say(messages.Record(runs_of(self.rights.owned_alone), (), (), ()))
            self._phase(Phase.SPLIT, EXCHANGE_TIMEOUT_S)

    def _stop_writing(self, why: str) -> None:
        if self.state is not State.SPLIT_BRAIN:
            self._was_alone = self.state is State.ALONE
            self.rights.split()
            self._become(State.SPLIT_BRAIN)
            self._around.emit("split-brain", message=why)

    def _said_where(self, message: messages.Record, _: int) -> None:
        """Where the other may have written alone."""
        self.conflicts = conflicts(self.rights.owned_alone, message.own)
        self._phase(Phase.SPLIT)

    def _outlive(self, direct: Runs) -> None:
        """The other's process has ended, so one is left that writes: it goes on, and since old
        copies of either may lie on top of newer ones everything is compared."""
        self.conflicts = None
        self._nobody_knows()
        self.rights.cut()
        self._absorb(direct)
        self._become(State.ALONE if self._was_alone else State.CUT)
        self._around.emit("split-brain-ended")

    # -- while paired -------------------------------------------------------------------------
    def _grant(self, message: messages.Grant, sequence: int) -> None:
        if self.keeps:
            raise PeerError(ErrorCode.KIND, "a keeper has nothing to write, and takes no extent")
        self.rights.granted(message, sequence)

    def _take_asked(self, message: messages.Take, _: int) -> None:
        self._handover.asked(message, None if self._left is None else "the partner is stopping")

    def _error(self, message: words.Error, _: int) -> None:
        self._hang_up(None)
        why = f"the partner says: {message.text}"
        if message.code in (ErrorCode.SPLIT_BRAIN, ErrorCode.BOTH_OWN) and self._known:
            self._stop_writing(why)
        else:
            self._around.emit("partner-refused", code=message.code, message=why)

    def _closed(self, message: words.Bye, _: int) -> None:
        self._hang_up(None)


def _gone_on(on: bool, now: Lasting) -> Lasting:
    return replace(now, gone_on=on)


def _to_rights(take: Callable[[Rights, Any], None]) -> Callable[[Node, Any, int], None]:
    return lambda node, message, _: take(node.rights, message)


# A message that is not here in the phase of the connection ends it.
_HANDLERS: dict[tuple[Phase, type[object]], Callable[[Node, Any, int], None]] = {
    (Phase.HELLO, Hello): Node._greeted,
    (Phase.RECORDS, messages.Record): Node._heard,
    (Phase.SPLIT, messages.Record): Node._said_where,
    (Phase.READY, messages.Free): lambda node, message, _: node._exchange.freed(message),
    (Phase.READY, messages.Ready): lambda node, message, _: node._exchange.ready(message),
    (Phase.UP, messages.Add): _to_rights(Rights.added),
    (Phase.UP, messages.Grant): Node._grant,
    (Phase.UP, messages.Got): _to_rights(Rights.got),
    (Phase.UP, messages.Remove): _to_rights(Rights.removed),
    (Phase.UP, messages.Free): _to_rights(Rights.free),
    (Phase.UP, messages.Ask): _to_rights(Rights.asked),
    (Phase.UP, messages.Status): _to_rights(Rights.status),
    (Phase.UP, messages.Take): Node._take_asked,
    (Phase.UP, messages.Taken): lambda node, message, _: node._handover.taken(message),
    (Phase.UP, messages.Lead): lambda node, message, _: node.lead.heard(message.claim),
    (Phase.UP, messages.Resize): lambda node, message, _: node.growth.asked(message),
    (Phase.UP, messages.Resized): lambda node, message, _: node.growth.answered(message),
    (Phase.UP, words.Bye): Node._bye,
    **{(phase, words.Bye): Node._closed for phase in set(Phase) - {Phase.CLOSED, Phase.UP}},
    **{(phase, words.Error): Node._error for phase in Phase},
}
