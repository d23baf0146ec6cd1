"""A receiver that is promoted, with a power cut after each effect of it.

P1 Before the new generation is durable it is still a receiver, with its last point.
P2 From then on it can only become the volume, and a sender of the old generation is not followed.
P3 The image is the newest committed point, and the generation of before is the first of the old.
P4 What is damaged, or has never been whole, is promoted by force only; what the image lacks then is
   named.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count
from uuid import UUID

import pytest

from bitmapd.points.lineage import Verdict, judge
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.commit import NO_FLAGS, PageFlag
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import NO_KEEPER, Keeping
from bitmapd.receiver.promotion import (
    Obstacle,
    Ready,
    finish,
    has_new_generation,
    prepare,
    successor,
    undo,
)
from bitmapd.receiver.scan import Scanned, scan
from bitmapd.receiver.steps import Steps, run
from bitmapd.receiver.superblock import Line
from tests.support.sim import SimDisk, SimLoop, drain
from tests.support.simreceiver import GENERATION, GEOMETRY, Machine, Script, exchange, fresh, point
from tests.support.simreceiver import small as _small

NEW = UUID("20000000-0000-4000-8000-00000000000b")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)


class Silent:
    """Whom the applier tells."""

    def applied(self, point: int) -> None: ...

    def damaged(self, missing: object) -> None: ...

    def image_failed(self, error: OSError) -> None: ...


class Bench:
    """Journal and image with nobody on them but who promotes."""

    def __init__(self, image: SimDisk, journal: SimDisk) -> None:
        self.loop = SimLoop()
        self.disks = image, journal
        found: list[Scanned] = []
        run(scan(journal), lambda error, result: found.append(result) if result else None)
        drain(self.loop, journal)
        self.journal = Journal(journal, found[0], lambda error: None)
        line = self.journal.superblock.line
        assert line is not None
        self.line: Line = line
        self.keeping = Keeping(self.journal, NO_KEEPER, (), lambda event, **fields: None)
        self.applier = Applier(self.journal, image, line, self.loop, Silent(), self.keeping)

    def steps(self, *, force: bool = False) -> Steps[Ready]:
        """All of it; where the owner makes the new record there is nothing to do here."""
        went_on = has_new_generation(self.journal)
        ready = yield from prepare(self.journal, self.applier, self.line, force=force)
        if ready.obstacle is None or force:
            line = self.line if went_on else successor(self.line, NEW)
            yield from finish(self.journal, self.keeping, line, 1_767_225_800)
        return ready

    def go(self, *, force: bool = False, effects: int | None = None) -> Ready | None:
        """None if it was cut short after so many effects."""
        ended: list[Ready] = []

        def done(error: OSError | None, ready: Ready | None) -> None:
            assert error is None
            assert ready is not None
            ended.append(ready)

        run(self.steps(force=force), done)
        for number in count():
            self.loop.run_soon()
            busy = [disk for disk in self.disks if disk.pending]
            if number == effects or not busy:
                break
            busy[0].finish(0)
        return ended[0] if ended else None

    def cut(self, rng: random.Random) -> tuple[SimDisk, SimDisk]:
        """The disks after a power cut at this moment."""
        image, journal = (SimDisk(d.name, d.size_bytes, d.crash(rng)) for d in self.disks)
        return image, journal

    @property
    def image(self) -> bytes:
        return bytes(self.disks[0].visible[: GEOMETRY.size_bytes])


def received(rng: random.Random, *, queued: bool) -> tuple[Machine, bytes]:
    """A receiver with some points, the last of which is not applied; and what that one is."""
    machine, script = fresh(), Script(rng)
    for _ in range(2):
        for _ in range(3):
            script.write()
        point(script, machine)
    if queued:
        script.write()
        exchange(script, machine)
        while script.send(4):
            exchange(script, machine)
        assert script.end()
        target = machine.receiver.journal.page.committed + 1
        while machine.receiver.journal.page.committed < target:
            wire = script.wire
            moved = wire is not None and wire.deliver()
            machine.loop.run_soon()
            if machine.journal.pending:
                machine.journal.finish(0)
                machine.loop.run_soon()
            else:
                assert moved
    return machine, script.points[script.incarnation, machine.receiver.journal.page.committed]


@pytest.mark.parametrize("queued", [False, True])
def test_a_power_cut_after_each_effect_leaves_a_receiver_or_a_volume(queued: bool) -> None:
    whole = False
    seen = set()
    for effects in count():
        rng = random.Random(effects)
        machine, content = received(rng, queued=queued)
        bench = Bench(*machine.crash(rng).disks)
        whole = bench.go(effects=effects) is not None
        disks = bench.cut(rng)
        again = Bench(*disks)
        seen.add(has_new_generation(again.journal))
        assert has_new_generation(again.journal) or not whole
        if has_new_generation(again.journal):
            assert again.image == content  # P3, whatever is lost
        else:
            copies = [SimDisk(disk.name, disk.size_bytes, bytes(disk.visible)) for disk in disks]
            as_before = Bench(copies[0], copies[1])
            run(undo(as_before.journal, as_before.line), lambda error, _: None)
            drain(as_before.loop, *as_before.disks)
            receiver = Machine(*as_before.disks)
            receiver.settle()
            assert bytes(receiver.image.visible[: GEOMETRY.size_bytes]) == content  # P1
            assert receiver.receiver.journal.page.flags == NO_FLAGS
        ready = again.go()
        assert ready is not None
        assert (ready.since, ready.obstacle) == ((), None)
        assert again.image == content
        line, page = again.journal.superblock.line, again.journal.page
        assert line is not None
        assert (line.generations, line.term) == ((NEW, GENERATION), 1)
        assert page.flags == PageFlag.PROMOTED
        script = Script(rng)
        hello = script.hello(committed=page.committed)
        assert judge(hello, Machine(*again.disks).receiver._greeting()) is Verdict.SENDER_IS_OLD
        if whole:
            break
    assert seen == {False, True}


def test_promoting_twice_changes_nothing() -> None:
    machine, content = received(random.Random(1), queued=True)
    bench = Bench(*machine.disks)
    assert bench.go() is not None
    before = [bytes(disk.visible) for disk in bench.disks]
    again = Bench(*bench.disks)
    assert again.go() is not None
    assert [bytes(disk.visible) for disk in again.disks] == before
    assert again.image == content


def test_what_has_never_been_whole_is_promoted_by_force_only() -> None:
    machine, script = fresh(), Script(random.Random(2))
    script.connect(machine)
    exchange(script, machine)
    bench = Bench(*machine.disks)
    refused = bench.go()
    assert refused is not None
    assert refused.obstacle is Obstacle.NEVER
    assert bench.journal.page.flags == NO_FLAGS
    assert not has_new_generation(bench.journal)
    forced = bench.go(force=True)
    assert forced is not None
    assert has_new_generation(bench.journal)


def test_a_point_that_rots_is_left_out_by_force_only_and_then_named() -> None:
    """Its extents: the old primary has it, and its record need not name it any more."""
    machine, content = received(random.Random(7), queued=True)
    journal = machine.receiver.journal
    (queued,) = journal.page.queue
    kept = [one for one in journal.points[queued.point] if one.length_bytes]
    assert kept
    place = kept[0].place_bytes
    disk = machine.journal
    raw = bytearray(disk.visible)
    raw[place] ^= 0x5A
    disks = machine.image, SimDisk(disk.name, disk.size_bytes, bytes(raw))
    refused = Bench(*disks).go()
    assert refused is not None
    assert refused.obstacle is Obstacle.DAMAGED
    bench = Bench(*disks)
    forced = bench.go(force=True)
    assert forced is not None
    per = GEOMETRY.blocks_per_extent
    named = {extent for first, stop in forced.since for extent in range(first, stop)}
    assert named >= {one.block // per for one in journal.points[queued.point]}
    assert forced.point == queued.point - 1
    assert bench.image != content


def test_an_image_between_two_points_is_promoted_by_force_only() -> None:
    """It was so when the journal could not make it whole any more."""
    machine, _ = received(random.Random(5), queued=False)
    bench = Bench(*machine.disks)
    ended: list[OSError | None] = []
    run(bench.journal.inconsistent(99), lambda error, _: ended.append(error))
    drain(bench.loop, *bench.disks)
    assert ended == [None]
    refused = bench.go()
    assert refused is not None
    assert refused.obstacle is Obstacle.INCONSISTENT
    assert bench.journal.page.flags == NO_FLAGS
    assert bench.go(force=True) is not None
    assert has_new_generation(bench.journal)


def test_when_nobody_knows_what_a_point_has_lost_all_of_it_is_named() -> None:
    machine, _ = received(random.Random(3), queued=True)
    bench = Bench(*machine.disks)
    (queued,) = bench.journal.page.queue
    bench.journal.page = replace(bench.journal.page, queue=(replace(queued, digest=bytes(16)),))
    forced = bench.go(force=True)
    assert forced is not None
    assert forced.obstacle is Obstacle.DAMAGED
    assert forced.since == ((0, GEOMETRY.extents),)
