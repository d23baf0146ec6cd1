"""Two appliances as processes: what section "What fails, and when" of the design promises.

The claims behind it are told by message and effect in tests/property/test_pair.py; here are the
programs that an administrator runs.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.nbdpeers import nbdkit
from tests.support.needs import need
from tests.support.pairs import Pair
from tests.support.sockets import free_ports
from tests.support.volumes import KIB, MIB, Volume, noise

PARTNER_KEYS = {
    "node", "state", "link", "copier", "term", "generation", "since", "peer", "own_extents",
    "partner_extents", "owed_extents", "embargoed_extents", "waiting_requests",
    "oldest_wait_seconds", "rtt_seconds", "messages_total", "asks_total", "handovers_total",
    "refused_guesses_total", "exchanges_total", "absorbed_extents_total", "compared_extents_total",
    "proof", "hands_over", "serving", "record_fallback",
}  # fmt: skip
PEER_KEYS = {
    "name", "version", "incarnation", "dirty_bytes", "lag_seconds", "secondary", "serves",
    "record_failing", "attach", "role",
}  # fmt: skip


@pytest.fixture
def pair(short_path: Path) -> Iterator[Pair]:
    with Pair(short_path) as made:
        made.create()
        yield made


def paused(pair: Pair) -> None:
    """Nothing is copied, so that what is written stays in the record."""
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")


def enlarged(pair: Pair, size_bytes: int) -> None:
    """Both media have so many bytes, and differ in what is new."""
    old = pair.primary.stat().st_size
    for path in (pair.primary, pair.secondary):
        os.truncate(path, size_bytes)
    with pair.primary.open("r+b") as file:
        file.seek(old)
        file.write(noise(9, size_bytes - old))


# -- together ---------------------------------------------------------------------------------


def test_one_volume_two_doors(pair: Pair) -> None:
    pair.start()
    for writer, reader, seed in ((1, 2, 1), (2, 1, 2)):
        data = noise(seed, 2 * MIB)
        pair[writer].write(5 * MIB, data)
        assert pair[reader].read(5 * MIB, len(data)) == data
    one, two = pair[1].status(), pair[2].status()
    assert one["size_bytes"] == two["size_bytes"]
    for node in (1, 2):
        pair[node].wait_in_sync()
    assert pair.equal()


def test_both_copy(pair: Pair) -> None:
    pair.start()
    for node in (1, 2):
        pair[node].wait_in_sync()
    before = {node: pair[node].status()["copied_bytes_total"] for node in (1, 2)}
    pair[1].write(0, noise(3, MIB))
    pair[2].write(40 * MIB, noise(4, MIB))
    for node in (1, 2):
        pair[node].wait_in_sync()
        assert pair[node].status()["copied_bytes_total"] >= before[node] + MIB
    assert pair.equal()


def test_in_sync_at_one_node_speaks_for_both(pair: Pair) -> None:
    pair.start()
    for node in (1, 2):
        pair[node].wait_in_sync()
    for round_number in range(3):
        pair[1].write(round_number * MIB, noise(round_number, 512 * KIB))
        pair[2].wait_in_sync()
        assert pair.equal()


def test_hits_send_nothing_and_disjoint_hosts_ask_nothing(pair: Pair) -> None:
    pair.start()
    pair[1].write(2 * MIB, noise(1, 64 * KIB))
    pair[2].write(50 * MIB, noise(2, 64 * KIB))
    before = {node: pair.partner(node)["messages_total"] for node in (1, 2)}
    for seed in range(20):
        pair[1].write(2 * MIB, noise(seed, 64 * KIB))
        pair[2].write(50 * MIB, noise(seed, 64 * KIB))
    for node in (1, 2):
        assert pair.partner(node)["messages_total"] - before[node] <= 2, "REMOVE at most"
        assert pair.partner(node)["asks_total"] == 0


def test_what_people_see(pair: Pair) -> None:
    pair.start()
    done = pair[1].dmctl_process("--json", "partner", "vol0")
    assert done.returncode == 0
    partner = json.loads(done.stdout)["partner"]
    assert set(partner) >= PARTNER_KEYS
    assert set(partner["peer"]) == PEER_KEYS
    assert (partner["state"], partner["link"], partner["node"]) == ("paired", "up", 1)
    text = pair[2].dmctl("partner", "vol0")
    assert "paired for" in text
    assert set(pair.partner(2)) >= PARTNER_KEYS


# -- starting ---------------------------------------------------------------------------------


def test_node_1_needs_nobody_before_it_has_met_its_partner(pair: Pair) -> None:
    pair[1].start()
    data = noise(9, MIB)
    pair[1].write(MIB, data)
    assert pair.partner(1)["state"] == "alone"
    pair[2].start()
    pair.until(2, "paired")
    assert pair[2].read(MIB, MIB) == data


def test_node_2_waits_for_node_1(pair: Pair) -> None:
    with pair_waiting(pair):
        done = pair[2].dmctl_process("--json", "start", "vol0")
        (told,) = json.loads(done.stdout)["volumes"]
        assert (done.returncode, told["result"]) == (15, "waiting")
        assert "waits for its partner" in told["error"]["message"]
        assert "takeover vol0 --fenced" in told["error"]["hint"]
        assert pair[2].refused("takeover", "vol0", "--wait", "50ms")["exit_status"] == 40
        assert pair[2].status()["state"] == "waiting"
        assert pair[2].dmctl_process("partner", "vol0").returncode == 15
        assert pair[2].refused("takeover", "vol0", "--fenced")["exit_status"] == 14
        assert pair[2].refused("verify", "vol0")["exit_status"] == 15
        pair[2].stop()


def shorter_wait(pair: Pair, number: int) -> None:
    """A shorter patience of `dmctl start` at that node."""
    file = next((pair[number].folder / "etc").rglob("vol0.toml"))
    file.write_text(file.read_text() + '\npartner_wait = "200ms"\n')


class pair_waiting:
    """A shorter patience of `dmctl start` at node 2."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def __enter__(self) -> None:
        shorter_wait(self._pair, 2)

    def __exit__(self, *_: object) -> None:
        """The file goes with the folder."""


