"""How much the record may name, and what happens when it would have to be more."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.volumes import KIB, MIB, Volume, noise

EXTENTS = 256
SIZE = EXTENTS * MIB
LIMIT = 64  # extents; the smallest there is
OPTIONS = ["--initial-sync", "skip", "--era-interval", "100ms", "--record-limit", f"{LIMIT}MiB"]


def touch(volume: Volume, extents: list[int], depth: int = 8) -> None:
    """One small write into each of these extents, several at a time, acknowledged."""
    with volume.host() as host:
        for extent in extents:
            host.submit(rawnbd.WRITE, extent * MIB, 4 * KIB, noise(extent, 4 * KIB))
            if host.in_flight == depth:
                assert host.reply().error == 0
        while host.in_flight:
            assert host.reply().error == 0
        host.disconnect()


def test_case_10_beyond_the_limit_dirty_extents_stay_and_writes_go_on(short_path: Path) -> None:
    """While nothing can be copied the record outgrows its limit rather than lose one extent."""
    order = list(range(0, EXTENTS, 2))
    random.Random(10).shuffle(order)
    with Volume(short_path, SIZE, options=OPTIONS) as volume:
        volume.create()
        volume.start()
        volume.ask("pause")
        touch(volume, order)
        figures = volume.ask("status")
        assert figures["record_limit_bytes"] == LIMIT * MIB
        assert len(order) <= figures["record_extents"]
        # Predictions stay in bounds when there is no room for them.
        assert figures["record_extents"] <= len(order) * 3 // 2 + LIMIT // 4
        volume.kill()
        assert volume.differing() == set(order)
        assert set(order) <= volume.recorded()
        volume.start()
        volume.ask("resume")  # a pause lasts over a crash
        volume.wait_in_sync()
        assert volume.until(lambda status: status["record_extents"] <= LIMIT)
        volume.stop()
        assert volume.recorded() == set()
        assert volume.differing() == set()


def test_case_10_clean_extents_make_room(short_path: Path) -> None:
    """All of the volume is written in a random order, and the record keeps to its limit."""
    order = list(range(EXTENTS))
    random.Random(11).shuffle(order)
    with Volume(short_path, SIZE, options=OPTIONS) as volume:
        volume.create()
        volume.start()
        for start in range(0, EXTENTS, 16):
            touch(volume, order[start : start + 16])
            volume.wait_in_sync()
            volume.until(lambda status: status["record_extents"] <= LIMIT)
        figures = volume.ask("status")
        assert figures["writes_total"] == EXTENTS
        assert figures["misses_total"] > LIMIT
        # What a crash costs is bounded by the limit: the stored record follows with the next tick.
        volume.until(lambda _: len(volume.recorded()) <= LIMIT + LIMIT // 8 + 16)
        volume.kill()
        recorded = len(volume.recorded())
        assert recorded <= LIMIT + LIMIT // 8 + 16
        volume.start()
        with volume.events() as events:
            assert events.wait("recovery-finished")["bytes_total"] == recorded * MIB
        volume.wait_in_sync()
        volume.stop()
        assert volume.differing() == set()


def test_case_10_a_limit_can_be_changed_while_running(short_path: Path) -> None:
    options = [*OPTIONS[:-1], f"{2 * LIMIT}MiB"]
    with Volume(short_path, SIZE, options=options) as volume:
        volume.create()
        volume.start()
        touch(volume, list(range(2 * LIMIT)))
        volume.wait_in_sync()
        volume.until(lambda status: LIMIT < status["record_extents"] <= 2 * LIMIT)
        volume.dmctl("set", volume.name, f"record-limit={LIMIT}MiB")
        figures = volume.until(lambda status: status["record_extents"] <= LIMIT)
        assert figures["record_limit_bytes"] == LIMIT * MIB
        volume.dmctl("set", volume.name, "record-limit=auto", "resync-target=10s")
        assert volume.ask("status")["record_limit_bytes"] > LIMIT * MIB
        volume.stop()


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_record_of_an_idle_volume_shrinks_to_nothing(short_path: Path) -> None:
    """Within a minute of being in sync; then not even a crash makes anything be copied."""
    with Volume(short_path, SIZE, options=OPTIONS) as volume:
        volume.create()
        volume.start()
        touch(volume, list(range(40)))
        volume.wait_in_sync()
        assert volume.ask("status")["record_extents"] >= 40
        volume.until(lambda status: status["record_extents"] == 0, timeout_s=60)
        clears = volume.ask("status")["record_clears_total"]
        assert clears > 0
        # The stored one follows within seconds.
        volume.until(lambda status: not volume.recorded())
        volume.kill()
        volume.start()
        figures = volume.ask("status")
        assert figures["state"] == "in-sync"
        assert figures["last_recovery"]["extents"] == 0
        assert figures["copied_bytes_total"] == 0
        volume.stop()
        assert volume.differing() == set()
