"""A receiver and the size of its volume: what it takes up, what it refuses, what it keeps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from bitarray import bitarray

from bitmapd.media.base import Done
from bitmapd.peer.frames import ErrorCode
from bitmapd.points.messages import ApplyUpTo
from bitmapd.receiver import growing
from bitmapd.receiver.commit import decode_page, encode_page
from bitmapd.receiver.places import Places
from bitmapd.record.extents import zeros
from tests.property.test_keeping import (
    Bench,
    Hourly,
    done,
    exchange_but_for,
    keeping_machine,
    keeping_of,
)
from tests.support import simpoints
from tests.support.simreceiver import (
    BLOCK,
    GEOMETRY,
    IMAGE_BYTES,
    Machine,
    Script,
    SimWire,
    fresh,
    point,
    small,
)

LARGER = 18 * BLOCK


@pytest.fixture(autouse=True)
def small_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)


def greeted(machine: Machine, script: Script, size_bytes: int) -> SimWire:
    """A sender of a volume of this size."""
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello(size_bytes=size_bytes))
    wire.deliver()
    machine.settle()
    return wire


def followed(points: int = 1) -> tuple[Machine, Script]:
    machine, script = fresh(), Script(random.Random(1))
    for _ in range(points):
        script.write()
        point(script, machine)
    return machine, script


def size_of(machine: Machine) -> int:
    return machine.receiver.journal.line.geometry.size_bytes


def test_a_larger_size_is_taken_up_durably() -> None:
    machine, script = followed()
    wire = greeted(machine, script, LARGER)
    assert wire.is_open
    hello = wire.answer()
    assert hello is not None
    assert getattr(hello, "size_bytes", None) == LARGER
    after = machine.crash(random.Random(1))
    assert size_of(after) == LARGER
    page = after.receiver.journal.page
    assert (page.committed, page.committed_bytes) == (1, GEOMETRY.size_bytes)
    assert after.receiver.journal.superblock.image_bytes == LARGER


def test_a_sender_whose_growth_was_cut_short_goes_on() -> None:
    machine, script = followed()
    greeted(machine, script, LARGER)
    script.connect(machine)
    script.write()
    point(script, machine)
    page = machine.receiver.journal.page
    assert (page.committed, page.committed_bytes) == (2, GEOMETRY.size_bytes)
    assert bytes(machine.image.visible[: GEOMETRY.size_bytes]) == bytes(script.content)


def test_what_waits_in_the_journal_is_read_with_the_size_of_its_own_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine, script = followed()
    begin = script.begin
    monkeypatch.setattr(script, "begin", lambda: replace(begin(), group=7))
    script.restart()  # all of it comes again, also the last block, which is short
    script.connect(machine)
    script.content[-512:] = b"x" * 512
    point(script, machine)
    page = machine.receiver.journal.page
    assert (page.committed, page.applied) == (2, 1), "it waits for its group"
    wire = greeted(machine, script, LARGER)
    wire.say(ApplyUpTo(7))
    wire.deliver()
    machine.settle()
    assert machine.receiver.journal.page.applied == 2
    assert bytes(machine.image.visible[: GEOMETRY.size_bytes]) == bytes(script.content)


def test_a_volume_does_not_shrink() -> None:
    machine, script = followed()
    wire = greeted(machine, script, GEOMETRY.size_bytes - 512)
    assert wire.error is not None
    assert (wire.error.code, "it cannot shrink" in wire.error.text) == (ErrorCode.SIZE, True)


def test_before_a_point_a_smaller_size_does_no_harm() -> None:
    machine, script = fresh(), Script(random.Random(1))
    greeted(machine, script, GEOMETRY.size_bytes)
    assert greeted(machine, script, GEOMETRY.size_bytes - 512).is_open
    assert size_of(machine) == GEOMETRY.size_bytes


class Fixed(Machine):
    """On an image that stays as it is."""

    most_bytes = IMAGE_BYTES


class Failing(Machine):
    def _enlarge(self, size_bytes: int, done: Done) -> None:
        self.loop.call_soon(done, OSError(28, "No space left on device"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Fixed, f"the image has {IMAGE_BYTES} bytes, the volume"), (Failing, "No space left")],
)
def test_an_image_that_is_too_small_is_named_and_points_go_on(
    kind: type[Machine], reason: str
) -> None:
    before, script = followed()
    machine = kind(*before.disks)
    wire = greeted(machine, script, LARGER)
    assert wire.error is not None
    assert wire.error.code is ErrorCode.SIZE
    assert reason in wire.error.text
    assert ("sender-refused", {"message": f"script: {wire.error.text}"}) in machine.events
    assert size_of(machine) == GEOMETRY.size_bytes
    script.connect(machine)
    script.write()
    point(script, machine)
    assert machine.receiver.journal.page.committed == 2


def test_the_first_volume_comes_in_once_the_image_has_its_size() -> None:
    machine, script = fresh(), Script(random.Random(1))
    wire = greeted(machine, script, LARGER)
    assert wire.error is not None
    assert "enlarge the image, and the volume comes in by itself" in wire.error.text
    assert machine.image.size_bytes == IMAGE_BYTES, "nobody has asked for that"
    assert machine.receiver.journal.superblock.line is None
    machine.image.extend(LARGER, b"\0")
    assert greeted(machine, script, LARGER).is_open
    assert size_of(machine) == LARGER


def test_an_image_whose_size_cannot_be_asked_for_is_named() -> None:
    machine = Failing(*fresh().disks)
    wire = greeted(machine, Script(random.Random(1)), GEOMETRY.size_bytes)
    assert wire.error is not None
    assert "the image: No space left" in wire.error.text


def test_a_journal_that_is_too_small_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, script = followed()
    least = property(lambda self: (self.geometry.size_bytes > LARGER - 1) << 40)
    monkeypatch.setattr(Places, "least_bytes", least)
    wire = greeted(machine, script, LARGER)
    assert wire.error is not None
    assert (wire.error.code, "too small" in wire.error.text) == (ErrorCode.SIZE, True)


def test_a_journal_without_room_for_the_maps_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, script = kept_points(2)
    most = property(lambda self: 1 if self.geometry.size_bytes == LARGER else 64)
    monkeypatch.setattr(Places, "maps", most)
    wire = greeted(machine, script, LARGER)
    assert wire.error is not None
    assert "2 points are kept, and the journal has room for 1" in wire.error.text


def test_what_is_queued_has_to_be_applied_before_segments_move(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simpoints.moving(monkeypatch)
    machine, script = followed()
    script.write()
    exchange_but_for(script, machine, machine.image, 2)
    assert machine.receiver.journal.page.queue
    wire = SimWire(machine)
    machine.receiver.connected(wire)
    wire.say(script.hello(size_bytes=LARGER))
    wire.deliver()
    machine.loop.run_soon()
    assert wire.error is not None
    assert wire.error.code is ErrorCode.BUSY
    machine.settle()
    assert greeted(machine, script, LARGER).is_open
    assert size_of(machine) == LARGER


# -- the maps of kept points ----------------------------------------------------------------


def kept_points(number: int) -> tuple[Hourly, Script]:
    """So many, of labels, and one more point."""
    machine, script = keeping_machine(), Script(random.Random(7))
    for _ in range(number):
        script.write()
        script.label = "kept"
        point(script, machine)
    script.label = ""
    script.write()
    point(script, machine)
    return machine, script


def said(machine: Machine) -> dict[int, bitarray]:
    """What the maps say, by kept point."""
    keeping = keeping_of(machine)
    return {
        kept.point: done(keeping.changed_since(kept.point), machine.loop, *machine.disks)
        for kept in keeping.points
    }


def names_as_much(after: dict[int, bitarray], before: dict[int, bitarray]) -> bool:
    return after.keys() == before.keys() and not any(
        (bits & ~after[number][: len(bits)]).any() for number, bits in before.items()
    )


def layouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The journal stays as it is; has its segments elsewhere; has fewer slots for maps."""
    yield None
    simpoints.moving(monkeypatch)
    yield None
    most = property(lambda self: 2 if self.geometry.size_bytes == LARGER else 64)
    monkeypatch.setattr(Places, "maps", most)
    yield None


