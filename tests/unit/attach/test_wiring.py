"""attach/helper: a helper that dies is replaced at once, and nothing waits for one that hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from bitmapd.attach import helper
from bitmapd.attach.helper import Wiring
from bitmapd.attach.helper_frames import HelperError

ROOT = Path(__file__).resolve().parents[3]
SOON_S = 60.0


class Bench:
    """Helpers of one volume, and what they report."""

    def __init__(self, folder: Path, *, suspends: bool) -> None:
        self.events: list[str] = []
        path = str(folder / "report")
        self._report = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._report.bind(path)
        self._report.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self.wiring = Wiring(self._loop, {"report": path}, self._emit, suspends=suspends)

    def _emit(self, event: str, **fields: Any) -> None:
        self.events.append(event)

    async def said(self) -> tuple[str, int]:
        """The next request that a helper reports, and which one it is."""
        verb, pid = (await self._loop.sock_recv(self._report, 100)).decode().split()
        return verb, int(pid)

    async def started(self) -> int:
        await self.wiring.call("work")
        assert (await self.said())[0] == "hello"
        verb, pid = await self.said()
        assert verb == "work"
        return pid

    def close(self) -> None:
        self.wiring.close()
        self._report.close()


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Bench], Awaitable[None]]], None]:
    monkeypatch.setattr(helper, "HELPER_MODULE", "tests.support.fakehelper")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(work: Callable[[Bench], Awaitable[None]], *, suspends: bool = True) -> None:
        async def main() -> None:
            bench = Bench(tmp_path, suspends=suspends)
            try:
                async with asyncio.timeout(SOON_S):
                    await work(bench)
            finally:
                bench.close()

        asyncio.run(main())

    return run


def test_2_one_that_dies_while_nobody_asks_is_replaced_at_once(run: Any) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.started()
        os.kill(first, signal.SIGKILL)
        verb, second = await bench.said()
        assert (verb, second != first) == ("hello", True)
        assert await bench.said() == ("awake", second)
        assert bench.events == ["helper-died"]
        await bench.wiring.call("work")
        assert await bench.said() == ("work", second)

    run(work)


def test_2_one_that_dies_at_work_is_replaced_though_nobody_asks_again(run: Any) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.started()
        call = asyncio.create_task(bench.wiring.call("hang"))
        assert await bench.said() == ("hang", first)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(HelperError, match="failed at 'hang'"):
            await call
        verb, second = await bench.said()
        assert (verb, second != first) == ("hello", True)
        assert await bench.said() == ("awake", second)
        assert bench.events == ["helper-died"]

    run(work)


def test_2_one_that_cannot_be_replaced_is_tried_again(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helper, "AGAIN_S", 0.0)

    async def work(bench: Bench) -> None:
        first = await bench.started()
        with monkeypatch.context() as patch:
            patch.setattr(helper, "HELPER_MODULE", "tests.support.no_such_module")
            os.kill(first, signal.SIGKILL)
            while bench.wiring.deaths < 3:
                await asyncio.sleep(0)
        verb, second = await bench.said()
        assert (verb, second != first) == ("hello", True)
        assert await bench.said() == ("awake", second)

    run(work)


def test_2_one_that_suspends_nothing_is_replaced_when_it_is_needed(run: Any) -> None:
    async def work(bench: Bench) -> None:
        first = await bench.started()
        process = bench.wiring._process
        assert process is not None
        os.kill(first, signal.SIGKILL)
        while process.returncode is None:
            await asyncio.sleep(0)
        assert await bench.started() != first
        assert bench.events == ["helper-died"]

    run(work, suspends=False)


def test_3_and_4_one_that_hangs_is_killed_and_not_waited_for(run: Any) -> None:
    async def work(bench: Bench) -> None:
        await bench.started()
        process = bench.wiring._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        bench.wiring.close()
        assert process.poll() is None, "close has waited"
        while process.returncode is None:
            await asyncio.sleep(0)
        assert process.returncode == -signal.SIGKILL
        assert bench.events == []

    run(work)


def test_after_close_none_is_replaced(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # An interpreter on a busy machine takes longer to end than the half second of grace.
    monkeypatch.setattr(helper, "GRACE_S", SOON_S)

    async def work(bench: Bench) -> None:
        await bench.started()
        process = bench.wiring._process
        assert process is not None
        bench.wiring.close()
        while process.returncode is None:
            await asyncio.sleep(0)
        assert process.returncode == 0, "it ended by itself"
        assert bench.events == []

    run(work)


def test_a_call_that_waits_when_it_is_closed_leaves_nothing_in_the_loop(run: Any) -> None:
    """A socket with the same number comes next."""

    async def work(bench: Bench) -> None:
        first = await bench.started()
        call = asyncio.create_task(bench.wiring.call("hang"))
        assert await bench.said() == ("hang", first)
        assert bench.wiring._sock is not None
        number = bench.wiring._sock.fileno()
        bench.wiring.close()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert number in (ours.fileno(), theirs.fileno())
            for sock in (ours, theirs):
                sock.setblocking(False)
            loop = asyncio.get_running_loop()
            heard = [asyncio.ensure_future(loop.sock_recv(sock, 1)) for sock in (ours, theirs)]
            await asyncio.sleep(0)
            for sock in (ours, theirs):
                sock.send(b"x")
            assert await asyncio.gather(*heard) == [b"x", b"x"]
        call.cancel()

    run(work)
