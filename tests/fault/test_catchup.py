"""A catch-up that the journal has no room for, with real processes: what is promoted meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import rawnbd
from tests.support.scrape import scrape
from tests.support.sites import Sites
from tests.support.volumes import MIB, Volume

pytestmark = pytest.mark.timeout(180)
SIZE = 96 * MIB
CHANGED = 80  # MiB, for which a journal of 64 MiB has no room

HOOK = """#!/bin/sh
set -e
case $1 in
keep) cp "$4" "$4.copy-$3" ;;
drop) rm -f "$4.copy-$3" ;;
restore) cat "$4.copy-$3" 1<> "$4" ;;
esac
"""


@contextlib.contextmanager
def behind(folder: Path, *far_options: str) -> Iterator[tuple[Sites, int, bytes]]:
    """Two sites in the course of a catch-up, slowly; with the last point of before, and what the
    volume was at that."""
    near, far = (("--metrics-listen", f"unix:{folder}/{name}.m") for name in ("near", "far"))
    with Sites(
        folder,
        SIZE,
        near_options=near,
        far_options=(*far, *far_options),
        journal_bytes=64 * MIB,
    ) as sites:
        sites.create()
        sites.start()
        write(sites, range(4))
        sites.near.wait_in_sync()
        number = sites.points()["number"]
        content = sites.near.primary.read_bytes()
        sites.far.stop("--now")
        write(sites, range(CHANGED))
        sites.near.dmctl("set", "vol0", "copy-rate=2MiB")
        sites.far.start()
        sites.far.until(lambda status: status["receiver"]["in_place_until"] is not None)
        yield sites, number, content


def write(sites: Sites, places: range) -> None:
    """What cannot be packed: the rate is one on the wire."""
    with sites.near.host() as host:
        for place in places:
            host.call(rawnbd.WRITE, place * MIB, MIB, os.urandom(MIB))


def events(volume: Volume) -> list[dict[str, Any]]:
    return [json.loads(line) for line in volume.dmctl("events", "vol0", "--now").splitlines()]


def test_with_clone_a_copy_of_the_last_point_is_promoted(short_path: Path) -> None:
    hook = short_path / "hook"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    options = ("--catch-up", "clone", "--point-hook", str(hook))
    with behind(short_path, *options) as (sites, number, content):
        receiver = sites.far.status()["receiver"]
        assert (receiver["catch_up"], receiver["consistent"]) == ("clone", "no")
        assert receiver["kept"] == [number]
        refused = sites.far.refused("points", "vol0", "--drop", str(number))
        assert refused["code"] == "wrong-state"
        sites.near.kill()
        answer = json.loads(sites.far.dmctl("--json", "promote", "vol0"))
        assert (answer["point"], answer["consistent"]) == (number, True)
        sites.far.stop("--now")
        assert sites.image.read_bytes() == content


def test_in_place_there_is_nothing_to_promote_until_it_ends(short_path: Path) -> None:
    with behind(short_path, "--catch-up", "in-place") as (sites, number, _):
        begun = [it for it in events(sites.far) if it["event"] == "catch-up-begun"]
        assert [it["point"] for it in begun] == [number + 1]
        assert f"point {number} is given up" in begun[0]["message"]
        assert sites.near.status()["receiver"]["in_place"]
        # As the alert PointInPlace sees it from either end.
        near, far = (scrape(short_path / f"{name}.m") for name in ("near", "far"))
        assert (near["bitmapd_receiver_in_place"], near["bitmapd_point_number"]) == (1, number)
        assert far["bitmapd_receiver_in_place_until"] == number + 1
        assert "catch-up-begun" in {it["event"] for it in events(sites.near)}
        assert sites.far.refused("test-failover", "vol0")["code"] == "wrong-state"
        sites.near.stop("--now")
        refused = sites.far.refused("promote", "vol0")
        assert refused["code"] == "wrong-state"
        assert "is between two points" in refused["message"]
        assert f"point {number + 1} ends that" in refused["hint"]
        sites.near.start()
        sites.far.start()
        sites.near.dmctl("set", "vol0", "copy-rate=none")
        sites.near.wait_in_sync()
        sites.near.stop()
        sites.far.stop()
        assert sites.equal()
        assert json.loads(sites.far.dmctl("--json", "promote", "vol0"))["consistent"]
