"""A record keeper, as processes: what it holds when the volume's machine is lost, and what it is
not for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import rawnbd
from tests.support.faulty import faulty_disk
from tests.support.keepers import Kept
from tests.support.volumes import KIB, MIB, Volume, make_file, noise

EXTENTS = 64
NO_GUESS = ("--predictor", "lru")  # what is recorded was written


@pytest.fixture
def kept(short_path: Path) -> Iterator[Kept]:
    """In sync, and paired."""
    with Kept(short_path, options=NO_GUESS) as made:
        in_sync(made)
        yield made


def in_sync(kept: Kept) -> None:
    """Paired, and neither record names anything: what is copied at first stays there for a while,
    clean, but for a stop."""
    kept.create()
    kept.start()
    kept.host.wait_in_sync()
    kept.host.stop()
    kept.host.start()
    kept.paired()


def behind(kept: Kept, *places: int) -> None:
    """Hosts have written there, a MiB each, and nothing is copied."""
    kept.host.dmctl("pause", "vol0")
    for place in places:
        kept.host.write(place * MIB, noise(place, MIB))


def lost(kept: Kept) -> Volume:
    """The volume's machine is gone, its record with it; the one that takes its place is created."""
    kept.host.kill()
    os.unlink(kept.host.record)
    kept.host = kept.another_host()
    kept.host.create("--join")
    return kept.host


# -- what it is for ---------------------------------------------------------------------------


def test_a_new_machine_fetches_the_record_and_copies_just_that(kept: Kept) -> None:
    before = kept.host.status()
    behind(kept, 3, 4, 40)
    recorded = kept.partner(kept.keeper)["partner_extents"]
    assert 3 <= recorded < 16
    lost(kept).start()
    partner = kept.until(kept.host, "paired")
    assert partner["compared_extents_total"] == 0
    kept.host.wait_in_sync()
    assert kept.equal()
    after = kept.host.status()
    assert after["copied_bytes_total"] == recorded * MIB
    assert after["uuid"] != before["uuid"], "the record and its configuration are new"
    assert [kept.host.read(place * MIB, MIB) for place in (3, 4, 40)] == [
        noise(place, MIB) for place in (3, 4, 40)
    ]


def test_a_keeper_says_what_the_secondary_lacks_while_the_volume_is_dead(kept: Kept) -> None:
    behind(kept, 7, 50)
    kept.host.kill()
    with kept.keeper.events() as events:
        if kept.partner(kept.keeper)["volatile"] or kept.partner(kept.keeper)["gone_on"]:
            events.wait("record-destaged")
    dump = json.loads(kept.keeper.dmctl("--json", "record", "dump", str(kept.keeper.record)))
    named = {e for first, count in dump["extents"]["runs"] for e in range(first, first + count)}
    assert kept.host.differing() == {7, 50}
    assert {7, 50} <= named
    assert len(named) < 16


def test_a_miss_waits_for_the_keeper_and_for_nothing_else_where_it_is_told_to(
    short_path: Path,
) -> None:
    with Kept(short_path, options=("--record-on", "partner", *NO_GUESS)) as kept:
        in_sync(kept)
        assert kept.superblock(kept.host)["volatile"]
        behind(kept, 9)
        messages = kept.partner(kept.host)["messages_total"]
        kept.host.write(9 * MIB, noise(1, MIB))
        assert kept.partner(kept.host)["messages_total"] == messages, "a hit sends nothing"
        assert kept.partner(kept.keeper)["partner_extents"] >= 1
        lost(kept).start()
        assert kept.until(kept.host, "paired")["compared_extents_total"] == 0
        kept.host.wait_in_sync()
        assert kept.equal()


def test_what_the_keeper_has_stored_outlives_its_process_too(short_path: Path) -> None:
    with Kept(short_path, words=("--partner-ack", "stored")) as kept:
        in_sync(kept)
        behind(kept, 11, 12)
        kept.keeper.kill()
        lost(kept)
        kept.keeper.start()
        kept.host.start()
        assert kept.until(kept.host, "paired")["compared_extents_total"] == 0
        kept.host.wait_in_sync()
        assert kept.equal()