# -- one dies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [1, 2])
def test_the_partner_copies_what_the_record_names_and_nothing_else(pair: Pair, dead: int) -> None:
    pair.start()
    alive = 3 - dead
    for node in (1, 2):
        pair[node].wait_in_sync()
    data = noise(11, 3 * MIB)
    pair[dead].write(20 * MIB, data)
    pair[dead].kill()
    partner = pair.until(alive, "cut")
    named = partner["partner_extents"]
    assert pair[alive].status()["state"] == "degraded"
    copied = pair[alive].status()["copied_bytes_total"]
    assert pair[alive].refused("takeover", "vol0")["exit_status"] == 15
    answer = json.loads(pair[alive].dmctl("--json", "takeover", "vol0", "--fenced"))
    assert answer["partner"]["state"] == "alone"
    assert answer["partner"]["proof"] == "word"
    assert answer["partner"]["absorbed_extents_total"] == named
    assert answer["partner"]["compared_extents_total"] == 0
    assert pair[alive].read(20 * MIB, 3 * MIB) == data
    pair[alive].write(33 * MIB, data)
    pair[alive].wait_in_sync()
    assert pair.equal()
    status = pair[alive].status()
    assert status["last_recovery"]["reason"] == "partner"
    assert status["copied_bytes_total"] - copied <= named * MIB + 4 * MIB
    # And back: nothing is compared, nothing copied twice.
    pair[dead].start()
    assert pair.until(dead, "paired")["compared_extents_total"] == 0
    assert pair[dead].read(20 * MIB, 3 * MIB) == data


def test_writes_to_new_places_wait_for_the_partner_and_go_on(pair: Pair) -> None:
    """Nothing stops but what has to: a place of one's own is written during a cut."""
    pair.start()
    mine = noise(5, 64 * KIB)
    paused(pair)
    pair[1].write(MIB, mine)
    pair[2].write(60 * MIB, mine)
    pair[1].kill()
    pair.until(2, "cut")
    pair[2].write(60 * MIB, noise(6, 64 * KIB))  # covered: served at once
    with pair[2].host() as host:
        host.submit(1, 33 * MIB, 4 * KIB, noise(7, 4 * KIB))  # a new place: it waits
        status = pair[2].until(lambda figures: figures["partner"]["waiting_requests"] == 1)
        assert status["state"] == "degraded"
        pair[1].start()
        assert host.reply().error == 0
        host.disconnect()
    assert pair.partner(2)["state"] == "paired"


