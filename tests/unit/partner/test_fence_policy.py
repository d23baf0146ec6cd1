"""When a node fences by itself, and what the agent is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitmapd.partner.fence_policy import RETRY_S, FenceSettings, Trigger, last_words, request

AUTO = FenceSettings(command="/fence", plug="b", delay_s=6.0, automatic=True)


@pytest.mark.parametrize(
    ("settings", "cut_for_s", "waiting", "due"),
    [
        (AUTO, 6.0, 1, True),
        (AUTO, 5.9, 1, False),  # the other one's turn comes first
        (AUTO, 600.0, 0, False),  # nobody here needs it: a standby does not shoot
        (AUTO, None, 1, False),  # in no other state than cut
        (replace(AUTO, automatic=False), 600.0, 1, False),
        (replace(AUTO, command=None), 600.0, 1, False),  # a time-out proves nothing
    ],
)
def test_a_node_shoots_by_itself_only_if_it_has_to(
    settings: FenceSettings, cut_for_s: float | None, waiting: int, due: bool
) -> None:
    assert Trigger().is_due(settings, 100.0, cut_for_s, waiting) is due


def test_not_again_before_a_minute_is_over() -> None:
    trigger = Trigger()
    trigger.ended(100.0)
    assert not trigger.is_due(AUTO, 100.0 + RETRY_S - 0.1, 60.0, 1)
    assert trigger.is_due(AUTO, 100.0 + RETRY_S, 60.0, 1)


def test_what_an_agent_reads() -> None:
    assert request("b.example", ()) == b"action=off\nplug=b.example\n"
    said = request("b", (("ip", "10.0.0.9"), ("plug", "3"), ("password", "a b")))
    assert said == b"action=off\nplug=3\nip=10.0.0.9\npassword=a b\n"


def test_a_node_that_came_back_and_dies_again_is_fenced_at_once() -> None:
    trigger = Trigger()
    trigger.ended(100.0)
    trigger.paired()
    assert trigger.is_due(AUTO, 101.0, 60.0, 1)


def test_a_log_gets_the_end_of_what_an_agent_prints_on_one_line() -> None:
    assert last_words(b"") == ""
    assert last_words(b"no\n  way \x1b[31m \xff\n") == "no way ?[31m \ufffd"
    assert last_words(b"0123456789", 4) == "…6789"
