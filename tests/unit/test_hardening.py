"""What a process does for itself, in one of its own."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
from pathlib import Path

import pytest

from bitmapd import hardening
from bitmapd.errors import BitmapdError
from bitmapd.media import aio

SCORE = Path("/proc/self/oom_score_adj")


def run(program: str) -> list[str]:
    command = [sys.executable, "-c", f"from bitmapd import hardening\n{program}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_it_takes_itself_out_of_those_that_are_killed_or_says_why_not() -> None:
    answer, score = run(
        f"print(hardening.be_killed_last(), open({str(SCORE)!r}).read())",
    )
    allowed = int(answer) == 0
    assert allowed or int(answer) in (errno.EACCES, errno.EPERM)
    assert int(score) == (-1000 if allowed else int(SCORE.read_text()))


def test_what_a_service_manager_has_seen_to_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "oom_score_adj"
    monkeypatch.setattr(hardening, "_OOM_SCORE_FILE", file)
    file.write_text("-1000\n")
    file.chmod(0o400)
    assert hardening.be_killed_last() == 0
    assert file.read_text() == "-1000\n"
    file.chmod(0o600)
    file.write_text("0\n")
    assert hardening.be_killed_last() == 0
    assert file.read_text() == "-1000"
    file.unlink()
    assert hardening.be_killed_last() == errno.ENOENT


def test_each_protection_that_is_missing_is_an_event() -> None:
    told = run(
        "hardening.become_io_flusher = hardening.be_killed_last = lambda: 1\n"
        "hardening.lock_memory = lambda flags: 12\n"
        "hardening.protect_memory(lambda event, message: print(event))"
    )
    assert told == ["not-io-flusher", "memory-not-locked", "may-be-killed"]


def test_a_python_of_another_word_size_than_the_kernels_numbers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """32 bits on x86_64, where number 206 is another call."""
    assert len(aio._numbers()) == 4
    monkeypatch.setattr(ctypes, "sizeof", lambda kind: 4)
    with pytest.raises(BitmapdError, match="a Python of 32 bits") as caught:
        aio._numbers()
    assert "64-bit Python" in str(caught.value.hint)
