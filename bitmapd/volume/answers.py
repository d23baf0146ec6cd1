"""What the partner asks of a node's media, done in tasks and answered in a sentence (edge)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from bitmapd.errors import BitmapdError
from bitmapd.partner.growth import Answer


class Answers:
    """Work that is under way."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, work: Coroutine[Any, Any, str | None], answer: Answer) -> None:
        """`answer` hears why it cannot be: what the work returns, or the error that ends it."""
        task = self._loop.create_task(_run(work, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def end(self) -> None:
        """Return when nothing is under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)


async def _run(work: Coroutine[Any, Any, str | None], answer: Answer) -> None:
    try:
        why_not = await work
    except BitmapdError as error:
        why_not = error.message
    except OSError as error:
        why_not = f"cannot write the record: {error.strerror or error}"
    answer(why_not)
