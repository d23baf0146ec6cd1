"""The stages of a planned move, exhaustively, and what either site concludes of the other."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import pytest

from bitmapd.points.messages import NIL, Feature, Hello2, Role
from bitmapd.points.switchover import ASKED, Outlook, Stage, after, outlook, refusal

OLD, NOW, NEW = (bytes([n]) * 16 for n in (1, 2, 3))
ENDS = {Stage.SERVING, Stage.DEMOTED, Stage.UNKNOWN, Stage.GIVEN}


def hello(**changes: Any) -> Hello2:
    values: dict[str, Any] = {
        "volume": bytes(16),
        "incarnation": bytes(16),
        "generations": (NOW, OLD, NIL, NIL),
        "size_bytes": 1 << 20,
        "block_bytes": 65536,
        "extent_bytes": 1 << 20,
        "committed": 7,
        "applied": 7,
        "oldest_kept": 0,
        "role": Role.DEMOTED,
        "features": Feature(0),
        "credit_bytes": 0,
        "term": 1,
        "name": "vol0",
        "program": "test",
    }
    return Hello2(**(values | changes))


RECEIVER = hello(role=Role.RECEIVER)


def test_every_stage_ends_and_before_demoting_an_error_lets_the_hosts_in_again() -> None:
    for first in Stage:
        seen = [first]
        for well in (True, False):
            while (following := after(seen[-1], well=well)) is not None:
                seen.append(following)
                assert len(seen) < 20
        assert seen[-1] in ENDS
    for stage in (Stage.CLOSING, Stage.SENDING, Stage.APPLYING):
        again = after(stage, well=False)
        assert again is Stage.REOPENING
        assert after(again, well=True) is Stage.SERVING
    assert after(Stage.DEMOTING, well=False) is Stage.UNKNOWN


@dataclass(frozen=True)
class World:
    """Old site, its superblock, and the new one; `sent`: a HANDOVER on its way, `taken`: TAKEN."""

    stage: Stage = Stage.SERVING
    demoted: bool = False  # durably
    promoted: bool = False  # the new site, durably
    sent: bool = False
    taken: bool = False

    @property
    def serves(self) -> bool:
        """Whether hosts may reach the old site."""
        return self.stage in (Stage.SERVING, Stage.CLOSING, Stage.REOPENING)


def steps(world: World) -> list[World]:
    """Whatever may come next: a stage's end, a crash of the process, a lost link, a message, an
    administrator's command."""
    stage = world.stage
    found = []
    for well in (True, False):
        if stage is Stage.HANDING and well and not world.taken:
            continue  # it is TAKEN that it waits for
        following = after(stage, well=well)
        if following is not None:
            demoted = world.demoted
            for landed in (True, False) if stage is Stage.DEMOTING and not well else (well,):
                durable = demoted or (stage is Stage.DEMOTING and landed)
                found.append(replace(world, stage=following, demoted=durable))
    asked = ASKED.get(stage)
    if asked is not None:
        found.append(replace(world, stage=asked, sent=asked is Stage.HANDING))
    if stage is not Stage.GIVEN:
        found.append(
            replace(
                world,
                stage=Stage.DEMOTED if world.demoted else Stage.SERVING,
                sent=False,  # a new connection ends the one before
                taken=False,
            )
        )
    if stage is Stage.DEMOTED:
        theirs = (
            hello(generations=(NEW, NOW, OLD, NIL), role=Role.SENDER, committed=0, term=2)
            if world.promoted
            else RECEIVER
        )
        found_out = outlook(hello(), theirs)
        if found_out is Outlook.NOT_TAKEN:  # `promote` there: it takes the role back
            found.append(replace(world, stage=Stage.SERVING, demoted=False, sent=False))
        else:
            assert found_out is Outlook.TAKEN
            found.append(replace(world, stage=Stage.GIVEN))
    if world.sent and not world.promoted:
        assert refusal(2, hello(), RECEIVER) is None
        found.append(replace(world, promoted=True, sent=False, taken=True))
    return found


def test_never_do_two_sites_serve_and_a_move_can_always_be_ended() -> None:
    """All states that can be reached, whatever dies in whichever order."""
    seen, ahead = {World()}, deque([World()])
    leads: dict[World, set[World]] = {}
    while ahead:
        world = ahead.popleft()
        assert not (world.serves and (world.promoted or world.demoted)), world
        assert world.demoted or not world.promoted
        leads[world] = set(steps(world))
        for following in leads[world] - seen:
            seen.add(following)
            ahead.append(following)
    goal = {world for world in seen if world.serves or world.promoted}
    while True:
        more = {world for world in seen - goal if leads[world] & goal}
        if not more:
            break
        goal |= more
    assert goal == seen
    assert any(world.stage is Stage.GIVEN for world in seen)


@pytest.mark.parametrize(
    ("theirs", "found"),
    [
        (RECEIVER, Outlook.NOT_TAKEN),
        (replace(RECEIVER, role=Role.PROMOTED), Outlook.BUSY),
        (replace(RECEIVER, committed=6), Outlook.OTHER),
        (hello(generations=(NEW, NOW, OLD, NIL), role=Role.SENDER), Outlook.TAKEN),
        (hello(generations=(NEW, NOW, OLD, NIL), role=Role.PROMOTED), Outlook.TAKEN),
        (hello(role=Role.SENDER), Outlook.OTHER),
        (hello(generations=(NEW, OLD, NIL, NIL), role=Role.SENDER), Outlook.OTHER),
    ],
)
def test_what_the_other_site_is(theirs: Hello2, found: Outlook) -> None:
    assert outlook(hello(), theirs) is found


@pytest.mark.parametrize(
    ("term", "ours", "theirs", "word"),
    [
        (2, replace(hello(), role=Role.SENDER), RECEIVER, "demoted"),
        (2, hello(generations=(OLD, NIL, NIL, NIL)), RECEIVER, "not what"),
        (1, hello(), RECEIVER, "term"),
        (3, hello(), RECEIVER, "term"),
        (2, replace(hello(), committed=6), RECEIVER, "point 7"),
        (2, replace(hello(), committed=0), replace(RECEIVER, committed=0, applied=0), "point 0"),
        (2, hello(), replace(RECEIVER, applied=6), "being applied"),
    ],
)
def test_what_a_receiver_does_not_take(term: int, ours: Hello2, theirs: Hello2, word: str) -> None:
    reason = refusal(term, ours, theirs)
    assert reason is not None
    assert word in reason
