"""Points that are kept, with power cuts and kills at any moment of it.

K1 Of every point that the directory says to be kept the copy is that point, byte for byte.
K2 The maps from a kept point on name every extent in which it differs from the image's point.
K3 A point with a label that was committed is kept once it is applied, whatever died, until it is
   dropped by name.
K4 Without a label just those stay that the rules want.
K5 Nobody waits for a copy but what is applied: points are received and committed meanwhile.
K6 A promotion to a kept point gives it, and names what changed since; a power cut after any of its
   effects leaves a receiver with all its points, or a promotion that goes on with the same one.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any
from uuid import UUID

import pytest
from bitarray import bitarray

from bitmapd.errors import NotFoundError, WrongStateError
from bitmapd.points.messages import NIL
from bitmapd.points.pieces import whole_mask
from bitmapd.receiver.applier import Applier
from bitmapd.receiver.directory import Keep, directory_offset
from bitmapd.receiver.journal import Journal
from bitmapd.receiver.keeping import Keeping
from bitmapd.receiver.promotion import (
    Ready,
    finish,
    has_new_generation,
    prepare,
    successor,
    undo,
)
from bitmapd.receiver.retention import needed
from bitmapd.receiver.scan import Scanned, scan
from bitmapd.receiver.steps import Steps, run
from bitmapd.receiver.superblock import Line
from bitmapd.record.extents import bits_of, zeros
from tests.property.test_failback import Failback, OldPrimary
from tests.support.machines import sim_seeds
from tests.support.records import blank_image
from tests.support.sim import SECTOR, SimDisk, SimLoop, drain
from tests.support.simpoints import Wrong
from tests.support.simreceiver import (
    GENERATION,
    GEOMETRY,
    IMAGE_BYTES,
    JOURNAL_BYTES,
    STORED,
    VOLUME,
    Machine,
    Script,
    SimKeeper,
    exchange,
    formatted,
    place,
    point,
    superblock,
)
from tests.support.simreceiver import small as _small

NEW = UUID("20000000-0000-4000-8000-00000000000b")
RUNS = int(os.environ.get("KEEPING_RUNS", "8"))
STEPS = int(os.environ.get("KEEPING_STEPS", "160"))
SIZE = GEOMETRY.size_bytes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    _small(monkeypatch)


class Hourly(Machine):
    """Of points that come each 20 minutes, by their clock."""

    rules = ((2, 3600.0),)


def keeping_machine() -> Hourly:
    return Hourly(
        SimDisk("image", IMAGE_BYTES),
        SimDisk("journal", JOURNAL_BYTES, bytes(formatted(superblock()))),
        SimDisk("store", STORED * IMAGE_BYTES),
    )


def new_script(rng: random.Random) -> Script:
    script = Script(rng)
    script.step_ns = 1200 * 10**9
    return script


def keeping_of(machine: Machine) -> Keeping:
    keeping = machine.receiver.keeping
    assert keeping is not None
    return keeping


def done(steps: Steps[Any], loop: SimLoop, *disks: SimDisk) -> Any:
    """The result of steps that nothing else meets."""
    ended: list[Any] = []

    def end(error: OSError | None, result: Any) -> None:
        assert error is None
        ended.append(result)

    run(steps, end)
    drain(loop, *disks)
    return ended[0]


def differing(one: bytes, other: bytes) -> bitarray:
    found = zeros(GEOMETRY.extents)
    size = GEOMETRY.extent_bytes
    for extent in range(GEOMETRY.extents):
        at = slice(extent * size, min((extent + 1) * size, SIZE))
        found[extent] = one[at] != other[at]
    return found


def check(machine: Machine, script: Script, labels: dict[int, str], dropped: set[int]) -> None:
    """Of a machine that rests."""
    page, store = machine.receiver.journal.page, machine.store
    if not page.committed or store is None:
        return
    assert page.applied == page.committed
    image = bytes(machine.image.visible[:SIZE])
    keeping = keeping_of(machine)
    for kept in keeping.points:
        assert kept.state is Keep.KEPT
        content = script.points[script.committed_by[kept.point], kept.point]
        at = place(kept.point)
        assert bytes(store.visible[at : at + SIZE]) == content, f"K1 of {kept.point}"
        changed = done(keeping.changed_since(kept.point), machine.loop, *machine.disks)
        assert not (differing(content, image) & ~changed).any(), f"K2 of {kept.point}"
    there = {kept.point: kept.label for kept in keeping.points}
    for number, label in labels.items():
        if number <= page.committed and number not in dropped:
            assert there.get(number) == label, f"K3 of {number}"
    assert set(there) == needed(keeping.points, machine.rules), "K4"


@pytest.mark.parametrize("seed", sim_seeds(RUNS))
def test_what_is_kept_is_right_whatever_dies(seed: int) -> None:
    rng = random.Random(seed)
    machine: Machine = keeping_machine()
    script = new_script(rng)
    labels: dict[int, str] = {}
    dropped: set[int] = set()
    for _ in range(STEPS):
        kind = rng.random()
        if script.wire is None:
            script.connect(machine)
        elif kind < 0.2:
            script.write()
        elif kind < 0.4:
            script.send(4)
        elif kind < 0.5 and len(labels) < 8 and script.point < STORED:
            script.label = rng.choice(["", f"label {script.point}"])
            if script.end():
                labels.pop(script.point, None)
                if script.label:
                    labels[script.point] = script.label
        elif kind < 0.53:
            machine, script.wire = machine.crash(rng), None
        elif kind < 0.56:
            machine, script.wire = machine.kill(rng), None
        elif kind < 0.58:
            script.restart()
        elif kind < 0.62 and machine.receiver.keeping and keeping_of(machine).points:
            victim = rng.choice(keeping_of(machine).points).point
            if labels.get(victim) and script.committed_by.get(victim) != NIL:
                dropped.add(victim)  # perhaps: it may be cut short
            run(quietly(keeping_of(machine).drop(victim)), lambda error, _: None)
        else:
            machine.finish_one(rng)
            wire = script.wire
            if wire is not None:
                wire.deliver()
            script.take()
        after = machine.recovered(rng, cut_short=rng.random() < 0.5)
        page = after.receiver.journal.page
        known = dict(script.committed_by)
        if page.committed not in known:
            script.committed_by = known | {page.committed: page_incarnation(script, page.committed)}
        check(after, script, committed(labels, script, page.committed), dropped)
        script.committed_by = known


def page_incarnation(script: Script, number: int) -> bytes:
    """Whose point it is that was committed and not yet said to be."""
    found = [who for who, point in script.points if point == number]
    return found[-1]


def committed(labels: dict[int, str], script: Script, newest: int) -> dict[int, str]:
    return {number: label for number, label in labels.items() if number <= newest}


def quietly(steps: Steps[None]) -> Steps[None]:
    try:
        yield from steps
    except NotFoundError:
        return


# -- one by one -------------------------------------------------------------------------------


def several(rng: random.Random, labelled: dict[int, str], most: int) -> tuple[Machine, Script]:
    """A receiver of so many points."""
    machine, script = keeping_machine(), new_script(rng)
    for number in range(1, most + 1):
        script.write()
        script.label = labelled.get(number, "")
        point(script, machine)
        machine.settle()
    return machine, script


def numbers(machine: Machine) -> list[int]:
    return [kept.point for kept in keeping_of(machine).points]


def test_a_rule_keeps_the_first_point_of_each_hour_and_labels_stay() -> None:
    """Points come at 0:20, 0:40, 1:00 and so on."""
    machine, script = several(random.Random(1), {5: "five"}, 10)
    check(machine, script, {5: "five"}, set())
    assert numbers(machine) == [5, 6, 9]
    assert machine.receiver.figures()["kept"] == [5, 6, 9]
    assert machine.receiver._greeting().oldest_kept == 5
    told = [(event, fields) for event, fields in machine.events if event == "point-kept"]
    assert ("point-kept", {"point": 5, "label": "five"}) in told
    again = Hourly(*machine.disks)
    again.settle()
    check(again, script, {5: "five"}, set())


def test_a_point_is_dropped_by_name_and_its_map_is_not_lost() -> None:
    machine, script = several(random.Random(2), {4: "a", 7: "b"}, 8)
    assert numbers(machine) == [3, 4, 6, 7]
    keeping = keeping_of(machine)
    for victim in (7, 4):
        done(keeping.drop(victim), machine.loop, *machine.disks)
        check(machine, script, {}, set())
    with pytest.raises(NotFoundError):
        next(keeping.drop(99))
    with pytest.raises(NotFoundError):
        next(keeping.drop(7))


def test_a_promotion_has_no_rules_and_leaves_what_is_kept() -> None:
    """Or a point that a rule keeps is gone before it can be promoted."""
    machine, _ = several(random.Random(4), {4: "a"}, 8)
    before = numbers(machine)
    assert machine.store is not None
    keeper = SimKeeper(machine.image, machine.store)
    keeping = Keeping(machine.receiver.journal, keeper, None, lambda event, **fields: None)
    done(keeping.settle(8, None), machine.loop, *machine.disks)
    assert numbers(machine) == before == [3, 4, 6]


def test_points_are_committed_while_a_copy_is_made() -> None:
    """K5: what has to wait is only what is applied."""
    machine, script = several(random.Random(3), {}, 1)
    assert machine.store is not None
    script.write()
    script.label = "slow"
    exchange_but_for(script, machine, machine.store, 2)
    script.label = ""
    script.write()
    exchange_but_for(script, machine, machine.store, 3)
    page = machine.receiver.journal.page
    assert (page.applied, page.committed) == (2, 3)
    assert [kept.state for kept in keeping_of(machine).points] == [Keep.KEPT, Keep.WANTED]
    machine.settle()
    assert machine.receiver.journal.page.applied == 3
    check(machine, script, {2: "slow"}, set())


def exchange_but_for(script: Script, machine: Machine, silent: SimDisk, target: int) -> None:
    """Until this point is committed, while one disk does not answer."""
    disks = [disk for disk in machine.disks if disk is not silent]

    def go(until: Callable[[], bool]) -> None:
        while not until():
            drain(machine.loop, *disks)
            wire = script.wire
            moved = wire is not None and wire.deliver()
            assert script.take() or moved

    while script.dirty:
        assert script.send(4)
    assert script.end()
    go(lambda: machine.receiver.journal.page.committed == target and script.point == target + 1)


def test_a_copy_that_fails_costs_its_point_only() -> None:
    machine, script = several(random.Random(4), {}, 1)
    assert machine.store is not None
    machine.store.fail_next["write"] = [28]
    script.write()
    script.label = "no room"
    point(script, machine)
    machine.settle()
    assert numbers(machine) == [1]
    (event,) = [fields for name, fields in machine.events if name == "point-not-kept"]
    assert event["point"] == 2
    script.label = "room"
    script.write()
    point(script, machine)
    machine.settle()
    check(machine, script, {3: "room"}, set())


def test_a_copy_that_cannot_be_taken_away_is_tried_again_at_the_next_start() -> None:
    machine, script = several(random.Random(5), {2: "x"}, 2)
    assert machine.store is not None
    machine.store.fail_next["write"] = [5]
    done(keeping_of(machine).drop(2), machine.loop, *machine.disks)
    assert [kept.state for kept in keeping_of(machine).points] == [Keep.KEPT, Keep.GOING]
    assert "point-not-dropped" in [name for name, _ in machine.events]
    again = Hourly(*machine.disks)
    again.settle()
    assert numbers(again) == [1]
    check(again, script, {}, set())


def test_without_a_way_to_keep_points_a_label_is_told_to_be_lost() -> None:
    machine = Machine(
        SimDisk("image", IMAGE_BYTES),
        SimDisk("journal", JOURNAL_BYTES, bytes(formatted(superblock()))),
    )
    script = new_script(random.Random(6))
    script.label = "label"
    point(script, machine)
    assert numbers(machine) == []
    (event,) = [fields for name, fields in machine.events if name == "point-not-kept"]
    assert "point_hook" in event["reason"]


def wanted_only(seed: int) -> tuple[Machine, Script]:
    """Point 2 has a label and is in the image; its copy has not been begun."""
    machine, script = several(random.Random(seed), {}, 1)
    assert machine.store is not None
    script.write()
    script.label = "label"
    exchange_but_for(script, machine, machine.store, 2)
    script.label = ""
    return machine, script


def test_what_can_no_longer_be_kept_is_told_and_left() -> None:
    """The way to keep points was taken away between two starts."""
    machine, script = wanted_only(9)
    without = Machine(*copies((machine.image, machine.journal)))
    without.settle()
    assert [kept.state for kept in keeping_of(without).points] == [Keep.GOING, Keep.GOING]
    names = [name for name, _ in without.events]
    assert names.count("point-not-kept") == 1
    assert names.count("point-not-dropped") == 2
    assert machine.store is not None
    again = Hourly(without.image, without.journal, machine.store)
    again.settle()
    assert numbers(again) == [2]  # as the first of the hour
    check(again, script, {}, set())


def test_a_point_that_was_applied_together_with_a_newer_one_is_not_kept() -> None:
    """The journal has lost some of it, and the newer one makes that good."""
    machine, script = several(random.Random(10), {}, 1)
    script.write()
    script.label = "lost"
    exchange_but_for(script, machine, machine.image, 2)
    script.label = ""
    script.changed = {block: whole_mask(GEOMETRY, block) for block in range(GEOMETRY.blocks)}
    script.dirty = set(script.changed)
    exchange_but_for(script, machine, machine.image, 3)
    entries = machine.receiver.journal.points[2]
    raw = bytearray(machine.journal.visible)
    for entry in entries:
        if entry.length_bytes:
            raw[entry.place_bytes] ^= 1
    journal = SimDisk("journal", JOURNAL_BYTES, bytes(raw))
    assert machine.store is not None
    after = Hourly(machine.image, journal, machine.store)
    after.settle()
    assert after.receiver.journal.page.applied == 3
    assert "point-not-kept" in [name for name, _ in after.events]
    check(after, script, {}, set())


def test_a_map_grows_on_in_the_next_process() -> None:
    machine, script = several(random.Random(11), {2: "a"}, 2)
    again = Hourly(*machine.disks)
    script.wire = None
    for _ in range(3):
        script.write()
    script.label = ""
    script.connect(again)
    point(script, again)
    again.settle()
    check(again, script, {2: "a"}, set())


def test_when_all_maps_are_in_use_nothing_more_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmapd.receiver.places.MOST_KEPT", 2)
    machine, script = several(random.Random(7), {1: "a", 2: "b", 3: "c"}, 5)
    check(machine, script, {1: "a", 2: "b"}, set())
    reasons = [fields["reason"] for name, fields in machine.events if name == "point-not-kept"]
    assert len(reasons) == 1
    assert "no room for another change map" in reasons[0]


def test_a_directory_that_rots_is_not_replaced_by_an_older_one() -> None:
    machine, script = several(random.Random(8), {2: "a", 4: "b"}, 5)
    raw = bytearray(machine.journal.visible)
    sequence = machine.receiver.journal.directory.sequence
    raw[directory_offset(sequence) + 100] ^= 1
    rotten = Hourly(machine.image, SimDisk("journal", JOURNAL_BYTES, bytes(raw)), machine.store)
    rotten.settle()
    assert any("directory" in note for note in rotten.notes)
    assert numbers(rotten) == [5]  # what the rule wants of the newest hour
    assert rotten.receiver.journal.directory.sequence > sequence
    check(rotten, script, {}, set())


# -- promotion --------------------------------------------------------------------------------


class Silent:
    """Whom the applier tells."""

    def applied(self, point: int) -> None: ...

    def damaged(self, missing: object) -> None: ...

    def image_failed(self, error: OSError) -> None: ...


class Bench:
    """Journal, image and copies with nobody on them but who promotes."""

    def __init__(self, image: SimDisk, journal: SimDisk, store: SimDisk) -> None:
        self.loop = SimLoop()
        self.disks = image, journal, store
        found: list[Scanned] = []
        run(scan(journal), lambda error, result: found.append(result) if result else None)
        drain(self.loop, journal)
        self.journal = Journal(journal, found[0], lambda error: None)
        line = self.journal.superblock.line
        assert line is not None
        self.line: Line = line
        keeper = SimKeeper(image, store)
        self.keeping = Keeping(self.journal, keeper, (), lambda event, **fields: None)
        self.applier = Applier(self.journal, image, line, self.loop, Silent(), self.keeping)

    def steps(self, point: int | None) -> Steps[Ready]:
        went_on = has_new_generation(self.journal)
        ready = yield from prepare(self.journal, self.applier, self.line, force=False, point=point)
        line = self.line if went_on else successor(self.line, NEW)
        yield from finish(self.journal, self.keeping, line, 1_767_225_800)
        return ready

    def go(self, point: int | None, effects: int | None = None) -> Ready | None:
        """None if it was cut short after so many effects."""
        ended: list[Ready] = []
        run(self.steps(point), lambda error, ready: ended.append(ready) if ready else None)
        for number in count():
            self.loop.run_soon()
            busy = [disk for disk in self.disks if disk.pending]
            if number == effects or not busy:
                break
            busy[0].finish(0)
        return ended[0] if ended else None

    @property
    def image(self) -> bytes:
        return bytes(self.disks[0].visible[:SIZE])


def copies(disks: tuple[SimDisk, ...]) -> Iterator[SimDisk]:
    for disk in disks:
        yield SimDisk(disk.name, disk.size_bytes, bytes(disk.visible))


def ready_for(rng: random.Random, *, queued: bool) -> tuple[Machine, Script]:
    machine, script = several(rng, {2: "good"}, 4)
    script.write()
    if queued:
        assert machine.store is not None
        exchange(script, machine)
        exchange_but_for(script, machine, machine.image, 5)
    else:
        point(script, machine)
    return machine, script


@pytest.mark.parametrize("queued", [False, True])
def test_a_power_cut_after_each_effect_of_a_promotion_to_an_older_point(queued: bool) -> None:
    seen = set()
    for effects in count():
        rng = random.Random(effects)
        machine, script = ready_for(rng, queued=queued)
        newest = script.points[script.incarnation, 5]
        content = script.points[script.incarnation, 2]
        bench = Bench(*machine.crash(rng).disks)
        whole = bench.go(2, effects) is not None
        cut = tuple(SimDisk(d.name, d.size_bytes, d.crash(rng)) for d in bench.disks)
        again = Bench(*cut)
        seen.add(has_new_generation(again.journal))
        if not has_new_generation(again.journal):
            assert not whole
            receiver = Bench(*copies(cut))
            done(undo(receiver.journal, receiver.line), receiver.loop, *receiver.disks)
            after = Hourly(*receiver.disks)
            after.settle()
            assert bytes(after.image.visible[:SIZE]) == newest
            for kept in keeping_of(after).points:
                assert after.store is not None
                at = place(kept.point)
                expected = script.points[script.incarnation, kept.point]
                assert bytes(after.store.visible[at : at + SIZE]) == expected
            other = Bench(*copies(cut))  # the administrator may think better of it
            ready = other.go(None)
            assert ready is not None
            assert (ready.point, other.image) == (5, newest)
            ready = again.go(2)
        else:
            ready = again.go(None)  # whatever is asked for: it goes on
        assert ready is not None
        assert ready.point == 2
        assert ready.obstacle is None
        assert again.image == content
        since = bits_of(ready.since, GEOMETRY.extents)
        assert not (differing(content, newest) & ~since).any()
        if whole:
            break
    assert seen == {False, True}


def test_a_promotion_that_was_begun_with_another_point_is_not_changed() -> None:
    machine, _ = ready_for(random.Random(1), queued=False)
    bench = Bench(*machine.disks)
    for effects in count(1):
        if has_new_generation(bench.journal):
            break
        bench = Bench(*copies(machine.disks))
        bench.go(2, effects)
    half = Bench(*copies(bench.disks))
    with pytest.raises(WrongStateError, match="begun with point 2"):
        next(prepare(half.journal, half.applier, half.line, force=False, point=3))


def test_a_point_of_which_no_copy_could_be_made_is_not_promoted() -> None:
    machine, _ = ready_for(random.Random(2), queued=False)
    bench = Bench(*machine.disks)
    caught: list[WrongStateError] = []

    def steps() -> Steps[None]:
        try:
            yield from prepare(bench.journal, bench.applier, bench.line, force=False, point=99)
        except WrongStateError as error:
            caught.append(error)

    done(steps(), bench.loop, *bench.disks)
    assert "no copy" in caught[0].message
    assert not bench.journal.page.flags


# -- the way back -----------------------------------------------------------------------------


class FailbackFromOlder(Failback):
    """The old primary has the newest point and an empty record; the new one an older point, and in
    its record what the promotion says."""

    def __init__(self, seed: int, here: bytes, there: bytes, named: bitarray) -> None:
        super().__init__(seed)
        line = Line(VOLUME, GEOMETRY, (GENERATION,), 0)
        journal = bytes(formatted(superblock(line=line)))
        self.machine = Empty(
            SimDisk("image", IMAGE_BYTES, there + bytes(IMAGE_BYTES - SIZE)),
            SimDisk("journal", JOURNAL_BYTES, journal),
        )
        self.boot(here, blank_image(GEOMETRY, named.tobytes()), bytes(SECTOR))


class Empty(OldPrimary):
    differs = ()


@pytest.mark.parametrize("seed", range(4))
def test_failback_after_a_promotion_to_an_older_point_copies_what_changed_since(seed: int) -> None:
    machine, script = ready_for(random.Random(seed), queued=False)
    newest = script.points[script.incarnation, 5]
    bench = Bench(*machine.disks)
    ready = bench.go(2)
    assert ready is not None
    assert bench.image != newest
    named = bits_of(ready.since, GEOMETRY.extents)
    world = FailbackFromOlder(seed, bench.image, newest, named)
    assert ends_equal(world)
    # Without the maps nobody would know of the difference, ever.
    forgetful = FailbackFromOlder(seed, bench.image, newest, zeros(GEOMETRY.extents))
    assert not ends_equal(forgetful)


def ends_equal(world: Failback) -> bool:
    try:
        world.run(0)
    except Wrong:
        return False
    return bytes(world.machine.image.visible[:SIZE]) == bytes(world.site.primary.visible)
