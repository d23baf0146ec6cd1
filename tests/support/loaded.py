"""What an interpreter has loaded after some imports."""

from __future__ import annotations

import subprocess
import sys


def after(*modules: str) -> list[str]:
    """The names of all modules that a new interpreter has when it has imported these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()