def test_a_partner_that_only_stood_still_goes_on(pair: Pair) -> None:
    pair.start()
    pair[1].write(8 * MIB, noise(1, 64 * KIB))
    with pair[2].events() as events:
        stopped = pair[1].pid
        os.kill(stopped, signal.SIGSTOP)
        try:
            events.wait("partner-down")
        finally:
            os.kill(stopped, signal.SIGCONT)
    for node in (1, 2):
        pair.until(node, "paired")
    assert pair[2].read(8 * MIB, 64 * KIB) == noise(1, 64 * KIB)


@pytest.mark.parametrize("first", [1, 2])
def test_both_die_and_the_union_of_their_records_is_copied(pair: Pair, first: int) -> None:
    pair.start()
    for node in (1, 2):
        pair[node].wait_in_sync()
    paused(pair)
    here, there = noise(21, MIB), noise(22, MIB)
    pair[1].write(10 * MIB, here)
    pair[2].write(30 * MIB, there)
    pair[first].kill()
    pair[3 - first].kill()
    assert not pair.equal()
    for node in (1, 2):
        pair[node].dmctl_process("start", "vol0")
    for node in (1, 2):
        pair.until(node, "paired")
        pair[node].dmctl("resume", "vol0")
    for node in (1, 2):
        pair[node].wait_in_sync()
    assert pair.equal()
    assert pair[2].read(10 * MIB, MIB) == here
    assert pair[1].read(30 * MIB, MIB) == there


def test_a_node_that_knows_nothing_compares_everything(pair: Pair) -> None:
    pair.start()
    for node in (1, 2):
        pair[node].wait_in_sync()
    pair[1].write(7 * MIB, noise(31, MIB))
    pair[2].kill()
    pair[1].kill()
    with pair_waiting(pair):
        pair[2].dmctl_process("start", "vol0")
    answer = json.loads(pair[2].dmctl("--json", "takeover", "vol0", "--fenced"))
    assert answer["partner"]["compared_extents_total"] == 64
    pair[2].wait_in_sync()
    assert pair.equal()
    assert pair[2].read(7 * MIB, MIB) == noise(31, MIB)


# -- stopping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("leaving", [1, 2])
def test_a_clean_stop_gives_everything_to_the_partner(pair: Pair, leaving: int) -> None:
    pair.start()
    stays = 3 - leaving
    pair[leaving].write(12 * MIB, noise(41, MIB))
    answer = json.loads(pair[leaving].dmctl("--json", "stop", "vol0"))
    assert answer["volumes"][0]["clean"]
    partner = pair.until(stays, "alone")
    assert partner["proof"] == "bye"
    assert pair[stays].read(12 * MIB, MIB) == noise(41, MIB)
    pair[stays].write(44 * MIB, noise(42, MIB))  # nobody is asked
    pair[leaving].start()
    pair.until(leaving, "paired")
    pair[leaving].wait_in_sync()
    assert pair.equal()


def test_both_stop_and_start_with_nothing_to_copy(pair: Pair) -> None:
    pair.start()
    pair[1].write(3 * MIB, noise(51, MIB))
    for node in (1, 2):
        pair[node].stop()
    assert pair.equal()
    for node in (1, 2):
        pair[node].dmctl_process("start", "vol0")
    for node in (1, 2):
        pair.until(node, "paired")
    assert pair[2].read(3 * MIB, MIB) == noise(51, MIB)
    assert pair[1].status()["copied_bytes_total"] == 0


# -- over TLS ---------------------------------------------------------------------------------


def test_over_tls_both_prove_who_they_are(short_path: Path) -> None:
    ports = free_ports(2)
    options = ["--partner-timeout", "1s"]
    with Pair(short_path, 64 * MIB, *options) as made:
        made[1].dmctl("partner-keys", str(short_path / "keys"), "--names", "left,right")
        for node, name, other in ((1, "left", "right"), (2, "right", "left")):
            said = made[node].options
            said[said.index("--partner") + 1] = f"tls://127.0.0.1:{ports[2 - node]}"
            said[said.index("--partner-listen") + 1] = f"tls://127.0.0.1:{ports[node - 1]}"
            said += ["--partner-certificates", str(short_path / "keys" / name)]
            said += ["--partner-name", other]
        made.create()
        made.start()
        data = noise(71, MIB)
        made[1].write(9 * MIB, data)
        assert made[2].read(9 * MIB, MIB) == data
        made[2].kill()
        made.until(1, "cut")
        made[1].dmctl("takeover", "vol0", "--fenced")
        made[1].wait_in_sync()
        assert made.equal()


