"""`examples/fencing/fence-by-ssh`: what it asks the other machine for, and what it proves."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest

AGENT = Path(__file__).parents[2] / "examples/fencing/fence-by-ssh"


def fence(folder: Path, said: str, status: int = 0) -> tuple[int, str]:
    """Its exit status, and what `ssh` was asked for; `status` is what that ends with."""
    ssh = folder / "ssh"
    ssh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {folder}/asked\nexit {status}\n')
    ssh.chmod(0o755)
    asked = folder / "asked"
    asked.write_text("")
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run([AGENT], input=said, text=True, env=environment, check=False, timeout=60)
    return done.returncode, asked.read_text()


def test_it_ends_the_volume_s_process_whatever_that_takes(tmp_path: Path) -> None:
    status, asked = fence(tmp_path, "action=off\nplug=b.example\nvolume=vol0\n")
    assert status == 0
    assert asked.endswith("root@b.example dmctl stop vol0 --now --kill --timeout 10s\n")


@pytest.mark.parametrize("failure", [255, 40])
def test_a_machine_that_does_not_answer_is_no_dead_one(tmp_path: Path, failure: int) -> None:
    """255 is ssh's own, 40 that of a process that does not end."""
    said = "action=off\nplug=b.example\nvolume=vol0\nusername=op\n"
    assert fence(tmp_path, said, failure)[0] == failure


@pytest.mark.parametrize("said", ["plug=b\n", "volume=v\n", "", "action=on\nplug=b\nvolume=v\n"])
def test_it_needs_to_know_whom(tmp_path: Path, said: str) -> None:
    assert fence(tmp_path, said) == (2, "")


def test_monitor_asks_whether_it_could(tmp_path: Path) -> None:
    status, asked = fence(tmp_path, "action=monitor\nplug=b\nvolume=v\n")
    assert (status, asked.endswith("root@b true\n")) == (0, True)


def test_it_describes_itself_as_fence_agents_do() -> None:
    done = subprocess.run(
        [AGENT], input="action=metadata\n", capture_output=True, text=True, check=True, timeout=60
    )
    root = ElementTree.fromstring(done.stdout)  # noqa: S314  (our own)
    assert {"action", "plug", "volume"} <= {one.get("name") for one in root.iter("parameter")}
    assert {"off", "monitor", "metadata"} <= {one.get("name") for one in root.iter("action")}
