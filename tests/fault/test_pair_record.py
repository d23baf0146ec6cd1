"""Where a pair records, as processes: what waits for what, what a loss of power costs."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty import FaultyDisk, faulty_disk
from tests.support.pairs import Pair
from tests.support.volumes import KIB, MIB, make_file, noise


@pytest.fixture
def pair(short_path: Path) -> Iterator[Pair]:
    """Both nodes rely on the other's memory."""
    with Pair(short_path, 64 * MIB, "--record-on", "partner") as made:
        made.create()
        yield made


def in_sync(pair: Pair) -> None:
    for node in (1, 2):
        pair[node].wait_in_sync()


def superblock(pair: Pair, node: int) -> dict[str, Any]:
    """What the stored record says of the pair."""
    dump = json.loads(pair[node].dmctl("--json", "record", "dump", str(pair[node].media["record"])))
    return dict(dump["superblock"]["pair"])


def both_die(pair: Pair) -> None:
    for node in (1, 2):
        pair[node].kill()


def both_start(pair: Pair) -> dict[int, dict[str, Any]]:
    for node in (1, 2):
        pair[node].dmctl_process("start", "vol0")
    return {node: pair.until(node, "paired") for node in (1, 2)}


def test_the_flag_says_what_a_loss_of_both_would_cost(pair: Pair) -> None:
    pair.start()
    for node in (1, 2):
        assert pair.partner(node)["volatile"]
        assert superblock(pair, node)["volatile"]
        assert superblock(pair, node)["record_on"] == "partner"
    in_sync(pair)
    here, there = noise(1, MIB), noise(2, MIB)
    pair[1].write(10 * MIB, here)
    pair[2].write(30 * MIB, there)
    both_die(pair)
    partners = both_start(pair)
    assert partners[1]["compared_extents_total"] == 64, "nobody can know"
    in_sync(pair)
    assert pair.equal()
    assert pair[2].read(10 * MIB, MIB) == here
    assert pair[1].read(30 * MIB, MIB) == there


def test_alone_a_node_stores_what_the_partner_held_and_the_flag_goes(pair: Pair) -> None:
    pair.start()
    in_sync(pair)
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")
    with pair[1].events() as events:
        pair[1].write(10 * MIB, noise(3, MIB))
        pair[2].kill()
        events.wait("record-destaged")
    assert pair.until(1, "cut")["volatile"] is False
    assert not superblock(pair, 1)["volatile"]
    assert set(range(10, 11)) <= pair[1].recorded()
    pair[1].write(10 * MIB, noise(4, 64 * KIB))  # ours, and stored by now
    pair[2].start()
    assert pair.until(1, "paired")["volatile"], "set again before anything counts in memory"
    for node in (1, 2):
        pair[node].dmctl("resume", "vol0")
    in_sync(pair)
    assert pair.equal()


@pytest.mark.parametrize("dead", [1, 2])
def test_the_partner_takes_over_what_only_it_has_recorded(pair: Pair, dead: int) -> None:
    pair.start()
    in_sync(pair)
    data = noise(11, 3 * MIB)
    pair[dead].write(20 * MIB, data)
    pair[dead].kill()
    alive = 3 - dead
    pair.until(alive, "cut")
    answer = json.loads(pair[alive].dmctl("--json", "takeover", "vol0", "--fenced"))
    assert answer["partner"]["compared_extents_total"] == 0
    assert pair[alive].read(20 * MIB, 3 * MIB) == data
    pair[alive].wait_in_sync()
    assert pair.equal()
    pair[dead].start()
    assert pair.until(dead, "paired")["compared_extents_total"] == 0


