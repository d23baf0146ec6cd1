"""attach/modes: dm mode's steps, and what becomes of the layers when one of them fails.

The kernel only notes what it is told.  With a real one, dm mode is tested in tests/vm/guest; nbd
mode is tested with the volume.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitmapd.attach import dm_mode
from bitmapd.attach.dm_mode import LAST_BARRIERS, DmMode
from bitmapd.attach.mode import EndEras, make_server
from bitmapd.errors import BitmapdError, UnreachableError
from bitmapd.gate.direct import DirectPath, HostCounters
from bitmapd.gate.routes import Segment, Table
from bitmapd.media.aio import AioEngine
from tests.support.local import LocalVolume
from tests.support.mirror import EXTENT, Mirror


class NotedKernel:
    """A `KernelAttachment` without a kernel."""

    current_era = 7
    mark_s = 0.001

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.adopted = False
        self.found: list[Segment] | None = None
        self.fails = False

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.fails:
            raise BitmapdError("no helper")

    async def look(self, *, owns: bool) -> list[Segment] | None:
        self._note("look")
        return self.found

    async def prepare(self) -> None:
        self._note("prepare")

    async def detach(self) -> None:
        self._note("detach")

    async def connect(self, server: object) -> None:
        self._note("connect")

    async def attach(self) -> list[Segment]:
        self._note("attach")
        return []

    def host_counters(self) -> HostCounters:
        return HostCounters(0, 0, 0, 0)

    async def close_hosts(self) -> None:
        self._note("close hosts")

    def stay_disconnected(self) -> None:
        self.calls.append("stay disconnected")

    def close(self) -> None:
        self.calls.append("close")


class NotedServer:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.loop = asyncio.get_running_loop()

    async def drain(self, timeout_s: float) -> None:
        self._calls.append(f"drain {timeout_s:g} s")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotedKernel]:
    made = NotedKernel()
    monkeypatch.setattr(dm_mode, "KernelAttachment", lambda *_: made)
    return made


EXCHANGED = ["stay disconnected", "drain 60 s", "close", "prepare", "connect", "attach"]


class Attached:
    """A mode after `prepare`."""

    def __init__(self, local: LocalVolume) -> None:
        self.events: list[str] = []
        self.opened: list[Callable[[], None]] = []
        self.barriers = 0
        self.mode = DmMode(
            local.config,
            asyncio.get_running_loop(),
            lambda event, **fields: self.events.append(event),
            on_barrier=lambda: None,
        )
        self._geometry = local.geometry

    async def prepare(self) -> None:
        await self.mode.prepare(self._geometry, self.opened)

    @property
    def direct(self) -> DirectPath:
        return self.mode.elsewhere[0]

    def barriers_that(self, land: Callable[[int], bool]) -> EndEras:
        """`land`: whether the barrier of this number does, the first being 1."""

        async def end_eras(enough: Callable[[], bool]) -> None:
            assert not enough()
            self.barriers += 1
            if land(self.barriers):
                self.direct.routes.propose([])
                self.direct.routes.landed(())
                self.direct.barriers += 1
            else:
                self.direct.failures += 1
            assert enough()

        return end_eras


def run(test: Callable[[], Any]) -> None:
    asyncio.run(test())


def test_the_layers_are_made_or_found_first(local: LocalVolume, kernel: NotedKernel) -> None:
    async def test() -> None:
        attached = Attached(local)
        assert not attached.mode.adopted
        await attached.prepare()
        assert attached.direct.collected_era == 6
        assert not attached.mode.exclusive
        for close in attached.opened:
            close()

    run(test)
    assert kernel.calls == ["look", "prepare", "close"]


@pytest.mark.parametrize("adopted", [False, True])
def test_a_start_that_failed_removes_what_it_made(
    local: LocalVolume, kernel: NotedKernel, adopted: bool
) -> None:
    kernel.adopted = adopted

    async def test() -> None:
        attached = Attached(local)
        await attached.prepare()
        assert attached.mode.adopted is adopted
        await attached.mode.undo()

    run(test)
    assert kernel.calls == ["look", "prepare", *([] if adopted else ["detach", "close"])]


def test_a_start_that_failed_before_the_layers_were_there(
    local: LocalVolume, kernel: NotedKernel
) -> None:
    kernel.fails = True

    async def test() -> None:
        attached = Attached(local)
        with pytest.raises(BitmapdError):
            await attached.prepare()
        await attached.mode.undo()
        assert not attached.mode.adopted

    run(test)
    assert kernel.calls == ["look"]


@pytest.mark.parametrize(("first_that_lands", "needed"), [(1, 1), (3, 3), (99, LAST_BARRIERS)])
def test_the_last_writes_are_asked_for_a_few_times(
    local: LocalVolume, kernel: NotedKernel, first_that_lands: int, needed: int
) -> None:
    async def test() -> None:
        attached = Attached(local)
        await attached.prepare()
        attached.direct.routes.adopt([(2, 3)])
        barriers = attached.barriers_that(lambda number: number >= first_that_lands)
        await attached.mode.last_writes(barriers)
        assert attached.direct.routes.settling is (first_that_lands > LAST_BARRIERS)
        assert attached.barriers == needed

    run(test)


def test_hosts_get_the_device_again_that_was_taken_from_them(
    local: LocalVolume, kernel: NotedKernel
) -> None:
    """As when a volume could not give its role away."""

    async def test() -> None:
        attached = Attached(local)
        mode = attached.mode
        await attached.prepare()
        mode.server = NotedServer(kernel.calls)  # type: ignore[assignment]
        mode._covers = lambda first, stop: True
        mode._mark = None  # type: ignore[assignment]  # nothing was direct before
        await mode.admit()
        kernel.fails = True
        with pytest.raises(BitmapdError):
            await mode.close_hosts()  # it is in use
        kernel.fails = False
        await mode.admit()
        assert kernel.calls == ["look", "prepare", "connect", "attach", "close hosts"]
        await mode.close_hosts()
        await mode.last_writes(attached.barriers_that(lambda number: True))
        assert attached.direct.routes.is_sealed
        await mode.admit()
        assert kernel.calls[5:] == ["close hosts", "attach"]
        assert not attached.direct.routes.is_sealed

    run(test)


def larger(attached: Attached, server: NotedServer) -> int:
    """What the gate has; as after `begin` and `admit`."""
    gate = Mirror(size_bytes=attached.direct.geometry.size_bytes + EXTENT).gate
    mode: Any = attached.mode
    mode.server, mode._gate, mode._covers = server, gate, lambda *extents: True
    mode._mark = None  # nothing was direct before
    return gate.size_bytes


def test_hosts_go_on_with_the_old_size_if_the_table_cannot_be_changed(
    local: LocalVolume, kernel: NotedKernel
) -> None:
    async def test() -> None:
        attached = Attached(local)
        await attached.prepare()
        size_bytes = larger(attached, NotedServer(kernel.calls))
        routes = attached.direct.routes
        routes.adopt([(2, 3)])
        with pytest.raises(UnreachableError) as caught:
            await attached.mode.follow_size(attached.barriers_that(lambda number: False))
        assert attached.barriers == LAST_BARRIERS
        assert caught.value.hint is not None
        assert "dmctl events vol0" in caught.value.hint
        assert routes.propose([(0, 8)]) == Table(((0, 8),)), "as before"
        routes.failed()
        assert kernel.calls == ["look", "prepare"]
        await attached.mode.follow_size(attached.barriers_that(lambda number: True))
        assert attached.direct.geometry.size_bytes == size_bytes
        assert kernel.calls[2:] == EXCHANGED
        assert routes.propose([(0, 8)]) == Table(((0, 8),)), "hosts write past the gate again"
        await attached.mode.follow_size(attached.barriers_that(lambda number: True))
        assert kernel.calls[2:] == EXCHANGED, "there was nothing to do"

    run(test)


def test_a_process_that_holds_up_hosts_and_cannot_go_on_fails(
    local: LocalVolume, kernel: NotedKernel
) -> None:
    failed: list[Any] = []

    async def test() -> None:
        attached = Attached(local)
        await attached.prepare()
        larger(attached, NotedServer(kernel.calls))
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: failed.append(str(context["exception"]))
        )
        kernel.fails = True
        with pytest.raises(BitmapdError):
            await attached.mode.follow_size(attached.barriers_that(lambda number: True))

    run(test)
    assert failed == ["no helper"]
    assert "detach" not in kernel.calls, "they wait for the next one"


@pytest.mark.parametrize("part", [0.5, 1, 2])
def test_layers_that_are_found_are_served_as_they_are(
    local: LocalVolume, kernel: NotedKernel, part: float
) -> None:
    """They are smaller if an earlier process died before hosts saw the volume's size."""
    size_bytes = local.geometry.size_bytes
    found_bytes = int(size_bytes * part)
    kernel.found = [(0, 4096, "direct"), (4096, found_bytes, "gate")]

    async def test() -> None:
        attached = Attached(local)
        await attached.prepare()
        assert attached.direct.geometry.size_bytes == min(size_bytes, found_bytes)

    run(test)
    assert kernel.calls == ["look", *(["close"] if part < 1 else []), "prepare"]


@pytest.mark.parametrize("fails", [False, True])
def test_detaching_goes_on_to_its_end(local: LocalVolume, kernel: NotedKernel, fails: bool) -> None:
    async def test() -> None:
        attached = Attached(local)
        await attached.prepare()
        attached.mode.server = NotedServer(kernel.calls)  # type: ignore[assignment]
        kernel.fails = fails
        await attached.mode.detach()
        assert attached.events == (["detach-error"] if fails else [])

    run(test)
    assert kernel.calls == ["look", "prepare", "detach", "drain 5 s", "close"]


@pytest.mark.parametrize("wanted", [True, False])
def test_a_volume_polls_only_where_it_is_configured(tmp_path: Path, wanted: bool) -> None:
    config = replace(LocalVolume(tmp_path, tmp_path).config, busy_poll=wanted)

    async def made() -> bool:
        loop = asyncio.get_running_loop()
        engine = AioEngine(loop)
        server = make_server(
            config, loop, engine, Mirror().gate, print, tls=None, may_spin=lambda: True
        )
        engine.close()
        return server._spin.wanted()

    assert asyncio.run(made()) is (wanted and len(os.sched_getaffinity(0)) > 1)
