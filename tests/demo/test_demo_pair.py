"""`make demo-pair`, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_pair.py"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_the_demo_of_a_pair_ends_well_and_cleans_up(short_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        env={**os.environ, "DEMO_DIR": str(short_path)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was lost" in done.stdout
    assert not (short_path / "demo-pair-run").exists()
    picture = (short_path / "demo-pair.svg").read_text()
    lines = re.findall(r'<polyline points="([^"]+)"[^>]*stroke="(#[0-9a-f]+)"', picture)
    drawn = Counter(colour for points, colour in lines if len(points.split()) > 1)
    assert sorted(drawn.values()) == [3, 6], "three figures; node 1 is gone in between"
    assert picture.endswith("</svg>\n")
