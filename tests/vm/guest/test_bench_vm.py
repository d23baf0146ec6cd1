"""The guest's part of `make bench-vm` works from end to end; nothing is asserted about time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.bench.vm import far, inside, report, rig
from tests.bench.vm.media import sh

pytestmark = pytest.mark.skipif(
    "BENCH_SMOKE" not in os.environ,
    reason="SETTING UP ALL CONTENDERS TAKES LONG: BENCH_SMOKE=1 runs it",
)


@pytest.fixture(scope="module")
def results() -> Iterator[inside.Results]:
    with (
        TemporaryDirectory(prefix="bvm") as folder,
        far.site(Path(folder), "127.0.0.1", rig.SIZE_BYTES) as site,
    ):
        yield inside.measure(inside.SCALES["smoke"], site)


def test_every_contender_is_measured_under_every_load(results: inside.Results) -> None:
    assert results["missing"] == {}
    assert [load["name"] for load in results["main"]] == ["rw16", "rr1", "fsync"]
    singles = [results["database"], results["fill"], results["trim"]]
    for load in [*results["main"], *singles, *results["spread"], *results["mixed"]]:
        assert rig.LINEAR in load["outcomes"]
        for name, outcomes in load["outcomes"].items():
            assert [one["rate"] > 0 for one in outcomes] == [True], (load["name"], name)
    for load in results["main"]:
        if load["name"] != "rr1":
            assert set(rig.PEERS) | {rig.HITS} <= set(load["outcomes"])
    assert set(results["database"]["outcomes"]) >= {rig.HITS, rig.MIX, *rig.PEERS}
    assert set(results["fill"]["outcomes"]) >= {rig.FRESH, *rig.PEERS}
    assert set(results["trim"]["outcomes"]) >= {rig.RAW, rig.FRESH}
    for load in results["layers"]:
        assert set(load["outcomes"]) == set(rig.LAYERS)
    for load in results["mixed"]:
        assert set(load["outcomes"]) >= {rig.MIX, *rig.PEERS}


def test_hits_are_hits_and_misses_are_misses(results: inside.Results) -> None:
    for load in [*results["main"], *results["spread"]]:
        for name in (rig.HITS, rig.PAUSED, rig.SEGMENTS):
            for one in load["outcomes"].get(name, []):
                assert one["volume"]["gate_writes"] == 0, (load["name"], name)
    for load in results["misses"]:
        (one,) = load["outcomes"][rig.MISSES]
        assert one["volume"]["hit_share"] == 0
        assert one["volume"]["writes"] == one["requests"]


def test_volumes_mirror_meanwhile(results: inside.Results) -> None:
    assert set(results["equal"].values()) == {True}
    (hits,) = [one for one in results["windows"] if one["name"] == rig.HITS]
    assert hits["volume"]["copied_bytes"] > 0
    assert hits["windows_s"]


def test_the_report_names_every_bar(results: inside.Results) -> None:
    rows = report.bar_rows(results)
    said = "\n".join(row[0] for row in rows)
    for what in ("of dm-linear", "of DRBD", "barrier", "fdatasync", "random reads"):
        assert what in said
    assert {row[-1] for row in rows} <= {"met", "MISSED", "-"}
    results |= {"machine": {"processor": "one"}, "command": "make bench-vm", "missing": {"x": "y"}}
    text = report.to_markdown(results)
    assert text.count("\n## ") == 2 + 3 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 2 + 2 + 1
    assert "nothing is known of them" in text


def test_nothing_is_left_behind(results: inside.Results) -> None:
    assert results["equal"]
    assert "bvm" not in sh("dmsetup", "ls")
    assert not list(Path("/sys/kernel/config/nullb").glob("bvm-*"))
    assert not list(Path("/sys/block").glob("bvm-*"))
