"""Groups by real programs: two volumes and their receivers; see `tests.soak.group`."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitmapd.points.group import UNHEARD
from tests.soak.group import GroupSites, Pair, run_rounds

pytestmark = pytest.mark.timeout(300)

PATIENT = ("--cut-patience", "1s")


@pytest.fixture
def sites(short_path: Path) -> Iterator[GroupSites]:
    with GroupSites(short_path, *PATIENT) as made:
        made.create()
        yield made


def test_a_group_that_lost_its_site_has_one_instant(short_path: Path) -> None:
    done, _ = run_rounds(short_path, 3, random.Random(7).randrange(1000))
    assert sum(done.values()) == 3


def test_members_are_promoted_together_and_wait_for_one_another(sites: GroupSites) -> None:
    sites.start()
    near, far = sites.near, sites.far
    refused = far["a"].refused("promote", "a")
    assert refused["code"] == "wrong-state"
    assert "--group db" in refused["hint"]
    assert "connected" in far["a"].refused("promote", "a", "b")["message"]
    assert far["a"].refused("promote", "--group", "other")["code"] == "wrong-state"
    assert (
        far["a"].refused("promote", "--group", "db", "--point", "1", "--force")["code"] == "usage"
    )
    near["b"].kill()
    near["a"].until(
        lambda status: "b does not answer" in (status["points"]["group"]["waits_for"] or "")
    )
    before = near["a"].status()["points"]["number"]
    near["a"].write(1 << 20, b"x" * 4096)  # hosts go on
    refused = near["a"].refused("point", "a", "--label", "L")
    assert (refused["code"], "b does not answer" in refused["message"]) == ("unreachable", True)
    assert near["a"].status()["points"]["number"] == before
    near["b"].start()
    near["a"].until(lambda status: status["points"]["number"] > before)


def test_a_leader_that_hangs_keeps_the_group_from_being_cut_and_that_is_said(
    sites: GroupSites,
) -> None:
    sites.start()
    near = sites.near
    leader, other = ("a", "b") if near["a"].status()["points"]["group"]["leads"] else ("b", "a")
    os.kill(near[leader].pid, signal.SIGSTOP)
    try:
        near[other].until(lambda status: status["points"]["group"]["waits_for"] == UNHEARD)
        near[other].write(1 << 20, b"x" * 4096)  # hosts go on
        refused = near[other].refused("point", other, "--label", "L")
        assert refused["code"] == "unreachable"
        assert UNHEARD in refused["message"]
        told = near[other].dmctl("events", other, "--now")
        assert UNHEARD in told
    finally:
        os.kill(near[leader].pid, signal.SIGCONT)
    before = near[other].status()["points"]["number"]
    near[other].write(2 << 20, b"y" * 4096)
    near[other].until(lambda status: status["points"]["number"] > before)
    assert near[other].status()["points"]["group"]["waits_for"] is None


def test_who_stops_does_not_wait_for_a_receiver_that_went_away(sites: GroupSites) -> None:
    sites.start()
    near, far = sites.near, sites.far
    os.kill(far["a"].pid, signal.SIGSTOP)
    near["a"].write(0, os.urandom(2 << 20))
    near["b"].write(0, os.urandom(4096))
    near["a"].until(lambda status: status["points"]["state"] in ("sending", "ended"), 30)
    far["a"].kill()
    near["b"].write(1 << 20, os.urandom(4096))
    told = "a: its receiver is away"
    near["b"].until(lambda status: told in (status["points"]["group"]["waits_for"] or ""), 30)
    near["b"].stop()
    assert near["b"].status()["dirty_bytes"] == 0


def test_a_member_that_leaves_by_an_editor_is_waited_for_no_more(sites: GroupSites) -> None:
    sites.start()
    near = sites.near
    leader, other = ("a", "b") if near["a"].status()["points"]["group"]["leads"] else ("b", "a")
    near[other].stop()
    near[leader].until(
        lambda status: f"{other} does not" in (status["points"]["group"]["waits_for"] or "")
    )
    (file,) = near[other].folder.rglob(f"volumes/{other}.toml")
    text = file.read_text()
    assert 'group = "db"\n' in text
    file.write_text(text.replace('group = "db"\n', ""))  # in place, as editors do
    near[leader].until(lambda status: status["points"]["group"]["waits_for"] is None)


def test_a_label_is_that_of_the_whole_group(sites: GroupSites) -> None:
    sites.start()
    host = Pair(sites)
    host.until(5)
    sites.near["b"].dmctl("point", "b", "--label", "release", "--wait")
    sites.near["a"].dmctl("wait", "a", "--for", "in-sync", "--timeout", "1ms", check=False)
    for volume in sites.near.values():
        volume.kill()
    host.end()
    answer = sites.promote()
    first, second = answer["volumes"]
    assert first["at"] == second["at"]
    assert sites.found("b") <= sites.found("a") <= sites.found("b") + 1
    again = sites.far["a"].refused("promote", "--group", "db")
    assert "a, b may have been promoted already" in again["hint"]
    assert again["code"] == "wrong-state"