def test_a_partner_of_another_name_is_refused(short_path: Path) -> None:
    ports = free_ports(2)
    with Pair(short_path) as made:
        made[1].dmctl("partner-keys", str(short_path / "keys"), "--names", "left,right")
        for node, name in ((1, "left"), (2, "right")):
            said = made[node].options
            said[said.index("--partner") + 1] = f"tls://127.0.0.1:{ports[2 - node]}"
            said[said.index("--partner-listen") + 1] = f"tls://127.0.0.1:{ports[node - 1]}"
            said += ["--partner-certificates", str(short_path / "keys" / name)]
            said += ["--partner-name", "somebody-else", "--partner-wait", "1s"]
        made.create()
        made[1].start()
        assert made[2].refused("start", "vol0")["exit_status"] == 15
        said = made[2].until(lambda status: status["partner"]["last_error"] is not None)
        assert "certificate" in said["partner"]["last_error"]


# -- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("--node", "3"), 2, "not a node of a pair"),
        (("--node", "1"), 2, "partner"),
        (("--partner", "nbd://x"), 2, "tls://"),
        (("--record-on", "partner"), 2, "is for one of two appliances"),
        (("--node", "1", "--partner", "tls://b", "--partner-listen", "tls://a"), 2, "certificates"),
    ],
)
def test_bad_options_are_refused_before_anything_is_changed(
    short_path: Path, options: tuple[str, ...], status: int, said: str
) -> None:
    with Pair(short_path) as made:
        node = made[1]
        node.options = list(options)
        error: dict[str, Any] = node.refused(*node.create_command())
        assert error["exit_status"] == status
        assert said in error["message"] + str(error.get("hint"))
        assert not (node.folder / "etc").exists() or not list((node.folder / "etc").rglob("*.toml"))


# -- a word that was false --------------------------------------------------------------------


def split(pair: Pair) -> None:
    """Both were declared dead, both lived, and both have written: 5 and 7 MiB, 6 and 7."""
    pair.start()
    for node in (1, 2):
        pair[node].wait_in_sync()
    door = pair.folder / "p1"  # where node 2 finds node 1
    door.rename(pair.folder / "away")
    stopped = pair[2].pid
    os.kill(stopped, signal.SIGSTOP)
    try:
        pair.until(1, "cut")
        pair[1].dmctl("takeover", "vol0", "--fenced")
    finally:
        os.kill(stopped, signal.SIGCONT)
    pair.until(2, "cut")
    pair[2].dmctl("takeover", "vol0", "--fenced")
    pair[1].write(5 * MIB, noise(81, MIB))
    pair[2].write(6 * MIB, noise(82, MIB))
    pair[1].write(7 * MIB, noise(83, MIB))
    pair[2].write(7 * MIB, noise(84, MIB))
    (pair.folder / "away").rename(door)
    for node in (1, 2):
        pair.until(node, "split-brain")
        assert pair[node].dmctl_process("partner", "vol0").returncode == 16
        assert pair[node].dmctl_process("status", "--check").returncode == 16
        assert pair[node].refused("takeover", "vol0", "--fenced")["exit_status"] == 16


def whole_again(pair: Pair) -> None:
    for node in (1, 2):
        pair.until(node, "paired")
        pair[node].wait_in_sync()
    assert pair.equal()
    assert pair[2].read(5 * MIB, MIB) == noise(81, MIB)
    assert pair[1].read(6 * MIB, MIB) == noise(82, MIB)
    assert pair[1].read(7 * MIB, MIB) == noise(84, MIB)


