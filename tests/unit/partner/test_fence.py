"""The other node is fenced first, and only then does this one serve alone."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitmapd.errors import BusyError, UnreachableError, WrongStateError
from bitmapd.partner.fence import Fence
from bitmapd.partner.fence_policy import FenceSettings
from tests.unit.partner.nodes import Proof, State, Two

HOUR_S = 3600.0


class Bench:
    """A pair whose link is cut, seen from node 1, with a real agent."""

    def __init__(self, folder: Path) -> None:
        self.it = Two()
        self.it.pair()
        self.it.cut()
        self.station = self.it.one
        self.node = self.station.node
        self.folder = folder
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.late_s = 0.0
        self.moved = asyncio.Event()
        self.fence = Fence(self.node, asyncio.get_running_loop(), self)

    # -- Home -------------------------------------------------------
    def emit(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def changed(self) -> None:
        self.moved.set()
        self.moved = asyncio.Event()

    def primary_late_s(self) -> float:
        return self.late_s

    # -- the test's side --------------------------------------------
    def agent(self, script: str, **more: Any) -> None:
        path = self.folder / "agent"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        self.fence.settings = FenceSettings(command=str(path), plug="b", **more)

    def told(self) -> list[str]:
        return [name for name, _ in self.events]

    async def until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            await self.moved.wait()

    def greet(self) -> None:
        """The exchange begins."""
        self.it.connect()
        self.station.receive(*self.it.two.sent())

    def held(self) -> Path:
        """The agent waits until this pipe is written."""
        path = self.folder / "held"
        os.mkfifo(path)
        return path


def bench(tmp_path: Path, play: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        made = Bench(tmp_path)
        try:
            await play(made)
        finally:
            made.fence.close()

    asyncio.run(run())


def test_the_proof_comes_before_the_step(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        it.agent(f"cat > {tmp_path}/said", options=(("ip", "1"),))
        await it.fence.run()
        assert (tmp_path / "said").read_text() == "action=off\nplug=b\nip=1\n"
        assert it.told() == ["fence-started", "fenced"]
        assert it.node.state is State.CUT  # the superblock comes first
        assert it.station.write().term == 4
        assert (it.node.state, it.node.proof) == (State.ALONE, Proof.FENCE)

    bench(tmp_path, play)


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo no way; exit 1", "ended with status 1: no way"), ("kill -9 $$", "by signal 9"),
     ("sleep 600", "did not end within 0.2 s, and was killed")],
)  # fmt: skip
def test_whatever_else_the_agent_does_proves_nothing(
    tmp_path: Path, script: str, said: str
) -> None:
    async def play(it: Bench) -> None:
        it.agent(script, timeout_s=0.2 if "sleep" in script else 60.0)
        with pytest.raises(UnreachableError) as caught:
            await it.fence.run()
        assert said in caught.value.message
        assert it.told() == ["fence-started", "fence-failed"]
        assert (it.node.state, len(it.station.writes), it.fence.step) == (State.CUT, 0, None)
        it.it.pair()  # and the other is let in again

    bench(tmp_path, play)


def test_without_an_agent_that_can_be_run(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        with pytest.raises(UnreachableError):
            await it.fence.run()
        it.fence.settings = FenceSettings(command=f"{tmp_path}/nowhere", plug="b")
        with pytest.raises(UnreachableError, match="cannot be run: No such file"):
            await it.fence.run()
        assert it.node.state is State.CUT

    bench(tmp_path, play)


def test_nothing_is_agreed_on_with_a_node_that_is_being_shot(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        held = it.held()
        it.agent(f"read line < {held}")
        task = asyncio.ensure_future(it.fence.run())
        await it.until(lambda: it.fence.step == "agent")
        it.it.connect()
        assert it.station.cable.closed
        assert not it.station.sent()
        with pytest.raises(BusyError):
            await it.fence.run()  # once at a time
        await asyncio.to_thread(held.write_text, "go\n")
        await task
        it.station.write()
        assert it.node.state is State.ALONE

    bench(tmp_path, play)


def test_an_exchange_is_not_shot_at(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        it.agent("exit 0")
        it.greet()
        with pytest.raises(BusyError):
            await it.fence.run()
        assert it.told() == []
        it.node.lost()
        await it.fence.run()
        it.station.write()
        with pytest.raises(WrongStateError):
            await it.fence.run()

    bench(tmp_path, play)


def test_what_may_land_on_the_primary_is_waited_for(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        it.late_s = HOUR_S
        it.agent("exit 0")
        task = asyncio.ensure_future(it.fence.run())
        await it.until(lambda: it.fence.step == "late-writes")
        assert it.told() == ["fence-started", "fenced"]
        assert not it.station.writes
        it.it.connect()
        assert it.station.cable.closed  # it is dead; what comes is its next process
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        it.fence.settings = replace(it.fence.settings, aborts_io=True)
        await it.fence.run()
        assert len(it.station.writes) == 1

    bench(tmp_path, play)


def test_by_itself_once_a_host_waits(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        it.agent("exit 1", automatic=True, delay_s=1.0)
        it.fence.tick(0.5, 1)
        it.fence.tick(5.0, 0)
        assert it.fence.step is None
        it.fence.tick(1.0, 1)
        await it.until(lambda: it.fence.step == "agent")
        it.fence.tick(2.0, 1)
        await it.until(lambda: it.fence.step is None)
        it.fence.tick(3.0, 1)  # not again so soon
        await asyncio.sleep(0)
        assert it.told() == ["fence-started", "fence-failed"]

    bench(tmp_path, play)


def test_not_in_the_middle_of_an_exchange(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        it.agent("exit 0", automatic=True)
        it.greet()
        it.fence.tick(5.0, 1)
        await asyncio.sleep(0)
        assert (it.fence.step, it.told()) == (None, [])
        it.node.lost()
        it.fence.tick(6.0, 1)
        await it.until(lambda: bool(it.station.writes) or it.fence.step == "agent")
        await it.until(lambda: it.fence.step is None)
        assert it.told() == ["fence-started", "fenced"]

    bench(tmp_path, play)


def test_the_agent_ends_with_the_pair(tmp_path: Path) -> None:
    async def play(it: Bench) -> None:
        up = it.held()
        it.agent(f"echo $$ > {up}; sleep 600", automatic=True)
        it.fence.tick(5.0, 1)
        pid = os.pidfd_open(int(await asyncio.to_thread(up.read_text)))
        it.fence.close()
        await it.until(lambda: it.fence.step is None)
        assert it.node.state is State.CUT
        await asyncio.to_thread(select.select, [pid], [], [])
        os.close(pid)

    bench(tmp_path, play)
