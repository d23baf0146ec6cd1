"""`make bench-points` works from end to end, part by part; nothing is asserted about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.points import parts

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", parts(quick=True))
def test_a_quick_run_measures_the_part(tmp_path: Path, part: str) -> None:
    results = ["--results", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.points", "--quick", "--only", part, *results],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    figures = json.loads(path.read_text())["figures"]
    assert figures
    assert all(row for row in figures.values())
    if part == "cuts":
        assert figures["link cut in one point"]["bytes sent / once"] < 3
    if part == "written":
        assert figures["receiver's disks"]["written / received"] > 1
