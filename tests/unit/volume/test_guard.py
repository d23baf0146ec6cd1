"""volume/guard: a secondary that was written at rest is not overwritten unasked.

Names end in the invariant of the module that they hold.
"""

from __future__ import annotations

import pytest

from bitmapd.media.fingerprint import places
from bitmapd.record.geometry import KIB, MIB
from bitmapd.record.layout import InitialSync
from tests.support.local import LocalVolume
from tests.support.serving import BrokenRecord, Served, run, serving

BLOCK = 64 * KIB
WRITTEN = 3 * MIB


def left_equal(local: LocalVolume) -> None:
    """A session that has copied a block, and was stopped cleanly."""

    async def test() -> None:
        async with serving(local) as served:
            await served.write(WRITTEN, b"w" * BLOCK)
            await served.in_sync()

    run(test())
    assert local.superblock.clean
    assert local.differing() == set()


def unseen(local: LocalVolume) -> int:
    """A place in the block that was copied, of which no fingerprint is taken."""
    taken = {at for at, _ in places(local.geometry.size_bytes, local.config.uuid.bytes)}
    return next(at for at in range(WRITTEN, WRITTEN + BLOCK, 4 * KIB) if at not in taken)


def paused(local: LocalVolume) -> Served:
    """A session of it: paused, nothing copied, everything recorded when it is over."""
    before = local.secondary.read_bytes()
    sessions = []

    async def test() -> None:
        async with serving(local) as served:
            sessions.append(served)
            await served.event("secondary-changed")
            assert served.volume.state == "paused"
            await served.write(0, b"h" * BLOCK)

    run(test())
    assert local.secondary.read_bytes() == before
    assert local.superblock.paused
    assert local.recorded() == set(range(local.geometry.extents))
    assert len(sessions[0].named("secondary-changed")) == 1
    assert sessions[0].named("secondary-forgot") == []
    return sessions[0]


def resumed(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            assert served.volume.state == "paused"
            await served.volume.resume()
            await served.in_sync()
            assert served.volume.copier.transfers.sent_bytes < local.geometry.size_bytes, "compared"

    run(test())
    assert local.differing() == set()
    assert local.superblock.initial_sync is InitialSync.NONE


def test_what_differs_is_named_and_stays_until_somebody_resumes_1_2(local: LocalVolume) -> None:
    left_equal(local)
    local.scribble(local.secondary, unseen(local))
    (event,) = paused(local).named("secondary-changed")
    assert event["places"] == [[WRITTEN, BLOCK]]
    assert f"bytes {BLOCK} at {WRITTEN}" in event["message"]
    assert "'dmctl resume vol0'" in event["message"]
    resumed(local)


@pytest.mark.parametrize("offset", [1080, 7 * MIB])
def test_a_secondary_that_was_mounted_is_noticed_by_its_fingerprint_2(
    local: LocalVolume, offset: int
) -> None:
    left_equal(local)
    local.scribble(local.secondary, offset)
    (event,) = paused(local).named("secondary-changed")
    assert event["places"] == []
    resumed(local)


def test_equal_sides_are_copied_to_as_always_1(local: LocalVolume) -> None:
    left_equal(local)
    left_equal(local)


def test_after_a_stop_that_left_something_it_is_no_guard_1(local: LocalVolume) -> None:
    """What the record names is copied in any case."""

    async def stop_now() -> None:
        async with serving(local, now=True) as served:
            await served.write(WRITTEN, b"w" * BLOCK)
            await served.in_sync()
            await served.volume.pause()
            await served.write(0, b"n" * BLOCK)

    async def go_on() -> None:
        async with serving(local) as served:
            await served.volume.resume()
            await served.event("secondary-forgot")
            await served.in_sync()

    left_equal(local)
    run(stop_now())
    assert not local.superblock.clean
    local.scribble(local.secondary, unseen(local))
    run(go_on())
    assert local.differing() == set()


def test_a_pause_that_cannot_be_kept_holds_and_is_told_3(local: LocalVolume) -> None:
    left_equal(local)
    local.scribble(local.secondary, unseen(local))
    before = local.secondary.read_bytes()

    async def test() -> None:
        served = Served(local)
        await served.volume.start()
        session = served.volume._parts.session._medium
        broken = [BrokenRecord(served), BrokenRecord(served, session.fd)]
        await served.event("secondary-changed")
        while "for the record could not be written" not in str(served.named("record-error")):
            served.told.clear()
            await served.told.wait()
        for one in broken:
            one.mend()
        assert served.volume.state in {"paused", "degraded"}
        await served.volume.stop(False)

    run(test())
    assert local.secondary.read_bytes() == before


def test_a_resume_that_comes_first_is_not_undone(local: LocalVolume) -> None:
    left_equal(local)
    local.scribble(local.secondary, 1080)

    async def test() -> None:
        async with serving(local) as served:
            await served.volume.resume()
            await served.in_sync()

    run(test())
    assert local.differing() == set()
    assert not local.superblock.paused
