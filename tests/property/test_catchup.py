"""A catch-up that the receiver's journal has no room for, over real sender and receiver.

The journal is so small that what changes while the link is away does not fit into it.  In addition
to what `tests.support.simpoints` looks at after each step:

C1 While the image gets a point in place the commit page says so, and with `clone` a copy of the
   last committed point is there, byte for byte, and named as kept.
C2 Without a choice (`keep`) the image is always a point.
C3 When all faults are over both sides become equal, and no copy is left that nobody needs.
C4 A promotion takes the copy; without one it is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from bitarray import bitarray

from bitmapd.errors import WrongStateError
from bitmapd.media.base import Done
from bitmapd.points import room, sender
from bitmapd.points.messages import Feature
from bitmapd.receiver import places
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.catchup import CatchUp
from bitmapd.receiver.commit import CommitPage
from bitmapd.receiver.keeping import NO_KEEPER, Keeping
from bitmapd.receiver.promotion import Obstacle, Ready, finish, prepare, successor
from bitmapd.receiver.steps import Steps, run
from tests.support import simpoints
from tests.support.machines import sim_seeds
from tests.support.policies import KeepNothing
from tests.support.sim import SECTOR, SimDisk
from tests.support.simpoints import EXTENT, SIZE, World, Wrong
from tests.support.simreceiver import (
    BLOCK,
    GEOMETRY,
    IMAGE_BYTES,
    SEGMENT,
    STORED,
    Machine,
    SimKeeper,
    formatted,
    place,
    superblock,
)

RUNS = int(os.environ.get("POINTS_RUNS", "10"))
NEW = UUID("20000000-0000-4000-8000-00000000000b")
STEPS = int(os.environ.get("POINTS_STEPS", "300"))
JOURNAL_BYTES = (1 << 20) + 5 * SEGMENT  # room for a frame, and for 7 of the 12 blocks


class Cloning(Machine):
    catch_up = CatchUp.CLONE


class InPlace(Machine):
    catch_up = CatchUp.IN_PLACE


def made(kind: type[Machine], *, stores: bool = False) -> Machine:
    disks = [
        SimDisk("image", IMAGE_BYTES),
        SimDisk(
            "journal", JOURNAL_BYTES, bytes(formatted(superblock(journal_bytes=JOURNAL_BYTES)))
        ),
    ]
    if stores or kind is Cloning:
        disks.append(SimDisk("store", STORED * IMAGE_BYTES))
    return kind(*disks)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    simpoints.small(monkeypatch)
    monkeypatch.setattr(places, "MIN_JOURNAL_BYTES", JOURNAL_BYTES)
    monkeypatch.setattr(places, "MIN_SEGMENTS", 5)
    monkeypatch.setattr(room, "FULL_S", 1.0)
    monkeypatch.setattr(sender, "ASK_AGAIN_S", 2.0)


class Away(World):
    """Whose link is away now and then while hosts write all over the volume."""

    def fault(self) -> None:
        if self.rng.random() < 0.2:
            self.cut_link()
            for block in self.rng.sample(range(SIZE // BLOCK), 8):
                self.fill(block)
        else:
            super().fault()

    def fill(self, block: int) -> None:
        first = block * BLOCK // SECTOR
        sectors = set(range(first, first + BLOCK // SECTOR))
        if sectors & self.flying:
            return

        def done(error: OSError | None) -> None:
            self.flying -= sectors

        self.flying |= sectors
        self.site.write(block * BLOCK, self.rng.randbytes(BLOCK), done)
        self.run_soon()

    def look_at(self, machine: Machine) -> None:
        page = machine.receiver.journal.page
        if not page.in_place or not page.committed:
            super().look_at(machine)
            return
        self.count["in place"] += 1
        if machine.catch_up is CatchUp.KEEP:
            raise Wrong("C2 nobody chose to give up the last point")
        if page.committed < self.seen:
            raise Wrong("I1 points went back")
        if machine.store is not None:
            copy = bytes(machine.store.visible[place(page.committed) :][:SIZE])
            contents = {content for (_, at), content in self.points.items() if at == page.committed}
            if copy not in contents:
                raise Wrong(f"C1 the copy is not point {page.committed}")
            if page.committed not in {
                kept.point for kept in machine.receiver.journal.directory.kept
            }:
                raise Wrong(f"C1 the copy of point {page.committed} is not named")
        self.check_record(bytes(machine.image.visible[:SIZE]), page.committed)


class AwayCloning(Away):
    machine_made = staticmethod(lambda: made(Cloning))


class AwayInPlace(Away):
    machine_made = staticmethod(lambda: made(InPlace))


class AwayKeeping(Away):
    machine_made = staticmethod(lambda: made(Machine))


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
@pytest.mark.parametrize("kind", [AwayCloning, AwayInPlace])
def test_whatever_happens_the_last_point_is_there_or_was_given_up_by_choice(
    kind: type[Away], seed: int
) -> None:
    """C1, C3."""
    world = kind(seed)
    world.run(STEPS)
    assert world.count["points"]
    page = world.machine.receiver.journal.page
    assert not page.inconsistent_until
    assert all(kept.label for kept in world.machine.receiver.journal.directory.points)


class Played(Away):
    """After its first point, with more changed than the journal has room for."""

    policy = KeepNothing

    def __init__(self, seed: int = 1) -> None:
        super().__init__(seed)
        self.connect()
        self.fill(10)
        self.rest()
        assert self.seen == 1
        for block in range(9):
            self.fill(block)
        self.settle()

    effects = 0  # of the receiver's disks

    def rest(self) -> None:
        """Until all is in a point, or nothing goes on."""
        for _ in range(40):
            self.settle()
            if self.at_rest():
                return
            if self.link is None:
                self.connect()
            self.advance(1.0)

    def begun(self) -> bool:
        return self.page.in_place

    def play(self, until: Callable[[], bool] = lambda: False) -> bool:
        """One thing after another, until that holds; False: it was all over before."""
        for _ in range(8000):
            if until():
                return True
            if self.at_rest():
                return False
            busy = [disk for disk in self.machine.disks if disk.pending]
            if busy:
                self.effects += 1
                self.finish(busy[0])
            elif not self.sender_moves():
                if self.link is None:
                    self.connect()
                self.advance(0.5)
        raise Wrong("it never came to rest")

    def sender_moves(self) -> bool:
        for disk in self.sender_disks:
            if disk.pending:
                self.finish(disk)
                return True
        moved = self.to_receiver() or self.to_sender()
        self.run_soon()
        return moved

    @property
    def page(self) -> CommitPage:
        return self.machine.receiver.journal.page

    @property
    def kept(self) -> list[int]:
        return [kept.point for kept in self.machine.receiver.journal.directory.kept]

    def said(self, name: str) -> list[dict[str, Any]]:
        return [fields for event, fields in self.machine.events if event == name]


class PlayedCloning(Played):
    machine_made = staticmethod(lambda: made(Cloning))


class PlayedInPlace(Played):
    machine_made = staticmethod(lambda: made(InPlace))


class PlayedStoring(Played):
    machine_made = staticmethod(lambda: made(InPlace, stores=True))


class PlayedKeeping(Played):
    machine_made = staticmethod(lambda: made(Machine))


def test_what_does_not_fit_waits_by_default() -> None:
    """C2: the receiver is not even asked."""
    world = PlayedKeeping()
    world.rest()
    assert not world.at_rest()
    assert world.site.sender.room.is_full
    assert (world.page.committed, world.page.inconsistent_until) == (1, 0)
    assert world.site.sender.uplink.receiver is not None
    assert Feature.CATCH_UP not in world.site.sender.uplink.receiver.features


@pytest.mark.parametrize("kind", [PlayedCloning, PlayedInPlace])
def test_it_goes_into_the_image_and_that_is_said_first(kind: type[Played]) -> None:
    """C1, C3."""
    world = kind()
    seen: list[int] = []
    emit = world.machine.receiver._emit

    def noted(event: str, **fields: Any) -> None:
        if event == "catch-up-begun":
            seen.append(world.page.inconsistent_until)
        emit(event, **fields)

    known = world.machine.receiver._volume
    assert known is not None
    known.catching_up._emit = noted
    assert world.play(world.begun)
    assert seen == [0], "it was said after the page"
    assert (world.page.committed, world.page.inconsistent_until) == (1, 2)
    assert world.kept == ([1] if kind is PlayedCloning else [])
    figures = world.machine.receiver.figures()
    assert (figures["consistent"], figures["in_place_until"]) == ("no", 2)
    world.rest()
    assert world.at_rest()
    assert world.are_equal
    assert not world.kept
    assert world.said("catch-up-ended") == [{"point": 2}]
    assert [event for event, _ in world.site.events].count("catch-up-begun") == 1
    assert not world.site.sender.room.is_full


def test_without_a_copy_the_last_point_is_not_given_up() -> None:
    """C1: `clone` where no copy can be made waits as `keep` does, and asks again."""
    world = PlayedCloning()
    store = world.machine.store
    assert store is not None
    store.fail_next["write"] = [28]
    assert world.play(lambda: bool(world.said("point-not-kept")))
    assert (world.page.committed, world.page.inconsistent_until) == (1, 0)
    assert not world.kept
    assert world.play(world.begun)
    assert world.kept == [1]
    world.rest()
    assert world.at_rest()
    assert world.are_equal


@pytest.mark.parametrize("kind", [PlayedCloning, PlayedInPlace])
def test_a_crash_of_the_receiver_after_each_effect(kind: type[Played]) -> None:
    """C1, from the question to the end of the catch-up."""
    seen = set()
    for effects in count():
        world = kind(effects)
        whole = not world.play(lambda: world.effects == effects)
        world.check()
        world.crash_receiver()
        world.machine.settle()
        seen.add((world.page.committed, world.page.in_place))
        world.check()
        world.rest()
        assert world.at_rest()
        assert world.are_equal
        assert not world.kept
        if whole:
            break
    assert seen == {(1, False), (1, True), (2, False)}


@pytest.mark.parametrize("kind", [PlayedCloning, PlayedInPlace])
def test_another_process_of_the_sender_goes_on_in_place(kind: type[Played]) -> None:
    """What the page says holds for whoever comes."""
    world = kind()
    assert world.play(world.begun)
    world.crash_sender()
    world.connect()
    world.settle()
    world.rest()
    assert "catch-up-begun" in dict(world.site.events)
    assert not world.said("catch-up-begun")[1:], "the receiver began anew"
    assert world.at_rest()
    assert world.are_equal


def promoted(machine: Machine, *, force: bool = False) -> Ready:
    journal, loop = machine.receiver.journal, machine.loop
    line = journal.superblock.line
    assert line is not None
    keeper = NO_KEEPER if machine.store is None else SimKeeper(machine.image, machine.store)
    keeping = Keeping(journal, keeper, None, lambda event, **fields: None)
    owner = machine.receiver
    applier = Applier(journal, machine.image, line, loop, owner, keeping)
    found: list[Ready] = []

    def steps() -> Steps[None]:
        ready = yield from prepare(journal, applier, line, force=force)
        found.append(ready)
        if ready.obstacle is None or force:
            yield from finish(journal, keeping, successor(line, NEW), 1_767_225_800)

    run(steps(), lambda error, _: None)
    machine.settle()
    return found[0]


def test_a_promotion_takes_the_copy() -> None:
    """C4."""
    world = PlayedCloning()
    assert world.play(world.begun)
    world.to_receiver()
    world.crash_sender()
    content = next(point for (_, at), point in world.points.items() if at == 1)
    ready = promoted(world.machine)
    assert (ready.point, ready.obstacle) == (1, None)
    assert bytes(world.machine.image.visible[:SIZE]) == content


def test_what_was_given_up_is_promoted_by_force_only() -> None:
    """C4."""
    world = PlayedInPlace()
    assert world.play(world.begun)
    world.crash_sender()
    assert promoted(world.machine).obstacle is Obstacle.INCONSISTENT
    assert promoted(world.machine, force=True).obstacle is Obstacle.INCONSISTENT


def test_the_copy_is_not_dropped_while_nothing_else_has_the_point() -> None:
    world = PlayedCloning()
    assert world.play(world.begun)
    keeping = world.machine.receiver.keeping
    assert keeping is not None
    errors: list[WrongStateError] = []

    def dropping() -> Steps[None]:
        try:
            yield from keeping.drop(1)
        except WrongStateError as error:
            errors.append(error)

    run(dropping(), lambda error, _: None)
    world.settle()
    assert errors
    assert world.kept == [1] or world.page.committed == 2


def test_one_of_a_group_does_not_ask() -> None:
    """Its point would be applied before the others have theirs."""
    world = PlayedInPlace()
    world.site.sender.uplink.in_group = True
    world.rest()
    assert (world.page.committed, world.page.inconsistent_until) == (1, 0)


def test_what_it_changes_is_named_for_the_points_that_are_kept() -> None:
    """A promotion to one of these has to name it, for the way back."""
    world = PlayedStoring()
    world.rest()
    world.site.sender.cut("before")
    world.rest()
    number, before = world.page.committed, bytes(world.machine.image.visible)
    assert world.kept == [number]
    for block in range(9):
        world.fill(block)
    assert world.play(world.begun)
    world.rest()
    keeping = world.machine.receiver.keeping
    assert keeping is not None
    found: list[bitarray] = []

    def done(error: OSError | None, extents: bitarray | None) -> None:
        assert extents is not None
        found.append(extents)

    run(keeping.changed_since(number), done)
    world.settle()
    for extent in range(GEOMETRY.extents):
        at = slice(extent * EXTENT, (extent + 1) * EXTENT)
        assert found[0][extent] or world.machine.image.visible[at] == before[at]


def test_a_view_of_the_point_before_stays_what_it_was() -> None:
    """Who looks at the image is asked before it is overwritten in place, too."""
    world = PlayedInPlace()
    preserved: set[int] = set()
    written: list[int] = []

    class View:
        def preserve(self, blocks: Sequence[int], done: Done) -> None:
            assert not set(blocks) & set(written)
            preserved.update(blocks)
            world.machine.loop.call_soon(done, None)

    applier = world.machine.receiver.applier
    assert applier is not None
    applier.guard(View())
    before = bytes(world.machine.image.visible)

    def look() -> bool:
        image = world.machine.image
        for op in image.pending:
            if op.kind == "write":
                blocks = range(
                    op.offset_bytes // BLOCK, -(-(op.offset_bytes + op.length_bytes) // BLOCK)
                )
                assert set(blocks) <= preserved
                written.extend(blocks)
        return False

    assert not world.play(look)
    assert written
    assert bytes(world.machine.image.visible) != before


@pytest.mark.parametrize("kind", [Machine, Cloning])
def test_who_asks_for_what_was_not_chosen_or_cannot_be_waits(kind: type[Machine]) -> None:
    """C2: no choice, or no way to make a copy."""

    class Asking(Played):
        machine_made = staticmethod(lambda: kind(*made(Machine).disks))

    world = Asking()
    world.site.sender.uplink.ask_in_place()
    world.rest()
    assert (world.page.committed, world.page.inconsistent_until) == (1, 0)
    assert bool(world.said("point-not-kept")) == (kind is Cloning)
