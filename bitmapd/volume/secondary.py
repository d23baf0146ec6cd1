"""The secondary of a volume: a device, a file, or the export of a server (edge).

It may be away when the volume starts, and come and go later; the copier sees to that.  One that is
not the volume's own is never written.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

from bitmapd.config import VolumeConfig
from bitmapd.errors import ForeignRecordError, OtherMediumError, UnreachableError, WrongStateError
from bitmapd.media.aio import AioEngine
from bitmapd.media.base import Target
from bitmapd.media.claims import Claim
from bitmapd.media.kdevice import KernelDevice
from bitmapd.media.waiting import completion
from bitmapd.net.uri import is_uri, parse_uri

if TYPE_CHECKING:
    from bitmapd.nbd.client.target import NbdTarget

OPEN_PATIENCE_S = 5.0  # for a server that does not answer while hosts wait to be served
# As nbdcopy opens; full copies: 0.61 to 0.68, 1.10 to 1.21 of its speed.  A thread of each that
# sends is no faster and takes 1.2 to 1.6 of the processor time (files in memory).
CONNECTIONS = 4

_UNSHARED = (
    "its server does not say that several clients may use it at a time: a flush of one node would"
    " not cover what the other has copied"
)

Emit = Callable[..., None]
Mismatch = Callable[[int], str | None]  # by size: why it is not the volume's secondary


def make_secondary(
    config: VolumeConfig,
    loop: asyncio.AbstractEventLoop,
    engine: AioEngine,
    mismatch: Mismatch,
    claim: Claim,
) -> Target:
    """A device is compared with what the record knows in the course of opening, off the loop."""
    if is_uri(config.secondary):
        return _make_client(config, loop)
    return KernelDevice(
        config.secondary, engine, claim=claim, defer=True, aside=True, mismatch=mismatch
    )


def _make_client(config: VolumeConfig, loop: asyncio.AbstractEventLoop) -> NbdTarget:
    """Only a volume with such a secondary has the 0.6 MiB of what speaks to it."""
    from bitmapd.nbd.client.target import NbdTarget  # noqa: PLC0415

    uri = parse_uri(config.secondary)
    certificates = config.tls_certificates if uri.tls else None
    return NbdTarget(loop, uri, tls_certificates=certificates, connections=CONNECTIONS)


async def open_secondary(
    secondary: Target,
    loop: asyncio.AbstractEventLoop,
    mismatch: Mismatch,
    emit: Emit,
    *,
    shared: bool,
) -> None:
    """One that is away does not keep hosts from working; a wrong one does, and one that a pair
    cannot share."""
    patience: asyncio.TimerHandle | None = None
    if not isinstance(secondary, KernelDevice):
        # Closing ends the attempt; the copier makes the next one, while hosts are served.
        patience = loop.call_later(OPEN_PATIENCE_S, secondary.close)
    try:
        await completion(secondary.open)
    except OtherMediumError as error:
        raise _foreign(error) from error
    except OSError as error:
        emit(
            "link-down",
            secondary=secondary.name,
            message=f"cannot open the secondary: {error.strerror or error}",
        )
        return
    finally:
        if patience is not None:
            patience.cancel()
    if (wrong := wrong_secondary(secondary, mismatch, shared=False)) is not None:
        raise _foreign(wrong)
    if shared and not secondary.takes_many:
        raise unshared(secondary.name)


def unshared(name: str) -> WrongStateError:
    return WrongStateError(
        f"secondary {name}: {_UNSHARED}",
        hint="let it offer multi-connection, such as by 'qemu-nbd --shared=0' from version 7.1 on;"
        " one server process has to serve both nodes",
    )


def _foreign(wrong: OSError) -> ForeignRecordError:
    return ForeignRecordError(
        wrong.strerror or str(wrong),
        hint="nothing was written; give the volume its own secondary back",
    )


def wrong_secondary(secondary: Target, mismatch: Mismatch, *, shared: bool) -> OSError | None:
    """What the copier is told of a secondary that it has opened again; does not block."""
    if shared and not secondary.takes_many:
        return OSError(errno.ENOTSUP, _UNSHARED)
    if isinstance(secondary, KernelDevice):  # it would not have been opened
        return None
    reason = mismatch(secondary.size_bytes)
    return None if reason is None else OSError(errno.ENODEV, reason)


async def present_size(
    secondary: Target, config: VolumeConfig, loop: asyncio.AbstractEventLoop
) -> tuple[int, int]:
    """Its size and that of its blocks, in bytes.  A device that is away has none; a server is
    asked over a connection of its own."""
    if isinstance(secondary, KernelDevice):
        size_bytes = await secondary.present_size_bytes() if secondary.connected else 0
        return size_bytes, secondary.block_size_bytes
    probe = _make_client(config, loop)
    try:
        await completion(probe.open)
        return probe.size_bytes, probe.block_size_bytes
    except OSError as error:
        raise UnreachableError(
            f"secondary {config.secondary} cannot be reached: {error.strerror or error}"
        ) from error
    finally:
        probe.close()


def leave_at_once(secondary: Target | None) -> None:
    """A server that does not answer must not hold up a stop in a hurry: end its requests.  A volume
    with a receiver (None) waits for none.

    What they were about is dirty, and stays in the record.
    """
    if secondary is not None and not isinstance(secondary, KernelDevice):
        secondary.close()
