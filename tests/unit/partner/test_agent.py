"""A fence agent may do anything: it is started, followed and ended as a program of its own."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bitmapd.partner.agent import KEPT_BYTES, Run, run

LONG_S = 60.0
Agent = Callable[[str], str]


@pytest.fixture
def agent(tmp_path: Path) -> Agent:
    def make(script: str) -> str:
        path = tmp_path / "agent"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return make


def wanted(command: str, timeout_s: float = LONG_S, said: bytes = b"action=off\n") -> Run:
    reading, writing = os.pipe()
    try:
        return run(command, said, timeout_s, reading)
    finally:
        os.close(writing)


def gone(pid: int) -> bool:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], LONG_S)[0])
    finally:
        os.close(fd)


def test_it_reads_what_it_is_told_and_its_status_counts(agent: Agent) -> None:
    said = b"action=off\nplug=b\n"
    assert wanted(agent("cat; exit 0"), said=said) == Run(0, said)
    assert wanted(agent("echo why >&2; exit 3")) == Run(3, b"why\n")
    assert wanted(agent("kill -9 $$")).status == -9


def test_one_that_reads_nothing_is_no_trouble(agent: Agent) -> None:
    assert wanted(agent("exit 0"), said=b"x" * (1 << 20)) == Run(0, b"")


def test_one_that_is_not_there(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        wanted(str(tmp_path / "nothing"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_end_of_whatever_it_prints_is_kept(agent: Agent) -> None:
    outcome = wanted(agent("seq 1 100000; echo the end"))
    assert outcome.status == 0
    assert len(outcome.output) == KEPT_BYTES
    assert outcome.output.endswith(b"\n100000\nthe end\n")


def test_it_has_no_descriptor_of_ours(agent: Agent, tmp_path: Path) -> None:
    with (tmp_path / "open").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        outcome = wanted(agent("ls -l /proc/self/fd"))
    assert outcome.status == 0
    assert b"/open" not in outcome.output


def test_all_that_it_has_started_is_killed_with_it(agent: Agent, tmp_path: Path) -> None:
    """One that sleeps in the background, of a parent that ignores signals."""
    os.mkfifo(tmp_path / "child")
    script = f"trap '' TERM INT HUP; sleep 600 & echo sorry; echo $! > {tmp_path}/child; wait"
    command = agent(script)
    reading, writing = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, command, b"", LONG_S, reading)
        child = int((tmp_path / "child").read_text())
        os.close(writing)  # nobody wants it any more
        assert running.result() == Run(None, b"sorry\n")
    assert gone(child)


def test_one_that_does_not_end_is_killed_when_its_time_is_up(agent: Agent) -> None:
    assert wanted(agent("sleep 600"), timeout_s=0.1).status is None


def test_what_it_leaves_running_is_not_waited_for(agent: Agent, tmp_path: Path) -> None:
    """It holds the output open, which therefore has no end."""
    outcome = wanted(agent(f"sleep 600 & echo $! > {tmp_path}/child; echo done"))
    pid = int((tmp_path / "child").read_text())
    try:
        assert outcome == Run(0, b"done\n")
        assert Path(f"/proc/{pid}").exists()
    finally:
        os.kill(pid, 9)
