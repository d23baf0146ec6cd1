"""`make demo-failover`, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo_failover.py"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("mount", ["yes", "no"])
def test_the_demo_of_two_sites_ends_well_and_cleans_up(short_path: Path, mount: str) -> None:
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        env={**os.environ, "DEMO_DIR": str(short_path), "DEMO_MOUNT": mount},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The last point was whole" in done.stdout
    assert "e2fsck finds nothing wrong" in done.stdout
    assert not (short_path / "demo-failover-run").exists()
