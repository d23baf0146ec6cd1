"""Volumes that are cut at one instant: what each does, and what has to be done next (pure).

The volumes of a group are processes of one host.  One of them, whichever holds the group's lock,
*leads*: it asks all for their state, `decide` says what follows, and it tells them.

| state of the members | order | a member then |
| --- | --- | --- |
| all may be cut, and one is due | STILL | has its hosts write through the gate, if they do not |
| the same, and all are still | CUT | is cut, and withholds the answers to writes |
| (all have been cut) | RELEASE | gives them |
| all have sent everything | END | says END to its receiver |
| all have committed it | APPLY | has its receiver apply up to that point, and no further |
| one is cut; another is not, or lost its receiver | VOID | gives up its cut; nothing is resent |

Invariants:
1. A point of a group is whole only if every member gave its answers at RELEASE, or at END, which
   come when all have been cut.  A member that hears of none in `patience_s` gives its cut up, and
   then its answers; so does one whose own cut is given up for any reason.
2. No member says END before all have read and sent everything.  What can still go wrong behind that
   is the loss of a link or a process: then some receivers have a point that others lack, and none
   of them applies it before a later one that all have.
   A member whose receiver has `LAGS` points or more that are not applied, as others may lack them,
   says END when all others have the point: so the last place at its receiver is for a point that
   all have then (models/apart.pml).
3. No host waits for another member longer than `patience_s`, whatever became of it.
4. The leader remembers nothing that it needs: another one goes on from what the members say.
5. A member that is not there, or not able, keeps the group from being cut.  It stays so: a point
   without it would be none of the group.  That goes for a leader that hangs, too: it is
   a member, so nobody takes its place, and those that do not hear it say so.
6. A member whose hosts write past the gate is cut while none does, and none does again before its
   answers were given: what the kernel answers cannot be withheld (`following`).

Points of a group have random numbers, which are the same at all members; their order is that in
which each member has them.  `ALONE` is the number of a point that a member was cut for by itself,
to send what is left before it stops: its receiver applies it with the next one of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Protocol

from bitmapd.gate.cycle import Void
from bitmapd.gate.withheld import Withheld
from bitmapd.media.base import Scheduler, Timer
from bitmapd.points.messages import ApplyUpTo, Message

ALONE: Final = 1
FIRST: Final = 2  # the smallest number of a point of a group
NUMBER_BITS: Final = 52  # what JSON carries everywhere
REMEMBERED: Final = 16  # as many as a receiver has waiting
LAGS: Final = REMEMBERED // 2
HEARD_S: Final = 3.0  # the leader's last word counts for so long
AWAY_S: Final = 3.0  # so long a point that is cut waits for a receiver that went away
UNHEARD: Final = "its leader does not answer"


class Stage(Enum):
    """Of the point of a group at one member."""

    NONE = "none"
    CUT = "cut"
    SENT = "sent"  # all of it, but END
    ENDED = "ended"


class Act(Enum):
    STILL = "still"
    CUT = "cut"
    RELEASE = "release"
    END = "end"
    APPLY = "apply"
    VOID = "void"


@dataclass(frozen=True, slots=True)
class Seen:
    """What a member says.  `is_ready`: it can be cut now, or once it `is_still`: no host writes
    past its gate.  `obstacle`: why it cannot, if that may last, or empty.  `applies`: the number up
    to which its receiver was told to apply; `committed`: the newest that its receiver has;
    `unapplied`: how many points wait there; `away_s`: how long nothing has been sent there."""

    name: str
    is_ready: bool
    obstacle: str
    is_due: bool
    label: str
    stage: Stage
    number: int
    committed: tuple[int, ...]
    applies: int
    unapplied: int = 0
    is_still: bool = True
    away_s: float = 0.0

    @classmethod
    def of(cls, name: str, said: dict[str, Any]) -> Seen:
        """From a member's answer; KeyError, TypeError, ValueError for what is none."""
        return cls(
            name,
            bool(said["is_ready"]),
            str(said["obstacle"]),
            bool(said["is_due"]),
            str(said["label"]),
            Stage(said["stage"]),
            int(said["number"]),
            tuple(map(int, said["committed"])),
            int(said["applies"]),
            int(said.get("unapplied", 0)),
            bool(said.get("is_still", True)),
            float(said.get("away_s", 0.0)),
        )


