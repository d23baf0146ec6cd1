"""The spool's file: it has no name, is as large as it was to be, and is written and read."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

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


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def run() -> None:
        engine = AioEngine(asyncio.get_running_loop())
        with pytest.raises(BitmapdError, match="gone: No such file"):
            open_spool(str(tmp_path / "gone"), SIZE, engine)
        engine.close()

    asyncio.run(run())