@pytest.mark.parametrize("words", [(), ("--now",)], ids=["clean", "now"])
def test_after_stops_nothing_is_compared(pair: Pair, words: tuple[str, ...]) -> None:
    pair.start()
    in_sync(pair)
    pair[1].write(10 * MIB, noise(5, MIB))
    pair[2].write(40 * MIB, noise(6, MIB))
    for node in (1, 2):
        pair[node].stop(*words)
        assert not superblock(pair, node)["volatile"]
    partners = both_start(pair)
    assert [partners[node]["compared_extents_total"] for node in (1, 2)] == [0, 0]
    in_sync(pair)
    assert pair.equal()


def test_what_is_relied_on_may_be_set_anew_while_a_node_is_stopped(pair: Pair) -> None:
    pair.start()
    assert pair[1].refused("set", "vol0", "record-on=both")["exit_status"] == 14
    for node in (1, 2):
        pair[node].stop()
        pair[node].dmctl("set", "vol0", "record-on=both")
        pair[node].start()
        pair.until(node, "paired")
    assert not pair[1].until(lambda status: not status["partner"]["volatile"])["partner"][
        "volatile"
    ]
    assert superblock(pair, 1)["record_on"] == "both"


# -- the partner stores -----------------------------------------------------------------------


@pytest.fixture
def storing(short_path: Path) -> Iterator[Pair]:
    """Both nodes rely on the other's stored record."""
    words = ("--record-on", "partner", "--partner-ack", "stored")
    with Pair(short_path, 64 * MIB, *words) as made:
        made.create()
        yield made


def test_what_the_partner_has_stored_needs_no_flag_and_no_comparison(storing: Pair) -> None:
    pair = storing
    pair.start()
    for node in (1, 2):
        assert not pair.partner(node)["volatile"]
        assert superblock(pair, node)["partner_ack"] == "stored"
    in_sync(pair)
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")
    here, there = noise(21, MIB), noise(22, MIB)
    pair[1].write(10 * MIB, here)
    pair[2].write(30 * MIB, there)
    both_die(pair)
    assert 10 in pair[2].recorded(), "the write was answered, so it is stored there"
    assert 30 in pair[1].recorded()
    partners = both_start(pair)
    assert [partners[node]["compared_extents_total"] for node in (1, 2)] == [0, 0]
    for node in (1, 2):
        pair[node].dmctl("resume", "vol0")
    in_sync(pair)
    assert pair.equal()
    assert pair[2].read(10 * MIB, MIB) == here
    assert pair[1].read(30 * MIB, MIB) == there


# -- a record's device fails ------------------------------------------------------------------


@pytest.fixture
def failing(short_path: Path) -> Iterator[tuple[Pair, FaultyDisk]]:
    """Node 1's record is on a disk that fails when told to."""
    backing = make_file(short_path / "record1", 2 * MIB)
    with ExitStack() as stack:
        disk = stack.enter_context(faulty_disk(short_path / "faulty", backing))
        # Predictions would leave no misses in so small a volume.
        pair = stack.enter_context(Pair(short_path, 64 * MIB, "--predictor", "lru"))
        pair[1].record = disk.path
        pair.create()
        pair.start()
        in_sync(pair)
        pair[1].until(lambda _: not pair[1].recorded())  # so that every write to it needs a page
        yield pair, disk


def test_hosts_do_not_notice_that_a_record_fails(failing: tuple[Pair, FaultyDisk]) -> None:
    pair, disk = failing
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")
    data = noise(41, MIB)
    with disk.failing("pwrite"), pair[1].events() as events:
        pair[1].write(10 * MIB, data)
        events.wait("record-fallback")
        pair[1].write(11 * MIB, data)
        assert pair.partner(1)["record_fallback"]
        assert pair.partner(2)["peer"]["record_failing"]
        assert superblock(pair, 2)["volatile"], "this record has the flag for both"
        assert [pair[node].status()["state"] for node in (1, 2)] == ["degraded", "degraded"]
    pair[1].until(lambda status: not status["partner"]["record_fallback"])
    pair[2].until(lambda status: not status["partner"]["volatile"])
    assert {10, 11} <= pair[1].recorded()
    for node in (1, 2):
        pair[node].dmctl("resume", "vol0")
    in_sync(pair)
    assert pair.equal()


