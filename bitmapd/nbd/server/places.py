"""Who gets a place at the export, and whose turn it is at work that costs much (pure).

Clients that have not been let in hold places which others need, and they cost nothing to make.  So
an account is kept for each origin: an address, the user of a unix socket.

1. Whoever was let in keeps its place.  So does a client whose certificate was verified, as long as
   it is there: only one that has hung up while it waited at the door gives its place away.
2. Of the others, the origin that holds most places, the newcomer's included, gives one up: of its
   clients at the stage where most of them are, the oldest.  An origin that floods thus takes places
   from itself, and its other clients pass the stage at which the flood stays.
3. `Turns` serves accounts in rotation, so a flood of one origin delays another one by a single
   turn, and of each account the one that asked last.  Where more ask than can be served, the oldest
   are about to lose their places by rule 2: served in the order of asking, each would be served too
   late.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import IntEnum, auto
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

# A host of IPv6 commonly has a network of this size to itself.
_IPV6_NETWORK_BITS = 64


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end; `origin` is the account that its places are on."""

    name: str
    origin: str
    is_remote: bool = False
    is_trusted: bool = False


class Standing(IntEnum):
    """How far a client has come."""

    GONE = auto()  # has hung up, and is not read, so that it did not end yet
    SILENT = auto()
    TALKING = auto()
    SECURING = auto()  # TLS is under way
    VERIFIED = auto()
    LET_IN = auto()


T = TypeVar("T")


def gives_way(guests: Iterable[tuple[T, str, Standing]], newcomer: str) -> T | None:
    """Whose place a newcomer of this origin gets; None: the newcomer has to go.

    `guests`: client, origin, standing; the oldest first."""
    poor: list[tuple[T, str, Standing]] = []
    for client, origin, standing in guests:
        if standing is Standing.GONE:
            return client
        if standing < Standing.VERIFIED:
            poor.append((client, origin, standing))
    if not poor:
        return None
    held = Counter(origin for _, origin, _ in poor)
    held[newcomer] += 1
    most = max(held[origin] for _, origin, _ in poor)
    poor = [guest for guest in poor if held[guest[1]] == most]
    stages = Counter(guest[1:] for guest in poor)
    stages[newcomer, Standing.SILENT] += 1
    # `max` returns the first of equals, which is the oldest.
    return max(poor, key=lambda guest: stages[guest[1:]])[0]


def origin_of_address(host: str) -> str:
    """An address as an account: IPv6 by its network, IPv4 as itself, however it is written."""
    address = ip_address(host.partition("%")[0])
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    network = int(address) >> (128 - _IPV6_NETWORK_BITS) << (128 - _IPV6_NETWORK_BITS)
    return f"{IPv6Address(network)}/{_IPV6_NETWORK_BITS}"


class Turns(Generic[T]):
    """What waits for its turn, by account: whatever an origin has a share of its own for."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, list[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, account: Hashable, item: T) -> None:
        self._waiting.setdefault(account, []).append(item)

    def remove(self, account: Hashable, item: T) -> bool:
        """False if it does not wait (any more)."""
        items = self._waiting.get(account)
        if items is None or item not in items:
            return False
        items.remove(item)
        if not items:
            del self._waiting[account]
        return True

    def next(self) -> T:
        """Of the account that was served longest ago, what came last; there must be something."""
        account, items = self._waiting.popitem(last=False)
        item = items.pop()
        if items:
            self._waiting[account] = items
        return item
