"""`make demo`, as a user runs it: with a mounted file system where that can be, and without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


def run_demo(folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(DEMO)],
        env={**os.environ, "DEMO_DIR": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def figure(output: str, label: str) -> float:
    found = re.search(rf"^ *{re.escape(label)} +([\d,.]+)", output, re.MULTILINE)
    assert found, f"no line '{label}' in:\n{output}"
    return float(found[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mount", ["yes", "no"])
def test_the_demo_ends_well_and_cleans_up(short_path: Path, mount: str) -> None:
    if mount == "yes" and (os.geteuid() != 0 or not Path("/dev/fuse").exists()):
        pytest.skip("LOUD: mounting needs root and /dev/fuse; only the other variant runs here")
    folder = short_path / "d"
    output = run_demo(folder, DEMO_MOUNT=mount)
    assert "Nothing was lost" in output
    assert ("NOTE: mounting needs root" in output) == (mount == "no")
    hits, misses = figure(output, "hits (no record I/O)"), figure(output, "misses")
    assert misses > 0
    # A mounted file system writes to the same places again; nbdcopy goes over the whole image.
    assert hits > (misses if mount == "yes" else 0)
    assert 0 < figure(output, "recopied after the crash") < figure(output, "device size") / 2
    assert not folder.exists()
    assert str(folder) not in Path("/proc/mounts").read_text()