def test_new_places_wait_if_the_partner_dies_as_well(failing: tuple[Pair, FaultyDisk]) -> None:
    pair, disk = failing
    with disk.failing("pwrite"):
        pair[1].write(10 * MIB, noise(42, MIB))
        pair[2].kill()
        pair.until(1, "cut")
        with pair[1].host() as host:
            host.submit(1, 33 * MIB, 4 * KIB, noise(43, 4 * KIB))
            pair[1].until(lambda status: status["partner"]["waiting_requests"] == 1)
            refused = pair[1].refused("takeover", "vol0", "--fenced")
            assert "could not be recorded" in refused["message"]
            pair[2].start()
            assert host.reply().error == 0
            host.disconnect()
        assert pair.until(2, "paired")["peer"]["record_failing"]
    in_sync(pair)
    assert pair.equal()


def test_a_node_does_not_start_without_a_record_and_the_partner_goes_on(
    failing: tuple[Pair, FaultyDisk], short_path: Path
) -> None:
    """The lock and the superblock of a record prove things that nobody else can say."""
    pair, disk = failing
    pair[1].write(10 * MIB, noise(47, MIB))
    pair[1].kill()
    with disk.failing("pread"):
        refused = pair[1].refused("start", "vol0")
        assert refused["code"] == "record-damaged"
        assert "'dmctl record replace vol0 DEVICE'" in refused["hint"]
        assert pair[2].read(30 * MIB, MIB) == bytes(MIB)
        pair[1].dmctl("record", "replace", "vol0", str(make_file(short_path / "new", MIB)))
        pair[1].start()
        assert pair.until(1, "paired")["compared_extents_total"] == 0
        in_sync(pair)
    assert pair.equal()


def test_both_die_while_one_record_alone_has_the_flag(failing: tuple[Pair, FaultyDisk]) -> None:
    pair, disk = failing
    data = noise(44, MIB)
    with disk.failing("pwrite"):
        pair[1].write(10 * MIB, data)
        # Alone, node 2 would store what it holds of node 1 and take its flag away.
        for node in (2, 1):
            pair[node].kill()
    partners = both_start(pair)
    assert partners[1]["compared_extents_total"] == 64
    assert pair[2].read(10 * MIB, MIB) == data
    in_sync(pair)
    assert pair.equal()


@pytest.mark.parametrize("lost", [1, 2])
def test_a_lost_record_is_replaced_and_the_partner_says_what_differs(
    short_path: Path, lost: int
) -> None:
    other = 3 - lost
    with Pair(short_path) as pair:
        pair.create()
        pair.start()
        in_sync(pair)
        pair[lost].write(10 * MIB, noise(46, MIB))
        pair[lost].kill()
        pair[lost].record.write_bytes(bytes(MIB))
        assert "'dmctl record replace vol0 DEVICE'" in pair[lost].refused("start", "vol0")["hint"]
        new = make_file(short_path / "new", 2 * MIB)
        assert pair[other].refused("record", "replace", "vol0", str(new))["exit_status"] == 14
        pair[lost].dmctl("record", "replace", "vol0", str(new))
        pair[lost].start()
        for node in (1, 2):
            assert pair.until(node, "paired")["compared_extents_total"] == 0
        pair[lost].until(lambda status: not status["partner"]["volatile"])
        in_sync(pair)
        assert pair.equal()
        pair[lost].kill()
        pair[lost].dmctl("record", "replace", "vol0", str(new), "--force")
        pair[other].kill()
        assert both_start(pair)[1]["compared_extents_total"] == 64, "nobody can know"