def test_what_was_in_the_keepers_memory_only_is_compared_after_both_are_lost(kept: Kept) -> None:
    behind(kept, 11, 12)
    kept.keeper.kill()
    lost(kept)
    kept.keeper.start()
    kept.host.start()
    assert kept.until(kept.host, "paired")["compared_extents_total"] == EXTENTS
    kept.host.wait_in_sync()
    assert kept.equal()


def test_both_are_killed_and_the_records_are_there(kept: Kept) -> None:
    behind(kept, 20)
    for node in (kept.host, kept.keeper):
        node.kill()
    for node in (kept.keeper, kept.host):
        node.start()
    assert kept.until(kept.host, "paired")["compared_extents_total"] == 0
    kept.host.dmctl("resume", "vol0")
    kept.host.wait_in_sync()
    assert kept.equal()


# -- the keeper is away -----------------------------------------------------------------------


def test_without_the_keeper_new_places_wait_and_go_on_when_it_is_back(kept: Kept) -> None:
    behind(kept, 5)
    kept.keeper.kill()
    kept.until(kept.host, "cut")
    assert kept.host.status()["state"] == "degraded"
    assert kept.host.dmctl_process("status", "vol0", "--check").returncode == 100
    kept.host.write(5 * MIB, noise(2, 64 * KIB))  # ours
    refused = kept.host.refused("takeover", "vol0")
    assert (refused["exit_status"], "keeper" in refused["message"]) == (15, True)
    with kept.host.host() as host:
        host.submit(rawnbd.WRITE, 33 * MIB, 64 * KIB, noise(3, 64 * KIB))
        kept.host.until(lambda status: status["partner"]["waiting_requests"] == 1)
        kept.keeper.start()
        assert not host.reply().error
    kept.until(kept.keeper, "paired")
    assert 33 in kept.host.recorded()


def test_a_keeper_that_is_stopped_lets_the_volume_go_on_and_never_passes_for_complete(
    kept: Kept,
) -> None:
    kept.host.dmctl("pause", "vol0")
    kept.keeper.stop()
    kept.until(kept.host, "alone")
    kept.host.write(30 * MIB, noise(4, MIB))  # a new place: nobody is waited for
    assert kept.superblock(kept.keeper)["gone_on"]
    lost(kept)
    kept.keeper.start()
    kept.host.start()
    assert kept.until(kept.host, "paired")["compared_extents_total"] == EXTENTS
    kept.host.wait_in_sync()
    assert kept.equal()


def test_a_keeper_that_comes_back_learns_what_it_has_missed(kept: Kept) -> None:
    kept.keeper.stop()
    kept.until(kept.host, "alone")
    behind(kept, 30)
    kept.keeper.start()
    kept.paired()
    assert kept.partner(kept.keeper)["partner_extents"] >= 1
    lost(kept).start()
    assert kept.until(kept.host, "paired")["compared_extents_total"] == 0
    kept.host.wait_in_sync()
    assert kept.equal()


def test_where_hosts_go_on_in_a_cut_a_lost_record_is_not_made_up_for(short_path: Path) -> None:
    with Kept(short_path, options=("--on-cut", "go-on", *NO_GUESS)) as kept:
        in_sync(kept)
        kept.host.dmctl("pause", "vol0")
        kept.keeper.kill()
        kept.until(kept.host, "cut")
        kept.host.write(30 * MIB, noise(5, MIB))
        assert kept.partner(kept.host)["gone_on"]
        kept.host.kill()
        kept.keeper.start()
        kept.host.start()
        assert kept.until(kept.host, "paired")["compared_extents_total"] == 0, "its record is there"
        behind(kept, 31)
        lost(kept).start()
        assert kept.until(kept.host, "paired")["compared_extents_total"] == EXTENTS
        kept.host.wait_in_sync()
        assert kept.equal()


