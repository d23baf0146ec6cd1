"""hintkeeper: what was learnt is in the record when the volume stops, and now and then before."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import zlib

import pytest

from bitmapd.record import tool
from bitmapd.record.geometry import MIB
from bitmapd.record.hints import HINTS_BYTES, Hints, decode_hints
from bitmapd.volume import hints as hintkeeper
from bitmapd.volume import volume as volume_module
from tests.support.local import LocalVolume
from tests.support.serving import Served, run, serving


def kept(local: LocalVolume) -> Hints | None:
    with tool.RecordMedium.open_read_only(local.record) as medium:
        area = tool.read_hints(medium)
    assert len(area) == HINTS_BYTES
    return decode_hints(area, local.geometry.extents)


def trail(served: Served) -> tuple[int, ...]:
    hints = served.volume.gate.policy.hints()
    assert hints is not None
    return hints.trail


def test_what_was_learnt_outlives_a_restart(local: LocalVolume) -> None:
    async def first() -> None:
        async with serving(local) as served:
            assert trail(served) == ()
            await served.write(3 * MIB, b"a" * 4096)
            assert kept(local) is None

    async def second() -> None:
        async with serving(local) as served:
            assert trail(served) == (3,)

    run(first())
    found = kept(local)
    assert found is not None
    assert found.trail == (3,)
    run(second())
    assert kept(local) == found


def test_it_is_kept_now_and_then_while_the_volume_runs(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hintkeeper, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(volume_module, "TICK_S", 0.01)

    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"a" * 4096)
            while kept(local) is None:
                await asyncio.sleep(0.01)

    run(test())


def test_what_cannot_be_kept_is_told_and_stops_nothing(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(0, b"a" * 4096)
            await served.in_sync()
            medium = served.volume._parts.session._medium
            writable, medium.fd = medium.fd, os.open(local.record, os.O_RDONLY)
            await served.volume._parts.hints.save()
            assert "cannot write" in served.named("hints-not-saved")[0]["message"]
            os.close(medium.fd)
            medium.fd = writable

    run(test())
    assert kept(local) is not None


def test_a_policy_that_learns_nothing_leaves_it_alone(local: LocalVolume) -> None:
    async def write(extent: int) -> None:
        async with serving(local) as served:
            await served.write(extent * MIB, b"a" * 4096)

    run(write(0))
    before = kept(local)
    assert before is not None
    local.config = dataclasses.replace(local.config, predictor="lru")
    run(write(5))
    assert kept(local) == before


def use(served: Served, predictor: str) -> None:
    """As `dmctl set` does."""
    volume = served.volume
    volume.reconfigure(dataclasses.replace(volume.config, predictor=predictor))


def test_it_goes_over_to_a_new_policy_when_the_volume_grows(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(3 * MIB, b"a" * 4096)
            for path in (local.primary, local.secondary):
                os.truncate(path, 9 * MIB)
            await served.volume.resize()
            assert trail(served) == (3,)
            hints = served.volume.gate.policy.hints()
            assert hints is not None
            assert hints.extents == len(hints.ever) == 9

    run(test())


def test_what_the_record_has_waits_for_a_policy_that_can_use_it(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first() -> None:
        async with serving(local) as served:
            await served.write(3 * MIB, b"a" * 4096)

    async def second() -> None:
        async with serving(local) as served:
            assert served.volume.gate.policy.hints() is None
            with monkeypatch.context() as patched:
                patched.setattr(tool, "read_hints", unreachable)
                use(served, "superset")
            assert trail(served) == (3,)

    def unreachable(medium: tool.RecordMedium) -> bytes:
        raise AssertionError("the record is read while hosts are served")

    run(first())
    before = kept(local)
    local.config = dataclasses.replace(local.config, predictor="lru")
    run(second())
    assert kept(local) == before, "nothing was missed"


def test_it_outlives_a_policy_that_learns_nothing(local: LocalVolume) -> None:
    async def test() -> None:
        async with serving(local) as served:
            await served.write(3 * MIB, b"a" * 4096)
            use(served, "lru")
            await served.write(5 * MIB, b"a" * 4096)
            use(served, "superset")
            assert trail(served) == (3,)

    run(test())
    found = kept(local)
    assert found is not None
    assert found.trail == (3,)


def test_the_loop_neither_deflates_nor_inflates_while_hosts_are_served(
    local: LocalVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    async def test() -> None:
        async with serving(local) as served:
            await served.write(3 * MIB, b"a" * 4096)
            with monkeypatch.context() as patched:
                for name in ("compress", "decompressobj"):
                    patched.setattr(zlib, name, lambda *args, name=name: called.append(name))
                for predictor in ("lru", "superset", "lru", "superset"):
                    use(served, predictor)
            assert trail(served) == (3,)

    run(test())
    assert called == []