@dataclass(frozen=True, slots=True)
class Order:
    """`later`: members that are not told yet."""

    act: Act
    number: int = 0
    label: str = ""
    later: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """`waits_for`: why the group cannot be cut, or empty; `is_busy`: look again soon."""

    orders: tuple[Order, ...] = ()
    waits_for: str = ""
    is_busy: bool = False


def newest_of_all(histories: Sequence[Sequence[int]]) -> int:
    """The newest number of a group that is in every one of these, each in its order; 0: none."""
    if not histories:
        return 0
    common = set(histories[0]).intersection(*histories[1:])
    return next(
        (number for number in reversed(histories[0]) if number in common and number >= FIRST), 0
    )


def _told(absent: Sequence[str], members: Sequence[Seen]) -> str:
    """Why these keep the group from going on, or empty."""
    silent = [f"{name} does not answer" for name in absent]
    return ", ".join(
        silent + [f"{seen.name}: {seen.obstacle}" for seen in members if seen.obstacle]
    )


def decide(members: Sequence[Seen], absent: Sequence[str]) -> Decision:
    """What follows.  `absent`: those that did not answer."""
    orders: list[Order] = []
    newest = 0 if absent else newest_of_all([seen.committed for seen in members])
    if newest and any(seen.applies != newest for seen in members):
        orders.append(Order(Act.APPLY, newest))
    open_ones = [seen for seen in members if seen.stage is not Stage.NONE]
    if not open_ones:
        waits_for = _told(absent, members)
        due = [seen for seen in members if seen.is_due]
        if due and not waits_for and all(seen.is_ready for seen in members):
            label = next((seen.label for seen in due if seen.label), "")
            still = all(seen.is_still for seen in members)
            orders.append(Order(Act.CUT, 0, label) if still else Order(Act.STILL))
        return Decision(tuple(orders), waits_for, bool(due))
    away = [seen for seen in members if seen.away_s >= AWAY_S]
    numbers = {seen.number for seen in open_ones}
    for number in sorted(numbers):
        alike = [seen for seen in open_ones if seen.number == number]
        has = [seen for seen in members if seen in alike or number in seen.committed]
        begun = all(seen.stage in (Stage.CUT, Stage.SENT) for seen in has)
        lost = begun and any(seen in away for seen in alike)
        if absent or lost or len(has) < len(members):
            if any(seen.stage in (Stage.CUT, Stage.SENT) for seen in alike):
                orders.append(Order(Act.VOID, number))
        elif all(seen.stage is not Stage.CUT for seen in alike) and any(
            seen.stage is Stage.SENT for seen in alike
        ):
            lag = [seen for seen in alike if seen.stage is Stage.SENT and seen.unapplied >= LAGS]
            others = [seen for seen in members if seen not in lag]
            have_it = all(number in seen.committed for seen in others)
            later = () if have_it else tuple(seen.name for seen in lag)
            if any(seen.stage is Stage.SENT and seen not in lag for seen in alike) or not later:
                orders.append(Order(Act.END, number, later=later))
    return Decision(tuple(orders), _told(absent, away), True)


class Cuttable(Protocol):
    """The sender."""

    @property
    def cut_obstacle(self) -> str:
        """Why it cannot be cut, if that may last, or empty."""

    @property
    def may_be_cut(self) -> bool:
        """Now, if there is no obstacle."""

    @property
    def is_still(self) -> bool:
        """Whether no host writes past the gate, and all that was written so is known."""

    def still(self) -> None:
        """Have it be so, for the cut that follows soon."""

    @property
    def is_due(self) -> bool:
        """Whether it has something to send, and the interval is over."""

    @property
    def label(self) -> str:
        """That of the point that was asked for."""

    @property
    def unapplied(self) -> int:
        """How many committed points its receiver has not applied."""

    @property
    def away_s(self) -> float:
        """How long its receiver has been away, or it was paused; 0: not."""

    def cut_now(self, number: int, wall_ns: int, label: str) -> None: ...

    def give_up(self, reason: Void) -> None:
        """The cut that is open, if one is."""

    def say(self, message: Message) -> None: ...

    def proceed(self) -> None: ...


class Answering(Protocol):
    """The gate."""

    answers: Withheld
    patience_s: float

    def withhold_answers(self) -> None: ...

    def release_answers(self) -> None: ...


