"""A volume that is to grow asks its receiver first (edge).

1. The receiver has taken the larger size up, durably, before anything of it happens here.
2. The question is a greeting: the connection is given up, and the next one begins with the larger
   size.  What was sent of the open point stays where it is.
3. A receiver that refuses, or is away, leaves the volume as it is, and points go on.

A crash leaves a receiver of the larger size, which takes points of the smaller one all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from bitmapd.errors import BitmapdError, NoSpaceError, UnreachableError
from bitmapd.peer.frames import ErrorCode
from bitmapd.peer.words import Error
from bitmapd.volume.sending import ReceiverLink

OFFER_S: Final = 30.0  # for a connection, and for what waits to be applied

_FOR_GOOD: Final = (ErrorCode.SIZE, ErrorCode.OTHER)


async def offer(
    link: ReceiverLink,
    name: str,
    size_bytes: int,
    until: Callable[[Callable[[], bool]], Awaitable[None]],
) -> None:
    """Return when the receiver has room for so large a volume.  UnreachableError, NoSpaceError."""
    uplink = link.sender.uplink

    def is_taken() -> bool:
        theirs = link.receiver
        return theirs is not None and theirs.size_bytes >= size_bytes

    def is_refused() -> bool:
        return link.refusal is not None and link.refusal.code in _FOR_GOOD

    if not uplink.is_ready:
        raise UnreachableError(
            f"the receiver of volume '{name}' is away, and has to take up the larger size first",
            hint=f"'dmctl events {name} --now' says why; nothing was changed",
        )
    if is_taken():
        return
    link.refusal = None
    uplink.offer(size_bytes)
    uplink.close(reason="the volume grows")
    try:
        async with asyncio.timeout(OFFER_S):
            await until(lambda: is_taken() or is_refused())
    except TimeoutError:
        pass
    if not is_taken():
        uplink.offer(0)
        raise _refused(name, link.refusal)


def _refused(name: str, refusal: Error | None) -> BitmapdError:
    if refusal is None or refusal.code not in _FOR_GOOD:
        why = "it did not come back" if refusal is None else refusal.text
        return UnreachableError(
            f"the receiver of volume '{name}' has not taken up the larger size within {OFFER_S:g}"
            f" s: {why}",
            hint="the volume stays as it is; try again",
        )
    return NoSpaceError(
        f"the receiver of volume '{name}' cannot take up the larger size: {refusal.text}",
        hint="the volume stays as it is; enlarge what is too small there, then try again",
    )
