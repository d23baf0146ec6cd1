"""Chosen mistakes can be made: a table that has lost its place in the code would find nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def _tool():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools/mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_each_mistake_has_its_place_and_its_tests():
    without = []
    mistakes = _tool().load()
    for mistake in mistakes:
        try:
            mistake.place(ROOT)
        except ValueError as error:
            without.append(str(error))
        without += [
            f"{mistake.name}: {test} is not there"
            for test in mistake.tests
            if not (ROOT / test.partition("::")[0]).exists()
        ]
    assert without == []
    assert len({mistake.name for mistake in mistakes}) == len(mistakes)
