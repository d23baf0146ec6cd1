"""Sizes, durations and rates: what is accepted, what is refused with which hint, round trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.errors import UsageError
from bitmapd.units import (
    MAX_DURATION_S,
    MAX_SIZE_BYTES,
    format_duration,
    format_rate,
    format_size,
    human_duration,
    human_size,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7B", 7),
        ("64KiB", 65536),
        ("1 MiB", 1 << 20),
        (" 3GiB ", 3 << 30),
        ("2TiB", 2 << 40),
        ("64k", 65536),
        ("1m", 1 << 20),
        ("1M", 1 << 20),
        ("5g", 5 << 30),
        ("1t", 1 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("1kB", "1KiB for 1024 bytes"),
        ("3MB", "3MiB for 3145728 bytes"),
        ("1GB", "1GiB"),
        ("1tb", "1TiB"),
        ("1.5GiB", "whole number"),
        ("-1", "whole number"),
        ("", "whole number"),
        ("GiB", "whole number"),
        ("1XiB", "KiB"),
        ("1kib2", "whole number"),
        ("\u0661MiB", "whole number"),
    ],
)
def test_refused_sizes_say_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert hint in str(caught.value.hint)
    assert repr(text) in caught.value.message


def test_a_size_beyond_the_limit_is_refused() -> None:
    assert parse_size(str(MAX_SIZE_BYTES)) == MAX_SIZE_BYTES
    with pytest.raises(UsageError, match="larger than"):
        parse_size("99999999TiB")


@given(st.integers(0, MAX_SIZE_BYTES))
def test_size_round_trip(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(0, 1000), st.sampled_from([1 << 10, 1 << 20, 1 << 30, 1 << 40]))
def test_whole_units_are_written_short(number: int, factor: int) -> None:
    text = format_size(number * factor)
    assert parse_size(text) == number * factor
    assert len(text) <= 7


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [("250ms", 0.25), ("5s", 5.0), ("2min", 120.0), ("1h", 3600.0), ("0s", 0.0), ("1 s", 1.0)],
)
def test_durations(text: str, duration_s: float) -> None:
    assert parse_duration(text) == duration_s


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("5", "unit is missing"),
        ("5m", "unknown unit m"),
        ("1.5s", "not a duration"),
        ("-5s", "not a duration"),
        ("", "not a duration"),
        ("1S", "unknown unit S"),
    ],
)
def test_refused_durations(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        parse_duration(text)
    assert "250ms" in str(caught.value.hint)


def test_a_duration_beyond_the_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="ten years"):
        parse_duration("99999999h")


@given(st.integers(0, MAX_DURATION_S * 1000))
def test_duration_round_trip(milliseconds: int) -> None:
    duration_s = milliseconds / 1000
    assert parse_duration(format_duration(duration_s)) == duration_s


def test_rates() -> None:
    assert parse_rate("10MiB/s") == 10 << 20
    assert parse_rate("10MiB") == 10 << 20
    with pytest.raises(UsageError, match="zero") as caught:
        parse_rate("0", "pause it")
    assert caught.value.hint == "pause it"
    with pytest.raises(UsageError):
        parse_rate("1MB/s")


@given(st.integers(1, MAX_SIZE_BYTES))
def test_rate_round_trip(rate_bytes_per_s: int) -> None:
    assert parse_rate(format_rate(rate_bytes_per_s)) == rate_bytes_per_s


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (200 << 10, "200 KiB"),
        (3 << 30, "3.0 GiB"),
        (1500 << 40, "1500.0 TiB"),
    ],
)
def test_human_sizes(size_bytes: int, text: str) -> None:
    assert human_size(size_bytes) == text


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [(0.26, "0.3 s"), (12.2, "12 s"), (59.6, "1:00 min"), (200, "3:20 min"), (7500, "2:05 h")],
)
def test_human_durations(duration_s: float, text: str) -> None:
    assert human_duration(duration_s) == text
