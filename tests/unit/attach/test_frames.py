"""Frames between bitmapd and its wiring helper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitmapd.attach.helper_frames import (
    MAX_HEADER_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    Frame,
    FrameError,
    FrameReader,
    HelperError,
    check_answer,
    encode,
    failure,
    pack_runs,
    result,
    unpack_runs,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
frames = st.lists(
    st.tuples(st.dictionaries(st.text(max_size=8), json_values, max_size=4), st.binary()),
    max_size=5,
)


@given(frames, st.lists(st.integers(1, 40), min_size=1))
def test_any_chunking_gives_the_frames_back(
    sent: list[tuple[dict[str, object], bytes]], cuts: list[int]
) -> None:
    stream = b"".join(encode(header, payload) for header, payload in sent)
    reader, received, position, turn = FrameReader(), [], 0, 0
    while position < len(stream):
        length = cuts[turn % len(cuts)]
        received += reader.feed(stream[position : position + length])
        position, turn = position + length, turn + 1
    assert [(frame.header, frame.payload) for frame in received] == sent
    assert not reader.inside_frame


def test_a_stream_that_ends_inside_a_frame_is_noticed() -> None:
    reader = FrameReader()
    assert reader.feed(encode({"id": 1}, b"abc")[:-1]) == []
    assert reader.inside_frame


@pytest.mark.parametrize(
    "prefix", [PREFIX.pack(MAX_HEADER_BYTES + 1, 0), PREFIX.pack(2, MAX_PAYLOAD_BYTES + 1)]
)
def test_too_long_frames_are_refused_by_the_receiver(prefix: bytes) -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(prefix)


def test_a_too_long_header_is_refused_by_the_sender() -> None:
    with pytest.raises(FrameError):
        encode({"text": "x" * MAX_HEADER_BYTES})


@pytest.mark.parametrize("text", [b"{", b"[]", b"\xff"])
def test_headers_that_are_no_objects_are_refused(text: bytes) -> None:
    with pytest.raises(FrameError):
        FrameReader().feed(PREFIX.pack(len(text), 0) + text)


def test_answers() -> None:
    frame = Frame(result(7, index=3), b"x")
    assert check_answer(frame, 7) is frame
    with pytest.raises(HelperError, match="is open") as caught:
        check_answer(Frame(failure(7, "EBUSY", "is open")), 7)
    assert caught.value.code == "EBUSY"
    for header in (result(6), {"id": 7}, {"id": 7, "ok": 1}):
        with pytest.raises(FrameError):
            check_answer(Frame(header), 7)
    assert Frame({"verb": "stat"}).verb == "stat"


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 100))))
def test_runs(steps: list[tuple[int, int]]) -> None:
    runs, end = [], 0
    for gap, length in steps:
        runs.append((end + gap, end + gap + length))
        end = runs[-1][1]
    assert unpack_runs(pack_runs(runs)) == runs


@pytest.mark.parametrize("payload", [b"x", pack_runs([(3, 3)]), pack_runs([(4, 6), (5, 7)])])
def test_runs_that_are_none(payload: bytes) -> None:
    with pytest.raises(FrameError):
        unpack_runs(payload)
