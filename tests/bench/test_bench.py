"""The benchmark command works from end to end; nothing is asserted about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_quick_run_tells_what_a_request_costs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.cost", "--quick"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith("|") and "us a" in line]
    assert len(rows) == 5 * 3, "five loads; nbdkit, and bitmapd with and without copying"
    assert done.stdout.count("memory, idle again") == 3


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_quick_run_measures_every_part(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.bench.bench",
            "--quick",
            *("--disk", str(tmp_path / "disk")),
            *("--results", str(tmp_path / "results")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "results").iterdir()
    results = json.loads(path.read_text())
    assert [backing["name"] for backing in results["backings"]] == ["tmpfs", "disk"]
    for backing in results["backings"]:
        assert len(backing["loads"]) == 6
        for load in backing["loads"]:
            assert set(load["iops"]) == {"bitmapd", "nbdkit", "qemu-nbd", "qemu-nbd direct"}
            assert all(value > 0 for values in load["iops"].values() for value in values)
        # The two loads measure what they say: the working set is in the record, or it is not.
        # How far apart they are depends on how long the machine takes: what is idle leaves.
        random_writes = [one for one in backing["loads"] if "random write" in one["name"]]
        assert len(random_writes) == 2
        ours = backing["miss"]["ours"]["bitmapd"]
        misses = ours["miss_share"][0]
        assert misses > 0.5
        assert ours["predicted_share"][0] < misses
        assert all(one["hit_share"]["bitmapd"] > 1 - misses for one in random_writes)
        assert len(backing["copies"]) == 2
    assert all(one["resident_mib"] > 0 for one in results["memory"].values())
    assert results["age"]["hottest_age_s"] > 0
    assert results["age"]["content_age_s"] > 0
