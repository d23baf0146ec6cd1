"""Loading the kernel's modules (edge)."""

from __future__ import annotations

import subprocess
from typing import Final

TIMEOUT_S: Final = 30.0


def modprobe(name: str, *parameters: str) -> None:
    """Ask for a module; whether it came shows in what it brings.

    OSError or subprocess.TimeoutExpired if the program could not be run to its end.
    """
    subprocess.run(
        ["modprobe", name, *parameters], check=False, capture_output=True, timeout=TIMEOUT_S
    )
