"""Sizes, durations and rates as people write them (pure).

A size is a whole number of bytes, a duration a float of seconds with a resolution of one
millisecond, a rate a whole number of bytes per second.

1. `parse_size(format_size(n)) == n` and `parse_duration(format_duration(d)) == d` for every value
   that parsing can give: what a program writes into a file, it reads back unchanged.
2. A unit that means two things to two people is refused with a hint, never guessed: `MB` (powers
   of 1000 or of 1024), `5m` (minutes or milliseconds), a bare `5` for a time.
3. `human_size` and `human_duration` round for tables and are never parsed.
"""

from __future__ import annotations

import re

from bitmapd.errors import UsageError

SIZE_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
MAX_SIZE_BYTES = (1 << 63) - 1

_SHORT_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL_UNITS = {"kb": "KiB", "mb": "MiB", "gb": "GiB", "tb": "TiB"}
_DURATION_UNITS_MS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
MAX_DURATION_S = 10 * 365 * 86_400
_WORD = re.compile(r"([0-9]{1,20})\s*([A-Za-z]*)", re.ASCII)
_SIZE_HINT = "write a whole number and one of B KiB MiB GiB TiB, such as 64KiB"
_DURATION_HINT = "write a whole number and one of ms s min h, such as 250ms or 5s"


def parse_size(text: str) -> int:
    """Bytes; a number without a unit is in bytes, k m g t are powers of 1024 in either case."""
    match = _WORD.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a size", hint=_SIZE_HINT)
    number, unit = int(match[1]), match[2]
    if unit.lower() in _DECIMAL_UNITS:
        good = _DECIMAL_UNITS[unit.lower()]
        raise UsageError(
            f"{text!r}: the unit {unit} is ambiguous",
            hint=f"write {number}{good} for {number * SIZE_UNITS[good]} bytes",
        )
    factor = SIZE_UNITS.get(unit, _SHORT_UNITS.get(unit.lower()))
    if factor is None:
        raise UsageError(f"{text!r}: unknown unit {unit}", hint=_SIZE_HINT)
    if number * factor > MAX_SIZE_BYTES:
        raise UsageError(f"{text!r} is larger than {MAX_SIZE_BYTES} bytes")
    return number * factor


def format_size(size_bytes: int) -> str:
    """Exact: the largest unit that divides the size."""
    for unit, factor in reversed(SIZE_UNITS.items()):
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return "0B"


def parse_duration(text: str) -> float:
    """Seconds; the unit is required."""
    match = _WORD.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is not a duration", hint=_DURATION_HINT)
    number, unit = int(match[1]), match[2]
    if unit not in _DURATION_UNITS_MS:
        reason = f"unknown unit {unit}" if unit else "the unit is missing"
        raise UsageError(f"{text!r}: {reason}", hint=_DURATION_HINT)
    milliseconds = number * _DURATION_UNITS_MS[unit]
    if milliseconds > MAX_DURATION_S * 1000:
        raise UsageError(f"{text!r} is longer than ten years")
    return milliseconds / 1000


def format_duration(duration_s: float) -> str:
    """Exact to the millisecond: the largest unit that divides the duration."""
    milliseconds = round(duration_s * 1000)
    for unit, factor in reversed(_DURATION_UNITS_MS.items()):
        if milliseconds and milliseconds % factor == 0:
            return f"{milliseconds // factor}{unit}"
    return "0s"


def parse_rate(text: str, instead_of_zero: str | None = None) -> int:
    """Bytes per second, written as a size with an optional `/s`; zero is refused, with a hint at
    what to do instead."""
    rate_bytes_per_s = parse_size(text.strip().removesuffix("/s"))
    if rate_bytes_per_s == 0:
        raise UsageError(f"{text!r}: a rate of zero copies nothing", hint=instead_of_zero)
    return rate_bytes_per_s


def format_rate(rate_bytes_per_s: int) -> str:
    return f"{format_size(rate_bytes_per_s)}/s"


def human_size(size_bytes: float) -> str:
    """Rounded to about three digits, for tables."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def human_duration(duration_s: float) -> str:
    """Rounded, for tables: `0.3 s`, `12 s`, `3:20 min`, `2:05 h`."""
    if duration_s < 10:
        return f"{duration_s:.1f} s"
    seconds = round(duration_s)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02} min"
    return f"{seconds // 3600}:{seconds // 60 % 60:02} h"
