"""Frames between bitmapd and its wiring helper (pure).

A stream socket pair carries one request at a time and its answer.  A frame is

    offset  size  field
    0       4     length of the header, big-endian
    4       4     length of the payload, big-endian
    8       …     header: one JSON object, UTF-8
    …       …     payload: raw bytes; runs of blocks are pairs of little-endian u64 (first, stop)

A request is {"id": int, "verb": str, …}, an answer {"id": int, "ok": true, …} or
{"id": int, "error": {"code": str, "message": str}}.  `code` is an errno name (EBUSY) or a word.
File descriptors ride with SCM_RIGHTS on the first byte of the request that names them.

1. Both ends are of one release and of one user, but a helper may die in mid-frame: a stream that
   ends inside a frame is told from one that ends between two.
2. A frame beyond the bounds or of the wrong shape raises `FrameError`; the stream is of no use
   afterwards, and the caller ends the helper.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_HEADER_BYTES = 16 << 20
MAX_PAYLOAD_BYTES = 1 << 30

PREFIX = struct.Struct(">II")
RUN = struct.Struct("<QQ")


class FrameError(ValueError):
    """The stream does not carry what this end understands."""


class HelperError(OSError):
    """The helper answered that a request failed; `code` is its word for the reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.strerror = message


@dataclass(frozen=True, slots=True)
class Frame:
    header: dict[str, Any]
    payload: bytes = b""

    @property
    def verb(self) -> str:
        return str(self.header.get("verb", ""))


def encode(header: dict[str, Any], payload: bytes | bytearray | memoryview = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise FrameError(f"a frame of {len(text)} and {len(payload)} bytes is too long")
    return PREFIX.pack(len(text), len(payload)) + text + payload


class FrameReader:
    """Cuts a byte stream into frames, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def inside_frame(self) -> bool:
        """Whether the stream would end in the middle of a frame if it ended now."""
        return bool(self._pending)

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """The frames that are now complete."""
        self._pending += data
        frames = []
        while len(self._pending) >= PREFIX.size:
            header_length, payload_length = PREFIX.unpack_from(self._pending)
            if header_length > MAX_HEADER_BYTES or payload_length > MAX_PAYLOAD_BYTES:
                raise FrameError(f"a frame of {header_length} and {payload_length} bytes")
            start = PREFIX.size + header_length
            stop = start + payload_length
            if len(self._pending) < stop:
                break
            frames.append(
                Frame(
                    _header(bytes(self._pending[PREFIX.size : start])),
                    bytes(self._pending[start:stop]),
                )
            )
            del self._pending[:stop]
        return frames


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"a header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise FrameError("a header is not a JSON object")
    return header


def result(request_id: int, **fields: Any) -> dict[str, Any]:
    return {"id": request_id, "ok": True, **fields}


def failure(request_id: int, code: str, message: str) -> dict[str, Any]:
    return {"id": request_id, "error": {"code": code, "message": message}}


def check_answer(frame: Frame, request_id: int) -> Frame:
    """The frame itself if it is a success; HelperError or FrameError otherwise."""
    header = frame.header
    if header.get("id") != request_id:
        raise FrameError(f"answer {header.get('id')!r} to request {request_id}")
    if header.get("ok") is True:
        return frame
    error = header.get("error")
    if not isinstance(error, dict):
        raise FrameError("an answer is neither a success nor an error")
    raise HelperError(str(error.get("code", "failed")), str(error.get("message", "no reason")))


def pack_runs(runs: Iterable[tuple[int, int]]) -> bytes:
    return b"".join(RUN.pack(first, stop) for first, stop in runs)


def unpack_runs(payload: bytes) -> list[tuple[int, int]]:
    """Runs [first, stop) of a payload; FrameError unless they are whole and ascend."""
    if len(payload) % RUN.size:
        raise FrameError(f"runs of {len(payload)} bytes")
    runs = list(RUN.iter_unpack(payload))
    end = 0
    for first, stop in runs:
        if not end <= first < stop:
            raise FrameError(f"run {first}..{stop} after {end}")
        end = stop
    return runs
