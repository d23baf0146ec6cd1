"""From operations with a `done` callback, and from calls that block, to `await` (edge)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

Args = ParamSpec("Args")
Result = TypeVar("Result")


async def completion(submit: Callable[[Callable[[Exception | None], None]], None]) -> None:
    """Await an operation with a `done` callback; its error is raised."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    submit(done)
    await future


class Aside:
    """A thread for calls that block, one after another in the order in which they were asked for.

    A call that was asked for is carried out, even if nobody waits for it any longer.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self.at_work = 0  # calls that were asked for and have not returned

    async def __call__(
        self, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        loop = asyncio.get_running_loop()
        returned = loop.run_in_executor(self._pool, partial(call, *args, **kwargs))
        self.at_work += 1
        returned.add_done_callback(self._returned)
        return await asyncio.shield(returned)

    def _returned(self, _: asyncio.Future[Any]) -> None:
        self.at_work -= 1

    def close(self) -> None:
        """The thread ends with its last call."""
        self._pool.shutdown(wait=False)
