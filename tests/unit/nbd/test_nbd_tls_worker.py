"""nbd.server.tls_worker and stream: steps of TLS handshakes beside the loop."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from bitmapd.nbd.server.stream import Stream
from bitmapd.nbd.server.tls_worker import Step, TlsWorker
from bitmapd.net.tls import server_context
from tests.support.nbdcerts import make_certificates


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await test

    asyncio.run(limited())


class Steps:
    """Steps that tell when they were carried out; the first one waits for `go`."""

    def __init__(self, worker: TlsWorker) -> None:
        self.worker = worker
        self.go = threading.Event()
        self.begun = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.order: list[str] = []
        self.results: dict[str, Exception | None] = {}
        self.ended = asyncio.Event()
        self.awaited = 0

    def make(self, name: str, error: Exception | None = None) -> Step:
        def work() -> None:
            if name == "first":
                self.loop.call_soon_threadsafe(self.begun.set)
                self.go.wait(20)
            self.order.append(name)
            if error is not None:
                raise error

        def done(result: Exception | None) -> None:
            self.results[name] = result
            if len(self.results) == self.awaited:
                self.ended.set()

        return Step(name.partition("-")[0], work, done)


def test_steps_go_round_the_origins_and_hand_in_what_they_raise() -> None:
    async def test() -> None:
        worker = TlsWorker(asyncio.get_running_loop())
        steps = Steps(worker)
        failure = MemoryError("no memory")
        first = steps.make("first")
        worker.submit(first)
        await steps.begun.wait()
        flood = [steps.make(f"flood-{number}") for number in range(4)]
        for step in flood:
            worker.submit(step)
        worker.submit(steps.make("victim-1", failure))
        assert worker.withdraw(flood[2])
        assert not worker.withdraw(first)
        steps.awaited = 5
        steps.go.set()
        await steps.ended.wait()
        assert steps.order == ["first", "flood-3", "victim-1", "flood-1", "flood-0"]
        assert steps.results["victim-1"] is failure
        assert steps.results["flood-0"] is None
        assert worker.withdraw(first)
        worker.close()

    run(test())


def test_who_has_answered_does_not_compete_with_first_steps_again() -> None:
    async def test() -> None:
        worker = TlsWorker(asyncio.get_running_loop())
        steps = Steps(worker)
        answering = steps.make("a-answering")
        steps.awaited = 1
        worker.submit(answering)
        await steps.ended.wait()
        worker.submit(steps.make("first"))
        await steps.begun.wait()
        steps.awaited = 5
        for number in range(3):
            worker.submit(steps.make(f"a-{number}"))
        worker.submit(answering)
        assert worker.withdraw(answering)
        worker.submit(answering)
        steps.ended.clear()
        steps.go.set()
        await steps.ended.wait()
        assert steps.order == ["a-answering", "first", "a-2", "a-answering", "a-1", "a-0"]
        worker.close()

    run(test())


def test_nothing_begins_after_close() -> None:
    async def test() -> None:
        worker = TlsWorker(asyncio.get_running_loop())
        steps = Steps(worker)
        worker.submit(steps.make("first"))
        await steps.begun.wait()
        waiting = steps.make("waiting")
        worker.submit(waiting)
        steps.awaited = 1
        steps.go.set()
        worker.close()
        worker.close()
        late = steps.make("late")
        worker.submit(late)
        await steps.ended.wait()
        assert steps.order == ["first"]
        assert worker.withdraw(waiting)
        assert worker.withdraw(late)

    run(test())


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def test_a_connection_that_was_reset_before_tls(certificates: Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        worker = TlsWorker(loop)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        ours.setblocking(False)
        before = len(os.listdir("/proc/self/fd"))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        ended: list[Exception | None] = []
        stream = Stream(loop, ours, lambda: None, lambda: None)
        told = asyncio.Event()

        def end(error: Exception | None) -> None:
            ended.append(error)
            told.set()

        stream.start_tls(server_context(certificates / "good"), worker, "o", end)
        await told.wait()
        stream.close()
        assert isinstance(ended[0], OSError)
        assert len(ended) == 1
        assert not stream.is_secure
        assert len(os.listdir("/proc/self/fd")) == before - 2
        worker.close()

    run(test())
