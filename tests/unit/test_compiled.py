"""Interpreted or compiled, it is all of one kind, and the program says which."""

from __future__ import annotations

import os
import runpy
from importlib import import_module
from pathlib import Path

from bitmapd import is_compiled, version_text

ROOT = Path(__file__).resolve().parents[2]


def test_modules_of_one_group_are_compiled_together_and_it_is_said() -> None:
    """One that runs interpreted beside compiled ones is slow, and may be another version."""
    hot = runpy.run_path(str(ROOT / "setup.py"))["HOT"]
    assert hot
    kinds = {
        str(import_module(path.removesuffix(".py").replace("/", ".")).__file__).endswith(".so")
        for path in hot
    }
    assert kinds == {is_compiled()}
    assert version_text().endswith("(compiled)") == is_compiled()


def test_what_was_meant_to_be_compiled_is() -> None:
    """Else `make test-compiled` would prove the sources once more."""
    assert is_compiled() == (os.environ.get("EXPECT_COMPILED") == "1")
