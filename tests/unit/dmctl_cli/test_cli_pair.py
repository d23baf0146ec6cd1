"""create of one of two appliances: what its record says, what is refused; what `partner` shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bitmapd.config import load_volume
from dmctl.cli.failover import STATUS, rows
from tests.support.cli import MIB, Cli, new_cli


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[dict[int, Cli]]:
    """Two configurations on one machine, as two appliances that see the same media."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    with new_cli(tmp_path / "one") as one, new_cli(tmp_path / "two") as two:
        for name in ("p", "s"):
            one.medium(name)
        for cli in (one, two):
            cli.medium("r", MIB)
        yield {1: one, 2: two}


def words(nodes: dict[int, Cli], number: int, **options: str) -> list[str]:
    shared = nodes[1].folder
    values = {
        "primary": f"{shared}/p",
        "secondary": f"{shared}/s",
        "record": f"{nodes[number].folder}/r",
        "node": str(number),
        "partner": f"unix:///run/{3 - number}",
        "partner-listen": f"unix:///run/{number}",
        **{key.replace("_", "-"): value for key, value in options.items()},
    }
    return ["create", "vol0", *(f"--{key}={value}" for key, value in values.items())]


def record(cli: Cli) -> dict[str, Any]:
    dump: dict[str, Any] = cli.ok("record", "dump", f"{cli.folder}/r", "--json").json
    return dump


@pytest.mark.parametrize("number", [1, 2])
def test_a_new_record_names_nothing_and_says_that_this_is_not_all(
    nodes: dict[int, Cli], number: int
) -> None:
    cli = nodes[number]
    cli.ok(*words(nodes, number))
    before = load_volume(cli.paths, "vol0")
    cli.medium("new", MIB)
    cli.ok("record", "replace", "vol0", f"{cli.folder}/new")
    config = load_volume(cli.paths, "vol0")
    assert (config.record, config.uuid) == (f"{cli.folder}/new", before.uuid)
    dump = cli.ok("record", "dump", config.record, "--json").json
    pair = dump["superblock"]["pair"]
    assert dump["extents"]["recorded"] == 0
    assert (pair["node"], pair["volatile"], pair["term"]) == (number, True, 0)
    assert pair["volume_uuid"] == (str(config.uuid) if number == 1 else None)
    assert pair["never_paired"] is (number == 2)
    small = f"{cli.folder}/small"
    Path(small).write_bytes(bytes(4096))
    assert cli.call("record", "replace", "vol0", small).status == 13
    assert load_volume(cli.paths, "vol0").record == config.record


@pytest.mark.parametrize("whose", ["p", "s", "other/p"])
def test_a_new_record_is_not_made_on_what_a_volume_has(nodes: dict[int, Cli], whose: str) -> None:
    cli = nodes[1]
    cli.ok(*words(nodes, 1))
    (cli.folder / "other").mkdir()
    media = []
    for key in ("primary", "secondary", "record"):
        cli.medium(f"other/{key[0]}", 4 * MIB)
        media.append(f"--{key}={cli.folder}/other/{key[0]}")
    cli.ok("create", "other", *media)
    path = cli.folder / whose
    before = path.read_bytes()
    told = cli.call("record", "replace", "vol0", str(path))
    assert told.status == 12, told.err
    assert "is the primary of" in told.err or "is the secondary of" in told.err
    assert path.read_bytes() == before
    assert load_volume(cli.paths, "vol0").record == f"{cli.folder}/r"
    cli.ok("record", "replace", "vol0", f"{cli.folder}/r", "--force")


def test_a_volume_without_a_partner_gets_no_new_record(nodes: dict[int, Cli]) -> None:
    cli = nodes[1]
    media = [f"--{key}={cli.folder}/{key[0]}" for key in ("primary", "secondary", "record")]
    cli.ok("create", "vol0", *media)
    told = cli.call("record", "replace", "vol0", f"{cli.folder}/r")
    assert (told.status, "no partner" in told.err) == (2, True)


def test_what_cannot_be_told_of_its_media_leaves_a_volume_single(nodes: dict[int, Cli]) -> None:
    cli = nodes[1]
    media = [f"--{key}={nodes[1].folder}/{key[0]}" for key in ("primary", "secondary", "record")]
    cli.ok("create", "vol0", *media)
    before = cli.paths.volume_file("vol0").read_bytes(), (cli.folder / "r").read_bytes()
    (cli.folder / "s").rename(cli.folder / "away")
    change = ["set", "vol0", "node=1", "partner=unix:///run/2", "partner-listen=unix:///run/1"]
    assert cli.call(*change).status == 10
    assert (cli.paths.volume_file("vol0").read_bytes(), (cli.folder / "r").read_bytes()) == before
    (cli.folder / "away").rename(cli.folder / "s")
    cli.ok(*change)
    assert load_volume(cli.paths, "vol0").node == 1


