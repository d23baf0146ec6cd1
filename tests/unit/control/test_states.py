"""The table of states: who uses it, and what docs/recovery.md says."""

from __future__ import annotations

import re
from pathlib import Path

from bitmapd.control.states import STATES, check_codes, check_status, hint

RECOVERY = Path(__file__).resolve().parents[3] / "docs/recovery.md"


def test_the_document_has_every_state_with_its_exit_status() -> None:
    text = RECOVERY.read_text()
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", text, re.MULTILINE))
    said = {name: int(status) for name, status in rows.items() if name in STATES}
    assert said == {n: state.check_status for n, state in STATES.items()}


def test_the_document_tells_which_of_several_is_shown() -> None:
    text = " ".join(RECOVERY.read_text().split())
    (order,) = re.findall(r"shows the first of ([^;]*?), and each ends", text)
    errors = [name for name, state in STATES.items() if state.hint]
    said = re.findall(r"`([a-z-]+)`", order)
    assert said == [name for name in errors if name != "stopped"]


def test_every_state_that_is_not_well_has_a_hint_and_a_status() -> None:
    for name, state in STATES.items():
        assert bool(state.check_status) == bool(state.hint), name
    assert hint("paused", "db") == "dmctl resume db"
    assert hint("in-sync", "db") is None
    assert hint("of a newer version", "db") is None
    assert check_status("of a newer version") == 1


def test_every_state_is_in_the_help() -> None:
    lines = check_codes().splitlines()
    assert lines[0] == "  0 copying, in-sync, receiving, keeping"
    named = {name.strip(",") for line in lines for name in line.split()[1:]}
    assert named == set(STATES)
