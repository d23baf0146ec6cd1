"""The spool's file: it has no name, is as large as it was to be, and is written and read."""

from __future__ import annotations

import asyncio
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bitmapd.errors import BitmapdError
from bitmapd.media.aio import AioEngine
from bitmapd.media.buffers import aligned
from bitmapd.media.waiting import completion
from bitmapd.volume.spoolfile import open_spool

SIZE = 1 << 20


def test_it_leaves_no_trace_and_brings_back_what_it_was_given(tmp_path: Path) -> None:
    async def run() -> None:
        engine = AioEngine(asyncio.get_running_loop())
        device = await engine.call(partial(open_spool, str(tmp_path), SIZE, engine))
        assert device.size_bytes == SIZE
        assert list(tmp_path.iterdir()) == []
        written, read = aligned(4096), aligned(4096)
        written[:] = b"x" * 4096
        await completion(partial(device.write, 8192, written))
        await completion(partial(device.read, 8192, read))
        assert read == written
        await engine.call(device.close)
        engine.close()

    asyncio.run(run())


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_the_loop_does_not_wait_for_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """That hangs, as one does which allocates while its journal is full."""
    goes_on = threading.Event()
    right = getattr(os, call)

    def hangs(*arguments: Any) -> int:
        goes_on.wait(30)
        return int(right(*arguments))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        engine = AioEngine(loop)
        device = await engine.call(partial(open_spool, str(tmp_path), SIZE, engine))
        monkeypatch.setattr(os, call, hangs)
        ended: list[OSError | None] = []
        (device.read if call == "preadv" else device.write)(0, aligned(4096), ended.append)
        engine.kick()
        await asyncio.sleep(0.05)
        assert ended == []
        goes_on.set()
        async with asyncio.timeout(30):
            while not ended:
                await asyncio.sleep(0.001)
        assert ended == [None]
        await engine.call(device.close)
        engine.close()

    asyncio.run(run())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        engine = AioEngine(asyncio.get_running_loop())
        with pytest.raises(BitmapdError, match="gone: No such file"):
            open_spool(str(tmp_path / "gone"), SIZE, engine)
        engine.close()

    asyncio.run(run())
