"""The end of a view, once, whoever ends it and for whatever reason."""

from __future__ import annotations

import asyncio
import errno
from typing import Any
from unittest.mock import AsyncMock, Mock

from bitmapd.volume.drill import Drill


def test_a_view_that_fails_while_somebody_ends_it_ends_once() -> None:
    async def test() -> None:
        faults: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: faults.append(what))
        drained = asyncio.Event()
        engine: Any = Mock(call=AsyncMock(), after_reap=[])
        drill = Drill("vol0", Mock(), Mock(), engine, Mock(), Mock())

        async def drain(timeout_s: float) -> None:
            await drained.wait()

        server: Any = Mock(drain=AsyncMock(side_effect=drain))
        engine.after_reap.append(server.flush_replies)
        drill._server, drill._overlay, drill._applier = server, Mock(), Mock()
        drill._view = Mock(when_idle=lambda call: call())
        ends = asyncio.ensure_future(drill.end())
        await asyncio.sleep(0)
        drill._wanted = Mock()
        drill._failed(OSError(errno.ENOSPC, "full"))
        drained.set()
        await ends
        await asyncio.sleep(0)
        assert (faults, engine.call.await_count, server.drain.await_count) == ([], 1, 1)

    asyncio.run(test())