def test_node_1_is_the_volume_and_everything_is_to_be_copied(nodes: dict[int, Cli]) -> None:
    nodes[1].ok(*words(nodes, 1))
    dump = record(nodes[1])
    pair = dump["superblock"]["pair"]
    config = load_volume(nodes[1].paths, "vol0")
    assert (pair["node"], pair["volume_uuid"]) == (1, str(config.uuid))
    assert pair["never_paired"]
    assert dump["extents"]["recorded"] == dump["extents"]["total"] > 0
    assert config.attach == "nbd"


@pytest.mark.parametrize("first", ["full", "checksum", "skip"])
def test_node_2_joins_the_same_media_and_names_nothing(nodes: dict[int, Cli], first: str) -> None:
    nodes[1].ok(*words(nodes, 1))
    said = nodes[2].ok(*words(nodes, 2, initial_sync=first)).err
    assert "node 2 copies nothing at first" in said
    dump = record(nodes[2])
    pair = dump["superblock"]["pair"]
    assert (pair["node"], pair["volume_uuid"]) == (2, None)
    assert pair["never_paired"]
    assert (dump["superblock"]["clean"], dump["superblock"]["initial_sync"]) == (False, "none")
    assert dump["extents"]["recorded"] == 0


def test_a_single_volume_says_nothing_of_a_pair(nodes: dict[int, Cli]) -> None:
    line = [word for word in words(nodes, 1) if not word.startswith(("--node", "--partner"))]
    nodes[1].ok(*line)
    assert record(nodes[1])["superblock"]["pair"] is None
    status = nodes[1].ok("status", "--json").json["volumes"][0]
    assert status["partner"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attach": "dm"}, "one node of a pair serves at a time"),
        ({"serve": "promoted"}, "not one of always, on-promote"),
        ({"record_on": "elsewhere"}, "not one of both, partner, local"),
        ({"node": "3"}, "there are 1 and 2"),
        ({"partner_listen": "unix:///run/2"}, "where this node itself listens"),
    ],
)
def test_what_cannot_be_one_of_two(
    nodes: dict[int, Cli], options: dict[str, str], reason: str
) -> None:
    outcome = nodes[1].call(*words(nodes, 1, **options))
    assert outcome.status == 2
    assert reason in outcome.err
    assert not nodes[1].paths.volume_file("vol0").exists()


@pytest.mark.parametrize("where", ["local", "partner", "both"])
def test_where_a_place_is_recorded_is_chosen_when_it_is_created(
    nodes: dict[int, Cli], where: str
) -> None:
    nodes[1].ok(*words(nodes, 1, record_on=where))
    assert record(nodes[1])["superblock"]["pair"]["record_on"] == where


def test_where_a_place_is_recorded_is_set_while_the_volume_is_stopped(
    nodes: dict[int, Cli],
) -> None:
    nodes[1].ok(*words(nodes, 1))
    done = nodes[1].ok("--json", "set", "vol0", "record-on=partner", "partner-ack=stored")
    assert (done.json["name"], done.json["record_on"]) == ("vol0", "partner")
    text = nodes[1].paths.volume_file("vol0").read_text()
    assert 'record_on = "partner"' in text
    assert 'partner_ack = "stored"' in text
    for word, reason in (
        ("record-on=elsewhere", "not one of both, partner, local"),
        ("record-on=local", None),
    ):
        outcome = nodes[1].call("set", "vol0", word)
        assert outcome.status == (0 if reason is None else 2)
        assert (reason or "") in outcome.err


def test_a_volume_without_a_partner_is_recorded_here(nodes: dict[int, Cli]) -> None:
    line = [word for word in words(nodes, 1) if not word.startswith(("--node", "--partner"))]
    nodes[1].ok(*line)
    outcome = nodes[1].call("set", "vol0", "record-on=partner")
    assert (outcome.status, "is for one of two appliances" in outcome.err) == (2, True)


FIGURES: dict[str, Any] = {
    "role": "pair", "kept": False,
    "node": 2, "state": "cut", "link": "down", "copier": False, "term": 4, "since": 12.3,
    "hands_over": False,
    "own_extents": 5, "partner_extents": 6, "owed_extents": 1, "waiting_requests": 3,
    "oldest_wait_seconds": 7.25, "rtt_seconds": 0.0005, "messages_total": 40, "handovers_total": 7,
    "proof": None, "fencing": None, "last_error": "no answer for 2 s", "peer": None,
    "serving": False, "conflicts": None,
}  # fmt: skip