def test_a_volume_that_starts_without_its_keeper_waits_and_may_be_told_to_go_on(
    kept: Kept,
) -> None:
    behind(kept, 14)
    for node in (kept.host, kept.keeper):
        node.kill()
    done = kept.host.dmctl_process("start", "vol0")
    assert done.returncode == 15
    answer = json.loads(kept.host.dmctl("--json", "takeover", "vol0", "--fenced"))
    assert answer["partner"]["compared_extents_total"] == 0, "its own record names everything"
    kept.host.dmctl("resume", "vol0")
    kept.host.wait_in_sync()
    assert kept.equal()
    kept.keeper.start()
    kept.paired()


def test_a_record_that_failed_and_is_well_again_is_not_taken_for_complete(short_path: Path) -> None:
    """The keeper, which knows what it lacks, is away."""
    with ExitStack() as stack:
        backing = make_file(short_path / "backing", 2 * MIB)
        disk = stack.enter_context(faulty_disk(short_path / "faulty", backing))
        kept = stack.enter_context(
            Kept(short_path, options=NO_GUESS, words=("--partner-ack", "stored"))
        )
        kept.host.record = disk.path
        in_sync(kept)
        kept.host.dmctl("pause", "vol0")
        with disk.failing("pwrite"):
            kept.host.write(10 * MIB, noise(51, MIB))
            assert kept.partner(kept.host)["record_fallback"]
            for node in (kept.keeper, kept.host):
                node.kill()
        assert 10 not in kept.host.recorded()
        assert kept.host.dmctl_process("start", "vol0").returncode == 15
        answer = json.loads(kept.host.dmctl("--json", "takeover", "vol0", "--fenced"))
        assert answer["partner"]["compared_extents_total"] == EXTENTS
        kept.host.dmctl("resume", "vol0")
        kept.host.wait_in_sync()
        assert kept.equal()


# -- life -------------------------------------------------------------------------------------


def test_a_clean_stop_leaves_nothing_to_copy_in_either_record(kept: Kept) -> None:
    kept.host.write(3 * MIB, noise(6, MIB))
    kept.host.stop()
    kept.until(kept.keeper, "cut")
    kept.keeper.until(lambda status: status["record_extents"] == 0)
    assert not kept.host.recorded()
    assert kept.equal()
    kept.host.start()
    kept.paired()
    kept.host.wait_in_sync()
    assert kept.host.status()["copied_bytes_total"] == 0


def test_a_stop_at_once_leaves_what_is_not_copied_in_both_records(kept: Kept) -> None:
    behind(kept, 3)
    kept.host.stop("--now")
    kept.until(kept.keeper, "cut")
    assert kept.partner(kept.keeper)["partner_extents"] >= 1
    assert 3 in kept.host.recorded()


def test_both_grow(kept: Kept) -> None:
    for path in (kept.primary, kept.secondary):
        os.truncate(path, 70 * MIB)
    assert kept.keeper.refused("resize", "vol0")["exit_status"] == 14
    kept.host.dmctl("resize", "vol0")
    assert kept.keeper.status()["size_bytes"] == 70 * MIB
    behind(kept, 69)
    lost(kept).start()
    assert kept.until(kept.host, "paired")["compared_extents_total"] == 0
    kept.host.wait_in_sync()
    assert kept.equal()


def test_a_keeper_does_not_what_a_volume_does(kept: Kept) -> None:
    for words in (
        ("takeover", "vol0"),
        ("takeover", "vol0", "--fenced"),
        ("demote", "vol0"),
        ("verify", "vol0"),
        ("pause", "vol0"),
        ("resync", "vol0"),
        ("partner", "vol0", "--lead"),
        ("partner", "vol0", "--dissolve", "--yes"),
    ):
        refused = kept.keeper.refused(*words)
        assert (refused["exit_status"], "keeps the record" in refused["message"]) == (14, True)
    assert kept.partner(kept.host)["state"] == "paired"
    assert not kept.keeper.socket.exists()


