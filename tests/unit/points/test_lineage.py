"""Which of two ends has the right data (cycles of generations, terms, points)."""

from __future__ import annotations

import dataclasses

import pytest

from bitmapd.points.lineage import LENGTH, Generations, Verdict, descend, judge
from bitmapd.points.messages import NIL, Hello2, Role
from tests.data.make_points_golden import MESSAGES

GREETING = MESSAGES["hello2"]
A, B, C = (bytes([number]) * 16 for number in (1, 2, 3))


def line(*generations: bytes) -> Generations:
    return (*generations, *(NIL,) * (LENGTH - len(generations)))


def hello(
    generations: Generations, committed: int = 5, role: Role = Role.RECEIVER, term: int = 3
) -> Hello2:
    assert isinstance(GREETING, Hello2)
    return dataclasses.replace(
        GREETING, generations=generations, committed=committed, role=role, term=term
    )


@pytest.mark.parametrize(
    ("ours", "receiver", "verdict"),
    [
        (line(A), hello(line(A)), Verdict.GO_ON),
        (line(A), hello(line(A), committed=6), Verdict.GO_ON),
        (line(A), hello(line(A), committed=4), Verdict.WENT_BACK),
        (line(A), hello(line(A), role=Role.DEMOTED), Verdict.GO_ON),
        (line(A), hello(line(A), role=Role.PROMOTED), Verdict.BOTH_SERVE),
        (line(A), hello(line(A), term=4), Verdict.SENDER_IS_OLD),
        (line(A), hello(line(A), term=2), Verdict.GO_ON),
        (line(A), hello(line(B, A)), Verdict.SENDER_IS_OLD),
        (line(A), hello(line(B, A), role=Role.PROMOTED), Verdict.SENDER_IS_OLD),
        (line(B, A), hello(line(A)), Verdict.RECEIVER_IS_OLD),
        (line(B, A), hello(line(C, A)), Verdict.SPLIT_BRAIN),
        (line(A), hello(line(B)), Verdict.SPLIT_BRAIN),
        (line(A), hello(line(NIL), committed=0), Verdict.WENT_BACK),
    ],
)
def test_generations_say_who_is_right(
    ours: Generations, receiver: Hello2, verdict: Verdict
) -> None:
    assert judge(hello(ours, role=Role.SENDER), receiver) is verdict


def test_a_receiver_without_data_is_followed_by_who_never_had_one() -> None:
    sender = hello(line(A), committed=0, role=Role.SENDER)
    assert judge(sender, hello(line(NIL), committed=0)) is Verdict.NEW_RECEIVER


def test_nil_is_no_generation_that_two_have_in_common() -> None:
    assert judge(hello(line(A, NIL)), hello(line(B, NIL))) is Verdict.SPLIT_BRAIN


def test_a_step_remembers_those_before() -> None:
    generations = line(A)
    for number in range(2, 8):
        generations = descend(generations, bytes([number]) * 16)
    assert [generation[0] for generation in generations] == [7, 6, 5, 4]
