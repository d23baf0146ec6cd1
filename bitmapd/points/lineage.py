"""Which of two ends has the right data: generations, terms, numbers of points (pure).

A *generation* is 16 random bytes that name a line of data.  Whoever is promoted begins a new one
and remembers the old ones: current first, up to three before it, padded with nil.  So two ends can
tell which of them has moved on, without a third.

1. A receiver that is not of the sender's generation, was promoted, or lacks a point that the sender
   knows to be committed is not followed: nothing is sent to it, and nothing is cleared on its word.
2. What still exists on a medium says nothing about lineage; only generations do.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, TypeVar

from bitmapd.points.messages import NIL, Hello2, Role

Generations = tuple[bytes, ...]
G = TypeVar("G")

LENGTH: Final = 4


class Verdict(Enum):
    """Of a sender and a receiver; what is said of one of them is said of both in one go."""

    GO_ON = "both have the same data, and one of them serves"
    NEW_RECEIVER = "the receiver has no data yet"
    SENDER_IS_OLD = "the receiver was promoted after the sender had the data"
    RECEIVER_IS_OLD = "the sender's data have moved on without the receiver"
    WENT_BACK = "the receiver lacks points that it once had"
    BOTH_SERVE = "both serve the same generation"
    SPLIT_BRAIN = "both have data that the other lacks"


FOLLOWED: Final = (Verdict.GO_ON, Verdict.NEW_RECEIVER)


def descend(generations: tuple[G, ...], new: G) -> tuple[G, ...]:
    """The generations after a step to a new one; the oldest is forgotten."""
    return (new, *generations)[:LENGTH]


def judge(sender: Hello2, receiver: Hello2) -> Verdict:
    """What both ends conclude from both greetings."""
    ours, theirs = sender.generations[0], receiver.generations[0]
    if theirs == NIL:
        return Verdict.NEW_RECEIVER if not sender.committed else Verdict.WENT_BACK
    if ours == theirs:
        if receiver.role is Role.PROMOTED:
            return Verdict.BOTH_SERVE
        if sender.term < receiver.term:
            return Verdict.SENDER_IS_OLD
        return Verdict.GO_ON if receiver.committed >= sender.committed else Verdict.WENT_BACK
    if ours in receiver.generations:
        return Verdict.SENDER_IS_OLD
    if theirs in sender.generations:
        return Verdict.RECEIVER_IS_OLD
    return Verdict.SPLIT_BRAIN
