"""HELLOs to begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bitmapd.partner.greeting import OFFERED, REQUIRED
from bitmapd.partner.messages import Hello, HelloFlag, Role

NIL = bytes(16)
VOLUME = b"v" * 16


def generations(text: str) -> tuple[bytes, ...]:
    """One per letter, current first."""
    return (*(letter.encode() * 16 for letter in text), *(NIL,) * (4 - len(text)))


def hello(node: int, /, **more: Any) -> Hello:
    return replace(
        Hello(
            volume=VOLUME, node=node, lowest=1, highest=1, role=Role.PAIR, flags=HelloFlag(0),
            required=REQUIRED, offered=OFFERED, term=3, incarnation=node * 100, session=1,
            boot=b"b" * 16, generations=generations("a"), size_bytes=65536, extent_bytes=8192,
            block_bytes=4096, last_paired=0, machine=bytes([node]) * 16, timeout_ms=2000,
            most_requests=64, name="vol0", primary="p", secondary="s", program="test",
        ),
        **more,
    )  # fmt: skip
