"""The command, with configuration and sockets in a folder of the caller's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.bench.vm.media import CommandFailed

TIMEOUT_S = 120.0


def dmctl(folder: Path, *words: str, check: bool = True) -> None:
    """CommandFailed if it does not end with 0, unless that is not to be checked."""
    (folder / "run").mkdir(exist_ok=True)
    places = {"DMCTL_CONFIG_DIR": str(folder / "etc"), "DMCTL_RUN_DIR": str(folder / "run")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dmctl", *words],
        env={**os.environ, **places, "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if check and done.returncode:
        said = f"{done.stdout}{done.stderr}".strip()
        raise CommandFailed(f"dmctl {' '.join(words)}: exit status {done.returncode}: {said}")
