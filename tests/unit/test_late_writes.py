"""A server that carries out, after its client is gone, what it had received before."""

from __future__ import annotations

import errno

from bitmapd.copier.engine import Copier, CopyState
from bitmapd.copier.reconnect import LATE_WRITES_S
from bitmapd.copier.throttle import Backoff, Throttle
from bitmapd.gate.gate import Gate
from bitmapd.media.buffers import BufferPool, aligned
from bitmapd.record.geometry import Geometry
from bitmapd.record.store import RecordStore
from tests.support.policies import KeepNothing
from tests.support.records import blank_image, load_image
from tests.support.sim import SimDisk, SimLoop, drain

GEOMETRY = Geometry(1 << 20, 65536, 4096)


def test_a_late_write_of_a_lost_connection_is_covered() -> None:
    loop = SimLoop()
    image = blank_image(GEOMETRY)
    record = SimDisk("record", len(image), image)
    primary = SimDisk("primary", GEOMETRY.size_bytes)
    secondary = SimDisk("secondary", GEOMETRY.size_bytes)
    secondary.writes_late = True
    store = RecordStore(GEOMETRY, load_image(image), record, loop, lambda *a, **k: None)
    gate = Gate(GEOMETRY, primary, store, KeepNothing(), loop, limit_extents=64)
    copier = Copier(
        GEOMETRY,
        gate,
        primary,
        secondary,
        loop,
        BufferPool(loop, 1 << 20),
        Throttle(None),
        Backoff(jitter=lambda: 0.0),
        lambda *a, **k: None,
        check_secondary=lambda: None,
        era_interval_s=1.0,
    )
    copier.start()

    def write(byte: bytes) -> None:
        buffer = aligned(4096)
        buffer[:] = byte * 4096
        gate.write(8192, buffer, lambda error: None)
        drain(loop, record, primary)

    write(b"1")
    loop.advance(1.0)
    drain(loop, primary)
    (stuck,) = secondary.pending
    assert stuck.kind == "write"

    # The connection is lost with the write on its way; the server keeps it.
    secondary.pending.clear()
    secondary.connected = False
    stuck.done(OSError(errno.ENOTCONN, "the connection was lost"))
    assert copier.state is CopyState.LINK_DOWN
    write(b"2")
    for _ in range(4):
        loop.advance(1.0)
        drain(loop, record, primary, secondary)
    assert copier.state is CopyState.RUNNING
    assert secondary.visible[8192:12288] == b"2" * 4096
    assert not gate.in_sync, "the old write may still come"
    assert not gate.is_clean(0)

    # And now it comes.
    secondary.visible[8192:12288] = stuck.data
    secondary.durable[8192:12288] = stuck.data
    gate.tick()
    assert store.covers(0, 1)
    loop.advance(LATE_WRITES_S)
    drain(loop, record, primary, secondary)
    loop.advance(1.0)
    drain(loop, record, primary, secondary)
    assert gate.in_sync
    assert secondary.durable[8192:12288] == b"2" * 4096
