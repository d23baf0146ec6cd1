"""`dmctl verify` on a running volume: one comparison, its progress and its report."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

from bitmapd.config import VolumeConfig
from bitmapd.copier.comparing import Comparison, Side
from bitmapd.copier.engine import CopyState
from bitmapd.copier.verify import Verify, VerifyResult
from bitmapd.errors import BitmapdError, UnreachableError, WrongStateError
from bitmapd.gate.gate import Gate
from bitmapd.record.geometry import Geometry
from bitmapd.volume.mirror import Mirror

VERIFY_POOL_BYTES = 16 << 20
_PROGRESS_S = 0.5

Emit = Callable[..., None]
Progress = Callable[[dict[str, Any]], Awaitable[None]]


def unreadable(result: VerifyResult, config: VolumeConfig) -> list[tuple[str, str, int, int]]:
    """(side, name, offset, length) of what could not be read, and so was not compared."""
    return [
        (side, name, offset, length)
        for side, name, runs in (
            ("primary", config.primary, result.unreadable_primary),
            ("secondary", config.secondary, result.unreadable_secondary),
        )
        for offset, length in runs
    ]


def tell(result: VerifyResult, config: VolumeConfig, emit: Emit) -> dict[str, Any]:
    """An event for each place that is not as it should be; the answer to `dmctl verify`."""
    for side, name, offset, length in unreadable(result, config):
        emit(
            "verify-error",
            device=name,
            offset_bytes=offset,
            length_bytes=length,
            message=f"cannot read the {side} at byte {offset}: it was not compared there",
        )
    for offset, length in result.unexpected:
        emit(
            "unexpected-difference",
            offset_bytes=offset,
            length_bytes=length,
            message=f"primary and secondary differ at byte {offset}, outside the record",
        )
    return {
        "compared_bytes": result.compared_bytes,
        "unexpected_bytes": result.unexpected_bytes,
        "repaired_bytes": result.repaired_bytes,
        "undecided_blocks": result.undecided_blocks,
        "unexpected": [list(run) for run in result.unexpected],
        "unreadable_bytes": result.unreadable_bytes,
        "unreadable": [
            {"side": side, "offset_bytes": offset, "length_bytes": length}
            for side, _, offset, length in unreadable(result, config)
        ],
    }


class Verifying:
    """One comparison of both sides while hosts use the volume."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        geometry: Geometry,
        gate: Gate,
        comparison: Comparison,
        config: VolumeConfig,
        give_up: Callable[[OSError], None] | None,
        *,
        repair: bool,
    ) -> None:
        """`give_up` ends what the comparison waits for, if that may take its time."""
        self._finished: asyncio.Future[tuple[OSError | None, VerifyResult]] = loop.create_future()
        self._config = config
        self._give_up = give_up
        self._verify = Verify(
            geometry,
            gate,
            comparison,
            loop,
            repair=repair,
            done=lambda error, result: self._finished.set_result((error, result)),
        )

    def cancel(self, number: int, reason: str) -> None:
        error = OSError(number, reason)
        self._verify.cancel(error)
        if self._give_up is not None:
            self._give_up(error)

    async def run(self, progress: Progress) -> VerifyResult:
        """Withdrawn if the caller is cancelled.

        If it ends early: UnreachableError for the secondary, WrongStateError if it was cancelled
        for what happens to the volume, BitmapdError for the primary and the record.
        """
        finished = self._finished
        try:
            self._verify.start()
            while not finished.done():
                await asyncio.wait([finished], timeout=_PROGRESS_S)
                await progress({"progress": round(self._verify.progress, 4)})
            error, result = finished.result()
        finally:
            if not finished.done():
                self.cancel(errno.ECANCELED, "the request was withdrawn")
        if error is not None:
            raise self._ended_early(error)
        return result

    def _ended_early(self, error: OSError) -> BitmapdError:
        reason = error.strerror or str(error)
        failed = self._verify.failed
        if failed is not None:
            name = self._config.primary if failed is Side.PRIMARY else self._config.secondary
            reason = f"cannot read the {failed.value} {name}: {reason}"
        message = f"verify ended early: {reason}"
        if failed is Side.SECONDARY or error.errno == errno.ENOTCONN:
            return UnreachableError(message)
        if error.errno == errno.ECANCELED:
            return WrongStateError(message)
        return BitmapdError(message)


async def repaired(
    gate: Gate,
    copier: Mirror,
    now_s: float,
    until: Callable[[Callable[[], bool]], Awaitable[None]],
) -> None:
    """Return when what was marked before `now_s` is durable on the secondary.

    If copying stands still before that, the error says so: the record names what is left.
    """

    def copied() -> bool:
        oldest_s = gate.oldest_dirty_s()
        return gate.in_sync or (oldest_s is not None and oldest_s > now_s)

    copier.wake()
    await until(lambda: copied() or copier.state is not CopyState.RUNNING or copier.stuck)
    if copied():
        return
    left = "what differs is in the record, and has not been copied"
    if copier.state is CopyState.LINK_DOWN:
        raise UnreachableError(f"{left}: the secondary went away", hint="it is copied later")
    if copier.state is CopyState.RUNNING:
        raise BitmapdError(f"{left}: one side refuses it", hint="'dmctl events' says which")
    why = "paused" if copier.state is CopyState.PAUSED else "stopped"
    raise WrongStateError(f"{left}: the volume was {why}")
