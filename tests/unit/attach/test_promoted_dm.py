"""attach/promoted_dm: a stack that comes when hosts are let in, and goes when they are sent away.

The kernel only notes what it is told; with a real one it is tested in tests/vm/guest/test_dm_pair.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bitmapd.attach import dm_mode, promoted_dm
from bitmapd.attach.promoted_dm import PromotedDm
from bitmapd.errors import BitmapdError, BusyError, UnreachableError
from bitmapd.gate.direct import DirectPath, HostCounters
from bitmapd.gate.routes import Segment
from tests.support.local import LocalVolume
from tests.support.mirror import BLOCK, Mirror
from tests.unit.attach.test_modes import EXCHANGED, NotedServer


class NotedKernel:
    """A `KernelAttachment` without a kernel; what is told goes to `calls`."""

    current_era = 7
    mark_s = 0.001

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls
        self.found: list[Segment] | None = None
        self.open = False  # some host has the device
        self.fails = ""  # the call that does

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.fails == call:
            raise BitmapdError(f"cannot {call}")

    async def look(self, *, owns: bool) -> list[Segment] | None:
        self._note("look")
        return self.found

    async def prepare(self) -> None:
        self._note("prepare")

    async def connect(self, server: object) -> None:
        self._note("connect")

    async def attach(self) -> list[Segment]:
        self._note("attach")
        return self.found or []

    def host_counters(self) -> HostCounters:
        return HostCounters(0, 0, 0, 0)

    async def close_hosts(self) -> None:
        self._note("close hosts")
        if self.open:
            raise BusyError("/dev/mapper/vol0 is in use")

    async def sever(self) -> None:
        self._note("sever")

    def stay_disconnected(self) -> None:
        self._note("stay disconnected")

    async def detach(self) -> None:
        self._note("detach")

    def close(self) -> None:
        self.calls.append("close")


class NotedPrimary:
    def __init__(self, calls: list[str]) -> None:
        self._calls = calls
        self.taken = False

    async def lend(self) -> None:
        self._calls.append("lend")

    async def take_back(self) -> None:
        self._calls.append("take back")
        if self.taken:
            raise BusyError("it is mounted")


class Bench:
    """A mode with its kernel, before `prepare`."""

    def __init__(self, local: LocalVolume, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.events: list[str] = []
        self.kernel = NotedKernel(self.calls)
        self.primary = NotedPrimary(self.calls)
        self.mirror = Mirror(elsewhere=(), piecewise=True)
        self.opened: list[Callable[[], None]] = []
        monkeypatch.setattr(dm_mode, "KernelAttachment", lambda *_: self.kernel)
        server = NotedServer(self.calls)
        monkeypatch.setattr(promoted_dm, "make_server", lambda *_, **more: server)
        self.mode = PromotedDm(
            local.config,
            asyncio.get_running_loop(),
            lambda event, **fields: self.events.append(event),
            on_barrier=lambda: None,
        )
        self.config = local.config

    async def prepare(self) -> None:
        await self.mode.prepare(self.mirror.geometry, self.opened)

    async def begin(self) -> None:
        store: Any = self.mirror.store
        primary: Any = self.primary
        engine: Any = None
        gate = self.mirror.gate
        await self.mode.begin(engine, gate, store, lambda: True, self.opened, primary)

    async def serving(self) -> None:
        """Hosts are let in."""
        await self.prepare()
        await self.begin()
        await self.mode.admit()

    async def serving_directly(self) -> DirectPath:
        """Hosts write two extents past the gate."""
        await self.serving()
        assert self.mode.path.path is not None
        self.mode.path.path.routes.adopt([(2, 4)])
        return self.mode.path.path

    def told(self) -> list[str]:
        told = list(self.calls)
        self.calls.clear()
        return told


async def no_eras(enough: Callable[[], bool]) -> None:
    raise AssertionError("nothing was written past the gate")


Test = Callable[[Bench], Awaitable[None]]


@pytest.fixture
def run(local: LocalVolume, monkeypatch: pytest.MonkeyPatch) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def main() -> None:
            await test(Bench(local, monkeypatch))

        asyncio.run(main())

    return run


def test_a_stack_comes_and_goes_with_hosts(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        await it.prepare()
        assert (it.mode.exclusive, it.mode.adopted, it.mode.direct) == (True, False, [])
        assert it.told() == ["look", "sever", "close"]  # a rest of another one is removed
        await it.begin()
        assert it.mode.figures(it.mirror.gate) == {}
        for _ in range(2):
            await it.mode.admit()
            assert it.told() == ["lend", "close hosts", "prepare", "connect", "attach"]
            await it.mode.dismiss(no_eras, force=False)
            assert it.told() == ["close hosts", "detach", "close", "drain 5 s", "take back"]
        await it.mode.dismiss(no_eras, force=True)
        await it.mode.cut_off()
        await it.mode.close_hosts()
        assert it.told() == []

    run(test)


def test_hosts_that_have_it_open_keep_it_without_force(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        await it.serving()
        it.kernel.open = True
        it.told()
        with pytest.raises(BusyError):
            await it.mode.dismiss(no_eras, force=False)
        with pytest.raises(BusyError):
            await it.mode.close_hosts()
        assert it.told() == ["close hosts"] * 2
        await it.mode.dismiss(no_eras, force=True)
        assert it.told() == ["close hosts", "sever", "close", "drain 5 s", "take back"]
        with pytest.raises(BusyError):  # they have it open still
            await it.mode.admit()
        assert it.told()[-4:] == ["sever", "close", "drain 5 s", "take back"]

    run(test)


def test_what_is_open_when_it_goes_counts_as_written(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        await it.serving_directly()
        await it.mode.cut_off()
        per = it.mirror.geometry.blocks_per_extent
        assert list(it.mirror.gate.current.runs()) == [(2 * per, 4 * per)]

    run(test)


def test_the_last_barriers_bring_what_was_written(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        path = await it.serving_directly()

        async def end_eras(enough: Callable[[], bool]) -> None:
            assert not enough()
            path.routes.propose([])
            path.routes.landed(())
            path.barriers += 1
            assert enough()

        await it.mode.dismiss(end_eras, force=False)
        assert path.barriers >= 1
        assert not it.mirror.gate.current

    run(test)


def test_one_that_is_found_alive_is_served_on(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        extent = it.mirror.geometry.extent_bytes
        size = it.mirror.geometry.size_bytes
        it.kernel.found = [
            (0, extent, "gate"),
            (extent, 3 * extent, "direct"),
            (3 * extent, size, "gate"),
        ]
        await it.prepare()
        assert it.told() == ["look", "prepare"]
        assert (it.mode.exclusive, it.mode.adopted, it.mode.direct) == (False, True, [(1, 3)])
        assert it.mode.path.is_open(1)
        await it.mode.undo()  # it stays, whatever becomes of this start
        assert it.told() == ["close"]
        await it.prepare()
        it.mirror.store.add([(1, 3)], (), lambda error: None)
        it.mirror.run()
        await it.begin()
        await it.mode.admit()
        assert it.told() == ["look", "prepare", "connect", "attach"]
        assert "direct_extents" in it.mode.figures(it.mirror.gate)
        await it.mode.detach()
        assert it.told() == ["detach", "close", "drain 5 s"]

    run(test)


def test_one_that_may_not_go_on_before_it_has_begun(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        it.kernel.found = [(0, it.mirror.geometry.size_bytes, "gate")]
        await it.prepare()
        it.told()
        await it.mode.cut_off()
        assert it.told() == ["sever", "close"]
        await it.mode.detach()
        await it.mode.last_writes(no_eras)
        assert it.told() == []

    run(test)


@pytest.mark.parametrize("fails", ["prepare", "connect", "attach"])
def test_hosts_that_cannot_be_let_in_leave_nothing(run: Callable[[Test], None], fails: str) -> None:
    async def test(it: Bench) -> None:
        await it.prepare()
        await it.begin()
        it.kernel.fails = fails
        with pytest.raises(BitmapdError, match=f"cannot {fails}"):
            await it.mode.admit()
        assert it.told()[-4:] == ["sever", "close", "drain 5 s", "take back"]
        assert it.mode.path.path is None
        it.kernel.fails = ""
        await it.mode.admit()

    run(test)


def grow(it: Bench) -> int:
    """The volume, and not what hosts have; the size of before."""
    old = it.mirror.geometry
    it.mirror.gate.grow(dataclasses.replace(old, size_bytes=old.size_bytes + old.extent_bytes))
    return old.size_bytes


def eras(it: Bench) -> Callable[[Callable[[], bool]], Awaitable[None]]:
    """Barriers that land, one after the other."""

    async def end_eras(enough: Callable[[], bool]) -> None:
        path = it.mode.path.path
        assert path is not None
        while not enough():
            path.routes.propose([(0, 9)])
            path.routes.landed(())
            path.barriers += 1

    return end_eras


def test_hosts_see_a_larger_size_once_every_write_passes_the_gate(
    run: Callable[[Test], None],
) -> None:
    async def test(it: Bench) -> None:
        await it.serving()
        await it.mode.follow_size(no_eras)  # nothing has grown
        assert it.mode.path.path is not None
        it.mode.path.path.routes.adopt([(2, 4)])
        it.told()
        old_bytes = grow(it)
        assert it.mode.path.path.geometry.size_bytes == old_bytes
        await it.mode.follow_size(eras(it))
        assert it.told() == EXCHANGED
        assert it.mode.path.path.geometry.size_bytes == it.mirror.gate.size_bytes > old_bytes
        new = range(old_bytes // BLOCK, it.mirror.gate.size_bytes // BLOCK)
        assert list(it.mirror.gate.current.runs()) == [(new[0], new[-1] + 1)]  # nothing was open
        assert not it.mode.path.path.is_closing
        await it.mode.follow_size(no_eras)
        await it.mode.dismiss(no_eras, force=False)
        grow(it)
        await it.mode.follow_size(no_eras)  # nobody is in
        await it.mode.admit()
        assert it.mode.path.path.geometry.size_bytes == it.mirror.gate.size_bytes

    run(test)


@pytest.mark.parametrize("while_served", [False, True])
def test_what_is_open_in_the_new_part_when_it_goes_counts_as_written(
    run: Callable[[Test], None], while_served: bool
) -> None:
    async def test(it: Bench) -> None:
        await it.prepare()
        await it.begin()
        if while_served:
            await it.mode.admit()
        per = it.mirror.geometry.blocks_per_extent
        old = grow(it) // it.mirror.geometry.extent_bytes
        if while_served:
            await it.mode.follow_size(eras(it))
        else:
            await it.mode.admit()
        gate = it.mirror.gate
        gate.current.discard(0, it.mirror.geometry.blocks + per)
        path = it.mode.path.path
        assert path is not None
        path.routes.adopt([(old - 1, old + 1)])
        await it.mode.cut_off()
        assert list(gate.current.runs()) == [((old - 1) * per, (old + 1) * per)]

    run(test)


def test_hosts_go_on_with_the_old_size_while_no_barrier_passes(run: Callable[[Test], None]) -> None:
    async def test(it: Bench) -> None:
        path = await it.serving_directly()
        it.mode.path.is_held_up = lambda: True  # by a partner that is not there

        async def no_era_ends(enough: Callable[[], bool]) -> None:
            assert enough()

        it.told()
        grow(it)
        with pytest.raises(UnreachableError, match="no barrier passes"):
            await it.mode.follow_size(no_era_ends)
        assert (it.told(), it.mode.path.path) == ([], path)
        assert (path.is_closing, path.routes.is_gating) == (False, False)
        it.mode.path.is_held_up = lambda: False
        await it.mode.follow_size(eras(it))
        assert it.told() == EXCHANGED

    run(test)


@pytest.mark.parametrize("fails", ["prepare", "connect", "attach"])
def test_a_process_that_holds_up_hosts_and_cannot_go_on_fails(
    run: Callable[[Test], None], fails: str
) -> None:
    async def test(it: Bench) -> None:
        failures: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _loop, context: failures.append(str(context["exception"]))
        )
        await it.serving()
        grow(it)
        it.kernel.fails = fails
        with pytest.raises(BitmapdError, match=f"cannot {fails}"):
            await it.mode.follow_size(eras(it))
        assert failures == [f"cannot {fails}"]
        assert "sever" not in it.told()[5:]  # they wait for the next process

    run(test)


def test_one_that_is_found_alive_and_smaller_is_served_on_as_it_is(
    run: Callable[[Test], None],
) -> None:
    async def test(it: Bench) -> None:
        extent = it.mirror.geometry.extent_bytes
        it.kernel.found = [(0, extent, "gate"), (extent, 2 * extent, "direct")]
        await it.prepare()
        assert it.told() == ["look", "close", "prepare"]
        assert it.mode.direct == [(1, 2)]
        path = it.mode.path.path
        assert path is not None
        assert path.geometry.size_bytes == 2 * extent < it.mirror.geometry.size_bytes
        it.mirror.store.add([(1, 2)], (), lambda error: None)
        it.mirror.run()
        await it.begin()
        await it.mode.admit()
        it.told()
        it.kernel.found = None
        await it.mode.follow_size(eras(it))
        assert it.told() == EXCHANGED
        assert it.mode.path.path is not None
        assert it.mode.path.path.geometry == it.mirror.geometry

    run(test)


def test_what_cannot_be_removed_is_reported_and_who_cannot_be_cut_off_is_an_error(
    run: Callable[[Test], None],
) -> None:
    async def test(it: Bench) -> None:
        await it.serving()
        it.kernel.fails = "sever"
        with pytest.raises(BitmapdError):
            await it.mode.cut_off()
        assert it.mode.path.path is not None  # hosts may go on
        it.kernel.fails, it.primary.taken = "detach", True
        await it.mode.dismiss(no_eras, force=False)
        assert it.events == ["detach-error", "detach-error"]

    run(test)
