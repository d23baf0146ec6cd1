"""Each row of the table of what may die in the course of a point, at each step that it names.

One schedule of a point is played step by step: hosts write before the cut and to what is pending,
blocks are sent ahead and at the cut, the receiver commits and applies.  A row says who dies, and at
which of these steps; the schedule is played anew for each, with several power cuts.  Then, as in
`tests.support.simpoints`:

I1 The receiver has the point that its commit page names, and none is lost that the sender heard of.
I2 The record names what differs.
I3 When all is over both sides are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from bitmapd.gate.cycle import Void
from bitmapd.points.sender import Phase
from bitmapd.receiver.places import COMMIT_OFFSETS
from bitmapd.receiver.receiver import State
from tests.support import simpoints
from tests.support.machines import sim_seeds
from tests.support.policies import KeepNothing
from tests.support.simpoints import World
from tests.support.simreceiver import BLOCK

CUTS = 4  # of power, at each step
POINT = 2  # that is played; the first one is written in place


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    simpoints.small(monkeypatch)


class Played(World):
    """After its first point."""

    policy = KeepNothing
    answered = True  # the write to what is pending

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.connect()
        self.put(10, 1)
        self.rest()
        assert self.seen == POINT - 1

    def put(self, block: int, fill: int, count: int = 1) -> None:
        def done(error: OSError | None) -> None:
            self.answered = True

        self.answered = False
        self.site.write(block * BLOCK, bytes([fill]) * BLOCK * count, done)
        self.run_soon()

    def rest(self) -> None:
        for _ in range(60):
            self.settle()
            if self.at_rest() and not self.machine.receiver.journal.page.queue:
                break
            if self.link is None:
                self.connect()
            self.advance(1.0)
        assert self.at_rest()
        assert self.are_equal

    def one(self) -> bool:
        """The next step of those that are under way; False: there is none."""
        site, machine = self.site, self.machine
        for disk in (site.record, site.primary):
            if disk.pending:
                self.finish(disk)
                return True
        if self.to_receiver():
            self.run_soon()
            return True
        for disk in (machine.journal, machine.image):
            if disk.pending:
                self.finish(disk)
                return True
        if self.to_sender():
            self.run_soon()
            return True
        if site.ledger.pending:
            self.finish(site.ledger)
            return True
        return False

    def all(self) -> Iterator[None]:
        while self.one():
            yield

    def steps(self) -> Iterator[None]:
        """Of the point."""
        sender = self.site.sender
        self.put(1, 2)
        self.put(6, 2)
        yield from self.all()
        sender.cut()
        self.run_soon()
        sender._gate.give_up_cut(Void.ASKED)  # what was read goes on as if copied ahead
        yield from self.all()
        self.put(1, 3)
        self.put(9, 3)
        yield from self.all()
        sender.cut()
        self.advance(2.0)
        while not sender._gate.is_cutting:
            yield
            self.one()
        self.put(9, 4)  # waits
        yield
        yield from self.all()
        self.advance(1.0)
        yield from self.all()

    @property
    def writes_page(self) -> bool:
        return any(op.offset_bytes in COMMIT_OFFSETS for op in self.machine.journal.pending)

    @property
    def committed(self) -> int:
        """On the medium."""
        return self.machine.receiver.journal.page.committed

    @property
    def applied(self) -> int:
        return self.machine.receiver.journal.page.applied

    @property
    def phase(self) -> Phase:
        return self.site.sender.phase


def sender_dies(world: Played) -> None:
    world.crash_sender(power=world.rng.random() < 0.7)


def power_of_sender(world: Played) -> None:
    world.crash_sender(power=True)


def receiver_dies(world: Played) -> None:
    world.crash_receiver()


def both_die(world: Played) -> None:
    world.crash_receiver()
    world.crash_sender(power=world.rng.random() < 0.7)


def link_dies(world: Played) -> None:
    world.cut_link()


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    dies: Callable[[Played], None]
    when: Callable[[Played], bool]


ROWS = {
    "01": Row("era open", sender_dies, lambda w: w.phase is Phase.OPEN and not w.site.gate.in_sync),
    "02": Row(
        "a write waits for its copy",
        sender_dies,
        lambda w: w.site.gate.is_cutting and not w.answered,
    ),
    "03": Row(
        "half of it sent, some of it ahead",
        sender_dies,
        lambda w: w.phase in (Phase.CUTTING, Phase.READING) and w.site.sender.uplink.entries > 0,
    ),
    "04": Row(
        "END sent, the receiver commits",
        sender_dies,
        lambda w: w.phase is Phase.ENDED and w.seen < POINT,
    ),
    "05": Row(
        "COMMITTED heard, superblock and clears on their way",
        sender_dies,
        lambda w: (
            w.seen == POINT
            and bool(
                w.site.sender.closing.storing or w.site.record.pending or w.site.ledger.volatile
            )
        ),
    ),
    "06": Row(
        "committed, and the primary not flushed",
        power_of_sender,
        lambda w: w.phase is Phase.ENDED and bool(w.site.primary.volatile),
    ),
    "07": Row(
        "data in flight to the journal",
        receiver_dies,
        lambda w: w.machine.receiver.state is State.RECEIVING and bool(w.machine.journal.pending),
    ),
    "08": Row(
        "flushed, before the commit page",
        receiver_dies,
        lambda w: w.machine.receiver.state is State.COMMITTING and not w.machine.journal.volatile,
    ),
    "09": Row("the commit page torn", receiver_dies, lambda w: w.writes_page and w.seen < POINT),
    "10": Row(
        "commit page durable, COMMITTED not heard",
        receiver_dies,
        lambda w: w.committed == POINT and w.seen < POINT,
    ),
    "11": Row(
        "applying, the image torn",
        receiver_dies,
        lambda w: (
            w.committed > w.applied and bool(w.machine.image.pending or w.machine.image.volatile)
        ),
    ),
    "12": Row(
        "image flushed, not said to be applied",
        receiver_dies,
        lambda w: w.committed > w.applied and w.writes_page,
    ),
    "15": Row("both, at any step", both_die, lambda w: True),
    "16": Row("the link, at any step", link_dies, lambda w: True),
}


def played_to(seed: int, step: int) -> Played:
    world = Played(seed)
    for number, _ in enumerate(world.steps()):
        if number == step:
            break
    return world


def steps_of(row: Row) -> list[int]:
    world = Played(0)
    return [number for number, _ in enumerate(world.steps()) if row.when(world)]


def named() -> list[object]:
    return [pytest.param(number, id=f"points/{number} {row.name}") for number, row in ROWS.items()]


@pytest.mark.parametrize("seed", sim_seeds(CUTS))
@pytest.mark.parametrize("number", named())
def test_who_dies_in_the_course_of_a_point_loses_nothing(number: str, seed: int) -> None:
    row = ROWS[number]
    steps = steps_of(row)
    assert steps, "the schedule has no such step"
    for step in steps:
        world = played_to(seed, step)
        assert row.when(world)
        row.dies(world)
        world.check()
        world.rest()
        world.check()


@pytest.mark.parametrize("number", ["08", "16"])
def test_nothing_is_sent_again_that_the_receiver_has_durably(number: str) -> None:
    """The open point is whole in the journal when it dies: END is enough."""
    row = ROWS[number]
    for step in steps_of(ROWS["08"]):
        world = played_to(1, step)
        sent_bytes = world.site.sender.uplink.sent_bytes
        row.dies(world)
        while world.site.sender.points < POINT:
            if world.link is None:
                world.connect()
            assert world.one()
        assert world.site.sender.uplink.sent_bytes == sent_bytes


def test_a_commit_that_was_not_heard_is_said_by_the_next_greeting() -> None:
    for step in steps_of(ROWS["10"]):
        world = played_to(1, step)
        world.crash_receiver()
        assert world.committed == POINT
        world.settle()
        world.connect()
        world.settle()
        receiver = world.site.sender.uplink.receiver
        assert receiver is not None
        assert receiver.committed == POINT