def test_two_that_went_on_alone_write_nothing_and_say_where_they_have(pair: Pair) -> None:
    """Reads are served: there is one medium, and nothing better will come."""
    split(pair)
    found = []
    for node in (1, 2):
        pair[node].until(lambda status: status["partner"]["conflicts"] is not None)
        found.append(pair.partner(node)["conflicts"])
        assert pair[node].read(7 * MIB, MIB) == noise(84, MIB)
        with pair[node].host() as host:
            host.submit(1, 7 * MIB, 4 * KIB, noise(1, 4 * KIB))
            pair[node].until(lambda status: status["partner"]["waiting_requests"] == 1)
    one, two = found
    assert one["own_extents"] == two["partner_extents"] >= 2
    assert two["own_extents"] == one["partner_extents"] >= 2
    assert one["both"] == two["both"]
    assert any(first <= 7 < first + count for first, count in one["both"])
    assert "written alone here" in pair[1].dmctl_process("partner", "vol0").stdout


@pytest.mark.parametrize("anew", [1, 2])
def test_one_begins_anew_on_command_and_the_other_goes_on(pair: Pair, anew: int) -> None:
    """Hosts of that one stay connected, and what they had asked for is done.  Everything is
    compared, so both sides become equal whatever the two have copied over one another."""
    split(pair)
    stays = 3 - anew
    with pair[stays].host() as host:
        host.submit(1, 9 * MIB, 4 * KIB, noise(1, 4 * KIB))
        pair[stays].until(lambda status: status["partner"]["waiting_requests"] == 1)
        assert pair[anew].refused("partner", "vol0", "--rejoin")["exit_status"] == 2  # --yes
        pair[anew].dmctl("partner", "vol0", "--rejoin", "--yes")
        assert host.reply().error == 0
        host.disconnect()
    whole_again(pair)
    assert pair[anew].read(9 * MIB, 4 * KIB) == noise(1, 4 * KIB)
    partner = pair.partner(stays)
    assert (partner["conflicts"], partner["compared_extents_total"]) == (None, 64)
    assert pair[anew].refused("partner", "vol0", "--rejoin", "--yes")["exit_status"] == 14


def test_both_may_begin_anew(pair: Pair) -> None:
    split(pair)
    for node in (1, 2):
        pair[node].dmctl("stop", "vol0", "--now")
        shorter_wait(pair, node)
    for node in (1, 2):
        pair[node].dmctl_process("start", "vol0")
    whole_again(pair)


# -- planned ----------------------------------------------------------------------------------


def test_a_planned_takeover_moves_the_hosts_and_needs_no_proof(pair: Pair) -> None:
    pair.start()
    data = noise(61, MIB)
    with pair[1].host() as host:
        error = pair[2].refused("takeover", "vol0")
        assert error["exit_status"] == 12
        assert "1 hosts are connected" in error["message"]
        host.disconnect()
    pair[1].until(lambda status: status["connections"] == 0)
    pair[1].write(21 * MIB, data)
    pair[1].until(lambda status: status["connections"] == 0)
    answer = json.loads(pair[2].dmctl("--json", "takeover", "vol0"))
    assert answer["partner"]["state"] == "paired"
    assert pair.partner(1)["own_extents"] == 0
    with pytest.raises((ConnectionError, FileNotFoundError)):
        pair[1].host()
    assert pair[2].read(21 * MIB, MIB) == data
    pair[2].write(22 * MIB, data)
    pair[2].until(lambda status: status["connections"] == 0)
    pair[1].dmctl("takeover", "vol0")
    assert pair[1].read(22 * MIB, MIB) == data
    assert pair[1].dmctl("takeover", "vol0", "--wait", "1s") == ""  # nothing to do
    pair[2].stop()  # its hosts are stopped already
    assert pair.until(1, "alone")["proof"] == "bye"


def test_forced_a_planned_takeover_cuts_hosts_off(pair: Pair) -> None:
    pair.start()
    with pair[1].host() as host:
        pair[2].dmctl("takeover", "vol0", "--force")
        with pytest.raises(ConnectionError):
            host.call(1, 0, 4 * KIB, noise(1, 4 * KIB))


# -- a larger size ----------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2])
def test_both_take_up_a_larger_size(short_path: Path, first: int) -> None:
    with Pair(short_path, 64 * MIB - 64 * KIB) as pair:
        pair.create()
        pair.start()
        pair[first].wait_in_sync()
        size = 70 * MIB + 64 * KIB
        enlarged(pair, size)
        answer = json.loads(pair[first].dmctl("--json", "resize", "vol0"))
        assert answer["changed"]
        assert [pair[node].status()["size_bytes"] for node in (1, 2)] == [size, size]
        data = noise(1, MIB)
        pair[3 - first].write(size - MIB, data)
        assert pair[first].read(size - MIB, MIB) == data
        for node in (1, 2):
            pair[node].wait_in_sync()
        assert pair.equal()
        assert not json.loads(pair[3 - first].dmctl("--json", "resize", "vol0"))["changed"]