def test_what_people_see_of_a_partner_that_is_gone() -> None:
    shown = dict(rows(FIGURES))
    assert shown["state"] == "cut for 12 s"
    assert shown["link"] == "down (no answer for 2 s)"
    assert shown["lead"] == "the partner"
    assert shown["hosts"] == "let in by 'dmctl takeover' only"
    assert shown["extents"] == "5 here, 6 at the partner, 1 on their way"
    assert shown["waiting"] == "3 requests of hosts, up to 7.2 s"
    assert {"proof", "partner", "fencing"}.isdisjoint(shown)
    shown = dict(rows(FIGURES | {"fencing": "agent", "proof": "fence"}))
    assert shown["fencing"] == "the fence command is at work"
    both = {"own_extents": 5, "partner_extents": 7, "both_extents": 2, "both": [[3, 2]]}
    shown = dict(rows(FIGURES | {"state": "split-brain", "conflicts": both}))
    assert shown["conflicts"] == "5 extents written alone here, 7 at the partner, 2 at both"


def test_what_people_see_of_one_that_is_there() -> None:
    peer = {"version": "0.1", "role": "pair", "secondary": "up", "dirty_bytes": 512,
            "lag_seconds": 1.5, "serves": True}  # fmt: skip
    shown = dict(rows(FIGURES | {"state": "paired", "link": "up", "copier": True, "peer": peer}))
    assert shown["hosts"] == "let in at the partner"
    assert shown["link"] == "up, 0.50 ms there and back"
    assert shown["lead"] == "this node"
    assert shown["partner"] == "0.1, secondary up, 512 bytes to copy, 1.5 s behind"
    assert "role" not in shown
    kept = {"state": "paired", "kept": True, "peer": peer | {"role": "keeper", "secondary": None}}
    shown = dict(rows(FIGURES | kept))
    assert shown["role"] == "the partner is a keeper of this node's record"
    assert shown["partner"] == "0.1, keeps the record"
    assert "this node its record" in dict(rows(FIGURES | {"role": "keeper"}))["role"]


def test_the_exit_status_of_each_state() -> None:
    assert STATUS == {
        "paired": 0, "cut": 100, "alone": 100, "waiting": 15, "outdated": 1, "split-brain": 16,
    }  # fmt: skip


# -- fencing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fence_command": "fence_scsi"}, "name the program from the root"),
        ({"fence_command": "/nowhere/fence"}, "/nowhere/fence is not there"),
        ({"fence_command": "/etc"}, "/etc is no file"),
        ({"fence_command": "/etc/passwd"}, "chmod +x /etc/passwd"),
        ({"fence_command": "/bin/true", "fence_options": "action=on"}, "action=on proves nothing"),
        ({"takeover": "auto"}, "auto needs a fence_command"),
    ],
)
def test_a_fence_command_that_cannot_prove_anything_is_refused(
    nodes: dict[int, Cli], options: dict[str, str], said: str
) -> None:
    outcome = nodes[1].call(*words(nodes, 1, **options))
    assert (outcome.status, said in outcome.err) == (2, True), outcome.err
    assert not nodes[1].paths.volume_file("vol0").exists()


def test_a_single_appliance_has_nobody_to_fence(nodes: dict[int, Cli]) -> None:
    media = [f"--{key}={nodes[1].folder}/{key[0]}" for key in ("primary", "secondary", "record")]
    for option in ("--fence-command=/bin/true", "--takeover=manual", "--cut-patience=5s"):
        outcome = nodes[1].call("create", "vol0", *media, "--attach=nbd", option)
        assert outcome.status == 2
        assert f"{option.partition('=')[0]} is for one of two appliances" in outcome.err


def test_config_check_looks_for_the_fence_command(nodes: dict[int, Cli]) -> None:
    agent = nodes[1].folder / "agent"
    agent.write_text("#!/bin/sh\n")
    agent.chmod(0o755)
    nodes[1].ok(*words(nodes, 1, fence_command=str(agent), fence_options="ip=1 user='a b'"))
    config = load_volume(nodes[1].paths, "vol0")
    assert config.fence_options == (("ip", "1"), ("user", "a b"))
    nodes[1].ok("config", "check")
    agent.chmod(0o644)
    outcome = nodes[1].call("config", "check")
    assert (outcome.status, f"{agent} may not be executed" in outcome.err) == (2, True)
