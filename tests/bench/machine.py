"""What the figures were measured on, without naming any path of the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "unknown"


def _field(path: str, key: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return "unknown"


def describe() -> dict[str, str]:
    memory_kib = int(_field("/proc/meminfo", "MemTotal").split()[0])
    return {
        "processor": _field("/proc/cpuinfo", "model name"),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / (1 << 20):.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nbdkit": _first_line("nbdkit", "--version"),
        "qemu-nbd": _first_line("qemu-nbd", "--version"),
        "libnbd": _first_line("nbdcopy", "--version"),
        "fio": _first_line("fio", "--version"),
        "load average at the start": load_average(),
    }


def load_average() -> str:
    """Of the last minute; the benchmark itself makes about 2."""
    return f"{os.getloadavg()[0]:.1f}"


def resident_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of a process now, and at its highest."""
    path = f"/proc/{pid}/status"
    now, peak = (int(_field(path, key).split()[0]) for key in ("VmRSS", "VmHWM"))
    return now << 10, peak << 10


def processor_s(pid: int) -> float:
    """What a process has had so far, threads that have ended included: its CPU clock, whose number
    is made of the process's (MAKE_PROCESS_CPUCLOCK in the kernel's posix-timers.h)."""
    return time.clock_gettime((~pid << 3) | 2)
