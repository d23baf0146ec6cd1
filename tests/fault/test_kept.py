"""Points that stay, with real processes: kept, listed, dropped, promoted, and the way back."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.loops import loop_device, memory_folder, run, sparse_file
from tests.support.needs import lacks, need
from tests.support.sites import Sites, Writer, newest
from tests.support.volumes import MIB

pytestmark = pytest.mark.timeout(180)
SIZE = 32 * MIB

HOOK = """#!/bin/sh
set -e
echo "$@" >> "$4.calls"
case $1 in
keep) test "$6" != refused || { echo 'no room' >&2; exit 3; }; cp "$4" "$4.copy-$3" ;;
drop) rm -f "$4.copy-$3" ;;
restore) cat "$4.copy-$3" 1<> "$4" ;;
esac
"""


@contextlib.contextmanager
def xfs(folder: Path) -> Iterator[Path]:
    """A file system that can clone files, in a folder with a short path."""
    need("mkfs.xfs", "losetup", "mount")
    if os.geteuid():
        lacks("to be root, who may mount")
    if "xfs" not in Path("/proc/filesystems").read_text().split():
        lacks("xfs in the kernel")
    with loop_device(sparse_file(folder / "disk", 600 * MIB)) as device:
        run("mkfs.xfs", "-q", "-m", "reflink=1", device)
        (folder / "x").mkdir()
        run("mount", device, str(folder / "x"))
        try:
            yield folder / "x"
        finally:
            run("umount", str(folder / "x"))


@pytest.fixture
def sites(short_path: Path) -> Iterator[Sites]:
    """On XFS, with small extents, so that what differs is a small part of the volume."""
    with xfs(short_path) as folder:
        options = ("--extent-size", "64KiB")
        with Sites(folder, SIZE, *options, far_options=("--retain", "3 x 1s")) as made:
            made.create()
            yield made


def points(sites: Sites) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(sites.far.dmctl("--json", "points", "vol0"))["points"]
    return found


def kept(sites: Sites) -> dict[int, str]:
    return {point["point"]: point["label"] for point in points(sites) if point["kept"]}


def labelled(sites: Sites, label: str) -> int:
    """A point that the receiver has."""
    words = ("--json", "point", "vol0", "--label", label, "--wait")
    return int(json.loads(sites.near.dmctl(*words))["point"])


def wait_kept(sites: Sites, number: int) -> None:
    sites.far.until(lambda status: number in status["receiver"]["kept"])


def test_an_older_point_is_promoted_and_failback_copies_the_differences(sites: Sites) -> None:
    sites.start()
    writer = Writer(sites.near)
    writer.more(200)
    told = writer.answered
    number = labelled(sites, "before-upgrade")
    after = writer.answered
    wait_kept(sites, number)
    sites.far.stop("--now")
    sites.far.start()
    writer.more(200)
    sites.point(sites.points()["number"] + 2)
    sites.far.until(lambda status: len(status["receiver"]["kept"]) >= 4)
    listed = kept(sites)
    assert listed[number] == "before-upgrade"
    assert len(listed) <= 3 + 1 + 1  # by rule, by label, and one that is about to go
    assert "before-upgrade" in sites.far.dmctl("points", "vol0")
    assert (sites.image.parent / f"{sites.image.name}.point-{number}").exists()
    sites.near.kill()
    writer.stop()

    answer = json.loads(sites.far.dmctl("--json", "promote", "vol0", "--label", "before-upgrade"))
    assert answer["point"] == number
    assert answer["consistent"]
    sites.far.stop("--now")
    assert told <= newest(sites.image) <= after + 1
    sites.far.start()
    named = sites.far.status()["record_bytes"]
    assert 0 < named < SIZE
    later = Writer(sites.far, slots=500, first=1_000_000)
    later.more(50)
    later.stop()
    sites.near.dmctl("failback", "vol0", "--journal", str(sites.near_journal), "--yes")
    sites.far.wait_in_sync()
    assert sites.far.status()["points"]["sent_bytes_total"] <= 16 * MIB
    sites.far.stop()
    sites.near.stop()
    assert sites.equal()


def test_rules_and_names_say_which_points_stay(sites: Sites) -> None:
    sites.start()
    first = labelled(sites, "twice")
    second = labelled(sites, "twice")
    wait_kept(sites, second)
    for number in (first, second):
        assert kept(sites)[number] == "twice"
    assert sites.far.refused("points", "vol0", "--drop", "9999")["code"] == "not-found"
    sites.far.dmctl("points", "vol0", "--drop", str(first))
    assert first not in kept(sites)
    assert not (sites.image.parent / f"{sites.image.name}.point-{first}").exists()
    again = labelled(sites, "twice")
    wait_kept(sites, again)
    sites.near.stop()
    sites.far.stop()
    assert kept(sites)[again] == "twice"  # read from the journal
    assert sites.far.refused("points", "vol0", "--drop", str(again))["code"] == "wrong-state"
    ambiguous = sites.far.refused("promote", "vol0", "--label", "twice")
    assert ambiguous["code"] == "usage"
    assert f"{second}, {again}" in ambiguous["message"]
    for words in (("--label", "never"), ("--point", "9999")):
        assert sites.far.refused("promote", "vol0", *words)["code"] == "wrong-state"
    sites.far.start()
    assert sites.far.status()["state"] == "receiving"


def test_retain_is_refused_where_no_copies_can_be_made() -> None:
    with (
        memory_folder() as folder,
        Sites(folder, SIZE, far_options=("--retain", "2 x 1h")) as sites,
    ):
        sparse_file(sites.image, SIZE)
        words = (
            "receive", "vol0", "--image", str(sites.image), "--journal", str(sites.journal),
            "--listen", sites.listen,
        )  # fmt: skip
        refused = sites.far.refused(*words, "--retain", "2 x 1h")
        assert refused["code"] == "usage"
        assert "cannot be cloned" in refused["message"]
        assert "--point-hook" in refused["hint"]
        assert "keeps" in sites.far.refused(*words, "--retain", "40 x 1h, 14 x 1d")["message"]
        sites.far.dmctl(*words)  # a label is a wish


def test_a_program_keeps_points_and_its_errors_cost_only_them(short_path: Path) -> None:
    hook = short_path / "hook"
    hook.write_text(HOOK)
    hook.chmod(0o755)
    with Sites(short_path, SIZE, far_options=("--point-hook", str(hook))) as sites:
        sites.create()
        sites.start()
        writer = Writer(sites.near)
        writer.more(50)
        told = writer.answered
        number = labelled(sites, "in words")
        after = writer.answered
        wait_kept(sites, number)
        refused = labelled(sites, "refused")
        events = sites.far.dmctl("events", "vol0", "--now")
        sites.point(refused + 1)
        writer.stop()
        sites.far.until(lambda status: status["receiver"]["applied"] > refused)
        events = sites.far.dmctl("events", "vol0", "--now")
        assert "point-not-kept" in events
        assert "no room" in events
        assert kept(sites) == {number: "in words"}
        sites.near.kill()
        answer = json.loads(sites.far.dmctl("--json", "promote", "vol0", "--point", str(number)))
        assert answer["point"] == number
        sites.far.stop("--now")
        assert told <= newest(sites.image) <= after + 1
        calls = Path(f"{sites.image}.calls").read_text().splitlines()
        assert calls[0].startswith(f"keep vol0 {number} {sites.image} ")
        assert calls[0].endswith("in words")
        assert any(call.startswith(f"restore vol0 {number} ") for call in calls)
