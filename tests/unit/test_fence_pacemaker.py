"""`dmctl-fence-pacemaker`: what it asks the cluster for, and what it takes for a proof."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "examples/ocf/dmctl-fence-pacemaker"


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """Programs of Pacemaker that write down what they are asked for."""
    for name, text in (
        ("crm_attribute", 'cat "$HERE/kind"'),
        ("stonith_admin", 'echo "$@" >"$HERE/asked"; exit "$(cat "$HERE/status")"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "kind").write_text("reboot\n")
    (tmp_path / "status").write_text("0")
    return tmp_path


def fence(cluster: Path, said: str) -> tuple[int, str | None]:
    environment = {**os.environ, "HERE": str(cluster), "PATH": f"{cluster}:{os.environ['PATH']}"}
    done = subprocess.run([AGENT], input=said, text=True, env=environment, check=False, timeout=60)
    asked = cluster / "asked"
    return done.returncode, asked.read_text().strip() if asked.exists() else None


@pytest.mark.parametrize(("kind", "word"), [("reboot", "--reboot"), ("off", "--fence")])
def test_it_asks_for_what_the_cluster_does_itself(cluster: Path, kind: str, word: str) -> None:
    """A fencing that was done already counts only if it is of the same kind."""
    (cluster / "kind").write_text(f"{kind}\n")
    assert fence(cluster, "action=off\nplug=b\nx=y\n") == (0, f"{word} b --tolerance 10s")


def test_what_the_cluster_refuses_is_no_proof(cluster: Path) -> None:
    (cluster / "status").write_text("124")
    assert fence(cluster, "action=off\nplug=b\n")[0] == 124


def test_a_cluster_that_does_not_answer_is_no_proof(cluster: Path) -> None:
    (cluster / "crm_attribute").write_text("#!/bin/sh\nexit 102\n")
    status, asked = fence(cluster, "action=off\nplug=b\n")
    assert status != 0
    assert asked is None


@pytest.mark.parametrize("said", ["action=off\n", "plug=\n", "action=on\nplug=b\n", ""])
def test_nothing_else_is_asked_for(cluster: Path, said: str) -> None:
    assert fence(cluster, said) == (2, None)