def test_a_partner_that_was_away_grows_when_it_comes_back(pair: Pair) -> None:
    pair.start()
    pair[2].dmctl("stop", "vol0")
    pair.until(1, "alone")
    enlarged(pair, 72 * MIB)
    pair[1].dmctl("resize", "vol0")
    pair[1].wait_in_sync()
    pair[2].start()
    pair.until(2, "paired")
    assert pair[2].status()["size_bytes"] == 72 * MIB
    for node in (1, 2):
        pair[node].wait_in_sync()
    assert pair.equal()


def test_a_size_that_only_one_node_sees_changes_nothing(pair: Pair) -> None:
    pair.start()
    os.truncate(pair.primary, 72 * MIB)
    assert pair[1].refused("resize", "vol0")["code"] == "no-space"  # on the secondary
    os.truncate(pair.secondary, 72 * MIB)
    pair[2].kill()
    pair.until(1, "cut")
    assert "both nodes have to grow" in pair[1].refused("resize", "vol0")["message"]
    pair[2].start()
    pair.until(1, "paired")
    assert [pair[node].status()["size_bytes"] for node in (1, 2)] == [64 * MIB, 64 * MIB]
    pair[1].dmctl("resize", "vol0")
    for node in (1, 2):
        pair[node].wait_in_sync()
    assert pair[2].status()["size_bytes"] == 72 * MIB


# -- single volume and pair -------------------------------------------------------------------


def of_the_record(node: Volume) -> dict[str, Any]:
    return dict(json.loads(node.dmctl("--json", "record", "dump", str(node.record)))["superblock"])


def test_a_single_volume_becomes_node_1_and_goes_on(short_path: Path) -> None:
    with Pair(short_path) as pair:
        one, link = pair[1], pair[1].options
        one.options = block = ["--block-size", "256KiB"]
        one.dmctl(*one.create_command())
        one.start()
        one.dmctl("pause", "vol0")
        one.write(3 * MIB, noise(1, MIB))
        words = ["node=1", f"partner={link[3]}", f"partner-listen={link[5]}"]
        assert one.refused("set", "vol0", *words)["exit_status"] == 2, "it runs"
        one.dmctl("stop", "vol0")
        before = of_the_record(one)
        assert "node 1" in one.refused("set", "vol0", "node=2", *words[1:])["message"]
        assert "partner_listen" in one.refused("set", "vol0", *words[:2])["message"]
        assert of_the_record(one) == before
        done = one.dmctl_process("set", "vol0", *words)
        assert " ".join(block) in done.stdout + done.stderr, "what node 2 has to be created with"
        after = of_the_record(one)
        assert after["pair"]["never_paired"]
        assert after["generations"] == before["generations"]
        assert "already" in one.refused("set", "vol0", *words)["message"]
        pair[2].dmctl(*pair[2].create_command(), *block)
        pair.start()
        assert pair[2].read(3 * MIB, MIB) == noise(1, MIB)
        one.dmctl("resume", "vol0")
        for node in (1, 2):
            pair[node].wait_in_sync()
        assert pair.equal()


def test_who_was_written_at_rest_does_not_become_a_pair(short_path: Path) -> None:
    with Pair(short_path) as pair:
        one, link = pair[1], pair[1].options
        one.options = []
        one.dmctl(*one.create_command())
        one.start()
        one.wait_in_sync()
        one.dmctl("stop", "vol0")
        with one.primary.open("r+b") as file:
            file.write(noise(5, MIB))
        words = ["node=1", f"partner={link[3]}", f"partner-listen={link[5]}"]
        assert "was written while" in one.refused("set", "vol0", *words)["message"]
        assert of_the_record(one)["pair"] is None


