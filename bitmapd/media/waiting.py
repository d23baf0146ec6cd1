"""From operations with a `done` callback to `await` (edge)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from bitmapd.media.base import Done


async def completion(submit: Callable[[Done], None]) -> None:
    """Await an operation with a `done` callback; its OSError is raised."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: OSError | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    submit(done)
    await future