def test_without_a_fallback_new_places_fail_as_at_a_single_volume(
    failing: tuple[Pair, FaultyDisk],
) -> None:
    pair, disk = failing
    pair[1].stop()
    pair[1].dmctl("set", "vol0", "record-fallback=false")
    pair[1].start()
    pair.until(1, "paired")
    with disk.failing("pwrite"), pair[1].host() as host:
        host.submit(1, 33 * MIB, 4 * KIB, noise(45, 4 * KIB))
        assert host.reply().error == errno.EIO
        assert not pair.partner(1)["record_fallback"]
        host.disconnect()
    in_sync(pair)
    assert pair.equal()


# -- the other's record -----------------------------------------------------------------------


def both_dead(pair: Pair) -> bytes:
    """Each record names what the other does not; returns what was written at 10 and 30 MiB."""
    pair[1].dmctl("set", "vol0", f"partner-record={pair[2].record}")
    pair.start()
    in_sync(pair)
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")
    data = noise(51, MIB)
    pair[1].write(10 * MIB, data)
    pair[2].write(30 * MIB, data)
    both_die(pair)
    pair[1].dmctl_process("start", "vol0")
    pair.until(1, "waiting")
    return data


def test_of_two_dead_nodes_one_returns_and_reads_the_record_of_the_other(short_path: Path) -> None:
    with Pair(short_path) as pair:
        pair.create()
        data = both_dead(pair)
        theirs = pair[2].record.read_bytes()
        with pair[1].events() as events:
            answer = json.loads(pair[1].dmctl("--json", "takeover", "vol0", "--fenced"))
            assert events.wait("partner-record-read")["device"] == str(pair[2].record)
        assert answer["partner"]["compared_extents_total"] == 0
        pair[1].dmctl("resume", "vol0")
        pair[1].wait_in_sync()
        assert pair.equal()
        assert pair[1].read(10 * MIB, MIB) == pair[1].read(30 * MIB, MIB) == data
        assert pair[2].record.read_bytes() == theirs, "it is never written"
        pair[2].start()
        assert pair.until(2, "paired")["compared_extents_total"] == 0


@pytest.mark.parametrize("wrong", ["lost", "ours", "volatile"])
def test_a_record_that_does_not_count_leads_to_a_comparison(short_path: Path, wrong: str) -> None:
    words = ("--record-on", "partner") if wrong == "volatile" else ()
    with Pair(short_path, 64 * MIB, *words) as pair:
        pair.create()
        both_dead(pair)
        if wrong == "lost":
            pair[2].record.write_bytes(bytes(MIB))
        elif wrong == "ours":
            pair[2].record.write_bytes(pair[1].record.read_bytes())
        answer = json.loads(pair[1].dmctl("--json", "takeover", "vol0", "--fenced"))
        assert answer["partner"]["compared_extents_total"] == 64
        pair[1].dmctl("resume", "vol0")
        pair[1].wait_in_sync()
        assert pair.equal()


# -- going on in a cut ------------------------------------------------------------------------


def test_one_node_goes_on_in_a_cut_and_tells_the_other_when_it_is_back(short_path: Path) -> None:
    with Pair(short_path) as pair:
        pair.create()
        pair[1].dmctl("set", "vol0", "on-cut=go-on")
        pair.start()
        in_sync(pair)
        pair[2].kill()
        pair.until(1, "cut")
        data = noise(31, MIB)
        pair[1].write(33 * MIB, data)  # a new place: nobody is waited for
        assert pair.partner(1)["gone_on"]
        assert superblock(pair, 1)["gone_on"]
        pair[2].start()
        assert pair.until(2, "paired")["compared_extents_total"] == 0
        assert not pair[1].until(lambda status: not status["partner"]["gone_on"])["paused"]
        assert pair[2].read(33 * MIB, MIB) == data
        in_sync(pair)
        assert pair.equal()
        pair[1].kill()
        pair.until(2, "cut")
        answer = json.loads(pair[2].dmctl("--json", "takeover", "vol0", "--fenced"))
        assert answer["partner"]["compared_extents_total"] == 64, "it may lack something"
