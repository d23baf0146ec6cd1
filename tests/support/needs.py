"""What a test needs of the machine: it is skipped loudly, or fails where LAB_REQUIRED is set."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def lacks(what: str) -> NoReturn:
    message = f"NEEDS {what}: this was NOT tested"
    if os.environ.get("LAB_REQUIRED"):
        pytest.fail(message)
    pytest.skip(message)


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            lacks(f"{program}, which is not installed")
