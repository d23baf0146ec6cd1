"""`make bench-pair` works from end to end; nothing is asserted about time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_quick_run_measures_every_part(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.pair", "--quick", "--results", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.iterdir()
    figures = json.loads(path.read_text())["figures"]
    assert len(figures) == 18
    assert figures["destage of 1 TiB"]["page writes"] == 34
    assert figures["exchange over a link"]["own extents"] == 100
    assert figures["link ends every 100 ms"]["exchanges"] > 1
    assert figures["disjoint hosts"]["asks"] == 0
    assert figures["disjoint hosts"]["writes"] > 0
    assert figures["takeover after kill -9"]["compared extents"] == 0
    assert figures["one extent, two hosts"]["handovers"] > 0
