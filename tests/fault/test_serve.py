"""`serve = on-promote`: hosts are let in by a takeover at the node, and sent away by `demote`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pairs import Pair
from tests.support.volumes import KIB, MIB, noise

CLOSED = (ConnectionError, FileNotFoundError)


@pytest.fixture
def pair(short_path: Path) -> Iterator[Pair]:
    with Pair(short_path, 64 * MIB, "--serve", "on-promote") as made:
        made.create()
        made.start()
        yield made


def serving(pair: Pair, number: int) -> tuple[bool, bool]:
    """Whether the node lets hosts in, and whether the other one knows."""
    here = pair.partner(number)["serving"]
    other = pair[3 - number].until(
        lambda status: status["partner"]["peer"]["serves"] is here  # PING is on its way
    )
    return here, other["partner"]["peer"]["serves"]


def test_nobody_is_let_in_before_a_takeover(pair: Pair) -> None:
    for node in (1, 2):
        assert serving(pair, node) == (False, False)
        with pytest.raises(CLOSED):
            pair[node].host()
        assert "let in by 'dmctl takeover' only" in pair[node].dmctl("partner", "vol0")
    answer = json.loads(pair[2].dmctl("--json", "takeover", "vol0"))
    assert answer["partner"]["serving"]
    assert serving(pair, 2) == (True, True)
    assert "let in at the partner" in pair[1].dmctl("partner", "vol0")
    pair[2].write(5 * MIB, noise(1, MIB))
    with pytest.raises(CLOSED):
        pair[1].host()
    pair[1].wait_in_sync()
    assert pair.equal()


def test_both_serve_with_beside_and_one_moves_the_hosts_without(pair: Pair) -> None:
    for node in (1, 2):
        said = pair[node].dmctl("takeover", "vol0", "--beside")
        assert said == ""
    for node in (1, 2):
        assert serving(pair, node) == (True, True)
    data = noise(2, MIB)
    pair[1].write(7 * MIB, data)
    assert pair[2].read(7 * MIB, MIB) == data
    with pair[1].host() as host:
        pair[2].dmctl("takeover", "vol0", "--beside")  # serves already: nothing happens there
        host.call(1, 0, 4 * KIB, noise(3, 4 * KIB))
        host.disconnect()
    pair[1].until(lambda status: status["connections"] == 0)
    pair[2].until(lambda status: status["connections"] == 0)
    pair[1].dmctl("takeover", "vol0")
    assert serving(pair, 1) == (True, True)
    assert serving(pair, 2) == (False, False)
    assert pair.partner(2)["own_extents"] == 0


def test_demote_sends_the_hosts_away_and_gives_everything(pair: Pair) -> None:
    pair[1].dmctl("takeover", "vol0")
    for node in (1, 2):
        pair[node].dmctl("pause", "vol0")  # what is written stays this node's own
    pair[1].write(9 * MIB, noise(4, 2 * MIB))
    assert pair.partner(1)["own_extents"] >= 2
    with pair[1].host() as host:
        error = pair[1].refused("demote", "vol0")
        assert (error["exit_status"], error["message"]) == (12, "1 hosts are connected")
        host.call(1, 0, 4 * KIB, noise(5, 4 * KIB))
        answer = json.loads(pair[1].dmctl("--json", "demote", "vol0", "--force"))
        with pytest.raises(ConnectionError):
            host.call(1, 0, 4 * KIB, noise(5, 4 * KIB))
    assert answer["given"]
    assert answer["partner"]["own_extents"] == answer["partner"]["owed_extents"] == 0
    assert serving(pair, 1) == (False, False)
    with pytest.raises(CLOSED):
        pair[1].host()
    assert json.loads(pair[1].dmctl("--json", "demote", "vol0"))["given"]  # again: nothing to do
    pair[2].dmctl("takeover", "vol0")
    assert pair[2].read(9 * MIB, 2 * MIB) == noise(4, 2 * MIB)
    for node in (1, 2):
        pair[node].dmctl("resume", "vol0")
    pair[2].wait_in_sync()
    assert pair.equal()
    pair[1].stop()  # never to have served again is no trouble
    assert pair.until(2, "alone")["proof"] == "bye"
    assert serving_alone(pair)


def serving_alone(pair: Pair) -> bool:
    return pair[2].read(9 * MIB, MIB) == noise(4, MIB)


def test_without_a_partner_demote_keeps_what_is_owned(pair: Pair) -> None:
    pair[1].dmctl("takeover", "vol0")
    pair[1].dmctl("pause", "vol0")
    pair[1].write(3 * MIB, noise(6, MIB))
    pair[2].kill()
    own = pair.until(1, "cut")["own_extents"]
    answer = json.loads(pair[1].dmctl("--json", "demote", "vol0"))
    assert (answer["given"], answer["partner"]["own_extents"]) == (False, own)
    assert not pair.partner(1)["serving"]
    error = pair[1].refused("takeover", "vol0")  # nothing proves that the other is dead
    assert error["exit_status"] == 15
    assert not pair.partner(1)["serving"]
    pair[2].start()
    pair.until(1, "paired")
    assert not pair.partner(2)["serving"]
    pair[1].dmctl("takeover", "vol0", "--wait", "30s")
    assert pair[1].read(3 * MIB, MIB) == noise(6, MIB)


def test_a_single_appliance_has_nobody_to_give_to(short_path: Path) -> None:
    with Pair(short_path) as made:
        node = made[1]
        node.options = []
        node.dmctl(*node.create_command())
        node.start()
        assert node.refused("demote", "vol0")["exit_status"] == 14


def test_serve_is_for_two_appliances(short_path: Path) -> None:
    with Pair(short_path) as made:
        node = made[1]
        node.options = ["--serve", "on-promote"]
        error = node.refused(*node.create_command())
        assert error["exit_status"] == 2
        assert "on-promote is for one of two appliances" in error["message"]
        node.options = ["--serve", "never"]
        assert "'never' is not one of" in node.refused(*node.create_command())["message"]
