"""nbd.server.places: who makes room for a newcomer, and whose turn it is."""

from __future__ import annotations

import itertools
import random

import pytest

from bitmapd.nbd.server.places import Standing, Turns, gives_way, origin_of_address

SILENT, TALKING, SECURING = Standing.SILENT, Standing.TALKING, Standing.SECURING
VERIFIED, LET_IN, GONE = Standing.VERIFIED, Standing.LET_IN, Standing.GONE


def guests(*lines: tuple[str, Standing]) -> list[tuple[int, str, Standing]]:
    """Numbered, the oldest first."""
    return [(number, origin, standing) for number, (origin, standing) in enumerate(lines)]


@pytest.mark.parametrize(
    ("present", "newcomer", "leaves"),
    [
        # 1: who was let in or verified keeps its place
        ([("a", LET_IN), ("a", VERIFIED)], "a", None),
        ([("a", LET_IN), ("a", VERIFIED)], "b", None),
        ([("a", VERIFIED), ("b", SILENT)], "a", 1),
        ([("a", VERIFIED), ("a", GONE), ("a", SILENT)], "b", 1),
        ([("a", SILENT), ("b", GONE)], "a", 1),
        # 2: the origin with most places, the newcomer's included
        ([("b", SILENT), ("a", SECURING), ("a", SECURING)], "c", 1),
        ([("b", SILENT), ("a", SECURING)], "a", 1),
        ([("a", SILENT), ("b", SILENT)], "c", 0),
        # what was verified is on nobody's account
        ([("a", VERIFIED), ("a", VERIFIED), ("a", SECURING), ("b", TALKING)], "b", 3),
        # of its clients at the stage where most are, the oldest; the newcomer is silent
        ([("a", TALKING), ("a", SECURING), ("a", SILENT), ("a", SILENT)], "a", 2),
        ([("a", SILENT), ("a", SECURING), ("a", SECURING), ("a", SECURING)], "a", 1),
        ([("a", SECURING), ("a", TALKING), ("a", TALKING)], "b", 1),
        ([("a", SECURING), ("a", SILENT)], "a", 1),
        ([("a", SECURING), ("a", SECURING)], "a", 0),
    ],
)
def test_who_gives_way(
    present: list[tuple[str, Standing]], newcomer: str, leaves: int | None
) -> None:
    assert gives_way(guests(*present), newcomer) == leaves


def test_a_flood_takes_places_from_its_own_origin_only() -> None:
    places = guests(("victim", SILENT), *[("flood", SILENT)] * 63)
    for number in range(64, 1000):
        leaving = gives_way(places, "flood")
        places = [guest for guest in places if guest[0] != leaving]
        places.append((number, "flood", SECURING))
    assert places[0] == (0, "victim", SILENT)
    assert len(places) == 64


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::2", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
    ],
)
def test_origin_of_an_address(address: str, origin: str) -> None:
    assert origin_of_address(address) == origin


def test_turns_go_round_the_origins() -> None:
    turns: Turns[int] = Turns()
    assert not turns
    for number in range(5):
        turns.add("flood", number)
    turns.add("victim", 100)
    turns.add("other", 200)
    assert turns.next() == 4
    turns.add("victim", 101)
    assert [turns.next() for _ in range(6)] == [101, 200, 3, 100, 2, 1]
    assert turns
    assert turns.next() == 0
    assert not turns


def test_what_waits_can_be_taken_back() -> None:
    turns: Turns[int] = Turns()
    turns.add("a", 1)
    turns.add("a", 2)
    assert turns.remove("a", 1)
    assert not turns.remove("a", 1)
    assert not turns.remove("b", 2)
    assert turns.remove("a", 2)
    assert not turns
    assert not turns.remove("a", 2)


def test_nobody_waits_longer_than_one_round() -> None:
    chance = random.Random(1)
    turns: Turns[tuple[str, int]] = Turns()
    asked: dict[str, int] = {}
    served_since: dict[str, int] = {}
    for number in range(2000):
        origin = chance.choice("aaaaaaaaab")
        turns.add(origin, (origin, number))
        asked[origin] = asked.get(origin, 0) + 1
        if chance.random() < 0.4:
            served, _ = turns.next()
            asked[served] -= 1
            served_since[served] = 0
            for other, waiting in asked.items():
                if other != served and waiting:
                    served_since[other] = served_since.get(other, 0) + 1
                    assert served_since[other] <= 2


@pytest.mark.parametrize("overload", [1.2, 2.0, 4.0])
def test_a_newcomer_passes_a_flood_of_its_own_origin_that_asks_for_more_than_can_be_served(
    overload: float,
) -> None:
    """One step takes one unit of time; the flood's clients answer nothing, the newcomer answers
    two units after its first step, and begins anew when it loses its place."""
    places, newcomers = 64, 30
    chance = random.Random(7)
    turns: Turns[tuple[object, int]] = Turns()  # (account, client)
    guests: dict[int, Standing] = {}
    waiting: dict[int, object] = {}  # client: the account it waits on
    numbers = itertools.count()
    newcomer, answers_at, attempts, entered = -1, -1.0, 0, 0
    time, next_arrival, next_turn = 0.0, 0.0, 0.5

    def come() -> int:
        if len(guests) >= places:
            leaving = gives_way([(one, "a", stage) for one, stage in guests.items()], "a")
            assert leaving is not None
            del guests[leaving]
            if (account := waiting.pop(leaving, None)) is not None:
                assert turns.remove(account, (account, leaving))
        number = next(numbers)
        guests[number] = SECURING
        ask(number, "first")
        return number

    def ask(number: int, account: str) -> None:
        waiting[number] = account
        turns.add(account, (account, number))

    while entered < newcomers:
        assert attempts < 2 * overload * newcomers
        if time > 5 * places / overload and newcomer not in guests and chance.random() < 0.1:
            newcomer, answers_at, attempts = come(), -1.0, attempts + 1
        if 0 <= answers_at <= time and newcomer in guests:
            ask(newcomer, "second")
            answers_at = -1.0
        time = min(next_arrival, next_turn)
        if time == next_arrival:
            come()
            next_arrival += chance.expovariate(overload)
        elif time == next_turn:
            next_turn += 1.0
            if turns:
                account, number = turns.next()
                del waiting[number]
                if number == newcomer and account == "first":
                    answers_at = time + 2.0
                elif number == newcomer:
                    entered += 1
                    del guests[newcomer]
                    newcomer = -1
