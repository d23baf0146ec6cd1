"""copier/throttle: rate, measured speed, waiting times."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.copier.throttle import Backoff, SpeedMeter, Throttle

MIB = 1 << 20


def test_no_limit_never_delays() -> None:
    throttle = Throttle(None)
    for _ in range(100):
        assert throttle.delay_s(0.0, MIB) == 0.0
        throttle.take(0.0, MIB)
    assert throttle.rate_bytes_per_s is None


def test_burst_then_rate() -> None:
    throttle = Throttle(1000, burst_bytes=500)
    assert throttle.delay_s(5.0, 500) == 0.0
    throttle.take(5.0, 500)
    assert throttle.delay_s(5.0, 200) == pytest.approx(0.2)
    assert throttle.delay_s(5.1, 200) == pytest.approx(0.1)
    assert throttle.delay_s(5.2, 200) == 0.0


def test_request_larger_than_the_bucket_leaves_a_debt() -> None:
    throttle = Throttle(1000, burst_bytes=100)
    assert throttle.delay_s(0.0, 1000) == 0.0
    throttle.take(0.0, 1000)
    # 900 owed and 100 to fill the bucket again.
    assert throttle.delay_s(0.0, 1000) == pytest.approx(1.0)


def test_debt_is_never_more_than_one_request() -> None:
    throttle = Throttle(1000, burst_bytes=100)
    for _ in range(50):
        throttle.take(0.0, 1000)
    assert throttle.delay_s(0.0, 1) <= 1.001


def test_idle_time_earns_no_more_than_the_bucket() -> None:
    throttle = Throttle(1000, burst_bytes=100)
    throttle.take(0.0, 100)
    throttle.take(1000.0, 100)
    assert throttle.delay_s(1000.0, 100) == pytest.approx(0.1)


def test_less_than_a_byte_is_no_reason_to_wait() -> None:
    throttle = Throttle(3, burst_bytes=100)
    throttle.take(0.0, 100)
    assert throttle.delay_s(33.1, 100) == 0.0


def test_time_that_stands_still_or_goes_back_earns_nothing() -> None:
    throttle = Throttle(1000, burst_bytes=100)
    throttle.take(10.0, 100)
    assert throttle.delay_s(9.0, 100) == pytest.approx(0.1)
    assert throttle.delay_s(10.05, 100) == pytest.approx(0.05)


def test_rate_changes_at_run_time() -> None:
    throttle = Throttle(1000, burst_bytes=100)
    throttle.take(0.0, 100)
    throttle.set_rate(10)
    assert throttle.rate_bytes_per_s == 10
    assert throttle.delay_s(0.0, 100) == pytest.approx(10.0)
    throttle.set_rate(None)
    assert throttle.delay_s(0.0, 100) == 0.0
    throttle.take(0.0, 5000)
    throttle.set_rate(1000)
    assert throttle.delay_s(0.0, 100) == 0.0


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
def test_senseless_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        Throttle(rate)
    throttle = Throttle(1000)
    with pytest.raises(ValueError, match="rate"):
        throttle.set_rate(rate)
    assert throttle.rate_bytes_per_s == 1000


def test_empty_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="burst"):
        Throttle(1000, burst_bytes=0)


@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 5000)), min_size=1, max_size=60),
    st.integers(100, 10000),
    st.integers(1, 3000),
)
def test_mean_rate_holds_for_a_caller_that_waits(
    requests: list[tuple[float, int]], rate: int, burst: int
) -> None:
    throttle = Throttle(rate, burst_bytes=burst)
    now = total = 0.0
    for pause_s, length in requests:
        now += pause_s
        now += throttle.delay_s(now, length)
        assert throttle.delay_s(now, length) == 0.0
        throttle.take(now, length)
        # Up to a bucket and the request that was just let through, and a byte each of rounding.
        total += length
        assert total <= rate * now + burst + length + len(requests)


def test_speed_is_unknown_until_measured() -> None:
    meter = SpeedMeter()
    assert meter.bytes_per_s is None
    assert meter.eta_s(100) is None
    assert meter.eta_s(0) == 0.0
    meter.add(1.0, 100)
    assert meter.bytes_per_s is None


def test_speed_of_a_steady_stream() -> None:
    meter = SpeedMeter()
    for tick in range(100):
        meter.add(tick * 0.1, 50)
    assert meter.bytes_per_s == pytest.approx(500)
    assert meter.eta_s(1000) == pytest.approx(2.0)


def test_pauses_do_not_count_as_slowness() -> None:
    meter = SpeedMeter()
    for burst in range(5):
        for tick in range(5):
            meter.add(burst * 60 + tick * 0.1, 50)
    assert meter.bytes_per_s == pytest.approx(500)


def test_slow_copies_count_when_their_begin_is_told() -> None:
    meter = SpeedMeter()
    meter.begin(100.0)
    meter.add(104.0, 400)
    meter.add(108.0, 400)
    meter.begin(500.0)
    meter.add(504.0, 400)
    assert meter.bytes_per_s == pytest.approx(100)


def test_speed_follows_a_change() -> None:
    meter = SpeedMeter(half_life_s=1.0)
    meter.begin(0.0)
    for tick in range(1, 101):
        meter.add(tick * 0.1, 100 if tick <= 50 else 10)
    speed = meter.bytes_per_s
    assert speed is not None
    assert 100 < speed < 150


def test_copies_that_end_together_have_a_speed_only_with_time() -> None:
    meter = SpeedMeter()
    meter.begin(1.0)
    meter.add(1.0, 100)
    assert meter.bytes_per_s is None
    meter.add(1.5, 100)
    assert meter.bytes_per_s == pytest.approx(400, rel=0.1)


def test_waits_double_up_to_the_limit() -> None:
    backoff = Backoff(1.0, 5.0, jitter=lambda: 0.0)
    assert [backoff.next_s() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.next_s() == 1.0


def test_jitter_shortens_by_up_to_half() -> None:
    backoff = Backoff(1.0, 5.0, jitter=lambda: 0.5)
    assert [backoff.next_s() for _ in range(3)] == [0.75, 1.5, 3.0]


def test_waits_differ_by_default() -> None:
    waits = {Backoff(8.0, 8.0).next_s() for _ in range(20)}
    assert len(waits) > 1
    assert all(4.0 <= wait <= 8.0 for wait in waits)


@pytest.mark.parametrize(("first", "limit"), [(0, 1), (-1, 1), (2, 1)])
def test_senseless_waits_are_refused(first: float, limit: float) -> None:
    with pytest.raises(ValueError, match="wait"):
        Backoff(first, limit)