@pytest.mark.parametrize("node", [1, 2])
def test_a_node_that_is_alone_becomes_a_single_volume(pair: Pair, node: int) -> None:
    pair.start()
    one, other = pair[node], pair[3 - node]
    one.write(2 * MIB, noise(2, MIB))
    assert "state 'paired'" in one.refused("partner", "vol0", "--dissolve", "--yes")["message"]
    paused(pair)
    other.write(7 * MIB, noise(3, MIB))
    other.kill()
    pair.until(node, "cut")
    assert "state 'cut'" in one.refused("partner", "vol0", "--dissolve", "--yes")["message"]
    one.dmctl("takeover", "vol0", "--fenced")
    generations = of_the_record(one)["generations"]
    one.dmctl("partner", "vol0", "--dissolve", "--yes")
    assert one.status()["partner"] is None
    found = of_the_record(one)
    assert found["pair"] is None
    assert found["generations"] == generations
    assert one.read(7 * MIB, MIB) == noise(3, MIB)
    one.dmctl("resume", "vol0")
    one.wait_in_sync()
    assert pair.equal()
    one.dmctl("stop", "vol0")
    one.start()
    assert "no partner" in one.refused("partner", "vol0", "--dissolve", "--yes")["message"]


def test_what_only_a_pair_has_goes_with_it(short_path: Path) -> None:
    options = ("--record-on", "partner", "--fence-command", "/bin/true", "--takeover", "auto")
    with Pair(short_path, 64 * MIB, *options) as pair:
        pair.create()
        pair.start()
        one = pair[1]
        one.write(2 * MIB, noise(2, MIB))
        pair[2].dmctl("stop", "vol0")
        pair.until(1, "alone")
        one.dmctl("partner", "vol0", "--dissolve", "--yes")
        one.dmctl("config", "check")
        one.dmctl("stop", "vol0")
        one.start()
        one.wait_in_sync()
        assert pair.equal()
        one.dmctl("stop", "vol0")
        link = one.options
        words = ["node=1", f"partner={link[3]}", f"partner-listen={link[5]}", "record-on=partner"]
        one.dmctl("set", "vol0", *words, "on-cut=go-on")
        assert of_the_record(one)["pair"]["record_on"] == "partner"


def test_what_has_stopped_is_not_dissolved_unless_that_had_begun(pair: Pair) -> None:
    pair.start()
    pair[2].dmctl("stop", "vol0")
    pair.until(1, "alone")
    one = pair[1]
    file = one.folder / "etc" / "volumes" / "vol0.toml"
    before = file.read_text()
    one.dmctl("stop", "vol0")
    assert "only its process" in one.refused("partner", "vol0", "--dissolve", "--yes")["message"]
    assert file.read_text() == before
    one.dmctl("start", "vol0", check=False)
    one.dmctl("takeover", "vol0", "--fenced")
    one.dmctl("partner", "vol0", "--dissolve", "--yes")
    one.dmctl("stop", "vol0")
    file.write_text(before)  # as a crash in between would have left it
    assert one.refused("start", "vol0")["code"] == "foreign-record"
    one.dmctl("partner", "vol0", "--dissolve", "--yes")
    one.start()
    one.wait_in_sync()


# -- lead and round trips ---------------------------------------------------------------------


def test_the_lead_moves_by_command_and_by_takeover_and_stays(pair: Pair) -> None:
    pair.start()

    def leads() -> list[bool]:
        return [pair.partner(node)["copier"] for node in (1, 2)]

    assert leads() == [True, False]
    pair[2].dmctl("partner", "vol0", "--lead")
    pair[1].until(lambda status: not status["partner"]["copier"])
    assert leads() == [False, True]
    pair[1].dmctl("takeover", "vol0")
    pair[2].until(lambda status: not status["partner"]["copier"])
    pair[1].kill()
    pair.until(2, "cut")
    assert "state 'cut'" in pair[2].refused("partner", "vol0", "--lead")["message"]
    pair[2].dmctl("takeover", "vol0", "--fenced")
    pair[1].start()
    pair.until(1, "paired")
    assert leads() == [False, True]


def test_round_trips(pair: Pair) -> None:
    pair.start()
    found = json.loads(pair[1].dmctl("--json", "partner", "vol0", "--ping", "7"))["ping"]
    trips = found["round_trips_seconds"]
    assert len(trips) == 7
    assert found["min_seconds"] == min(trips) <= found["mean_seconds"] <= found["max_seconds"]
    assert pair[2].dmctl("partner", "vol0", "--ping", "1").startswith("1 there and back")
    pair[2].kill()
    pair.until(1, "cut")
    assert pair[1].refused("partner", "vol0", "--ping", "2")["exit_status"] == 15