@pytest.mark.parametrize("layout", range(3))
def test_maps_say_what_they_said_wherever_they_are(
    layout: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And name too much rather than too little after a power cut at any effect of the growth."""
    for number, _ in enumerate(layouts(monkeypatch)):
        if number == layout:
            break
    for effects in count():
        rng = random.Random(effects)
        machine, script = kept_points(3)
        done(keeping_of(machine).drop(1), machine.loop, *machine.disks)
        before = said(machine)
        wire = SimWire(machine)
        machine.receiver.connected(wire)
        wire.say(script.hello(size_bytes=LARGER))
        wire.deliver()
        ended = False
        for _ in range(effects):
            machine.loop.run_soon()
            ended = not machine.finish_one(rng)
        after = machine.crash(rng)
        after.settle()
        assert names_as_much(said(after), before)
        assert size_of(after) in (GEOMETRY.size_bytes, LARGER)
        if ended:
            exact = {n: bits + zeros(len(said(after)[n]) - len(bits)) for n, bits in before.items()}
            assert said(after) == exact
            assert said(machine) == exact
            assert size_of(after) == LARGER
            slots = [kept.slot for kept in keeping_of(after).points]
            assert max(slots) < after.receiver.journal.places.maps
            break


# -- sizes of points ------------------------------------------------------------------------


def begin_of(script: Script, **changes: Any) -> Any:
    return replace(script.begin(), **changes)


@pytest.mark.parametrize(
    ("size_bytes", "fits"),
    [
        (GEOMETRY.size_bytes, True),
        (LARGER, True),
        (GEOMETRY.size_bytes + 512, True),
        (GEOMETRY.size_bytes + 100, False),
        (LARGER + 512, False),
        (GEOMETRY.size_bytes - 512, False),
    ],
)
def test_a_point_is_between_the_last_one_and_what_was_offered(size_bytes: int, fits: bool) -> None:
    machine, script = followed()
    wire = greeted(machine, script, LARGER)
    script.point = 2
    wire.say(begin_of(script, size_bytes=size_bytes))
    wire.deliver()
    assert wire.is_open is fits


def test_the_extents_of_a_smaller_volume_are_those_that_it_has() -> None:
    geometry = replace(GEOMETRY, size_bytes=6 * GEOMETRY.extent_bytes)
    assert growing.within(((0, 2), (4, 9), (12, 14)), geometry) == ((0, 2), (4, 6))


def test_a_page_of_a_journal_without_sizes_means_that_of_the_journal() -> None:
    machine, _ = followed()
    journal = machine.receiver.journal
    page = decode_page(
        encode_page(replace(journal.page, size_bytes=0)),
        journal.page.journal,
        journal.page.sequence % 2,
    )
    assert page.committed_bytes == 0
    assert journal.geometry_at(0) == GEOMETRY


def test_what_such_a_page_means_is_written_before_the_volume_grows() -> None:
    machine, script = followed()
    journal = machine.receiver.journal
    done(journal._changed(lambda page: {"size_bytes": 0}), machine.loop, *machine.disks)
    greeted(machine, script, LARGER)
    after = machine.crash(random.Random(3)).receiver.journal
    assert after.page.committed_bytes == GEOMETRY.size_bytes


@pytest.mark.parametrize("chosen", [2, None])
def test_what_is_promoted_has_the_size_of_its_point(chosen: int | None) -> None:
    machine, script = kept_points(2)
    greeted(machine, script, LARGER)
    bench = Bench(*machine.crash(random.Random(5)).disks)
    ready = bench.go(chosen)
    assert ready is not None
    assert (ready.point, ready.size_bytes) == (chosen or 3, GEOMETRY.size_bytes)
    assert all(stop <= GEOMETRY.extents for _, stop in ready.since)
    again = Bench(*machine.crash(random.Random(5)).disks)
    assert again.journal.line.geometry.size_bytes == LARGER


def test_what_never_had_a_point_has_the_size_that_was_said() -> None:
    machine, script = fresh(), Script(random.Random(1))
    greeted(machine, script, GEOMETRY.size_bytes)
    greeted(machine, script, LARGER)
    assert machine.receiver.journal.page.committed_bytes == 0
