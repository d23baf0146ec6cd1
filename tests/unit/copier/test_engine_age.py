"""copier/engine: how old the content of the secondary becomes while hosts write more than fits."""

from __future__ import annotations

import random

import pytest

from bitmapd.copier.plan import DUE_SHARE, HOT_PERIOD_S
from tests.support.mirror import BLOCK, PER_EXTENT, Mirror, begun

ERA_S = 1.0
STEP_S = 0.075  # of the hottest block
HOTTEST = 7


class Load:
    """Writes that never pause, and what the secondary lacks of them.

    In blocks it is a load of 20 MB/s on 375 MiB with a copy rate of 6 MiB/s, a tenth of each.
    """

    dirty_blocks = 600
    rate_blocks_per_s = 9.6
    writes_per_step = 2

    def __init__(self, writing: int, seed: int = 1) -> None:
        """`writing`: so many blocks from the first on are written."""
        self.mirror: Mirror = begun(
            extents=self.dirty_blocks // PER_EXTENT,
            rate_bytes_per_s=self.rate_blocks_per_s * BLOCK,
            limit_extents=1 << 20,
        )
        self._random = random.Random(seed)
        self._writing = writing
        self._since_s: dict[int, float] = {}  # block -> its first write that was not copied
        self.oldest_s: dict[int, float] = {}  # block -> how old its content became at most
        self.copies = 0
        mirror = self.mirror
        copied = mirror.copier.copied

        def noted(first: int, stop: int, length_bytes: int) -> None:
            copied(first, stop, length_bytes)
            for block in range(first, stop):
                self._was_copied(block)

        mirror.copier.copied = noted  # type: ignore[method-assign]
        mirror.put(0, self.dirty_blocks)
        for block in range(self.dirty_blocks):
            self._since_s[block] = mirror.loop.now_s

    def _was_copied(self, block: int) -> None:
        now_s = self.mirror.loop.now_s
        self.copies += 1
        since_s = self._since_s.pop(block, None)
        if since_s is not None:
            self.oldest_s[block] = max(self.oldest_s.get(block, 0.0), now_s - since_s)

    def run(self, seconds: float) -> None:
        mirror, steps = self.mirror, round(seconds / STEP_S)
        for _ in range(steps):
            chosen = [self._random.randrange(self._writing) for _ in range(self.writes_per_step)]
            for block in (HOTTEST, *chosen):
                mirror.put(block, fill=self._random.randrange(1, 256))
                self._since_s.setdefault(block, mirror.loop.now_s)
            mirror.run(STEP_S)
            told_s = mirror.copier.oldest_content_s
            assert told_s is not None
            assert told_s <= min(self._since_s.values(), default=mirror.loop.now_s)
        for block, since_s in self._since_s.items():
            age_s = mirror.loop.now_s - since_s
            self.oldest_s[block] = max(self.oldest_s.get(block, 0.0), age_s)

    @property
    def bound_s(self) -> float:
        return DUE_SHARE * self.dirty_blocks / self.rate_blocks_per_s + HOT_PERIOD_S + 2 * ERA_S


@pytest.mark.parametrize("writing", [Load.dirty_blocks, 60])
def test_the_age_of_every_block_is_bounded_by_what_is_dirty_and_the_rate(writing: int) -> None:
    load = Load(writing)
    load.run(200.0)
    assert len(load.oldest_s) == load.dirty_blocks
    assert max(load.oldest_s.values()) <= load.bound_s
    # What one sweep of three quarters of the link takes is what most of them see.
    sweep_s = load.dirty_blocks / load.rate_blocks_per_s * DUE_SHARE / (DUE_SHARE - 1)
    assert sorted(load.oldest_s.values())[load.dirty_blocks // 2] <= sweep_s + 2 * ERA_S
    told_s = load.mirror.copier.oldest_content_s
    assert told_s is not None
    assert load.mirror.loop.now_s - told_s <= 2 * max(load.oldest_s.values())


def test_the_hottest_block_is_copied_once_a_period() -> None:
    load = Load(Load.dirty_blocks)
    load.run(100.0)
    load.oldest_s.clear()
    load.run(60.0)
    assert load.oldest_s[HOTTEST] <= HOT_PERIOD_S + 2 * ERA_S


def test_no_link_lies_idle() -> None:
    load = Load(Load.dirty_blocks)
    load.run(100.0)
    assert load.copies >= 0.97 * 100.0 * load.rate_blocks_per_s