# -- the same number twice --------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_two_nodes_with_the_same_number_find_out_and_change_nothing(
    short_path: Path, number: int
) -> None:
    """Each has media of its own: on one machine the claims would refuse the second one before."""
    nodes = []
    for here, there in (("a", "b"), ("b", "a")):
        (short_path / here).mkdir()
        link = ["--partner", f"unix://{short_path}/p{there}"]
        link += ["--partner-listen", f"unix://{short_path}/p{here}", "--node", str(number)]
        link += ["--partner-wait", "0s"]
        nodes.append(Volume(short_path / here, options=link))
    try:
        for node in nodes:
            node.make_media()
            node.dmctl(*node.create_command())
            node.dmctl("start", "vol0", check=False)  # a node 2 waits
        before = [of_the_record(node)["pair"] for node in nodes]
        why = {1: "both were created as node 1", 2: "node 1 has to be created first"}[number]
        for node in nodes:
            node.until(lambda status: why in (status["partner"]["last_error"] or ""))
            assert why in node.status()["last_error"]["message"]
        assert [of_the_record(node)["pair"] for node in nodes] == before
    finally:
        for node in nodes:
            node.destroy()


# -- a secondary behind a server --------------------------------------------------------------


def test_a_server_that_takes_one_client_is_refused(short_path: Path) -> None:
    """A flush of one node has to cover what the other has copied (section "What both nodes share"
    in docs/failover.md)."""
    need("nbdkit")
    one_client = ("--filter=multi-conn", "multi-conn-mode=disable")
    with Pair(short_path) as pair:
        command = ["file", f"file={pair.secondary}"]
        with nbdkit(short_path, one_client[0], *command, one_client[1]) as server:
            for node in pair.nodes.values():
                node.secondary_target = str(server.uri())
            refused = pair[1].refused(*pair[1].create_command())
            assert "several clients" in refused["message"]
            assert "--shared" in refused["hint"]
        with nbdkit(short_path, *command):
            pair.create()
            pair.start()
            pair[1].write(MIB, noise(1, MIB))
            for node in (1, 2):
                pair[node].wait_in_sync()
            assert pair.equal()
            for node in (1, 2):
                pair[node].dmctl("stop", "vol0")
        with nbdkit(short_path, one_client[0], *command, one_client[1]):
            refused = pair[1].refused("start", "vol0")
            assert "several clients" in refused["message"]
            assert refused["exit_status"] == 14


def test_a_node_without_a_way_to_the_secondary_hands_its_dirt_over(short_path: Path) -> None:
    need("nbdkit")
    with Pair(short_path) as pair:
        command = ["file", f"file={pair.secondary}"]

        def copied(number: int) -> int:
            return int(pair[number].status()["copied_bytes_total"])

        with nbdkit(short_path, *command) as server:
            for node in pair.nodes.values():
                node.secondary_target = str(server.uri())
                node.options += ["--era-interval", "100ms", "--late-writes", "0s"]
            pair.create()
            pair.start()
            for number in (1, 2):
                pair[number].wait_in_sync()
        before = {number: copied(number) for number in (1, 2)}
        with nbdkit(short_path, "--filter=ip", *command, f"deny=pid:{pair[1].pid}"):
            pair[2].until(lambda status: status["state"] == "in-sync")
            pair[1].until(lambda status: status["partner"]["hands_over"])
            pair[1].write(3 * MIB, noise(1, MIB))
            pair[1].wait_in_sync()
            assert pair.equal()
            assert pair[1].status()["state"] == "link-down"
            assert not pair.partner(2)["hands_over"]
            assert "handed over" in pair[1].dmctl("partner", "vol0")
            assert copied(1) == before[1]
            assert copied(2) >= before[2] + MIB
        with nbdkit(short_path, *command):
            for number in (1, 2):
                pair[number].until(lambda status: status["state"] == "in-sync")
            pair[1].until(lambda status: not status["partner"]["hands_over"])
            pair[1].write(9 * MIB, noise(2, MIB))
            pair[1].wait_in_sync()
            assert copied(1) >= before[1] + MIB
            assert pair.equal()
