"""A volume with a receiver: which state is shown."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bitmapd.volume.secondary import leave_at_once
from bitmapd.volume.withreceiver import WithReceiver


def state(found: str, *, split: bool = False, dials: bool = False, full: bool = False) -> str:
    with_receiver = WithReceiver(
        "vol0",
        SimpleNamespace(config=SimpleNamespace(receiver_dials=dials)),
        SimpleNamespace(is_split=split, sender=SimpleNamespace(room=SimpleNamespace(is_full=full))),
        SimpleNamespace(),
    )
    return with_receiver.state_of(found)


@pytest.mark.parametrize(
    "found", ["degraded", "primary-failing", "link-down", "paused", "resyncing", "copying"]
)
def test_it_is_that_of_any_volume(found: str) -> None:
    assert state(found) == found


def test_a_split_brain_comes_before_all() -> None:
    assert state("degraded", split=True, dials=True, full=True) == "split-brain"


def test_a_promoted_volume_whose_receiver_is_not_there_is_alone() -> None:
    assert state("link-down", dials=True) == "alone"
    assert state("degraded", dials=True) == "degraded"
    assert state("copying", dials=True) == "copying"


def test_a_journal_that_is_full_is_worth_saying_where_nothing_worse_is() -> None:
    assert state("copying", full=True) == "journal-full"
    assert state("resyncing", full=True) == "journal-full"
    assert state("primary-failing", full=True) == "primary-failing"
    assert state("in-sync", full=True) == "in-sync"


def test_a_stop_in_a_hurry_has_no_server_to_leave() -> None:
    leave_at_once(None)