class Member:
    """One volume's part; see the module docstring."""

    def __init__(self, name: str, sender: Cuttable, gate: Answering, scheduler: Scheduler) -> None:
        self.name = name
        self._sender = sender
        self._gate = gate
        self._scheduler = scheduler
        self._timer: Timer | None = None
        self.stage = Stage.NONE
        self.number = 0
        self.committed: tuple[int, ...] = ()
        self.applies = 0
        self._waits_for = ""
        self._heard_s = float("-inf")
        self._held_since_s = 0.0
        self.cuts = 0
        self.hold_s = 0.0
        self.longest_hold_s = 0.0

    @property
    def patience_s(self) -> float:
        """How long a host may wait for the others."""
        return self._gate.patience_s

    # -- what the leader says ---------------------------------------------------------------
    def seen(self) -> Seen:
        sender = self._sender
        obstacle = sender.cut_obstacle
        return Seen(
            self.name,
            sender.may_be_cut and not obstacle,
            obstacle,
            sender.is_due,
            sender.label,
            self.stage,
            self.number,
            self.committed,
            self.applies,
            sender.unapplied,
            sender.is_still,
            sender.away_s,
        )

    @property
    def waits_for(self) -> str:
        """Why the group cannot be cut, or empty."""
        heard = self._scheduler.time() < self._heard_s + HEARD_S
        return self._waits_for if heard else UNHEARD

    def hear(self, waits_for: str) -> None:
        """The leader is there, and the group cannot be cut for that reason; empty: it can."""
        self._waits_for, self._heard_s = waits_for, self._scheduler.time()

    def obey(self, order: Order, wall_ns: int = 0) -> bool:
        """Whether it could: of no use for what is not CUT or RELEASE.  `wall_ns`: of the cut."""
        if order.act is Act.CUT:
            return self._cut(order, wall_ns)
        if order.act is Act.STILL:
            self._sender.still()
            return True
        if order.act is Act.APPLY:
            self.applies = order.number
            self._sender.say(ApplyUpTo(order.number))
            return True
        if order.number != self.number:
            return False
        if order.act is Act.RELEASE:
            return self._release()
        if order.act is Act.END and self.stage is Stage.SENT:
            self.stage = Stage.ENDED
            self._release()  # that word may have been lost, and all have been cut
            self._sender.proceed()
        elif order.act is Act.VOID and self.stage in (Stage.CUT, Stage.SENT):
            self._sender.give_up(Void.GROUP)
        return True

    def _cut(self, order: Order, wall_ns: int) -> bool:
        seen = self.seen()
        if self.stage is not Stage.NONE or not (seen.is_ready and seen.is_still):
            return False
        self.stage, self.number = Stage.CUT, order.number
        self.cuts += 1
        self._held_since_s = self._scheduler.time()
        self._gate.withhold_answers()
        self._timer = self._scheduler.call_later(self._gate.patience_s, self._too_late)
        self._sender.cut_now(order.number, wall_ns, order.label)
        return True

    def _release(self) -> bool:
        if not self._gate.answers.is_on:
            return False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        held_s = self._scheduler.time() - self._held_since_s
        self.hold_s += held_s
        self.longest_hold_s = max(self.longest_hold_s, held_s)
        self._gate.release_answers()
        return True

    def _too_late(self) -> None:
        self._timer = None
        self._sender.give_up(Void.GROUP)

    # -- what the sender says ---------------------------------------------------------------
    @property
    def may_cut_alone(self) -> bool:
        """Whether a cut that cannot wait has to be one of this volume alone."""
        return bool(self.waits_for)

    def may_end(self) -> bool:
        """All has been sent: whether END may be said."""
        if self.stage is Stage.CUT:
            self.stage = Stage.SENT
        return self.stage is not Stage.SENT

    def gave_up(self) -> None:
        """The cut is over, and its point none."""
        self.stage, self.number = Stage.NONE, 0
        self._release()

    def has_committed(self) -> None:
        """The receiver has the point that was ended."""
        if self.stage is Stage.ENDED:
            self.committed = (*self.committed, self.number)[-REMEMBERED:]
        self.stage, self.number = Stage.NONE, 0

    def linked(self) -> None:
        """The receiver may not have heard how far it may apply."""
        if self.applies:
            self._sender.say(ApplyUpTo(self.applies))

    def figures(self) -> dict[str, Any]:
        return {
            "number": self.committed[-1] if self.committed else None,
            "waits_for": self.waits_for or None,
            "cuts_total": self.cuts,
            "hold_seconds_total": round(self.hold_s, 6),
            "hold_seconds_max": round(self.longest_hold_s, 6),
        }
