"""copier/engine: how fast, how much at a time, and how much is left to hosts."""

from __future__ import annotations

import pytest

from bitmapd.copier.load import YIELD_BYTES_PER_S, YIELD_PIECE_BYTES, YIELD_SHARE, HostLoad
from tests.support.mirror import BLOCK, Mirror, begun, equal
from tests.support.sim import drain

MIB = 1 << 20


@pytest.fixture
def mirror() -> Mirror:
    return begun()


# -- how fast ---------------------------------------------------------------------------------


def test_the_rate_limit_holds() -> None:
    mirror = begun(rate_bytes_per_s=4 * BLOCK)
    mirror.put(0, 32)
    mirror.run(1.0)
    for elapsed in range(1, 6):
        mirror.run(1.0)
        # One burst at the beginning, then one piece a second.
        assert mirror.copier.copied_bytes <= (1 + elapsed) * 4 * BLOCK
    assert mirror.copier.copied_bytes >= 5 * 4 * BLOCK
    mirror.copier.throttle.set_rate(None)
    mirror.run(2.0)
    mirror.run(2.0)
    assert equal(mirror)


def test_one_wait_for_the_throttle_at_a_time() -> None:
    mirror = begun(rate_bytes_per_s=BLOCK)
    mirror.put(0, 12)
    mirror.run(1.0)
    for _ in range(100):
        mirror.copier.wake()
        mirror.run(0.01)
    waiting = [
        timer
        for timer in mirror.loop._timers
        if not timer.cancelled and timer.callback.__self__ in (mirror.copier, mirror.copier.rounds)
    ]
    assert len(waiting) == 2, "the end of the era and the throttle"


def test_copies_wait_for_memory() -> None:
    mirror = begun(pool_bytes=4 * BLOCK)
    mirror.put(0, 12)
    other = mirror.pool.take(4 * BLOCK)
    assert other is not None
    mirror.run(1.0)
    mirror.copier.wake()
    mirror.run(1.0)
    assert mirror.primary.asked("read") == []
    mirror.pool.give(other)
    mirror.run()
    assert equal(mirror)
    assert mirror.pool.out_bytes == 0


def test_the_window_bounds_what_is_in_flight() -> None:
    mirror = begun(
        extents=24,
        extent_bytes=MIB,
        block_bytes=64 << 10,
        piece_bytes=3 * MIB,
        pool_bytes=1 << 30,
    )
    mirror.store.add([(0, 24)], (), lambda error: None)
    drain(mirror.loop, mirror.record)
    mirror.gate.take_recorded()
    mirror.copier.wake()
    mirror.turn()
    # 8 MiB at a time: two pieces of 3 MiB fit, a third does not.
    assert [n // MIB for _, _, n in mirror.primary.calls] == [3, 3]
    mirror.finish(mirror.primary)
    assert len(mirror.primary.calls) == 2
    mirror.finish(mirror.secondary)
    assert len(mirror.primary.calls) == 3
    mirror.run()
    assert mirror.gate.in_sync


def test_small_copies_are_many_at_a_time() -> None:
    mirror = begun(extents=40)
    for block in range(0, 160, 2):
        mirror.write(block)
    drain(mirror.loop, mirror.record, mirror.primary)
    mirror.loop.advance(1.0)
    assert mirror.pending(mirror.primary) == ["read"] * 64
    mirror.run()
    assert equal(mirror)


class Hosts:
    """A mirror of 64 KiB blocks, 4 MiB of which are to be copied, while a host reads."""

    def __init__(self, limit_extents: int = 100) -> None:
        self.mirror = begun(
            extents=4,
            extent_bytes=MIB,
            block_bytes=64 << 10,
            piece_bytes=MIB,
            pool_bytes=1 << 30,
            limit_extents=limit_extents,
        )
        mirror = self.mirror
        mirror.store.add([(0, 4)], (), lambda error: None)
        drain(mirror.loop, mirror.record)
        mirror.gate.take_recorded()
        mirror.loop.advance(0.5)

    def read(self) -> None:
        self.mirror.gate.reads += 1

    def lengths(self) -> list[int]:
        return [n for kind, _, n in self.mirror.primary.calls if kind == "read"]


def test_copying_yields_to_hosts_at_work() -> None:
    hosts = Hosts()
    hosts.read()
    hosts.mirror.copier.wake()
    hosts.mirror.turn()
    lengths = hosts.lengths()
    assert set(lengths) == {YIELD_PIECE_BYTES}
    assert sum(lengths) == MIB, "no more than one burst at once"
    hosts.mirror.run(0.005)
    assert sum(hosts.lengths()) <= MIB + 0.006 * (YIELD_BYTES_PER_S + MIB) + YIELD_PIECE_BYTES
    hosts.mirror.run(0.5)
    hosts.mirror.run(0.5)
    assert hosts.mirror.gate.in_sync, "quiet hosts hold nothing back"


def test_copying_does_not_yield_to_quiet_hosts() -> None:
    hosts = Hosts()
    hosts.mirror.copier.wake()
    hosts.mirror.turn()
    assert hosts.lengths() == [MIB] * 4


def test_copying_does_not_yield_when_the_record_has_outgrown_its_limit() -> None:
    hosts = Hosts(limit_extents=3)
    hosts.read()
    hosts.mirror.copier.wake()
    hosts.mirror.turn()
    assert hosts.lengths() == [MIB] * 4


def test_host_load_allows_what_hosts_write_and_a_share() -> None:
    load = HostLoad(BLOCK)
    assert not load.active(0.0, 0, 0)
    assert load.active(1.0, 1, 50 << 20)
    assert load.throttle.rate_bytes_per_s == YIELD_BYTES_PER_S + (50 << 20) * YIELD_SHARE
    assert load.active(1.009, 1, 50 << 20)
    assert not load.active(1.02, 1, 50 << 20)
    sampled = load.throttle.rate_bytes_per_s
    assert sampled == YIELD_BYTES_PER_S + (50 << 20) * YIELD_SHARE, "sampled seldom"
    assert load.active(1.2, 2, 50 << 20)
    assert load.throttle.rate_bytes_per_s == YIELD_BYTES_PER_S


@pytest.mark.parametrize(
    ("block_kib", "least_mib_per_s"), [(4, 32), (64, 32), (128, 64), (256, 128), (1024, 128)]
)
def test_copying_beside_hosts_takes_as_many_blocks_of_any_size(
    block_kib: int, least_mib_per_s: int
) -> None:
    load = HostLoad(block_kib << 10)
    assert load.throttle.rate_bytes_per_s == least_mib_per_s * MIB
    load.active(1.0, 1, 0)
    assert load.throttle.rate_bytes_per_s == least_mib_per_s * MIB
