"""Hosts of one of two appliances: who may let them in again after whom."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from bitmapd.attach.mode import EndEras
from bitmapd.errors import BusyError, UnreachableError
from bitmapd.volume.hosts import VolumeHosts


class FakeMode:
    """A door."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.connected = 0
        self.cuts = 0
        self.open = True
        self.opened = 0
        self.answered = loop.create_future()  # the requests of hosts
        self.error: Exception | None = None
        self.is_stopping = False

    async def admit(self) -> None:
        if self.error is not None:
            raise self.error
        self.open, self.opened = True, self.opened + 1

    async def dismiss(self, end_eras: EndEras, *, force: bool) -> None:
        if self.connected and not force:
            raise BusyError(f"{self.connected} hosts are connected")
        await self.cut_off()

    async def cut_off(self) -> None:
        self.open = False
        self.cuts += 1
        await self.answered


async def no_eras(enough: Callable[[], bool]) -> None:
    """None has to end."""


Test = Callable[[VolumeHosts, FakeMode, list[bool]], Coroutine[Any, Any, None]]


def run(test: Test, *, are_served: bool = True) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        mode, told = FakeMode(loop), list[bool]()
        mode.open = are_served
        door: Any = mode
        hosts = VolumeHosts(
            door, loop, told.append, no_eras, lambda: mode.is_stopping, are_served=are_served
        )
        await test(hosts, mode, told)

    asyncio.run(main())


async def stopped(hosts: VolumeHosts, *, force: bool = True) -> str | None:
    done: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
    hosts.stop(force, done.set_result)
    return await done


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_a_void_takeover_lets_them_in_again_once_they_are_out() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        ended = asyncio.ensure_future(stopped(hosts))
        await turns()
        hosts.go_on()  # the link is lost while they are answered
        await turns()
        assert (mode.open, mode.opened) == (False, 0)
        mode.answered.set_result(None)
        assert await ended is None
        await turns()
        assert (mode.open, mode.opened, told) == (True, 1, [True, False, True])

    run(test)


def test_nobody_is_let_in_again_by_a_node_that_stops() -> None:
    """Whose link ends with it, in the middle of a takeover by the partner."""

    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        mode.answered.set_result(None)
        assert await stopped(hosts) is None
        mode.is_stopping = True
        hosts.go_on()
        await turns()
        await hosts.admit()
        assert (mode.open, mode.opened, told) == (False, 0, [True, False])

    run(test)


def test_it_lets_nobody_in_where_nobody_was() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        assert await stopped(hosts) is None
        hosts.go_on()
        await turns()
        assert (mode.open, told) == (False, [False])

    run(test, are_served=False)


def test_nor_after_a_demote_meanwhile() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        mode.answered.set_result(None)
        await stopped(hosts)
        await hosts.dismiss(force=False)
        hosts.go_on()
        await turns()
        assert (mode.open, hosts.are_served) == (False, False)
        await hosts.admit()
        await hosts.admit()
        assert (mode.open, mode.opened) == (True, 1)

    run(test)


def test_connected_hosts_are_asked_for() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        mode.answered.set_result(None)
        mode.connected = 2
        assert await stopped(hosts, force=False) == "2 hosts are connected at the partner"
        with pytest.raises(BusyError):
            await hosts.dismiss(force=False)
        assert mode.open
        hosts.go_on()
        await turns()
        assert mode.opened == 0
        await hosts.dismiss(force=True)
        assert not mode.open

    run(test)


def test_who_cannot_listen_says_so_and_serves_nobody() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        mode.error = UnreachableError("the address is in use")
        with pytest.raises(UnreachableError):
            await hosts.admit()
        assert (hosts.are_served, told) == (False, [False])

    run(test, are_served=False)


def test_hosts_that_cannot_be_let_in_again_are_reported() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        reported: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, what: reported.append(what))
        mode.answered.set_result(None)
        await stopped(hosts)
        mode.error = UnreachableError("the address is in use")
        hosts.go_on()
        await turns()
        assert [what["exception"] for what in reported] == [mode.error]

    run(test)


def test_hosts_of_a_split_brain_are_cut_off_once() -> None:
    async def test(hosts: VolumeHosts, mode: FakeMode, told: list[bool]) -> None:
        hosts.cut_off()
        await turns()
        hosts.cut_off()  # with the next tick; it is under way
        mode.answered.set_result(None)
        await turns()
        hosts.cut_off()
        await turns()
        assert (mode.open, mode.cuts, hosts.are_served, told) == (False, 1, False, [True, False])

    run(test)