def test_what_people_see(kept: Kept) -> None:
    keeper, host = kept.keeper.status(), kept.host.status()
    assert keeper["state"] == "keeping"
    assert kept.keeper.dmctl_process("status", "vol0", "--check").returncode == 0
    assert set(host) - set(keeper) <= {"primary_errors_total", "suspect_bytes"} | {
        key for key in host if key.endswith("_total")
    }
    assert (keeper["partner"]["role"], keeper["partner"]["peer"]["role"]) == ("keeper", "pair")
    assert (host["partner"]["role"], host["partner"]["peer"]["role"]) == ("pair", "keeper")
    assert (host["partner"]["kept"], host["partner"]["peer"]["secondary"]) == (True, None)
    assert "keeps the record" in kept.host.dmctl("partner", "vol0")
    assert "keeper" in kept.keeper.dmctl("partner", "vol0")
    assert "there and back" in kept.keeper.dmctl("partner", "vol0", "--ping", "2")
    assert "keeping" in kept.keeper.dmctl("status", "vol0")


def test_a_planned_takeover_and_a_demotion_give_a_keeper_nothing(kept: Kept) -> None:
    behind(kept, 8)
    kept.host.dmctl("takeover", "vol0")
    kept.host.dmctl("demote", "vol0")
    assert kept.partner(kept.keeper)["own_extents"] == 0
    assert kept.partner(kept.host)["own_extents"] >= 1
    kept.host.dmctl("resume", "vol0")
    kept.host.wait_in_sync()
    assert kept.equal()


# -- what does not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--size is missing"),
        (["--size", "64MiB", "--secondary", "/tmp/nothing"], "reads and writes no data"),
        (["--size", "64MiB", "--attach", "nbd"], "not for a keeper"),
        (["--size", "64MiB", "--join"], "not for a keeper"),
        (["--size", "64MiB", "--on-cut", "go-on"], "not for a keeper"),
    ],
)
def test_a_keeper_that_cannot_be(short_path: Path, words: list[str], text: str) -> None:
    with Kept(short_path) as kept:
        command = [*kept.keeper_command[: kept.keeper_command.index("--size")], *words]
        refused = kept.keeper.refused(*command)
        assert refused["exit_status"] == 2
        assert text in json.dumps(refused)
        assert not (kept.keeper.folder / "etc" / "volumes" / "vol0.toml").exists()


def test_a_keeper_of_another_size_is_refused_and_both_say_so(short_path: Path) -> None:
    with Kept(short_path) as kept:
        kept.keeper_command[kept.keeper_command.index("--size") + 1] = "32MiB"
        kept.create()
        for node in (kept.host, kept.keeper):
            node.start()
        kept.host.until(lambda status: "volume size" in (status["partner"]["last_error"] or ""))
        assert kept.partner(kept.host)["state"] == "alone"


def test_a_keeper_of_node_1_and_one_of_the_same_number_are_refused(short_path: Path) -> None:
    with Kept(short_path) as kept:
        command = list(kept.keeper_command)
        command[command.index("--node") + 1] = "1"
        assert "a keeper is node 2" in json.dumps(kept.keeper.refused(*command))
        kept.create()
        role = kept.host.refused("set", "vol0", "partner-role=keeper")
        assert role["exit_status"] == 2


def test_the_same_machine_with_a_new_record_fetches_it_too(kept: Kept) -> None:
    behind(kept, 3, 40)
    kept.host.kill()
    os.unlink(kept.host.record)
    new = make_file(kept.host.folder / "new", MIB)
    kept.host.dmctl("record", "replace", "vol0", str(new))
    kept.host.start()
    assert kept.until(kept.host, "paired")["compared_extents_total"] == 0
    kept.host.wait_in_sync()
    assert kept.equal()
